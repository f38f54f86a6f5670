"""What a model's own confidence was worth: probabilities against references, predicted Dice against the true one.

Both are told apart from the metrics: they say nothing of how good the label maps are, only whether the model knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.metrics import Row
from pipeline.evaluation.scored import NAN, RELIABILITY, ScoredCase
from pipeline.evaluation.statistics import MEAN, Estimate, doubled_ranks, estimate, mean_known

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class DicePrediction:
    """How well a model knew the Dice of one class, or its mean over classes.

    Attributes:
        class_name: a label's name, or MEAN: then each case counts by its means over the classes that it has both of.
        cases: with a predicted and a true Dice; of a structure that is not there the true one is 0.
        mae: mean absolute error of the predicted Dice; nan without cases.
        spearman: rank correlation of predicted and true Dice; nan where either has no spread.
    """

    class_name: str
    cases: int
    mae: float
    spearman: float


def estimate_reliability(cases: Sequence[ScoredCase], *, samples: int, seed: int) -> dict[str, Estimate]:
    """Return the mean over cases of each measure in RELIABILITY that any case has, with its interval."""
    patients = [case.patient for case in cases]
    found = {}
    for name in RELIABILITY:
        values = np.array([case.reliability.get(name, NAN) for case in cases])
        if not np.isnan(values).all():
            found[name] = estimate(values, samples=samples, seed=seed, patients=patients)
    return found


def assess_dice(cases: Sequence[ScoredCase]) -> list[DicePrediction]:
    """Return how well the model knew the Dice of each class, then of all; empty where it predicted none."""
    if not any(case.predicted_dice for case in cases):
        return []
    names = [row.class_name for row in cases[0].rows]
    predicted, true = (np.stack(table, axis=1) for table in zip(*map(dice_pairs, cases), strict=True))  # (classes, n)
    each = [_assess(*pair) for pair in zip(names, predicted, true, strict=True)]
    return [*each, _assess(MEAN, mean_known(predicted), mean_known(true))]


def dice_pairs(case: ScoredCase) -> tuple[FloatArray, FloatArray]:
    """Return a case's (classes,) predicted and true Dice; nan, both, where either is missing."""
    predicted = np.array([case.predicted_dice.get(row.class_name, NAN) for row in case.rows])
    true = np.array([true_dice(row) for row in case.rows])
    missing = np.isnan(predicted) | np.isnan(true)
    return np.where(missing, NAN, predicted), np.where(missing, NAN, true)


def spearman(first: FloatArray, second: FloatArray) -> float:
    """Return the rank correlation (Spearman, Am J Psychol 1904;15:72-101), ties sharing their mean rank.

    Returns:
        -1 to 1; nan where either has fewer than two different values.
    """
    a, b = (ranks - ranks.mean() for ranks in (doubled_ranks(first), doubled_ranks(second)))
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread else NAN


def _assess(class_name: str, predicted: FloatArray, true: FloatArray) -> DicePrediction:
    """Compare (cases,) predicted and true Dice, nan left out."""
    known = ~np.isnan(predicted)
    p, t = predicted[known], true[known]
    if not p.size:
        return DicePrediction(class_name, 0, NAN, NAN)
    return DicePrediction(class_name, p.size, float(np.abs(p - t).mean()), spearman(p, t))


def true_dice(row: Row) -> float:
    """Return a row's Dice, 0 of a structure that is not there; nan where nothing was predicted."""
    return 0.0 if row.status == "spurious" else row.values["dice"]
