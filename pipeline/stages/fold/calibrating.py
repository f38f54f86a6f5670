"""What a model's validation cases teach about its confidence, once it is trained: its temperature, and its Dice."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.confidence.calibration import Calibration, Features, fit_dice
from pipeline.confidence.reliability import Reliability, ReliabilityMeter, TemperatureFit, lattice_step
from pipeline.data.manifest import Case
from pipeline.data.store import CaseStore, Labels, PreparedCase
from pipeline.errors import ResourceError
from pipeline.evaluation.metrics import score_case
from pipeline.evaluation.scored import UNCALIBRATED
from pipeline.evaluation.self_assessment import true_dice
from pipeline.evaluation.structures import Structures
from pipeline.inference.planes import LogitPlanes
from pipeline.model import load_model
from pipeline.predictor import Engine, Predictor, Segmentation, Watcher
from pipeline.preparation.preprocessing import PreparedImage
from pipeline.training.diagnosis.stopwatch import unheard

log = logging.getLogger(__name__)

# One number is fitted: these many cases, spread over all, and voxels of each, on a lattice, are plenty.
TEMPERATURE_CASES = 8
TEMPERATURE_VOXELS = 1 << 18

# What a pass takes in which probabilities are looked at, in passes that only label: measured with a small U-Net on
# hippocampi; with a larger network it is nearer to 1.
PASS_COST = 1.3


class VoxelJudge:
    """The reliability of one case's probabilities, at the model's temperature and at 1, from the planes that pass by.

    Attributes:
        shipped: at the model's temperature.
        bare: at temperature 1; the same where that is the model's.
        seconds: that looking has taken.
    """

    def __init__(self, predictor: Predictor, label: Labels) -> None:
        self.shipped = ReliabilityMeter(predictor.output, predictor.temperature)
        self.is_calibrated = predictor.temperature != 1.0
        self.bare = ReliabilityMeter(predictor.output) if self.is_calibrated else self.shipped
        self.seconds = 0.0
        meters = {id(meter): meter for meter in (self.shipped, self.bare)}.values()
        self._watchers = [beside(label, meter.add, ignored=predictor.plan.ignored_class) for meter in meters]

    def __call__(self, planes: LogitPlanes, axis: int) -> None:
        """Look at some planes."""
        start = time.perf_counter()
        for watch in self._watchers:
            watch(planes, axis)
        self.seconds += time.perf_counter() - start

    def measures(self) -> dict[str, float]:
        """Return what was found by its name in RELIABILITY; that at temperature 1 apart where there is another."""
        bare = _known(self.bare.result) if self.is_calibrated else {}
        return _known(self.shipped.result) | {f"{name}{UNCALIBRATED}": value for name, value in bare.items()}


def calibration_of(
    folder: Path, store: CaseStore, cases: Sequence[Case], engine: Engine, reached: Callable[[str], None] = unheard
) -> Calibration | None:
    """Learn from validation cases how far a model's confidence can be trusted.

    The temperature comes from up to TEMPERATURE_CASES of them; all are then segmented at it, by the road that `segment`
    takes, and what is measured on the way is held against their labels.

    Args:
        folder: of the model.
        store: the prepared cases.
        cases: not seen by the model, with all of their labels.
        engine: how the machine is used.
        reached: is told the id of each case as it is begun.

    Returns:
        None without cases, and where memory does not suffice: the model is whole without it.
    """
    if not cases:
        return None
    model = load_model(folder, torch.device("cpu"))
    description = model.description
    predictor = Predictor(model.network, model.plan, description.inference, engine, output=description.output)
    try:
        return calibrate(predictor, store, cases, reached)
    except ResourceError as error:
        log.warning("%s: is left without a calibration: %s", folder, error)
        return None


def calibrate(
    predictor: Predictor, store: CaseStore, cases: Sequence[Case], reached: Callable[[str], None] = unheard
) -> Calibration:
    """Do the work of `calibration_of`; the predictor has the fitted temperature from then on."""
    predictor.temperature = _fitted_temperature(predictor, store, cases, reached)
    found: dict[str, list[tuple[Features, float]]] = {label: [] for label in list(predictor.plan.labels)[1:]}
    before, after = ReliabilityMeter(predictor.output), ReliabilityMeter(predictor.output)
    for case, label in _labelled(store, cases, reached):
        judge = VoxelJudge(predictor, label)
        segmentation = predictor.segment(_image_of(case), case.native, watch=[judge])
        before += judge.bare
        after += judge.shipped
        for name, features, dice in _lessons(predictor, segmentation, case):
            found[name].append((features, dice))
    return Calibration(
        temperature=predictor.temperature,
        cases=len(cases),
        before=before.result,
        after=after.result,
        labels={name: fit_dice([f for f, _ in pairs], [dice for _, dice in pairs]) for name, pairs in found.items()},
    )


def beside(
    label: Labels, add: Callable[[Tensor, Tensor], None], *, ignored: int, most_voxels: int | None = None
) -> Watcher:
    """Return a watcher that hands on planes of logits beside those of a label.

    Args:
        label: (X, Y, Z) class indices on the plan's grid.
        add: takes (K, V) logits and (V,) labels.
        ignored: class index of the voxels of which nobody knows what they are; they are not handed on.
        most_voxels: about so many, on a lattice; None: all.
    """
    step = lattice_step(label.shape, most_voxels) if most_voxels else 1

    def watch(planes: LogitPlanes, axis: int) -> None:
        logits = planes.logits[:, -planes.start % step :: step, ::step, ::step]
        reference = np.moveaxis(label, axis, 0)[planes.start : planes.start + planes.logits.shape[1]]
        classes = torch.from_numpy(reference[-planes.start % step :: step, ::step, ::step].astype(np.int64)).flatten()
        known, logits = classes != ignored, logits.flatten(1)
        add(*((logits, classes) if known.all() else (logits[:, known], classes[known])))

    return watch


def _fitted_temperature(
    predictor: Predictor, store: CaseStore, cases: Sequence[Case], reached: Callable[[str], None]
) -> float:
    """Return the temperature at which a few cases' logits are likeliest."""
    fit = TemperatureFit(predictor.output)
    chosen = np.linspace(0, len(cases) - 1, min(len(cases), TEMPERATURE_CASES)).round().astype(int)
    for case, label in _labelled(store, [cases[index] for index in chosen], reached):
        watch = beside(label, fit.add, ignored=predictor.plan.ignored_class, most_voxels=TEMPERATURE_VOXELS)
        memory = predictor.plan_in_hand(case.image, case.geometry, case.native)
        with predictor.stream(case.image, memory, case.body) as stream:
            for planes in stream:
                watch(planes, stream.axis)
    return fit.temperature


def _labelled(
    store: CaseStore, cases: Sequence[Case], reached: Callable[[str], None]
) -> Iterator[tuple[PreparedCase, Labels]]:
    """Read cases with their labels on the plan's grid."""
    for case in cases:
        reached(case.id)
        prepared = store.read(case.id)
        if prepared.label is not None:
            yield prepared, prepared.label


def _lessons(
    predictor: Predictor, segmentation: Segmentation, case: PreparedCase
) -> Iterator[tuple[str, Features, float]]:
    """Yield each structure that was found, what was measured of it, and its Dice on the native grid."""
    assert case.reference is not None
    labels = Structures.of_labels(predictor.plan)
    rows = score_case(segmentation.classes, case.reference, case.native.spacing_mm, labels, 1.0, metrics=("dice",))
    for row in rows:
        features, dice = Features.of(segmentation.confidence.labels[row.class_name]), true_dice(row)
        if features is not None and not np.isnan(dice):
            yield row.class_name, features, dice


def _image_of(case: PreparedCase) -> PreparedImage:
    """Return a stored case's image as it was prepared, but for float16's rounding."""
    return PreparedImage(case.image.astype(np.float32), case.geometry, case.body)


def _known(reliability: Reliability) -> dict[str, float]:
    """Return the measures that have a value."""
    return {name: value for name, value in reliability if value is not None}
