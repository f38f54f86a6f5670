"""One case of an evaluation: predicted, or taken from the out-of-fold predictions where it is fresh, and scored."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import __version__
from pipeline.confidence.calibration import CALIBRATION
from pipeline.data.manifest import Case, Manifest
from pipeline.errors import VolumeError
from pipeline.evaluation.lesions.scoring import LesionRules, score_lesions
from pipeline.evaluation.metrics import Row, score_case
from pipeline.evaluation.scored import NO_LESIONS, ScoredCase
from pipeline.evaluation.structures import Structures
from pipeline.hardware import device_name, peak_memory_bytes, pick_device, reset_peak_memory
from pipeline.inference.postprocessing import common_rules, postprocess
from pipeline.inference.probabilities import ProbabilityRequest
from pipeline.model import model_digest
from pipeline.predictor import Engine, Predictor
from pipeline.preparation.preprocessing import class_indices, label_values, prepared_label
from pipeline.records import digest_of, file_digest
from pipeline.stages.evaluating.cases import LabelledCase, Task
from pipeline.stages.evaluating.out_of_fold import KeptCase, KeptRow, OutOfFold
from pipeline.stages.evaluating.results import prediction_of
from pipeline.stages.fold.calibrating import VoxelJudge
from pipeline.stages.models import BEST
from pipeline.stages.segmenting.probability_files import probabilities_into
from pipeline.volumes.stored import content_digest
from pipeline.volumes.volume import Volume, read_label
from pipeline.volumes.writing import write_label


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a network made of a case, before rules that were chosen afterwards; `scored` by it."""

    classes: NDArray[Any]
    scored: ScoredCase


class CaseScorer:
    """Predicts and scores a task's cases; the networks are loaded with the first case that needs them.

    Args:
        task: models and cases.
        manifest: the cases'.
        tolerance_mm: of the normalised surface Dice.
        device: auto, cpu, cuda or cuda:N.
        folder: of the results; label maps go to it as they would ship.
        probabilities: whether the labels' probabilities are kept of out-of-fold predictions.
        overwrite: predict anew what is kept.
        lesions: which structures are counted lesion by lesion, and how.

    Attributes:
        task: models and cases.
        rules: that were chosen for the models.
        devices: that predicted the cases so far.
    """

    def __init__(
        self,
        task: Task,
        manifest: Manifest,
        *,
        tolerance_mm: float,
        device: str,
        folder: Path,
        probabilities: bool = False,
        overwrite: bool = False,
        lesions: LesionRules = NO_LESIONS,
    ) -> None:
        self.task, self._manifest, self._folder = task, manifest, folder
        self._tolerance_mm, self._overwrite, self._lesions = tolerance_mm, overwrite, lesions
        self._engine, self._device = Engine(device), device_name(pick_device(device))
        self._wanted = tuple(list(task.plan.labels)[1:]) if probabilities else ()
        self.rules = common_rules(task.models)
        self.devices = set[str]()

    @cached_property
    def predictor(self) -> Predictor:
        """The networks; rules that were chosen for them are applied here, to what is kept without them."""
        return Predictor.load(self.task.models, self._engine, chosen=False)

    def load(self) -> None:
        """Load the networks, unless they are.

        Raises:
            ModelError: a folder is no whole model, or models do not make an ensemble.
        """
        self.devices.add(device_name(self.predictor.device))

    def kept(self, case: Case) -> KeptCase | None:
        """Return what is kept of a case, where nothing it depends on has changed."""
        store = out_of_fold_of(self.task, case)
        if store is None or self._overwrite:
            return None
        try:
            return store.fresh(case.id, self._key(case), self._wanted)
        except VolumeError:
            return None  # Reading the case will say what is wrong with it.

    def score(self, case: Case, labelled: LabelledCase, kept: KeptCase | None) -> ScoredCase:
        """Score a case's label map as it ships, and write it; predicted now, or what is kept of it."""
        predicted = self._predict(case, labelled) if kept is None else self._take(case, labelled, kept)
        plan, native = self.task.plan, labelled.reference.geometry
        start = time.perf_counter()
        classes = postprocess(predicted.classes, plan, native, self.rules)
        spent = time.perf_counter() - start if self.rules.has_rules else 0.0
        label = Volume(label_values(classes, plan), native)
        write_label(prediction_of(self._folder, case.id), label, header_of=labelled.header_of, names=plan.labels)
        # Never kept: which structures are counted, and how, is settled anew with each evaluation.
        structures = Structures.of(plan, case)
        scored = replace(
            predicted.scored,
            lesions=score_lesions(classes, labelled.reference.array, native, structures, self._lesions),
        )
        if np.array_equal(classes, predicted.classes):
            return scored
        rows = self._rows(case, classes, labelled)
        return replace(scored, rows=rows, seconds=scored.seconds + spent)

    def _predict(self, case: Case, labelled: LabelledCase) -> Predicted:
        """Predict a case; keep it where its fold's model has done so."""
        predictor, native, plan = self.predictor, labelled.reference.geometry, self.task.plan
        store = out_of_fold_of(self.task, case)
        reset_peak_memory(predictor.device)
        start = time.perf_counter()
        prepared = predictor.prepare(labelled.images, native)
        prepared_s = time.perf_counter() - start
        judge = VoxelJudge(predictor, prepared_label(labelled.reference, prepared.geometry, plan))
        with self._wanted_probabilities(case, labelled) as request:
            start = time.perf_counter()
            segmentation = predictor.segment(prepared, native, watch=[judge], probabilities=request)
            seconds = prepared_s + time.perf_counter() - start - judge.seconds
        structures = segmentation.confidence.labels.items()
        scored = ScoredCase(
            case_id=case.id,
            patient=case.patient,
            fold=self.task.fold,
            rows=self._rows(case, segmentation.classes, labelled),
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(predictor.device),
            predicted_dice={name: s.predicted_dice for name, s in structures if s.predicted_dice is not None},
            # Where people have not looked for everything, there is nothing to hold a probability against.
            reliability={} if Structures.of(plan, case).unknown else judge.measures(),
        )
        if store is not None:
            label = Volume(label_values(segmentation.classes, plan), native)
            store.keep(self._record(case, scored), label, labelled.header_of, plan.labels)
        return Predicted(segmentation.classes, scored)

    def _wanted_probabilities(
        self, case: Case, labelled: LabelledCase
    ) -> AbstractContextManager[ProbabilityRequest | None]:
        """Return what is asked for beside a case's label map, where that is kept."""
        store = out_of_fold_of(self.task, case)
        if store is None or not self._wanted:
            return nullcontext()
        return probabilities_into(
            store.probabilities_of(case.id),
            labelled.reference.geometry,
            self.task.plan,
            self._wanted,
            temperature=self.predictor.temperature,
            header_of=labelled.header_of,
        )

    def _take(self, case: Case, labelled: LabelledCase, kept: KeptCase) -> Predicted:
        """Take what is kept of a case; where another tolerance is wanted it is scored anew, and that is kept."""
        store = out_of_fold_of(self.task, case)
        assert store is not None
        self.devices.add(kept.device)
        classes = class_indices(read_label(store.label_of(case.id)).array, self.task.plan)
        if kept.tolerance_mm != self._tolerance_mm:
            rows = tuple(KeptRow.of(row) for row in self._rows(case, classes, labelled))
            kept = kept.model_copy(update={"tolerance_mm": self._tolerance_mm, "rows": rows})
            store.note(kept)
        return Predicted(classes, kept.scored)

    def _rows(self, case: Case, classes: NDArray[Any], labelled: LabelledCase) -> tuple[Row, ...]:
        """Score class indices against the reference."""
        native, structures = labelled.reference.geometry, Structures.of(self.task.plan, case)
        return tuple(score_case(classes, labelled.reference.array, native.spacing_mm, structures, self._tolerance_mm))

    def _record(self, case: Case, scored: ScoredCase) -> KeptCase:
        """Return what is written down of a case that is kept."""
        assert self.task.fold is not None
        return KeptCase(
            case=case.id,
            patient=case.patient,
            fold=self.task.fold,
            model=self._model_digest,
            key=self._key(case),
            device=self._device,
            tolerance_mm=self._tolerance_mm,
            rows=tuple(KeptRow.of(row) for row in scored.rows),
            seconds=scored.seconds,
            peak_memory_bytes=scored.peak_memory_bytes,
            predicted_dice=dict(scored.predicted_dice),
            reliability=dict(scored.reliability),
            probabilities=self._wanted,
        )

    @cached_property
    def _model_digest(self) -> str:
        """Digest of the one model whose predictions are kept."""
        return model_digest(self.task.models[0])

    def _key(self, case: Case) -> str:
        """Return a digest of all that a case's prediction, its confidence and its scores depend on."""
        calibration = self.task.models[0] / CALIBRATION
        files = [*case.images.values(), *([case.label] if case.label else [])]
        return digest_of(
            {
                "model": self._model_digest,
                "calibration": file_digest(calibration) if calibration.exists() else None,
                "case": case.model_dump(mode="json"),
                "files": [content_digest(self._manifest.path_of(file)) for file in files],
                "device": self._device,
                "medseg": __version__,
            }
        )


def out_of_fold_of(task: Task, case: Case) -> OutOfFold | None:
    """Return where a case's prediction is kept: none but by the best model of the fold that holds it out."""
    (model, *others) = task.models
    if others or task.run is None or model.relative_to(task.run) != BEST or task.run.name != f"fold_{task.fold}":
        return None
    return OutOfFold(task.run.parent) if task.is_own and case.fold == task.fold else None


def keep_table(task: Task) -> None:
    """Write the table of an experiment's out-of-fold predictions, where the task has kept any."""
    stores = {store.folder: store for case in task.cases if (store := out_of_fold_of(task, case)) is not None}
    for store in stores.values():
        store.write_table()
