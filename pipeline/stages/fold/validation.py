"""Validation in training: whole volumes of the fold held out, by the road that `segment` and `evaluate` take.

Processes that train together share the cases out and all learn every score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from pipeline.data.manifest import Case
from pipeline.data.store import CaseStore
from pipeline.evaluation.metrics import score_case
from pipeline.evaluation.structures import Structures
from pipeline.pictures import draw_overlay
from pipeline.predictor import Predictor
from pipeline.training.diagnosis.stopwatch import unheard
from pipeline.training.distributed import gathered, this_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Validation(Protocol):
    """What a training does with whole volumes; the network is looked at as it is."""

    def scores(self, cases: Sequence[Case], reached: Callable[[str], None] = unheard) -> dict[str, float]:
        """Return the scores by name; "score" is the one by which the best model is chosen.

        Args:
            cases: of the fold held out.
            reached: is told the id of each case as it is begun.
        """
        ...

    def picture(self, case: Case, title: str) -> Figure:
        """Draw what the network makes of a case."""
        ...


@dataclass(frozen=True)
class DiceValidation:
    """Mean Dice per label or region over full volumes on their native grids, and their mean, the "score".

    Attributes:
        predictor: of the network in training.
        store: the prepared cases.
    """

    predictor: Predictor
    store: CaseStore

    def scores(self, cases: Sequence[Case], reached: Callable[[str], None] = unheard) -> dict[str, float]:
        """Score cases from the store, each process its share; all of them return the same.

        A structure that is missed, or found where there is none, counts as 0 here, for what is chosen by this score
        must not gain from missing a structure; `evaluate` lists such cases apart. Where no case holds any of the
        structures that people looked for, the score is 1 for who finds none; where they looked for none, 0.
        """
        names = list(self.predictor.plan.structures)
        mine = []
        for case in this_share().of(cases):
            reached(case.id)
            mine.append(self._dice(case))
        table = gathered(torch.tensor(mine, dtype=torch.float64).reshape(-1, len(names)), len(cases)).numpy()
        columns = {name: column[~np.isnan(column)] for name, column in zip(names, table.T, strict=True)}
        means = {f"dice/{name}": float(np.mean(values)) for name, values in columns.items() if len(values)}
        if means:
            return {**means, "score": float(np.mean(list(means.values())))}
        plan = self.predictor.plan
        return {"score": float(any(case.label and Structures.of(plan, case).any_known for case in cases))}

    def _dice(self, case: Case) -> list[float]:
        """Return a case's Dice per label or region; what does not count is no number."""
        structures, prepared = Structures.of(self.predictor.plan, case), self.store.read(case.id)
        if prepared.reference is None:
            return [math.nan] * len(structures.classes)
        classes = self.predictor.predict_prepared(prepared.image, prepared.geometry, prepared.native, prepared.body)
        rows = score_case(classes, prepared.reference, prepared.native.spacing_mm, structures, 1.0, metrics=("dice",))
        return [0.0 if row.status in ("missed", "spurious") else row.values["dice"] for row in rows]

    def picture(self, case: Case, title: str) -> Figure:
        """Draw the outlines of a case's prediction and reference on the plan's grid."""
        prepared = self.store.read(case.id)
        grid = prepared.geometry
        outlines = {"prediction": self.predictor.predict_prepared(prepared.image, grid, grid, prepared.body)}
        if prepared.label is not None:
            outlines = {"reference": prepared.label, **outlines}
        names = self.predictor.plan.class_names
        return draw_overlay(prepared.image[0], grid.spacing_mm, outlines, names, title)
