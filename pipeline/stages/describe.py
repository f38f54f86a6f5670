"""`medseg describe`: what a configuration's network is, before anything is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Plan, read_plan
from pipeline.errors import ConfigError, config_errors_of
from pipeline.networks.contract import NetworkTask
from pipeline.networks.description import Description, Layer, describe
from pipeline.networks.fitting import fitted_plan, network_for, network_task, outputs_of
from pipeline.stages.dataset import dataset_of
from pipeline.stages.networks import aligned
from pipeline.stages.settling import plan_path
from pipeline.stages.workspace import Workspace

# Patches a step where neither plan nor configuration says: nothing but the batch's memory depends on it.
BATCH_SIZE = 2

_COLUMNS = ("grid", "one for", "layers", "channels", "parameters", "multiply-adds")


@dataclass(frozen=True)
class Explanation:
    """A network and what it was built for.

    Attributes:
        name: in the NETWORKS table.
        source: where patch and spacing come from.
        batch_size: patches a step.
        task: what it was built for.
        description: what it is.
    """

    name: str
    source: str
    batch_size: int
    task: NetworkTask
    description: Description

    def as_json(self) -> dict[str, Any]:
        """Return all figures for machines."""
        figures = asdict(self.description)
        planned = self.task.planned and self.task.planned.model_dump(mode="json")
        return {
            "network": self.name,
            "plan": self.source,
            "batch_size": self.batch_size,
            **{key: figures.pop(key) for key in ("parameters", "multiply_adds")},
            "task": {**asdict(replace(self.task, planned=None)), "planned": planned},
            **figures,
        }

    def as_text(self) -> str:
        """Return the figures and a table of the levels for people."""
        figures = _figures(self)
        width = max(len(name) for name in figures)
        lines = [f"{name:{width}}  {value}" for name, value in figures.items()]
        return "\n".join([*lines, "", *aligned([_COLUMNS, *_levels(self)])])


def run(config: Config) -> Explanation:
    """Describe the network of a configuration for its plan.

    Raises:
        ConfigError: nothing is preprocessed and the configuration itself does not say patch and spacing, or the network
            does not fit.
        ManifestError: the manifest cannot be used.
    """
    manifest = dataset_of(config)
    plan, source = plan_of(config, manifest)
    outputs = outputs_of(config.task, plan, plan.output)
    with config_errors_of(f"network {config.network.name}"):
        plan = fitted_plan(plan, config.network, config.training.batch_size)
        task = network_task(plan, config.network, outputs)
        description = describe(network_for(plan, config.network, outputs), task)
    return Explanation(config.network.name, source, config.training.batch_size or plan.batch_size, task, description)


class UndecidedError(ConfigError):
    """Neither a plan nor the configuration says patch and spacing."""


def plan_of(config: Config, manifest: Manifest) -> tuple[Plan, str]:
    """Return the store's plan, else one of what the configuration says, and which it is.

    Raises:
        UndecidedError: nothing is preprocessed, and the configuration itself does not say patch and spacing.
        ConfigError: there are plans for several memories, and it does not say which.
    """
    folder = Workspace(config.workspace).store(config, manifest.name)
    path = plan_path(folder, config)
    if path.exists():
        return read_plan(path), f"the plan {path.relative_to(folder.parent)}"
    section = config.preprocessing
    if section.patch_size == "auto" or section.spacing_mm == "auto":
        raise UndecidedError(
            f"{manifest.name} is not preprocessed, so patch and spacing are not decided; run `medseg preprocess`, or "
            "say both: --set preprocessing.patch_size=[64,64,64] --set preprocessing.spacing_mm=[1,1,1]"
        )
    plan = Plan(
        channels=manifest.channels,
        labels=manifest.labels,
        regions=manifest.regions,
        orientation=section.orientation,
        spacing_mm=section.spacing_mm,
        crop=section.crop,
        patch_size=section.patch_size,
        batch_size=BATCH_SIZE if section.batch_size == "auto" else section.batch_size,
        normalisation={},
    )
    return plan, "the configuration's own patch and spacing, for nothing is preprocessed"


def _figures(explanation: Explanation) -> dict[str, str]:
    """Return each figure's name and text."""
    d, task = explanation.description, explanation.task
    dims = "3-D" if task.flat_axis is None else f"2-D, planes across axis {task.flat_axis}"
    kept, batch = d.training_bytes, explanation.batch_size
    return {
        "network": f"{explanation.name} ({dims})",
        "patch": f"{_by(task.patch_size)} voxels of {_by(_short(mm) for mm in task.spacing_mm)} mm, from "
        f"{explanation.source}",
        "parameters": f"{d.parameters:,}",
        "multiply-adds": f"{_count(d.multiply_adds)} a window, in convolutions and products of matrices",
        "receptive field": _field(d),
        "margin": f"{_by(d.margin)} voxels on each side",
        "input": f"{_by(d.input_size)} voxels give {_by(d.output_size)}",
        "legal inputs": f"only {_by(d.smallest_input)} voxels"
        if d.one_size
        else f"from {_by(d.smallest_input)} voxels in steps of {_by(d.stride)}",
        "memory, window": f"{_mebibytes(d.inference_bytes)} of activations at once, float32",
        "memory, training": f"{_mebibytes(kept)} of activations kept for a patch's gradient, "
        f"{_mebibytes(kept * batch)} for a batch of {batch}, float32; bf16 about half",
    }


def _field(description: Description) -> str:
    """Return the receptive field as text: voxels, mm, and what is not in them."""
    seen = ["all" if f is None else str(f[0]) if f[0] == f[1] else f"{f[0]}-{f[1]}" for f in description.field_voxels]
    if all(f is None for f in description.field_voxels):
        text = "the whole window"
    else:
        text = f"{_by(seen)} voxels, {_by('all' if mm is None else _short(mm) for mm in description.field_mm)} mm"
    if any(f is not None and f[0] < f[1] for f in description.field_voxels):
        text += " at most, by a voxel's place in the stride"
    if description.sees_statistics:
        text += "; norms take their statistics over the whole window besides"
    if description.unknown:
        text += f"; {', '.join(description.unknown)} counted as seeing everything"
    return text


def _levels(explanation: Explanation) -> Iterable[tuple[str, ...]]:
    """Yield a row of the table for each level."""
    d = explanation.description
    for scale, numbers in zip(d.scales, d.levels, strict=True):
        layers = [d.layers[number] for number in numbers]
        channels = sorted({layer.channels for layer in layers})
        grid = max(layer.grid for layer in layers)
        yield (
            _by(grid) or "tokens",
            _by(scale) if scale else "",
            _counted(layers),
            "-".join(str(n) for n in dict.fromkeys((channels[0], channels[-1]))),
            f"{sum(layer.parameters for layer in layers):,}",
            _count(sum(layer.multiply_adds for layer in layers)),
        )


def _counted(layers: Iterable[Layer]) -> str:
    """Return "2 convolution 3x3x3, 1 max pooling 2x2x2", in the order of their first."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(layer.kind for layer in layers).items())


def _by(values: Iterable[object]) -> str:
    """Return sizes as people write them: 64x64x24."""
    return "x".join(map(str, values))


def _short(mm: float) -> str:
    """Return millimetres without needless digits."""
    return f"{mm:.4g}"


def _count(number: int) -> str:
    """Return a large number in three digits."""
    for unit, factor in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return str(number)


def _mebibytes(number: int) -> str:
    """Return bytes in MiB."""
    return f"{number / 2**20:,.1f} MiB"
