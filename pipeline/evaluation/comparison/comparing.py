"""Comparing members on the same cases: means with intervals, paired tests, and rankings.

Seeds are averaged case by case and cases patient by patient before anything else, so that a patient counts once and a
pair is a patient. A structure that a member missed, or found where there is none, counts 0 in the metrics from 0 to 1,
for else whoever misses the hard cases would gain by it; and where some member found one that is not there, those that
found none count 1. It has no distance: a pair lacks one where either has none, and how many are left stands beside
every number.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import EvaluationError
from pipeline.evaluation.comparison.members import Member, differences, warnings_of
from pipeline.evaluation.comparison.statistics import by_patient, holm, rank_shares, signed_rank_p, wins
from pipeline.evaluation.metrics import METRICS, Row
from pipeline.evaluation.scored import ScoredCase
from pipeline.evaluation.statistics import MEAN, Estimate, estimate, with_mean

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Two members, paired patient by patient, in one metric and class.

    Attributes:
        metric, class_name: what is compared; MEAN is the mean over the classes that both have.
        first, second: the members.
        difference: mean of first minus second and its 95 % interval, over the patients in which both have a value.
        better, worse: patients in which the first is better, or worse; in the others they tie.
        p: of the signed-rank test.
        p_holm: corrected for the number of pairs in this metric and class.
    """

    metric: str
    class_name: str
    first: str
    second: str
    difference: Estimate
    better: int
    worse: int
    p: float
    p_holm: float


@dataclass(frozen=True)
class Ranking:
    """The members' ranks in one metric and class, patients drawn anew.

    Attributes:
        metric, class_name: what is ranked.
        patients: in which every member has a value.
        shares: member -> share of the resamples in which it is at rank 1, 2, ...
    """

    metric: str
    class_name: str
    patients: int
    shares: Mapping[str, tuple[float, ...]]

    def mean_rank(self, member: str) -> float:
        """Return a member's rank averaged over the resamples, 1 the best."""
        return float(sum(rank * share for rank, share in enumerate(self.shares[member], start=1)))


@dataclass(frozen=True)
class ComparisonResult:
    """All that was found.

    Attributes:
        name: of the comparison.
        members: in the order they were named.
        baseline: the member that the others are drawn against.
        class_names: the foreground classes, then MEAN.
        estimates: (member, metric, class) -> mean over patients with its interval.
        pairs: of all members, metrics and classes.
        rankings: of all metrics and classes.
        scores: (metric, member) -> (classes and MEAN, cases) values, seeds averaged.
        cases: ids, in the order of `scores`.
        patients: that the cases are of.
        warnings: what a reader must know beside the numbers.
    """

    name: str
    members: tuple[Member, ...]
    baseline: str
    class_names: tuple[str, ...]
    estimates: Mapping[tuple[str, str, str], Estimate]
    pairs: tuple[Pair, ...]
    rankings: tuple[Ranking, ...]
    scores: Mapping[tuple[str, str], FloatArray]
    cases: tuple[str, ...]
    patients: int
    warnings: tuple[str, ...]

    def ranking(self, metric: str, class_name: str) -> Ranking:
        """Return one of the rankings."""
        return next(r for r in self.rankings if (r.metric, r.class_name) == (metric, class_name))

    def differing_settings(self) -> dict[str, list[str]]:
        """Return the settings in which the members differ: section.key -> a value a member, "–" where it has none."""
        first = [member.runs[0].settings for member in self.members]
        table = {key: [settings.get(key, "–") for settings in first] for key in sorted({k for s in first for k in s})}
        return {key: values for key, values in table.items() if len(set(values)) > 1}


def compare(
    name: str,
    members: Sequence[Member],
    *,
    baseline: str | None = None,
    samples: int = 2000,
    seed: int = 0,
    same_budget: bool = True,
) -> ComparisonResult:
    """Compare members that were trained and evaluated alike.

    Args:
        name: of the comparison.
        members: at least two, each with a name of its own.
        baseline: name of the member that the others are drawn against; None: the first.
        samples: resamples of the bootstraps.
        seed: of the bootstraps.
        same_budget: whether differing budgets are refused; else they are a warning.

    Raises:
        EvaluationError: too few members, an unknown baseline, or members that cannot be compared; names every
            difference, one a line.
    """
    names = [member.name for member in members]
    if len(names) < 2 or len(set(names)) < len(names):
        raise EvaluationError(f"a comparison takes two or more members with different names, got {', '.join(names)}")
    if baseline is not None and baseline not in names:
        raise EvaluationError(f"--baseline {baseline}: is none of the members {', '.join(names)}")
    if found := differences(members, same_budget=same_budget):
        raise EvaluationError("\n".join(found))
    return _Scores(name, tuple(members), samples, seed).result(baseline or names[0])


@dataclass(frozen=True)
class _Scores:
    """The members' scores as arrays, from which all results are made."""

    name: str
    members: tuple[Member, ...]
    samples: int
    seed: int

    @cached_property
    def patients(self) -> dict[str, str]:
        """Case id -> patient, of the cases of all folds."""
        return {case.case_id: case.patient for run in self.members[0].runs for case in run.cases}

    @cached_property
    def class_names(self) -> list[str]:
        """The labels or regions that are scored."""
        return list(self.members[0].runs[0].structures)

    @cached_property
    def by_case(self) -> dict[tuple[str, str], FloatArray]:
        """(metric, member) -> (classes, cases); a case without a value in one run has none."""
        return {(metric, member.name): self._table(member, metric) for member in self.members for metric in METRICS}

    def _table(self, member: Member, metric: str) -> FloatArray:
        """Return one member's (classes, cases) values of a metric, averaged over the runs that scored a case."""
        at = {case: index for index, case in enumerate(self.patients)}
        sums, runs = np.zeros((len(self.class_names), len(at))), np.zeros(len(at))
        for case in (case for run in member.runs for case in run.cases):
            sums[:, at[case.case_id]] += [self._value(case, row, metric) for row in case.rows]
            runs[at[case.case_id]] += 1
        return np.asarray(sums / runs)

    @cached_property
    def invented(self) -> set[tuple[str, str]]:
        """(case, class) of the structures that are not there and that some member has found all the same."""
        cases = (case for member in self.members for run in member.runs for case in run.cases)
        return {(case.case_id, row.class_name) for case in cases for row in case.rows if row.status == "spurious"}

    def _value(self, case: ScoredCase, row: Row, metric: str) -> float:
        """Return what a row counts as: in metrics from 0 to 1 a structure missed or invented 0, and one rightly not
        found where another member invents it, 1.
        """
        if METRICS[metric].higher_is_better:
            if row.status in ("missed", "spurious"):
                return 0.0
            if row.status == "both_empty" and (case.case_id, row.class_name) in self.invented:
                return METRICS[metric].best
        return row.values[metric]

    def result(self, baseline: str) -> ComparisonResult:
        """Return all that can be said."""
        class_names = (*self.class_names, MEAN)
        return ComparisonResult(
            name=self.name,
            members=self.members,
            baseline=baseline,
            class_names=class_names,
            estimates={key: estimate for metric in METRICS for key, estimate in self._estimates(metric)},
            pairs=tuple(
                pair for metric in METRICS for index in range(len(class_names)) for pair in self._pairs(metric, index)
            ),
            rankings=tuple(self._ranking(metric, index) for metric in METRICS for index in range(len(class_names))),
            scores={key: with_mean(table) for key, table in self.by_case.items()},
            cases=tuple(self.patients),
            patients=len(set(self.patients.values())),
            warnings=tuple(warnings_of(self.members)),
        )

    def _estimates(self, metric: str) -> list[tuple[tuple[str, str, str], Estimate]]:
        """Return each member's means over patients, class by class."""
        tables = {member.name: self._per_patient(self.by_case[metric, member.name]) for member in self.members}
        return [
            ((name, metric, class_name), self._estimate(row))
            for name, table in tables.items()
            for class_name, row in zip((*self.class_names, MEAN), table, strict=True)
        ]

    def _pairs(self, metric: str, index: int) -> list[Pair]:
        """Return each pair of members in one metric and class."""
        class_name = (*self.class_names, MEAN)[index]
        pairs = list(itertools.combinations([member.name for member in self.members], 2))
        columns = [
            self._per_patient(self.by_case[metric, first] - self.by_case[metric, second])[index]
            for first, second in pairs
        ]
        p_values = [signed_rank_p(column) for column in columns]
        sign = 1 if METRICS[metric].higher_is_better else -1
        return [
            Pair(
                metric=metric,
                class_name=class_name,
                first=first,
                second=second,
                difference=self._estimate(column),
                better=wins(sign * column),
                worse=wins(-sign * column),
                p=p,
                p_holm=p_holm,
            )
            for (first, second), column, p, p_holm in zip(pairs, columns, p_values, holm(p_values), strict=True)
        ]

    def _ranking(self, metric: str, index: int) -> Ranking:
        """Rank the members in one metric and class, over the patients in which every member has a value."""
        # A case that one member lacks is left out for all; else the mean over classes would be over other classes.
        tables = np.stack([self.by_case[metric, member.name] for member in self.members])
        tables[:, np.isnan(tables).any(axis=0)] = np.nan
        values = np.stack([self._per_patient(table)[index] for table in tables])
        values = values[:, ~np.isnan(values).any(axis=0)]
        better = METRICS[metric].higher_is_better
        shares = rank_shares(values, higher_is_better=better, samples=self.samples, seed=self.seed)
        by_name = {member.name: tuple(map(float, row)) for member, row in zip(self.members, shares, strict=True)}
        return Ranking(metric, (*self.class_names, MEAN)[index], values.shape[1], by_name)

    def _per_patient(self, table: FloatArray) -> FloatArray:
        """Return (classes and MEAN, patients) of a (classes, cases) table."""
        return by_patient(with_mean(table), list(self.patients.values()))

    def _estimate(self, values: FloatArray) -> Estimate:
        """Return the mean over patients and its interval."""
        return estimate(values, samples=self.samples, seed=self.seed)
