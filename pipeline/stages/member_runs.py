"""Trained and evaluated runs as members of a comparison: which folders are meant, and what is read from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Config, TrainingSection
from pipeline.config_loading import load_config
from pipeline.data.plan import Plan, read_plan
from pipeline.errors import EvaluationError, ModelError
from pipeline.evaluation.comparison.members import MemberRun
from pipeline.evaluation.scored import ScoredCase, read_case_table
from pipeline.model import CONFIG, DESCRIPTION, PLAN, ModelDescription, load_model, read_description
from pipeline.stages.models import BEST, LAST, has_ended
from pipeline.stages.workspace import Workspace
from pipeline.tracking import flatten, is_tracked, read_state, tracked_runs, training_seconds

CASES, SUMMARY = "cases.csv", "summary.json"

# Settings that say where a run is kept and how it was called, not what it is.
_UNTOLD = {"name", "workspace", "tracking", "evaluation"}


def run_folders(target: str, workspace: Workspace, cases: str) -> tuple[list[Path], str]:
    """Return the run folders that a name means, and which cases they are to be compared on.

    Args:
        target: a run's folder, an experiment's (all of its folds), an evaluation's, or runs:/ID of a run in the
            workspace.
        workspace: where runs:/ID is looked up.
        cases: fold, test, all or a manifest's name; an evaluation's folder says it itself.

    Raises:
        ModelError: there is no such run.
    """
    folder = _by_id(target, workspace) if target.startswith("runs:/") else Path(target).resolve()
    if (folder / CASES).is_file():
        folder, cases = folder.parent.parent, folder.name
    found = [folder] if (folder / CONFIG).is_file() else sorted(path.parent for path in folder.glob(f"fold_*/{CONFIG}"))
    if not found:
        raise ModelError(f"{target}: neither a run's folder, nor an experiment's, nor an evaluation's inside of one")
    return found, cases


@dataclass(frozen=True)
class _Evaluation:
    """What `medseg evaluate` has written: its summary, and the cases as they were scored."""

    summary: dict[str, Any]
    cases: tuple[ScoredCase, ...]

    def is_of(self, model: ModelDescription) -> bool:
        """Tell whether a model took part."""
        return model.created in self.summary["facts"]["trained"].split(", ")

    @property
    def is_of_ensemble(self) -> bool:
        """Whether several folds' models labelled each case together: then it is of no fold."""
        return any(case.fold is None for case in self.cases)


def read_runs(folders: Sequence[Path], cases: str) -> tuple[MemberRun, ...]:
    """Read what a comparison needs of an experiment's folds.

    Where they were evaluated together, as an ensemble, they are one run of no fold, with the parameters, steps and
    seconds of all.

    Raises:
        ModelError: a training is not finished.
        EvaluationError: a best model is not evaluated on these cases.
    """
    for folder in folders:
        _refuse_unfinished(folder)
    together = _read_evaluation(folders[0].parent / "evaluation" / cases) if len(folders) > 1 else None
    bests = [read_description(folder / BEST / DESCRIPTION) for folder in folders]
    if together is None or not together.is_of_ensemble or not all(map(together.is_of, bests)):
        return tuple(read_run(folder, cases) for folder in folders)
    members = [_member_run(folder, cases, together) for folder in folders]
    seconds = [member.seconds for member in members]
    whole = replace(
        members[0],
        fold=None,
        parameters=sum(member.parameters for member in members),
        steps=sum(member.steps or 0 for member in members),
        seconds=None if None in seconds else sum(filter(None, seconds)),
        cases=together.cases,
        run_id=_run_id(folders[0].parent),
    )
    return (whole,)


def read_run(folder: Path, cases: str) -> MemberRun:
    """Read what a comparison needs of one trained and evaluated fold, by the newest evaluation of its best model.

    Raises:
        ModelError: its training is not finished.
        EvaluationError: its best model is not evaluated on these cases.
    """
    _refuse_unfinished(folder)
    best = read_description(folder / BEST / DESCRIPTION)
    summaries = [at / "evaluation" / cases / SUMMARY for at in (folder, folder.parent)]
    there = [summary for summary in summaries if summary.is_file()]
    for summary in sorted(there, key=lambda summary: summary.stat().st_mtime_ns, reverse=True):
        found = _read_evaluation(summary.parent)
        if found and found.is_of(best) and (best.fold is None or not found.is_of_ensemble):
            return _member_run(folder, cases, found)
    raise EvaluationError(
        f"{folder}: its best model is not evaluated on --cases {cases}; run `medseg evaluate {folder} --cases {cases}`"
    )


def _refuse_unfinished(folder: Path) -> None:
    """Raise where a training has not come to its end."""
    if not has_ended(folder):
        raise ModelError(f"{folder}: its training is not finished; `medseg train --resume` goes on with it")


def _member_run(folder: Path, cases: str, evaluation: _Evaluation) -> MemberRun:
    """Return a fold's run with its part of an evaluation."""
    config, plan = load_config(folder / CONFIG), read_plan(folder / BEST / PLAN)
    best = read_description(folder / BEST / DESCRIPTION)
    return MemberRun(
        fold=best.fold,
        seed=config.seed,
        network=best.network.name,
        parameters=_parameters(folder / BEST),
        manifest=f"{best.manifest_name}@{best.manifest_digest[:12]}",
        structures=tuple(plan.structures),
        budget=budget_of(config.training),
        steps=read_description(folder / LAST / DESCRIPTION).step,
        seconds=training_seconds(folder),
        evaluated_on=cases,
        tolerance_mm=evaluation.summary["surface_tolerance_mm"],
        device=evaluation.summary.get("device", ""),
        settings=_settings(config, plan),
        cases=tuple(case for case in evaluation.cases if case.fold == best.fold),
        failures=evaluation.summary["failures"],
        run_id=_run_id(folder),
    )


def budget_of(section: TrainingSection) -> str:
    """Return a training's budget for people: minutes, or steps, in which epochs are counted too."""
    steps = section.budgeted_steps
    return f"{section.budget.minutes:g} minutes" if steps is None else f"{steps} steps"


def _by_id(target: str, workspace: Workspace) -> Path:
    """Return the folder of the run with an id of MLflow's."""
    wanted = target.removeprefix("runs:/")
    for folder in tracked_runs(workspace.runs):
        if read_state(folder).run_id == wanted:
            return folder
    raise ModelError(f"{target}: no run in {workspace.runs} has this id; name its folder, or another --workspace")


def _read_evaluation(folder: Path) -> _Evaluation | None:
    """Read an evaluation, where there is one."""
    if not (folder / SUMMARY).is_file():
        return None
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return _Evaluation(summary, tuple(read_case_table(folder / CASES)))


def _run_id(folder: Path) -> str | None:
    """Return a folder's run in MLflow, where it is known there."""
    return read_state(folder).run_id if is_tracked(folder) else None


def _parameters(model: Path) -> int:
    """Return how many parameters a model's network has; the weights' file would count buffers too."""
    network = load_model(model, torch.device("cpu")).network
    return sum(parameter.numel() for parameter in network.parameters())


def _settings(config: Config, plan: Plan) -> dict[str, str]:
    """Return all settings of a run as text."""
    said = config.model_dump(mode="json", exclude=_UNTOLD)
    return dict(flatten({**said, "plan": plan.model_dump(mode="json", exclude={"reasons"})}))


def names_of(targets: Sequence[str], runs: Sequence[Sequence[Path]]) -> list[str]:
    """Return a member's name a target: its experiment's, with the target behind it where two would be the same."""
    names = [load_config(folders[0] / CONFIG).name for folders in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({target})" for name, target in zip(names, targets, strict=True)
    ]
