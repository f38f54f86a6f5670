"""Members of a comparison, and what must agree before their numbers may stand beside each other.

A member is one configuration: its runs of all folds and seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

from pipeline.evaluation.scored import ScoredCase
from pipeline.evaluation.statistics import MEAN


@dataclass(frozen=True)
class MemberRun:
    """One trained fold of a member, evaluated; or all of its folds, evaluated as one ensemble.

    Attributes:
        fold, seed: of the training; no fold where it has seen every case, and of an ensemble.
        network: its name.
        parameters: that are trained.
        manifest: the data set's name and digest.
        structures: names of the labels or regions that are scored.
        budget: of the training, for people: 10 minutes, 3000 steps.
        steps, seconds: of the training; None where they are not known.
        evaluated_on: which cases: fold, test, all, or a manifest's name.
        tolerance_mm: of the normalised surface Dice.
        device: that predicted; "" where that was not written down.
        settings: of the configuration and the plan, section.key -> value.
        cases: as they were scored.
        failures: case id -> why it has no score.
        run_id: in MLflow, where it is known there.
    """

    fold: int | None
    seed: int
    network: str
    parameters: int
    manifest: str
    structures: tuple[str, ...]
    budget: str
    steps: int | None
    seconds: float | None
    evaluated_on: str
    tolerance_mm: float
    device: str
    settings: Mapping[str, str]
    cases: tuple[ScoredCase, ...]
    failures: Mapping[str, str]
    run_id: str | None


@dataclass(frozen=True)
class Member:
    """One configuration and its runs.

    Attributes:
        name: as pages and tables say it.
        runs: a run a fold and seed.
    """

    name: str
    runs: tuple[MemberRun, ...]

    @cached_property
    def by_place(self) -> dict[tuple[int, int | None], MemberRun]:
        """The runs by the place of their seed among the member's seeds, and by fold."""
        seeds = sorted({run.seed for run in self.runs})
        return {(seeds.index(run.seed), run.fold): run for run in self.runs}

    @property
    def seconds_per_case(self) -> float:
        """The median over all cases, so that what the first one waits for does not count; nan where unknown."""
        known = [case.seconds for run in self.runs for case in run.cases if not math.isnan(case.seconds)]
        return median(known) if known else float("nan")

    @property
    def peak_memory_bytes(self) -> int | None:
        """The largest of any case; None where unknown."""
        return max((case.peak_memory_bytes or 0 for run in self.runs for case in run.cases), default=0) or None

    def count(self, status: str, class_name: str) -> int:
        """Return how many rows have a status: of one class, or of all for MEAN."""
        rows = (row for run in self.runs for case in run.cases for row in case.rows)
        return sum(row.status == status for row in rows if class_name in (row.class_name, MEAN))


def differences(members: Sequence[Member], *, same_budget: bool = True) -> list[str]:
    """Return all in which members differ that must agree, a line each; none where they can be compared."""
    must_agree = {**_MUST_AGREE, **({"budgets": _budget} if same_budget else {})}
    found = [line for what, of in must_agree.items() for line in _disagreement(what, of, members)]
    for member in members:
        for (_, fold), run in member.by_place.items():
            found += [f"{member.name}, fold {fold}: case {case} failed: {why}" for case, why in run.failures.items()]
    return found + _missing_cases(members) + _other_references(members)


def _budget(member: Member) -> str:
    """Return how long a member was trained."""
    return " and ".join(sorted({run.budget for run in member.runs}))


def _folds(member: Member) -> str:
    """Return a member's folds, seed by seed: which seeds does not matter, how many does."""
    seeds = sorted({seed for seed, _ in member.by_place})
    folds = [" ".join(sorted(str(fold) for at, fold in member.by_place if at == seed)) for seed in seeds]
    return f"{folds[0]}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}" if len(set(folds)) == 1 else str(folds)


_MUST_AGREE: dict[str, Callable[[Member], str]] = {
    "data sets": lambda member: " and ".join(sorted({run.manifest for run in member.runs})),
    "classes": lambda member: " and ".join(sorted({", ".join(run.structures) for run in member.runs})),
    "folds": _folds,
    "evaluated cases": lambda member: " and ".join(sorted({run.evaluated_on for run in member.runs})),
    "surface tolerances": lambda member: " and ".join(sorted({f"{run.tolerance_mm:g} mm" for run in member.runs})),
}


def _disagreement(what: str, of: Callable[[Member], str], members: Sequence[Member]) -> list[str]:
    """Say what each member has where they differ in one thing."""
    said = {member.name: of(member) for member in members}
    if len(set(said.values())) == 1:
        return []
    return [f"different {what}: " + "; ".join(f"{name}: {value}" for name, value in said.items())]


def _missing_cases(members: Sequence[Member]) -> list[str]:
    """Name the cases that some member has scored in a fold, and another neither scored nor listed as failed."""
    every: dict[int | None, set[str]] = {}
    for run in (run for member in members for run in member.runs):
        every.setdefault(run.fold, set()).update(case.case_id for case in run.cases)
    found = []
    for member in members:
        for (_, fold), run in member.by_place.items():
            missing = every[fold] - {case.case_id for case in run.cases} - set(run.failures)
            if missing:
                found.append(f"{member.name}, fold {fold}: without {', '.join(sorted(missing))}")
    return found


def _other_references(members: Sequence[Member]) -> list[str]:
    """Name the cases whose reference has another volume in one member than in another: another label, or grid."""
    first: dict[tuple[str, str], tuple[str, float]] = {}
    found = {}
    for member in members:
        for case in (case for run in member.runs for case in run.cases):
            for row in case.rows:
                known, volume = first.setdefault((case.case_id, row.class_name), (member.name, row.reference_ml))
                both_unknown = math.isnan(volume) and math.isnan(row.reference_ml)
                if volume != row.reference_ml and not both_unknown:
                    found[case.case_id] = (
                        f"case {case.case_id}, {row.class_name}: the reference has {volume:g} ml in {known}, "
                        f"{row.reference_ml:g} ml in {member.name}"
                    )
    return list(found.values())


def warnings_of(members: Sequence[Member]) -> list[str]:
    """Return what a reader must know beside the numbers, a line each."""
    found = [f"{line}; the members had unequal chances" for line in _disagreement("budgets", _budget, members)]
    devices = sorted({run.device for member in members for run in member.runs if run.device})
    if len(devices) > 1:
        found.append(f"seconds and memory were measured on different devices: {', '.join(devices)}")
    for member in members:
        missed, spurious = member.count("missed", MEAN), member.count("spurious", MEAN)
        if missed or spurious:
            found.append(
                f"{member.name}: {missed} structures missed, {spurious} spurious: they count 0 in Dice and NSD, and "
                "have no distance, so that their patients are left out of its pairs in HD95"
            )
    return found
