"""Choosing how predictions are treated by a paired test, and what such a choice is worth on cases it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.comparison.statistics import (
    SIGNIFICANCE,
    by_patient,
    signed_rank_p,
    wins,
    without_rounding,
)
from pipeline.evaluation.statistics import Estimate, FloatArray, estimate


@dataclass(frozen=True)
class Tried:
    """One treatment beside none.

    Attributes:
        difference: of the scores, treated minus untreated: mean over patients, with its interval.
        better, worse: patients; in the others they tie.
        p: of the signed-rank test.
    """

    difference: Estimate
    better: int
    worse: int
    p: float


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what it is worth.

    Attributes:
        tried: each treatment, in the order of the table.
        chosen: its index in `tried`; None: predictions are left as they are.
        untreated: mean score over patients.
        cross_fitted: the gain where each fold's cases are treated by what the other folds choose: an honest estimate,
            for no case has a say in its own treatment.
        by_fold: fold -> what the other folds choose for it, as `chosen`.
    """

    tried: tuple[Tried, ...]
    chosen: int | None
    untreated: float
    cross_fitted: Estimate
    by_fold: dict[int, int | None]


def choose(
    table: FloatArray, patients: Sequence[str], folds: Sequence[int], *, samples: int = 2000, seed: int = 0
) -> Choice:
    """Choose one of several treatments, or none.

    That with the best mean over patients is taken where the mean rises, the signed-rank test over patients says that
    this is no chance, and the choice made in this way on the other folds helps the folds left out.

    Args:
        table: (1 + treatments, cases) scores, the higher the better; the first row is untreated. A case without a
            score has nan in all rows.
        patients: whose each case is.
        folds: of each case; at least two.
        samples: resamples of the bootstraps.
        seed: of the bootstraps.

    Raises:
        ValueError: all cases are of one fold.
    """
    owners, numbers = np.asarray(patients), np.asarray(folds)
    if np.unique(numbers).size < 2:
        raise ValueError("cases of at least two folds are needed: a choice is judged on cases that had no say in it")
    gains = np.full(numbers.size, np.nan)
    by_fold: dict[int, int | None] = {}
    for fold in np.unique(numbers):
        others = numbers != fold
        picked = _best(table[:, others], owners[others])
        by_fold[int(fold)] = picked
        gains[~others] = 0.0 * table[0, ~others] if picked is None else (table[1 + picked] - table[0])[~others]
    cross_fitted = estimate(by_patient(gains[None], patients)[0], samples=samples, seed=seed)
    differences = by_patient(table[1:] - table[0], patients)
    return Choice(
        tried=tuple(_tried(row, samples, seed) for row in differences),
        chosen=_best(table, owners) if cross_fitted.mean > 0 else None,
        untreated=_mean(by_patient(table[:1], patients)[0]),
        cross_fitted=cross_fitted,
        by_fold=by_fold,
    )


def _best(table: FloatArray, patients: Sequence[str] | FloatArray) -> int | None:
    """Return the treatment with the largest gain, the first of equal ones; None where that may be chance."""
    differences = by_patient(table[1:] - table[0], list(patients))
    means = without_rounding([_mean(row) for row in differences])
    if not means.size or np.isnan(means).all():
        return None
    index = int(np.nanargmax(means))
    return index if means[index] > 0 and signed_rank_p(differences[index]) < SIGNIFICANCE else None


def _tried(differences: FloatArray, samples: int, seed: int) -> Tried:
    """Describe a treatment by its (patients,) differences."""
    return Tried(
        difference=estimate(differences, samples=samples, seed=seed),
        better=wins(differences),
        worse=wins(-differences),
        p=signed_rank_p(differences),
    )


def _mean(values: FloatArray) -> float:
    """Return the mean of what is known; nan where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
