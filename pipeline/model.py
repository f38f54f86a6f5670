"""A trained model on disk: a folder that needs nothing else.

MODEL/weights.safetensors   the network's weights
      model.yaml            what the network is, how whole volumes are predicted, where it came from
      plan.yaml             how an image is treated before the network sees it; labels and their values
      fingerprint.json      what the training cases were like
      config.yaml           the configuration it was trained with, as text
      calibration.json      what its validation cases taught about its confidence; where there were none, it is missing
      postprocessing.json   rules that `medseg find-best` chose on out-of-fold predictions; before that, it is missing
      MODEL_CARD.md         for people: data, scores, what it is for; data.json beside it is of its data set
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights

from pipeline.config import InferenceSection, NetworkSection, Output, Task
from pipeline.data.plan import Fingerprint, Plan, read_plan, write_plan
from pipeline.errors import ConfigError, ModelError
from pipeline.hardware import Precision
from pipeline.networks import Network
from pipeline.networks.fitting import network_for, outputs_of
from pipeline.records import Record, atomic_folder, digest_of, file_digest, refuse_other_format, write_json

MODEL_FORMAT_VERSION = 1

WEIGHTS, DESCRIPTION, PLAN, FINGERPRINT, CONFIG = FILES = (
    "weights.safetensors",
    "model.yaml",
    "plan.yaml",
    "fingerprint.json",
    "config.yaml",
)

# What the members of an ensemble have in common: all of the plan but what only training, readers and each
# member's own network go by.
_SHARED_PLAN = tuple(sorted(set(Plan.model_fields) - {"batch_size", "ignore_label", "network", "reasons"}))


class ModelDescription(Record):
    """What a model is and where it came from.

    Attributes:
        format_version: of the model folder's own format.
        name: of the experiment that trained it.
        task: segment; or denoise, whose network returns the image's channels, and serves only to begin a training with.
        network: its name in the NETWORKS table and its options.
        in_channels: channels of the image.
        num_classes: channels of what the network returns: a segmentation's classes, background included, or regions.
        output: softmax: a voxel has the label of the largest logit; regions: they may overlap, there is one for each
            label but the background, in their order, and a voxel has the label of the last whose logit is above 0.
        precision: in which the network was trained and computes: auto, fp32, bf16 or fp16.
        inference: how a whole volume is predicted.
        manifest_name, manifest_digest: the data set it was trained on.
        fold: the fold it has not seen; None where it has seen all.
        step: optimiser steps it was trained for.
        scores: validation score by name, such as dice/anterior.
        versions: package -> version at training.
        created: date and time, ISO 8601.
    """

    format_version: int = MODEL_FORMAT_VERSION
    name: str
    task: Task = "segment"
    network: NetworkSection
    in_channels: int
    num_classes: int
    output: Output = "softmax"
    precision: Precision
    inference: InferenceSection
    manifest_name: str
    manifest_digest: str
    fold: int | None
    step: int
    scores: dict[str, float]
    versions: dict[str, str]
    created: str


@dataclass
class Model:
    """A trained model.

    Attributes:
        description: what it is and where it came from.
        network: in eval mode, once loaded.
        plan: how an image is treated before the network sees it.
        fingerprint: what the training cases were like.
        config_text: the YAML it was trained with.
    """

    description: ModelDescription
    network: Network
    plan: Plan
    fingerprint: Fingerprint
    config_text: str


def save_model(folder: Path, model: Model) -> None:
    """Write a model's folder, or replace it, as a whole."""
    with atomic_folder(folder) as temporary:
        save_weights(model.network, str(temporary / WEIGHTS))
        description = yaml.safe_dump(model.description.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (temporary / DESCRIPTION).write_text(description, encoding="utf-8")
        write_plan(temporary / PLAN, model.plan)
        write_json(temporary / FINGERPRINT, model.fingerprint.model_dump(mode="json"))
        (temporary / CONFIG).write_text(model.config_text, encoding="utf-8")


def load_model(folder: Path, device: torch.device) -> Model:
    """Read a model's folder and put its network, in eval mode, on a device.

    Raises:
        ModelError: a file is missing, damaged, of another format version, or does not fit the others; names it.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: not a whole model, {', '.join(missing)} is missing; copy the whole folder")
    description = read_description(folder / DESCRIPTION)
    try:
        plan = read_plan(folder / PLAN)
    except ConfigError as error:
        raise ModelError(str(error)) from error
    try:
        fingerprint = Fingerprint.model_validate_json((folder / FINGERPRINT).read_bytes())
    except ValidationError as error:
        raise _damaged(folder / FINGERPRINT, error) from None
    network = _build(folder, description, plan).to(device)
    _load_weights(network, folder / WEIGHTS, device)
    return Model(description, network.eval(), plan, fingerprint, (folder / CONFIG).read_text(encoding="utf-8"))


def model_digest(folder: Path) -> str:
    """Return a digest of all in a model's folder that its label maps depend on, but for rules chosen afterwards."""
    return digest_of({name: file_digest(folder / name) for name in (WEIGHTS, DESCRIPTION, PLAN)})


def weights_sha256(path: Path) -> str:
    """Return the SHA-256 hex digest of a file of weights: of its tensors' names, types, shapes and bytes.

    Not of the file: what else stands in its header may come in any order.
    """
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_description(path: Path) -> ModelDescription:
    """Read and check a model's model.yaml, without its weights.

    Raises:
        ModelError: it is damaged, or of another format version.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    refuse_other_format(ModelError, path, version, MODEL_FORMAT_VERSION, "train it anew with `medseg train`")
    try:
        return ModelDescription.model_validate(content)
    except ValidationError as error:
        raise _damaged(path, error) from None


def refuse_other_task(folder: Path, description: ModelDescription) -> None:
    """Raise where a model does not segment.

    Raises:
        ModelError: it was trained for another task.
    """
    if description.task != "segment":
        raise ModelError(
            f"{folder}: has learned to {description.task}, not to segment; a training begins with its weights by "
            "training.init_from"
        )


def refuse_other_member(first_folder: Path, first: Model, folder: Path, other: Model) -> None:
    """Raise where two models do not make an ensemble, whose members see the same windows of the same prepared image.

    Raises:
        ModelError: names what differs.
    """
    pairs = {
        **{f"plan.{name}": (getattr(first.plan, name), getattr(other.plan, name)) for name in _SHARED_PLAN},
        "output": (first.description.output, other.description.output),
        "inference": (first.description.inference, other.description.inference),
        "the network's windows": (_windows_of(first), _windows_of(other)),
    }
    # Labels in another order are other classes, which dictionaries do not tell.
    differing = [f"{name} ({mine} and {its})" for name, (mine, its) in pairs.items() if repr(mine) != repr(its)]
    if differing:
        raise ModelError(f"{first_folder} and {folder} make no ensemble: they differ in {'; '.join(differing)}")


def _windows_of(model: Model) -> str:
    """Say what decides where windows lie, and what the network reads for them."""
    network, window = model.network, model.plan.patch_size
    return f"inputs of {network.input_size(window)}, margins of {network.margin}, in steps of {network.stride}"


def _build(folder: Path, description: ModelDescription, plan: Plan) -> Network:
    """Build the network that a description and a plan speak of."""
    got = (description.in_channels, description.num_classes)
    channels, outputs = len(plan.channels), outputs_of(description.task, plan, description.output)
    if got != (channels, outputs):
        raise ModelError(
            f"{folder}: {DESCRIPTION} has {got[0]} channels and {got[1]} classes, {PLAN} {channels} and {outputs}; "
            "they are not of one model: copy the whole folder again"
        )
    try:
        network = network_for(plan, description.network, outputs)
        yields = network.output_size(network.input_size(plan.patch_size))
    except ValueError as error:
        raise ModelError(f"{folder / DESCRIPTION}: network: {error}") from error
    if yields != plan.patch_size:
        # Of another version, whose levels were others: weights can fit all the same.
        raise ModelError(
            f"{folder / PLAN}: patch_size: {plan.patch_size}, of which {description.network.name} makes {yields} in "
            "this version of medseg: its levels are others than it was trained with; train it anew"
        )
    return network


def _load_weights(network: Network, path: Path, device: torch.device) -> None:
    """Put the weights of a file into a network."""
    try:
        load_weights(network, path, device=str(device))
    except (SafetensorError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ModelError:
    """Return the error for a file that cannot be read."""
    what = str(error)
    if isinstance(error, ValidationError):
        what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return ModelError(f"{path}: is damaged or not of this model: {what}; copy the model's folder again")
