"""`training.init_from`: a training begins with what fits of other weights, and says what that was."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.config import Task
from pipeline.data.plan import Plan
from pipeline.errors import ConfigError
from pipeline.networks import Network, build_network
from pipeline.networks.contract import ENCODER
from pipeline.networks.fitting import network_task
from pipeline.networks.transfer import Shape, Shared, Tensors, counting_axes, shared_names, transfer
from pipeline.records import Record, write_json
from pipeline.stages.initial_weights import InitialWeights, Kind, aligned, read_initial
from pipeline.training.state import TrainState

if TYPE_CHECKING:
    from pipeline.stages.fold.task import FoldTask
    from pipeline.tracking import RunLog

log = logging.getLogger(__name__)

REPORT = "init_from.json"
# The tag of the digest of the model that a training began with.
INITIAL_DIGEST_TAG = "medseg.init_from_sha256"

# Names of tensors that a line of the log has room for.
NAMES_SHOWN = 4

# A spacing further off than this share is another scale to the features of a network.
SPACING_TOLERANCE = 0.1


class Initialisation(Record):
    """What a training took from other weights.

    Attributes:
        model: their folder or file.
        kind: a medseg model, a MONAI bundle, or a state dict.
        name: of the experiment that trained it, or of the bundle or file.
        task: what it was trained for; of another task than the training's own, only the encoder is compared. None
            where that is not known.
        sha256: of a model's weights, description and plan; else of the file with the weights.
        prefixes: what names began with there, and begin with here, where one network is wrapped in something.
        classes: those that both have; a class keeps what the network's last layers knew of it, by its name. None where
            only the encoder is taken.
        new_classes: those that the model lacks: they begin with random weights.
        channels: those that both have, likewise.
        copied: parameters and buffers that both networks have in the same shape, for the same classes and channels.
        in_part: those of which what belongs to the shared classes and channels was taken -> shape in the model, shape
            in the training's network.
        other_shape: those that both have in shapes that do not fit -> the same.
        not_there: those that the model lacks.
        not_used: those of the model that the training's network lacks.
        parameters: numbers taken that are trained.
        remarks: what was assumed.
    """

    model: str
    kind: Kind = "medseg"
    name: str
    task: Task | None
    sha256: str
    prefixes: tuple[str, str] = ("", "")
    classes: tuple[str, ...]
    new_classes: tuple[str, ...]
    channels: tuple[str, ...]
    copied: tuple[str, ...]
    in_part: dict[str, tuple[Shape, Shape]]
    other_shape: dict[str, tuple[Shape, Shape]]
    not_there: tuple[str, ...]
    not_used: tuple[str, ...]
    parameters: int
    remarks: tuple[str, ...] = ()

    def as_lines(self) -> list[str]:
        """Return what fitted, and what did not, a line each."""
        in_part, shapes = (
            [f"{name} {there} instead of {here}" for name, (there, here) in tensors.items()]
            for tensors in (self.in_part, self.other_shape)
        )
        compared = len(self.copied) + len(in_part) + len(shapes) + len(self.not_there)
        lines = [
            f"{len(self.copied)} of {compared} tensors compared fit, {self.parameters} parameters, of {self.model}"
        ]
        for names, what in (
            (in_part, "fit in part, by the names of classes and channels"),
            (shapes, "have another shape there"),
            (self.not_there, "are not there"),
            (self.not_used, "of it are not here"),
        ):
            if names:
                more = ", ..." if len(names) > NAMES_SHOWN else ""
                lines.append(f"{len(names)} {what}: {', '.join(names[:NAMES_SHOWN])}{more}")
        if in_part and self.new_classes:
            lines.append(f"classes known: {', '.join(self.classes) or 'none'}; new: {', '.join(self.new_classes)}")
        if any(self.prefixes):
            there, here = (f"{prefix}*" for prefix in self.prefixes)
            lines.append(f"{there} there is {here} here")
        return [*lines, *self.remarks]

    def record(self, folder: Path, tracked: RunLog) -> None:
        """Write the report into the run folder and to tracking."""
        write_json(folder / REPORT, self.model_dump(mode="json"))
        tracked.artifact(folder / REPORT)
        tracked.tags({"medseg.init_from": self.name, INITIAL_DIGEST_TAG: self.sha256})
        taken = {"tensors": len(self.copied), "tensors_in_part": len(self.in_part), "parameters": self.parameters}
        tracked.params({"init_from": taken})


def initialise(task: FoldTask, state: TrainState) -> Initialisation | None:
    """Give a new training's network, and its running mean, what fits of the configured weights.

    Between trainings of one task that is every parameter and buffer of the same name and shape. Where classes or
    channels differ, what counts them is taken entry by entry, by their names; the rest of it stays random. Of a model
    of another task only the encoder is taken, for what stands behind it was for something else.

    Returns:
        What was taken; None where the configuration names no model.

    Raises:
        ModelError: the model is missing or damaged.
        ConfigError: no parameter fits, or the model was trained on the cases held out here.
    """
    folder = task.initial_model
    if folder is None:
        return None
    source = read_initial(folder)
    _refuse_seen_cases(task, source)
    report = _taken(task, source, state.network)
    if not report.parameters:
        lines = "; ".join(report.as_lines())
        raise ConfigError(f"training.init_from: nothing fits network {task.config.network.name}: {lines}")
    if state.average is not None:
        torch._foreach_copy_(state.average, state.followed)
    if source.plan is not None:
        _warn_of_other_plan(source.plan, task.plan)
    for line in report.as_lines():
        log.info("fold %d: training.init_from: %s", task.fold, line)
    return report


def _refuse_seen_cases(task: FoldTask, source: InitialWeights) -> None:
    """Raise where the model was trained on the cases that this training is validated on.

    Data sets are told by their name, for which of their cases took part may differ.
    """
    if source.manifest_name == task.manifest.name and source.fold != task.fold:
        held_out = "no fold" if source.fold is None else f"fold {source.fold}"
        raise ConfigError(
            f"training.init_from: {source.path} was trained on {source.manifest_name} with {held_out} held out, so it "
            f"has seen the validation cases of fold {task.fold}; train it with --fold {task.fold} too, and write "
            "{fold} for the fold in its path"
        )


def _warn_of_other_plan(there: Plan, here: Plan) -> None:
    """Say where images look otherwise to the network than those that it has learned from."""
    if list(there.channels) != list(here.channels):
        log.warning("its channels are %s, here %s", ", ".join(there.channels), ", ".join(here.channels))
    if there.orientation != here.orientation:
        log.warning(
            "its orientation is %s, here %s; set preprocessing.orientation", there.orientation, here.orientation
        )
    ratios = (mine / its for mine, its in zip(here.spacing_mm, there.spacing_mm, strict=True))
    if any(abs(ratio - 1) > SPACING_TOLERANCE for ratio in ratios):
        log.warning(
            "its voxels have %s mm, here %s: things look larger or smaller than it knows them; "
            "preprocessing.spacing_mm can take over its own",
            *(" x ".join(f"{mm:.3g}" for mm in plan.spacing_mm) for plan in (there, here)),
        )
    for channel in here.channels:
        schemes = [plan.normalisation[channel].scheme for plan in (there, here) if channel in plan.normalisation]
        if len(set(schemes)) > 1:
            log.warning("its %s was normalised by %s, here by %s; see preprocessing.normalisation", channel, *schemes)


def _taken(task: FoldTask, source: InitialWeights, network: Network) -> Initialisation:
    """Copy what fits of other weights into a network, by name and shape, and say what that was."""
    section, plan = task.config.network, task.plan
    same_task = source.task in (None, task.config.task)
    prefix = "" if same_task and task.config.training.init_parts == "all" else ENCODER
    here = _named(network.state_dict(), prefix)
    if not here:
        raise ConfigError(
            f"training.init_parts: network {section.name} has no encoder that is told apart by its names; take all"
        )
    renamed, prefixes = (source.tensors, ("", "")) if source.kind == "medseg" else aligned(source.tensors, here)
    there = _named(renamed, prefix)
    classes = _outputs(task.config.task, plan) if not prefix else []
    known = source.classes if not prefix else ()
    axes = counting_axes(
        lambda built_for: build_network(section.name, section.options, built_for),
        network_task(plan, section, task.outputs),
    )
    of_classes = _in_order(classes) if known is None else shared_names(known, classes)
    done = transfer(there, here, axes, of_classes, _shared_channels(source.channels, list(plan.channels)))
    trained = {name for name, _ in network.named_parameters()}
    return Initialisation(
        model=str(source.path),
        kind=source.kind,
        name=source.name,
        task=source.task,
        sha256=source.sha256,
        prefixes=prefixes,
        classes=tuple(classes[place] for _, place in of_classes.places),
        new_classes=tuple(name for name in classes if known is not None and name not in known),
        channels=tuple(name for name in plan.channels if source.channels is None or name in source.channels),
        copied=tuple(done.copied),
        in_part=done.in_part,
        other_shape=done.other_shape,
        not_there=tuple(name for name in here if name not in there),
        not_used=tuple(name for name in there if name not in here),
        parameters=sum(count for name, count in done.numbers.items() if name in trained),
        remarks=tuple(_assumed(source, classes)),
    )


def _assumed(source: InitialWeights, classes: Sequence[str]) -> list[str]:
    """Return what had to be assumed of weights that do not say it themselves."""
    if source.kind == "medseg":
        return []
    assumed = []
    if source.classes is None and classes:
        assumed.append("its classes are not named: as many are taken in their order; see that they are the same")
    if source.channels is None:
        assumed.append("its channels are not named: as many are taken in their order")
    assumed.append("how its images were prepared is not known: orientation, spacing and intensities should be alike")
    if source.manifest_name is None:
        assumed.append("what it was trained on is not known: if on cases held out here, their scores are worth nothing")
    return assumed


def _named(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors whose names begin so, in the memory that the optimiser knows."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _outputs(task: Task, plan: Plan) -> list[str]:
    """Return what each channel of a network's output is for: regions, classes, or the image's channels."""
    if task == "denoise":
        return list(plan.channels)
    return list(plan.regions if plan.output == "regions" else plan.labels)


def _shared_channels(there: Sequence[str] | None, here: Sequence[str]) -> Shared:
    """Return the channels that both have; where none has the name of another, as many are taken in their order."""
    if there is None:
        return _in_order(here)
    shared = shared_names(there, here)
    return shared if shared.places or shared.there != shared.here else _in_order(here)


def _in_order(names: Sequence[str]) -> Shared:
    """Return names that stand for as many others, one for one."""
    return Shared(len(names), len(names), [(place, place) for place in range(len(names))])
