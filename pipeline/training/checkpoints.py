"""Checkpoints: a TrainState as one safetensors file, written atomically and read back bit for bit.

Tensors stand under names ("network/...", "optimiser/..."), plain numbers as JSON in the file's metadata; nothing is
pickled.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.records import atomic_path
from pipeline.training.state import TrainState

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT_VERSION = 3

_NUMBERS = ("step", "total_steps", "recounts", "spent_s", "best_score", "best_step", "stale_validations")
# Of the epoch so far; a state with a bad step is never written.
_SUMS = ("loss", "gradient_norm", "norms")


def save_checkpoint(path: Path, state: TrainState, facts: dict[str, Any]) -> None:
    """Write the state atomically.

    Args:
        path: the file.
        state: what to write.
        facts: JSON-serialisable facts of the run that a resumed one must share, such as digests of configuration and
            data.
    """
    numbers = {name: getattr(state, name) for name in _NUMBERS}
    numbers["best_score"] = repr(state.best_score)  # minus infinity is no JSON
    numbers["recounts"] = list(state.recounts.items())  # nor are keys that are numbers
    tensors, optimiser_numbers = _optimiser_parts(state.optimiser)
    tensors |= {f"network/{name}": tensor for name, tensor in state.network.state_dict().items()}
    tensors |= {f"average/{i}": tensor for i, tensor in enumerate(state.average or [])}
    tensors |= {f"sums/{name}": getattr(state.sums, name) for name in _SUMS}
    metadata = {
        "format_version": CHECKPOINT_FORMAT_VERSION,
        "numbers": numbers,
        "optimiser": optimiser_numbers,
        "scaler": state.scaler.state_dict(),
        "facts": facts,
    }
    # Shared and strided tensors are written as plain copies; reading puts them back into the layout of the tensors that
    # are there.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"medseg": json.dumps(metadata)})


def load_checkpoint(path: Path, state: TrainState, facts: dict[str, Any]) -> None:
    """Put a checkpoint's values into a state that was built from the same configuration, whatever it has done since.

    Raises:
        TrainingError: the file is missing, damaged, of another format version, or of a run with other facts.
    """
    if not path.exists():
        raise TrainingError(f"{path}: no checkpoint to resume from; start without --resume")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["medseg"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: is damaged or no checkpoint ({error}); start without --resume") from error
    _refuse_other_run(path, metadata, facts)
    _fill(state.network.state_dict(), tensors, "network/")
    _fill({str(i): tensor for i, tensor in enumerate(state.average or [])}, tensors, "average/")
    _restore_optimiser(state.optimiser, tensors, metadata["optimiser"])
    if bool(metadata["scaler"]) != state.scaler.is_enabled():
        log.warning("%s: was written by a machine on which training.precision auto is another", path)
    if metadata["scaler"]:
        state.scaler.load_state_dict(metadata["scaler"])
    _fill({name: getattr(state.sums, name) for name in _SUMS}, tensors, "sums/")
    state.sums.bad_step.fill_(-1)
    for name in _NUMBERS:
        setattr(state, name, type(getattr(state, name))(metadata["numbers"][name]))


def _refuse_other_run(path: Path, metadata: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise where the checkpoint is of another format or another run."""
    version = metadata["format_version"]
    if version != CHECKPOINT_FORMAT_VERSION:
        raise TrainingError(
            f"{path}: checkpoint format {version}, this medseg reads {CHECKPOINT_FORMAT_VERSION}; finish the run with "
            "the medseg that began it, or start without --resume"
        )
    other = [key for key in facts if metadata["facts"].get(key) != facts[key]]
    if other:
        raise TrainingError(
            f"{path}: belongs to a run with another {', '.join(other)}; put back what was changed, or start without "
            "--resume"
        )


def _optimiser_parts(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into named tensors and plain numbers; its hyperparameters come from the
    configuration.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in optimiser.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser/{index}/{name}"] = value
            else:
                numbers[f"{index}/{name}"] = value
    return tensors, numbers


def _restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Put moments back, each in its parameter's own memory layout: fused steps walk both in step."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    optimiser.state.clear()
    for key, value in [*tensors.items(), *((f"optimiser/{name}", number) for name, number in numbers.items())]:
        kind, _, rest = key.partition("/")
        if kind != "optimiser":
            continue
        index, _, name = rest.partition("/")
        parameter = parameters[int(index)]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value = torch.empty_like(parameter).copy_(value)
        elif isinstance(value, Tensor):
            value = value.to(parameter.device)
        optimiser.state[parameter][name] = value


def _fill(targets: dict[str, Tensor], tensors: dict[str, Tensor], prefix: str) -> None:
    """Copy each named tensor into the one that is there."""
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[prefix + name])
