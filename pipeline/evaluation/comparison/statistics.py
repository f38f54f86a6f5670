"""Statistics of paired comparisons: signed ranks, Holm's correction, and how stable a ranking is.

Written here rather than taken from scipy, whose signed-rank test is exact only without ties and zeros: distances on a
grid of voxels have many of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.statistics import doubled_ranks

FloatArray = NDArray[np.float64]

# A difference may be chance where its p is not below this.
SIGNIFICANCE = 0.05

# Differences of numbers that a table holds with six digits: what is closer than this is a tie.
_DECIMALS = 9


def without_rounding(values: Sequence[float] | FloatArray) -> FloatArray:
    """Return means or differences without their last digits, so that what ties but for these ties."""
    return np.asarray(values, dtype=np.float64).round(_DECIMALS)


def wins(differences: FloatArray) -> int:
    """Return how many differences are above 0; ties, as `signed_rank_p` takes them, and nan are not."""
    return int((without_rounding(differences) > 0).sum())


def signed_rank_p(differences: Sequence[float] | FloatArray) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test (Wilcoxon, Biometrics Bull 1945;1(6):80-83).

    Zeros take part in the ranking and are left out of the sum (Pratt, JASA 1959;54:655-667); ties share their mean
    rank. The null distribution is exact whatever the ties: each sign is as likely as the other, and the sums of all
    2^n choices are counted by adding one rank after another. With n differences that are not zero no p is below
    2^(1-n): fewer than 6 cannot reach 0.05.

    Args:
        differences: one a pair; nan are left out.

    Returns:
        p, 0 to 1; 1 where no difference is other than zero, nan where there is none at all.
    """
    known = without_rounding(differences)
    known = known[~np.isnan(known)]
    if known.size == 0:
        return float("nan")
    doubled = doubled_ranks(np.abs(known))  # whole numbers: a mean rank may end in a half
    positive = int(doubled[known > 0].sum())
    distribution = np.ones(1)  # probability of each doubled sum
    for rank in doubled[known != 0]:
        distribution = (np.pad(distribution, (0, rank)) + np.pad(distribution, (rank, 0))) / 2
    tails = distribution[: positive + 1].sum(), distribution[positive:].sum()
    return float(min(1.0, 2 * min(tails)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down rule (Scand J Statist 1979;6(2):65-70).

    Args:
        p_values: of one family of tests; nan is no test, and stays nan.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if not np.isnan(p))
    corrected, largest = [float("nan")] * len(p_values), 0.0
    for place, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p))
        corrected[index] = largest
    return corrected


def rank_shares(values: FloatArray, *, higher_is_better: bool, samples: int, seed: int) -> FloatArray:
    """Return how often each member is at each rank when the patients are drawn anew, with replacement.

    As challenges show the stability of a ranking (Wiesenfarth et al., Sci Rep 2021;11:2369). Members are ranked by
    their means; those that tie share the better rank.

    Args:
        values: (members, patients), no nan.
        higher_is_better: the metric's direction.
        samples: number of resamples, at least 1.
        seed: of the draw; equal arguments give equal shares.

    Returns:
        (members, ranks) shares, each member's adding up to 1; nan without patients.
    """
    members, patients = values.shape
    if patients == 0:
        return np.full((members, members), np.nan)
    drawn = np.random.default_rng(seed).integers(patients, size=(samples, patients))
    # How often each patient is drawn makes a resampled mean one product: (samples, patients) by (patients, members).
    times = np.stack([np.bincount(sample, minlength=patients) for sample in drawn])
    means = without_rounding(times @ values.T / patients)
    if not higher_is_better:
        means = -means
    ranks = (means[:, None, :] > means[:, :, None]).sum(axis=2)  # (samples, members), how many are better
    return np.stack([(ranks == rank).mean(axis=0) for rank in range(members)], axis=1)


def by_patient(table: FloatArray, patients: Sequence[str]) -> FloatArray:
    """Return the (..., patients) means over each patient's cases, patients in alphabetical order, nan left out.

    Args:
        table: (..., cases).
        patients: whose each case is.
    """
    _, owners = np.unique(np.asarray(patients), return_inverse=True)
    belongs = np.eye(owners.max() + 1)[owners]  # (cases, patients)
    known = ~np.isnan(table)
    counts, sums = known @ belongs, np.where(known, table, 0.0) @ belongs
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
