"""`medseg find-best`: which configuration to use, by a paired test on out-of-fold predictions, and with which rules.

Neither asks a network: `medseg evaluate` has kept what each fold's model made of the cases that it had not seen, and
what it has not kept is made now.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.plan import read_plan
from pipeline.errors import EvaluationError
from pipeline.evaluation.comparison import report as comparison_report
from pipeline.evaluation.comparison.comparing import ComparisonResult, compare
from pipeline.evaluation.comparison.members import Member
from pipeline.evaluation.comparison.statistics import SIGNIFICANCE
from pipeline.evaluation.statistics import MEAN, Estimate
from pipeline.model import PLAN
from pipeline.records import write_json
from pipeline.stages import evaluate
from pipeline.stages.compare import joined, publish
from pipeline.stages.evaluating.cases import own_manifest
from pipeline.stages.evaluating.out_of_fold import OutOfFold
from pipeline.stages.member_runs import read_run
from pipeline.stages.models import models_of_experiment
from pipeline.stages.postprocessing.search import Search, keep_rules, search
from pipeline.stages.workspace import Workspace

log = logging.getLogger(__name__)

METRIC = "dice"


@dataclass(frozen=True)
class Verdict:
    """Which member to use.

    Attributes:
        best: the one with the highest mean Dice over patients.
        recommended: the cheapest of those that cannot be told from it.
        level: the members that the paired test cannot tell from the best, though it could, and the best itself.
        reason: for people.
    """

    best: str
    recommended: str
    level: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class FindBestReport:
    """What was found, and where it lies.

    Attributes:
        verdict: which configuration to use.
        comparison: of all of them; None of a single one.
        postprocessing: what was tried on the recommended one's predictions; None where that was not wanted.
        remarks: what a reader must know beside the numbers.
        experiment: folder of the recommended one.
        folder: of the results.
    """

    verdict: Verdict
    comparison: ComparisonResult | None
    postprocessing: Search | None
    remarks: tuple[str, ...]
    experiment: Path
    folder: Path

    @property
    def command(self) -> str:
        """How to segment with the ensemble of the recommended configuration's folds."""
        return f"medseg segment INPUT... --model {shlex.quote(str(self.experiment))} --out FOLDER"

    def as_text(self) -> str:
        """Return the members as a table, the verdict, the rules, and the command to use."""
        parts = [comparison_report.as_text(self.comparison)] if self.comparison else []
        parts += [f"note: {remark}" for remark in self.remarks] + [self.verdict.reason]
        parts += [self.postprocessing.as_text()] if self.postprocessing else []
        return "\n".join([*parts, f"report: {self.folder}", f"use: {self.command}"])

    def as_json(self) -> dict[str, Any]:
        """Return the verdict for machines."""
        chosen = self.postprocessing
        return {
            "best": self.verdict.best,
            "recommended": self.verdict.recommended,
            "within_noise_of_the_best": list(self.verdict.level),
            "reason": self.verdict.reason,
            "remarks": list(self.remarks),
            "postprocessing": chosen and chosen.rules.model_dump(mode="json"),
            "labels": chosen and {one.label: one.as_json() for one in chosen.labels},
            "command": self.command,
        }


@dataclass(frozen=True)
class _Candidate:
    """A configuration with its folds' models and what they scored on the cases that they had not seen."""

    config: Config
    models: tuple[Path, ...]
    member: Member
    remark: str

    @property
    def runs(self) -> list[Path]:
        """The run folders of its folds."""
        return [model.parent.parent for model in self.models]

    @property
    def experiment(self) -> Path:
        """Its folder."""
        return self.runs[0].parent


def run(
    configs: Sequence[Config], *, postprocessing: bool = True, device: str = "auto", out: Path | None = None
) -> FindBestReport:
    """Find the best of several trained configurations, and the postprocessing that helps it.

    Configurations are compared as their networks label, before rules that were chosen afterwards. Rules are chosen for
    the recommended one and written into its models' folders, from which `segment` and `evaluate` take them.

    Args:
        configs: each an experiment, trained on the same folds of the same cases; one alone has its rules chosen.
        postprocessing: whether rules are chosen.
        device: auto, cpu, cuda or cuda:N, for predictions that are not kept.
        out: folder of the results; None: comparisons/find_best_NAME in the workspace.

    Raises:
        EvaluationError: they cannot be compared, or a case has failed; names every reason.
        ModelError: a configuration is not trained, or a training has not ended.
    """
    found = [_candidate(config, device) for config in configs]
    root = configs[0].workspace
    name = joined([candidate.member.name for candidate in found])
    comparison = None
    verdict = Verdict(name, name, (name,), f"{name}: the only configuration")
    if len(found) > 1:
        comparison = compare(name, [candidate.member for candidate in found], same_budget=False)
        verdict = verdict_of(comparison)
    winner = next(candidate for candidate in found if candidate.member.name == verdict.recommended)
    chosen = _chosen(winner) if postprocessing else None
    folder = (out or Workspace(root).comparisons / f"find_best_{name}").resolve()
    remarks = tuple(f"{candidate.member.name}: {candidate.remark}" for candidate in found if candidate.remark)
    report = FindBestReport(verdict, comparison, chosen, remarks, winner.experiment, folder)
    write_json(folder / "find_best.json", report.as_json())
    if comparison is not None:
        said = replace(comparison, warnings=(*comparison.warnings, *remarks, verdict.reason))
        publish(said, [folder for candidate in found for folder in candidate.runs], folder, root)
    return report


def verdict_of(result: ComparisonResult) -> Verdict:
    """Say which member to use: the best, or the cheapest of those that the paired test cannot tell from it.

    With so few patients that the test could tell no members apart, however far they lie apart, it is the best.
    """
    means = {member.name: result.estimates[member.name, METRIC, MEAN].mean for member in result.members}
    best = max(means, key=lambda name: means[name])
    pairs = [pair for pair in result.pairs if (pair.metric, pair.class_name) == (METRIC, MEAN)]
    # The smallest p of so many signs, by Holm's rule times the number of pairs.
    can_tell = len(pairs) * 2.0 ** (1 - result.patients) < SIGNIFICANCE
    level = [best]
    said = []
    for pair in pairs:
        if best in (pair.first, pair.second):
            other = pair.second if pair.first == best else pair.first
            level += [other] if can_tell and not pair.p_holm < SIGNIFICANCE else []
            said.append(f"{other} {_signed(pair.difference, pair.first == best)}, p {pair.p_holm:.2g}")
    cost, unit = _costs(result.members)
    recommended = min(level, key=lambda name: cost[name])
    reason = f"{best} has the best mean Dice, {means[best]:.4f}; against it {'; '.join(said)} (corrected by Holm)"
    if not can_tell:
        reason += f". {result.patients} patients are too few for the test to tell any from another"
    elif recommended != best:
        reason += f". The difference to {recommended} is within noise, and that is cheaper"
        reason += f" ({cost[recommended]:.3g} against {cost[best]:.3g} {unit})"
    elif len(level) > 1:
        reason += f". {' and '.join(level[1:])} cannot be told from it, and cost no less"
    return Verdict(best, recommended, tuple(level), f"{reason}. Use {recommended}")


def _costs(members: Sequence[Member]) -> tuple[dict[str, float], str]:
    """Return what a case costs with each member: seconds where one device measured all, else parameters."""
    devices = {run.device for member in members for run in member.runs}
    seconds = {member.name: member.seconds_per_case for member in members}
    if len(devices) == 1 and not any(math.isnan(value) for value in seconds.values()):
        return seconds, "s a case"
    return {member.name: float(max(run.parameters for run in member.runs)) for member in members}, "parameters"


def _signed(difference: Estimate, first_is_best: bool) -> str:
    """Say how far a member lies from the best, with its interval."""
    sign = -1 if first_is_best else 1
    low, high = sorted((sign * difference.low, sign * difference.high))
    return f"{sign * difference.mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _candidate(config: Config, device: str) -> _Candidate:
    """Bring an experiment's out-of-fold predictions up to date, and read what they scored."""
    report = evaluate.run(config, device=device)
    if report.failures:
        failed = "\n".join(f"{config.name}: case {case} failed: {why}" for case, why in report.failures.items())
        raise EvaluationError(failed)
    models = tuple(models_of_experiment(Workspace(config.workspace).experiment(config.name).resolve()))
    kept = OutOfFold(models[0].parents[2]).of_models(models)
    runs = []
    for model in models:
        evaluated = read_run(model.parent.parent, "fold")
        evaluated = replace(
            evaluated,
            cases=tuple(case.scored for case in kept if case.fold == evaluated.fold),
            failures=report.failures,
            tolerance_mm=report.evaluation.tolerance_mm,
            device=report.evaluation.device,
        )
        runs.append(evaluated)
    folds = report.evaluation.cross_validation
    return _Candidate(config, models, Member(config.name, tuple(runs)), folds.remark if folds else "")


def _chosen(candidate: _Candidate) -> Search:
    """Choose rules for an experiment, and keep them."""
    config, plan = candidate.config, read_plan(candidate.models[0] / PLAN)
    samples = config.evaluation.bootstrap_samples
    found = search(candidate.experiment, candidate.models, own_manifest(config), plan, samples=samples)
    keep_rules(found, candidate.models)
    return found
