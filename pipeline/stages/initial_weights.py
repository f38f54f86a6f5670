"""Where `training.init_from` takes weights from: a medseg model, a MONAI bundle, or a file that holds a state dict.

Nothing that is read is run: a state dict is read as tensors alone (`weights_only`), and a bundle's configuration is not
looked at but for what its metadata calls its channels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config import Task
from pipeline.data.plan import Plan
from pipeline.errors import ModelError
from pipeline.model import load_model, model_digest
from pipeline.networks.transfer import Tensors
from pipeline.records import file_digest
from pipeline.stages.models import resolve_model

Kind = Literal["medseg", "bundle", "state dict"]

METADATA = Path("configs/metadata.json")
STATES = (Path("models/model.safetensors"), Path("models/model.pt"))
SUFFIXES = (".safetensors", ".pt", ".pth")

# Under which of its keys a checkpoint holds the network's weights.
_NESTED = ("state_dict", "model_state_dict", "network_weights", "model", "network", "net")
# Names that programs put before all names of a network when they wrap it.
_WRAPPERS = ("module", "model", "net", "network", "backbone", "_orig_mod")
# How many levels of a network's own names may stand before another's: `network.swinViT.` of a Swin UNETR.
_LEVELS = 2


@dataclass(frozen=True, eq=False)
class InitialWeights:
    """Weights to begin with, and what is known of them.

    Attributes:
        path: of the model, the bundle or the file.
        kind: what it is.
        name: of the experiment or the bundle.
        sha256: of a model's weights, description and plan; of the file with the state dict otherwise.
        tensors: name -> tensor.
        task: what they were trained for; None where that is not known.
        classes: what each output is for, in order; None where that is not known.
        channels: the image's, likewise.
        plan: how images were treated; None but of a medseg model.
        manifest_name: of the data set that they were trained on; None where that is not known.
        fold: the fold that was held out.
    """

    path: Path
    kind: Kind
    name: str
    sha256: str
    tensors: Tensors
    task: Task | None = None
    classes: tuple[str, ...] | None = None
    channels: tuple[str, ...] | None = None
    plan: Plan | None = None
    manifest_name: str | None = None
    fold: int | None = None


def find_initial(text: str, workspace: Path, uri: str | None = None) -> Path:
    """Return the folder or file that `training.init_from` names.

    Args:
        text: a file with a state dict, a MONAI bundle's folder, or a model as `resolve_model` takes it.
        workspace: where runs:/ and models:/ are looked up.
        uri: tracking server or database of these names.

    Raises:
        ModelError: there is no such thing.
    """
    path = Path(text)
    if (path.suffix in SUFFIXES and path.is_file()) or (path / METADATA).is_file():
        return path
    return resolve_model(text, workspace, uri)


def initial_digest(path: Path) -> str:
    """Return a digest of what a training would take from a model, a bundle or a file.

    Raises:
        ModelError: a bundle holds no state dict.
    """
    if path.is_file():
        return file_digest(path)
    return file_digest(_state_of(path)) if (path / METADATA).is_file() else model_digest(path)


def read_initial(path: Path) -> InitialWeights:
    """Read weights from a model, a bundle or a file.

    Raises:
        ModelError: it is damaged, holds no state dict, or one that cannot be read without running what is in it.
    """
    if path.is_file():
        return InitialWeights(path, "state dict", path.stem, file_digest(path), _read_state(path))
    return _of_bundle(path) if (path / METADATA).is_file() else _of_model(path)


def aligned(there: Tensors, here: Tensors) -> tuple[dict[str, Tensor], tuple[str, str]]:
    """Rename tensors as another network would call them, where one of the two is wrapped in something.

    Of all wrappers of names (`module.`) and all first levels of the other's own (`network.`), those are taken by which
    most numbers fall on a name of the same shape; where none is better, names stay as they are.

    Returns:
        The renamed tensors, and what their names began with and begin with now.
    """
    shapes = {name: tensor.shape for name, tensor in here.items()}

    def fitting(prefixes: tuple[str, str]) -> int:
        renamed = _renamed(there, *prefixes)
        return sum(tensor.numel() for name, tensor in renamed.items() if shapes.get(name) == tensor.shape)

    pairs = [(old, new) for old in _wrappers(there) for new in _first_levels(here)]
    best = max(pairs, key=fitting)  # the first of equal ones: as they are
    return _renamed(there, *best), best


def _of_model(folder: Path) -> InitialWeights:
    """Read a medseg model."""
    model = load_model(folder, torch.device("cpu"))
    description, plan = model.description, model.plan
    if description.task == "denoise":
        classes = tuple(plan.channels)
    else:
        classes = tuple(plan.regions if description.output == "regions" else plan.labels)
    return InitialWeights(
        path=folder,
        kind="medseg",
        name=description.name,
        sha256=model_digest(folder),
        tensors=model.network.state_dict(),
        task=description.task,
        classes=classes,
        channels=tuple(plan.channels),
        plan=plan,
        manifest_name=description.manifest_name,
        fold=description.fold,
    )


def _of_bundle(folder: Path) -> InitialWeights:
    """Read a MONAI bundle."""
    state = _state_of(folder)
    try:
        content = json.loads((folder / METADATA).read_bytes())
    except ValueError as error:
        raise ModelError(f"{folder / METADATA}: is no JSON: {error}") from error
    metadata: Mapping[str, Any] = content if isinstance(content, dict) else {}
    training = _part(metadata, "medseg")
    return InitialWeights(
        path=folder,
        kind="bundle",
        name=str(metadata.get("name") or folder.name),
        sha256=file_digest(state),
        tensors=_read_state(state),
        classes=_channel_names(metadata, "outputs", "pred"),
        channels=_channel_names(metadata, "inputs", "image"),
        manifest_name=training.get("manifest"),
        fold=training.get("fold"),
    )


def _channel_names(metadata: Mapping[str, Any], side: str, name: str) -> tuple[str, ...] | None:
    """Return what a bundle calls the channels of an input or output, in order."""
    names = _part(_part(_part(_part(metadata, "network_data_format"), side), name), "channel_def")
    if not names or not all(str(number).isdecimal() for number in names):
        return None
    return tuple(str(names[number]) for number in sorted(names, key=int))


def _part(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a mapping within a mapping; an empty one where there is none."""
    found = mapping.get(key)
    return found if isinstance(found, Mapping) else {}


def _state_of(bundle: Path) -> Path:
    """Return the file of a bundle's state dict."""
    found = next((bundle / name for name in STATES if (bundle / name).is_file()), None)
    if found is None:
        raise ModelError(f"{bundle}: a bundle without {' or '.join(map(str, STATES))}; its state dict is what is read")
    return found


def _read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a state dict."""
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a dozen kinds, by what is damaged or would have been run
        why = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path}: is no state dict that can be read as tensors alone ({why}); save one by "
            "torch.save(network.state_dict(), PATH) or safetensors"
        ) from error
    tensors = _tensors_in(content)
    if not tensors:
        raise ModelError(f"{path}: holds no state dict, neither at its top nor under {', '.join(_NESTED)}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; of a tensor that has several names, `save_model` keeps one, and the others beside it."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        kept: Mapping[str, str] = file.metadata() or {}
    return tensors | {name: tensors[own] for name, own in kept.items() if own in tensors}


def _tensors_in(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's network."""
    if not isinstance(content, Mapping):
        return {}
    for key in _NESTED:
        if isinstance(content.get(key), Mapping):
            return _tensors_in(content[key])
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _wrappers(names: Iterable[str]) -> list[str]:
    """Return what names may begin with that is not the network's own, nothing first."""
    found = dict.fromkeys([""])
    for name in names:
        prefix = ""
        for level in name.split(".")[:-1]:
            if level not in _WRAPPERS:
                break
            prefix += f"{level}."
            found[prefix] = None
    return list(found)


def _first_levels(names: Iterable[str]) -> list[str]:
    """Return the first levels of a network's names, nothing first."""
    found = dict.fromkeys([""])
    for name in names:
        levels = name.split(".")[:-1][:_LEVELS]
        found.update(dict.fromkeys("".join(f"{level}." for level in levels[: n + 1]) for n in range(len(levels))))
    return list(found)


def _renamed(tensors: Tensors, old: str, new: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `old`, beginning with `new`; the others as they are."""
    return {new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in tensors.items()}
