"""Validation in training: whole volumes of the fold held out, by the road that `segment` and `evaluate` take.

Processes that train together share the cases out and all learn every score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from pipeline.data.manifest import Case
from pipeline.data.store import CaseStore
from pipeline.evaluation.metrics import score_case
from pipeline.pictures import draw_overlay
from pipeline.predictor import Predictor
from pipeline.training.distributed import gathered, this_share

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
        """Score cases from the store, each process its share; all of them return the same.

        A structure that is missed, or found where there is none, counts as 0 here, for what is chosen by this score
        must not gain from missing a structure; `evaluate` lists such cases apart.
        """
        names = list(self.predictor.plan.labels)[1:]
        mine = [self._dice(case) for case in this_share().of(cases)]
        table = gathered(torch.tensor(mine, dtype=torch.float64).reshape(-1, len(names)), len(cases)).numpy()
        columns = {name: column[~np.isnan(column)] for name, column in zip(names, table.T, strict=True)}
        means = {f"dice/{name}": float(np.mean(values)) for name, values in columns.items() if len(values)}
        return {**means, "score": float(np.mean(list(means.values()))) if means else 0.0}

    def _dice(self, case: Case) -> list[float]:
        """Return a case's Dice per class without the background; what does not count is no number."""
        names = list(self.predictor.plan.labels)
        prepared = self.store.read(case.id)
        if prepared.reference is None:
            return [math.nan] * (len(names) - 1)
        classes = self.predictor.predict_prepared(prepared.image, prepared.geometry, prepared.native, prepared.body)
        rows = score_case(classes, prepared.reference, prepared.native.spacing_mm, names, 1.0, metrics=("dice",))
        counted = {row.class_name: 0.0 if row.status in ("missed", "spurious") else row.values["dice"] for row in rows}
        return [counted.get(name, math.nan) for name in names[1:]]

    def picture(self, case: Case, title: str) -> Figure:
        """Draw the outlines of a case's prediction and reference on the plan's grid."""
        prepared = self.store.read(case.id)
        outlines = {"prediction": self.predictor.predict_prepared(prepared.image, prepared.geometry, prepared.geometry)}
        if prepared.label is not None:
            outlines = {"reference": prepared.label, **outlines}
        names = list(self.predictor.plan.labels)
        return draw_overlay(prepared.image[0], prepared.geometry.spacing_mm, outlines, names, title)
