"""Which components are taken out of predictions: chosen label by label on those out of fold, only where it helps."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config_loading import load_config
from pipeline.data.cases import read_case_label
from pipeline.data.manifest import Case, Manifest
from pipeline.data.plan import Plan
from pipeline.errors import EvaluationError, ModelError
from pipeline.evaluation.comparison.choosing import Choice, Tried, choose
from pipeline.inference.postprocessing import (
    POSTPROCESSING,
    Postprocessing,
    read_postprocessing,
    save_postprocessing,
)
from pipeline.model import CONFIG, model_digest
from pipeline.preparation.preprocessing import class_indices
from pipeline.progress import track
from pipeline.records import json_number, write_json
from pipeline.stages.evaluating.out_of_fold import KeptCase, OutOfFold
from pipeline.stages.model_card import write_card
from pipeline.stages.postprocessing.rules import Pieces, Rule, candidates, pieces_of
from pipeline.tracking import RunLog, is_tracked, send_pending
from pipeline.volumes.volume import read_label

log = logging.getLogger(__name__)

SEND_LIMIT_S = 60.0


@dataclass(frozen=True)
class LabelSearch:
    """What was tried for one label, and chosen."""

    label: str
    rules: tuple[Rule, ...]
    choice: Choice

    @property
    def chosen(self) -> Rule | None:
        """The rule; None where the label is left as it is."""
        return None if self.choice.chosen is None else self.rules[self.choice.chosen]

    def as_json(self) -> dict[str, Any]:
        """Return the evidence."""
        choice = self.choice
        tried = [{"rule": rule.as_text(), **_tried_as_json(one)} for rule, one in self._tried()]
        names = {fold: "none" if at is None else self.rules[at].as_text() for fold, at in choice.by_fold.items()}
        return {
            "chosen": self.chosen.as_text() if self.chosen else "none",
            "dice_without": json_number(choice.untreated),
            "gain_cross_fitted": choice.cross_fitted.as_json("patients"),
            "chosen_by_the_other_folds": {str(fold): name for fold, name in names.items()},
            "tried": tried,
        }

    def as_text(self) -> str:
        """Return what was chosen and why, in a line."""
        choice = self.choice
        if self.chosen is None or choice.chosen is None:
            return f"{self.label}: left as it is, {len(self.rules)} rules tried"
        tried, honest = choice.tried[choice.chosen], choice.cross_fitted
        return (
            f"{self.label}: {self.chosen.as_text()}; Dice {choice.untreated:.4f} {tried.difference.mean:+.4f} "
            f"(p {tried.p:.2g}, {tried.better} patients better, {tried.worse} worse); "
            f"chosen on the other folds it is {honest.mean:+.4f}"
        )

    def _tried(self) -> Iterable[tuple[Rule, Tried]]:
        """Return each rule with what became of it."""
        return zip(self.rules, self.choice.tried, strict=True)


@dataclass(frozen=True)
class Search:
    """What was found for all labels.

    Attributes:
        experiment: folder of the experiment.
        cases, folds: that it was found on.
        labels: one by one, those that are nowhere predicted left out.
    """

    experiment: Path
    cases: int
    folds: tuple[int, ...]
    labels: tuple[LabelSearch, ...]

    @property
    def rules(self) -> Postprocessing:
        """The rules chosen."""
        found = {one.label: one.chosen for one in self.labels if one.chosen}
        on = f"out-of-fold predictions of {self.cases} cases, {self.experiment.name} folds {_listed(self.folds)}"
        return Postprocessing(
            largest_component=tuple(label for label, rule in found.items() if rule.largest_only),
            smallest_volume_ml={label: rule.smallest_ml for label, rule in found.items() if rule.smallest_ml},
            chosen_on=on,
        )

    def as_text(self) -> str:
        """Return a line a label."""
        return "\n".join([f"postprocessing: {self.rules.as_text()}", *(one.as_text() for one in self.labels)])


def search(experiment: Path, models: Sequence[Path], manifest: Manifest, plan: Plan, *, samples: int) -> Search:
    """Try rules on an experiment's out-of-fold predictions, label by label.

    Args:
        experiment: its folder.
        models: of its folds; predictions by others are left out.
        manifest: whose cases are predicted.
        plan: of the models.
        samples: resamples of the bootstraps.

    Raises:
        EvaluationError: there are predictions of fewer than two folds.
        VolumeError: a label map cannot be read.
    """
    predictions = OutOfFold(experiment)
    cases = predictions.of_models(models)
    folds = sorted({case.fold for case in cases})
    if len(folds) < 2:
        raise EvaluationError(
            f"{experiment}: postprocessing is chosen on out-of-fold predictions of two or more folds, there are those "
            f"of {len(folds)}; train more with `medseg train --fold all` and run `medseg evaluate`"
        )
    by_id = {case.id: case for case in manifest.cases}
    pieces = [
        _pieces(predictions, by_id[case.case], manifest, plan)
        for case in track(cases, "components of out-of-fold predictions", len(cases))
    ]
    found = (_search_label(name, [one.get(name) for one in pieces], cases, samples) for name in list(plan.labels)[1:])
    return Search(experiment, len(cases), tuple(folds), tuple(one for one in found if one is not None))


def keep_rules(found: Search, models: Sequence[Path]) -> None:
    """Write what was chosen into the folders of the models, its evidence beside the folds, and both to MLflow."""
    evidence = {
        **found.rules.model_dump(mode="json"),
        "models": {model.parent.parent.name: model_digest(model) for model in models},
        "labels": {one.label: one.as_json() for one in found.labels},
    }
    write_json(found.experiment / POSTPROCESSING, evidence)
    for model in models:
        # Where nothing was chosen now, what was chosen before goes; and stays away where there was nothing.
        if found.rules.has_rules or read_postprocessing(model).has_rules:
            save_postprocessing(model, found.rules)
            write_card(model)
            _log_model(model)
    _log_evidence(found, models)


def _search_label(
    label: str, pieces: Sequence[Pieces | None], cases: Sequence[KeptCase], samples: int
) -> LabelSearch | None:
    """Try rules on one label; None where it is nowhere predicted."""
    rules = candidates([one for one in pieces if one is not None])
    if not rules:
        return None
    table = np.array([[one.dice(rule) if one else math.nan for one in pieces] for rule in (Rule(), *rules)])
    choice = choose(table, [case.patient for case in cases], [case.fold for case in cases], samples=samples)
    return LabelSearch(label, tuple(rules), choice)


def _pieces(predictions: OutOfFold, case: Case, manifest: Manifest, plan: Plan) -> dict[str, Pieces]:
    """Take a case's prediction apart: label -> its components; without labels that nobody looked for in it."""
    label = read_case_label(manifest, case, {})
    if label is None:
        raise EvaluationError(f"case {case.id!r}: has lost its label since it was predicted")
    prediction = read_label(predictions.label_of(case.id))
    classes, reference = class_indices(prediction.array, plan), class_indices(label.array, plan)
    found = pieces_of(classes, reference, plan, prediction.geometry.voxel_volume_ml)
    return {name: pieces for name, pieces in found.items() if case.is_annotated([name])}


def _log_model(model: Path) -> None:
    """Send a model with its rules to the run that trained it: a new version where it is registered."""
    run_log = _run_log(model.parent.parent)
    if run_log is None:
        return
    tracking = load_config(run_log.folder / CONFIG).tracking
    run_log.model(model, tracking.register_as, tracking.alias)
    run_log.close()


def _log_evidence(found: Search, models: Sequence[Path]) -> None:
    """Log the evidence to the run of the experiment, and send what waits."""
    run_log = _run_log(found.experiment)
    if run_log is None:
        return
    gains = {one.label: one.choice.cross_fitted.mean for one in found.labels if one.chosen}
    run_log.metrics({f"cv/postprocessing_gain/dice/{label}": gain for label, gain in gains.items()}, 0)
    run_log.tags({"medseg.postprocessing": found.rules.as_text()})
    run_log.artifact(found.experiment / POSTPROCESSING)
    run_log.close()
    tracked = [folder for folder in (model.parent.parent for model in models) if is_tracked(folder)]
    send_pending(found.experiment, *tracked, limit_s=SEND_LIMIT_S)


def _run_log(folder: Path) -> RunLog | None:
    """Open the log of a run; None where it is not tracked."""
    try:
        return RunLog.open(folder)
    except ModelError:
        return None


def _tried_as_json(tried: Tried) -> dict[str, Any]:
    """Return a rule's outcome as JSON knows it."""
    difference = tried.difference.as_json("patients")
    return {"difference": difference, "better": tried.better, "worse": tried.worse, "p": json_number(tried.p)}


def _listed(folds: Sequence[int]) -> str:
    """Name folds."""
    return " ".join(map(str, folds))
