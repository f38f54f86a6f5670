"""`training.init_from`: a training begins with what fits of another model's weights, and says what that was."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.config import Task
from pipeline.errors import ConfigError
from pipeline.model import Model, load_model, model_digest
from pipeline.networks import Network
from pipeline.records import Record, write_json
from pipeline.training.state import TrainState, averaged_tensors

if TYPE_CHECKING:
    from pipeline.stages.fold_task import FoldTask
    from pipeline.tracking import RunLog

log = logging.getLogger(__name__)

REPORT = "init_from.json"

# What a network has in common with one that was trained for another task: in every U-Net and autoencoder it has this
# name.
ENCODER = "encoder."

# Names of tensors that a line of the log has room for.
NAMES_SHOWN = 4


class Initialisation(Record):
    """What a training took from another model.

    Attributes:
        model: its folder.
        name: of the experiment that trained it.
        task: what it was trained for; of another task than the training's own, only the encoder is compared.
        sha256: of its weights, description and plan.
        copied: parameters and buffers that both networks have in the same shape.
        other_shape: those that both have -> shape in the model, shape in the training's network.
        not_there: those that the model lacks.
        not_used: those of the model that the training's network lacks.
        parameters: numbers among the copied ones that are trained.
    """

    model: str
    name: str
    task: Task
    sha256: str
    copied: tuple[str, ...]
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    not_there: tuple[str, ...]
    not_used: tuple[str, ...]
    parameters: int

    def as_lines(self) -> list[str]:
        """Return what fitted, and what did not, a line each."""
        shapes = [f"{name} {there} instead of {here}" for name, (there, here) in self.other_shape.items()]
        compared = len(self.copied) + len(shapes) + len(self.not_there)
        return [
            f"{len(self.copied)} of {compared} tensors compared fit, {self.parameters} parameters, of {self.model}",
            *(
                f"{len(names)} {what}: {', '.join(names[:NAMES_SHOWN])}{', ...' if len(names) > NAMES_SHOWN else ''}"
                for what, names in (
                    ("have another shape there", shapes),
                    ("are not there", self.not_there),
                    ("of it are not here", self.not_used),
                )
                if names
            ),
        ]

    def record(self, folder: Path, tracked: RunLog) -> None:
        """Write the report into the run folder and to tracking."""
        write_json(folder / REPORT, self.model_dump(mode="json"))
        tracked.artifact(folder / REPORT)
        tracked.tags({"medseg.init_from": self.name, "medseg.init_from_sha256": self.sha256})
        tracked.params({"init_from": {"tensors": len(self.copied), "parameters": self.parameters}})


def initialise(task: FoldTask, state: TrainState) -> Initialisation | None:
    """Give a new training's network, and its running mean, what fits of the configured model.

    Between trainings of one task that is every parameter and buffer of the same name and shape; of a model of another
    task only those of the encoder, for what stands behind it was for something else.

    Returns:
        What was taken; None where the configuration names no model.

    Raises:
        ModelError: the model is missing or damaged.
        ConfigError: no parameter fits, or the model was trained on the cases held out here.
    """
    folder = task.initial_model
    if folder is None:
        return None
    model = load_model(folder, torch.device("cpu"))
    _refuse_seen_cases(task, folder, model)
    report = _compared(task.config.task, folder, model, state.network)
    if not report.parameters:
        lines = "; ".join(report.as_lines())
        raise ConfigError(f"training.init_from: nothing fits network {task.config.network.name}: {lines}")
    _copy(model.network.state_dict(), state.network.state_dict(), report.copied)
    if state.average is not None:
        torch._foreach_copy_(state.average, averaged_tensors(state.network))
    if list(model.plan.channels) != list(task.plan.channels):
        log.warning("its channels are %s, here %s", ", ".join(model.plan.channels), ", ".join(task.plan.channels))
    for line in report.as_lines():
        log.info("fold %d: training.init_from: %s", task.fold, line)
    return report


def _refuse_seen_cases(task: FoldTask, folder: Path, model: Model) -> None:
    """Raise where the model was trained on the cases that this training is validated on.

    Data sets are told by their name, for which of their cases took part may differ.
    """
    description = model.description
    if description.manifest_name == task.manifest.name and description.fold != task.fold:
        held_out = "no fold" if description.fold is None else f"fold {description.fold}"
        raise ConfigError(
            f"training.init_from: {folder} was trained on {description.manifest_name} with {held_out} held out, so it "
            f"has seen the validation cases of fold {task.fold}; train it with --fold {task.fold} too, and write "
            "{fold} for the fold in its path"
        )


def _compared(task: Task, folder: Path, model: Model, network: Network) -> Initialisation:
    """Compare a model's tensors with a network's, by name and shape."""
    prefix = "" if model.description.task == task else ENCODER
    there, here = (_shapes(net.state_dict(), prefix) for net in (model.network, network))
    copied = tuple(name for name, shape in here.items() if there.get(name) == shape)
    trained = dict(network.named_parameters())
    return Initialisation(
        model=str(folder),
        name=model.description.name,
        task=model.description.task,
        sha256=model_digest(folder),
        copied=copied,
        other_shape={name: (there[name], shape) for name, shape in here.items() if there.get(name, shape) != shape},
        not_there=tuple(name for name in here if name not in there),
        not_used=tuple(name for name in there if name not in here),
        parameters=sum(trained[name].numel() for name in copied if name in trained),
    )


def _shapes(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors whose names begin so."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(prefix)}


def _copy(there: Mapping[str, Tensor], here: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    """Copy tensors by name, each into the memory that the optimiser knows."""
    with torch.no_grad():
        for name in names:
            here[name].copy_(there[name])
