"""Statistics over per-case tables: means with bootstrap intervals, missed and spurious beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.metrics import Row
from pipeline.records import json_number

FloatArray = NDArray[np.float64]

CONFIDENCE = 0.95

# The line of a summary that is the mean over classes.
MEAN = "mean"

# Drawn indices held in memory at a time.
_DRAWS_AT_A_TIME = 2**22


@dataclass(frozen=True)
class Estimate:
    """The mean of one metric over cases.

    Attributes:
        mean: nan where no case has a value.
        low, high: ends of its 95 % interval; nan with fewer than two patients.
        cases: cases with a value.
    """

    mean: float
    low: float
    high: float
    cases: int

    def as_json(self, counted: str = "cases") -> dict[str, float | int | None]:
        """Return the estimate as JSON knows it.

        Args:
            counted: what a value is of, the key of their number: cases, or patients.
        """
        numbers = {"mean": self.mean, "low": self.low, "high": self.high}
        return {name: json_number(number) for name, number in numbers.items()} | {counted: self.cases}


@dataclass(frozen=True)
class ClassSummary:
    """One label or region, or the mean over them.

    Attributes:
        class_name: its name, or MEAN.
        scored: rows with reference and prediction.
        missed: rows with a reference and no prediction.
        spurious: rows with a prediction and no reference.
        metrics: metric name -> estimate over the scored rows.
        not_annotated: rows of cases in which nobody looked for it.
    """

    class_name: str
    scored: int
    missed: int
    spurious: int
    metrics: dict[str, Estimate]
    not_annotated: int = 0


def bootstrap_interval(
    values: Sequence[float] | FloatArray,
    *,
    samples: int,
    seed: int,
    patients: Sequence[str] | None = None,
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """Return the bootstrap percentile interval of the mean (Efron and Tibshirani, 1993, chapter 13).

    Patients are drawn with replacement, each with all of its cases, since two scans of one patient are not independent.

    Args:
        values: one a case; nan are left out.
        samples: number of resamples, at least 1.
        seed: of the draw; equal arguments give equal intervals.
        patients: whose each value is; None: each value is of another patient.
        confidence: of the interval, 0 to 1.

    Returns:
        Its ends; nan, nan where fewer than two patients have a value.
    """
    array = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(array)
    owners = np.arange(array.size) if patients is None else np.asarray(patients)
    return _ratio_interval(array[known], np.ones(known.sum()), owners[known], samples, seed, confidence)


def estimate(values: FloatArray, *, samples: int, seed: int, patients: Sequence[str] | None = None) -> Estimate:
    """Return the mean of what is known of the values, with its `bootstrap_interval`; nan where nothing is."""
    known = values[~np.isnan(values)]
    low, high = bootstrap_interval(values, samples=samples, seed=seed, patients=patients)
    return Estimate(float(known.mean()) if known.size else float("nan"), low, high, int(known.size))


def estimate_ratio(
    ratios: Sequence[tuple[float, float]], *, samples: int, seed: int, patients: Sequence[str]
) -> Estimate:
    """Return the ratio of two sums over all cases, with its bootstrap interval; patients are drawn as for a mean.

    Args:
        ratios: (above, below) the line, one a case.
        samples: number of resamples, at least 1.
        seed: of the draw.
        patients: whose each case is.

    Returns:
        nan where all that stands below the line is 0; its cases are those that have anything there.
    """
    above, below = np.asarray(ratios, dtype=np.float64).reshape(-1, 2).T
    low, high = _ratio_interval(above, below, np.asarray(patients), samples, seed, CONFIDENCE)
    total = float(below.sum())
    return Estimate(float(above.sum()) / total if total else float("nan"), low, high, int(np.count_nonzero(below)))


def summarise(
    rows: Mapping[str, Sequence[Row]], *, samples: int, seed: int, patients: Mapping[str, str] | None = None
) -> list[ClassSummary]:
    """Summarise a per-case table by class, and over classes.

    A case's value over classes is the mean over the classes that are scored in it; a case in which none is
    has no value. What that leaves out stands in `missed` and `spurious`.

    Args:
        rows: case id -> a row a class, the same classes in the same order for each case.
        samples: resamples of the bootstrap.
        seed: of the bootstrap.
        patients: case id -> patient; None: each case is of another patient.

    Returns:
        A summary a class, then one with the name MEAN; empty without cases.
    """
    if not rows:
        return []
    owners = [patients[case] if patients else case for case in rows]
    by_class = list(zip(*rows.values(), strict=True))
    estimated = partial(estimate, samples=samples, seed=seed, patients=owners)
    names = list(by_class[0][0].values)
    # (classes, cases) a metric
    tables = {name: np.array([[row.values[name] for row in column] for column in by_class]) for name in names}
    summaries = [
        _summary(column[0].class_name, column, {name: estimated(tables[name][index]) for name in names})
        for index, column in enumerate(by_class)
    ]
    every_row = [row for column in by_class for row in column]
    return [*summaries, _summary(MEAN, every_row, {name: estimated(mean_known(tables[name])) for name in names})]


def mean_known(table: FloatArray) -> FloatArray:
    """Return the (n,) mean over the first axis of an (m, n) table, nan left out; nan where all are."""
    known = ~np.isnan(table)
    counts = known.sum(axis=0)
    sums = np.where(known, table, 0.0).sum(axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def with_mean(table: FloatArray) -> FloatArray:
    """Return a (classes, cases) table with a last line: the mean over the classes that have a value."""
    return np.concatenate([table, mean_known(table)[None]])


def doubled_ranks(values: FloatArray) -> NDArray[np.int64]:
    """Return twice the rank of each value, from 1; values that tie have their mean rank."""
    _, groups, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray(2 * last - counts + 1, dtype=np.int64)[groups]


def _summary(class_name: str, rows: Sequence[Row], metrics: dict[str, Estimate]) -> ClassSummary:
    """Count the rows by status beside their estimates."""
    statuses = [row.status for row in rows]
    return ClassSummary(
        class_name=class_name,
        scored=statuses.count("scored"),
        missed=statuses.count("missed"),
        spurious=statuses.count("spurious"),
        not_annotated=statuses.count("not_annotated"),
        metrics=metrics,
    )


def _ratio_interval(
    above: FloatArray, below: FloatArray, owners: NDArray[Any], samples: int, seed: int, confidence: float
) -> tuple[float, float]:
    """Return the bootstrap interval of a ratio of two sums, owners drawn; nan, nan with fewer than two of them."""
    _, owners = np.unique(owners, return_inverse=True)
    sums, counts = (np.bincount(owners, weights=values).astype(np.float64) for values in (above, below))
    if counts.size < 2 or not counts.any():
        return float("nan"), float("nan")
    ratios = _resampled_ratios(sums, counts, samples, np.random.default_rng(seed))
    # nan where, by chance, nobody was drawn who has anything below the line.
    low, high = np.nanquantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _resampled_ratios(sums: FloatArray, counts: FloatArray, samples: int, rng: np.random.Generator) -> FloatArray:
    """Return (samples,) ratios, patients drawn with replacement; in blocks, so that memory stays bounded."""
    block = max(1, _DRAWS_AT_A_TIME // sums.size)
    ratios = []
    for start in range(0, samples, block):
        drawn = rng.integers(sums.size, size=(min(block, samples - start), sums.size))
        above, below = sums[drawn].sum(axis=1), counts[drawn].sum(axis=1)
        ratios.append(np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0))
    return np.concatenate(ratios)
