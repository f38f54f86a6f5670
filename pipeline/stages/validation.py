"""Validation in training: whole volumes of the fold held out, by the road that `segment` and `evaluate` take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.data.manifest import Case
from pipeline.data.store import CaseStore
from pipeline.evaluation.metrics import score_case
from pipeline.pictures import draw_overlay
from pipeline.predictor import Predictor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Validation(Protocol):
    """What a training does with whole volumes; the network is looked at as it is."""

    def scores(self, cases: Sequence[Case]) -> dict[str, float]:
        """Return the scores by name; "score" is the one by which the best model is chosen."""
        ...

    def picture(self, case: Case, title: str) -> Figure:
        """Draw what the network makes of a case."""
        ...


@dataclass(frozen=True)
class DiceValidation:
    """Mean Dice per class over full volumes on their native grids, and their mean, the "score".

    Attributes:
        predictor: of the network in training.
        store: the prepared cases.
    """

    predictor: Predictor
    store: CaseStore

    def scores(self, cases: Sequence[Case]) -> dict[str, float]:
        """Score cases one after another from the store.

        A structure that is missed, or found where there is none, counts as 0 here, for what is chosen by this score
        must not gain from missing a structure; `evaluate` lists such cases apart.
        """
        names = list(self.predictor.plan.labels)
        found: dict[str, list[float]] = {name: [] for name in names[1:]}
        for case in map(self.store.read, (case.id for case in cases)):
            if case.reference is None:
                continue
            classes = self.predictor.predict_prepared(case.image, case.geometry, case.native, case.body)
            for row in score_case(classes, case.reference, case.native.spacing_mm, names, 1.0, metrics=("dice",)):
                if row.status != "both_empty":
                    found[row.class_name].append(row.values["dice"] if row.status == "scored" else 0.0)
        means = {f"dice/{name}": float(np.mean(values)) for name, values in found.items() if values}
        return {**means, "score": float(np.mean(list(means.values()))) if means else 0.0}

    def picture(self, case: Case, title: str) -> Figure:
        """Draw the outlines of a case's prediction and reference on the plan's grid."""
        prepared = self.store.read(case.id)
        outlines = {"prediction": self.predictor.predict_prepared(prepared.image, prepared.geometry, prepared.geometry)}
        if prepared.label is not None:
            outlines = {"reference": prepared.label, **outlines}
        names = list(self.predictor.plan.labels)
        return draw_overlay(prepared.image[0], prepared.geometry.spacing_mm, outlines, names, title)
