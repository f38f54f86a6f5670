"""A study: which configurations, seeds and folds are compared, and how what is missing of it is made."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pipeline.config import Config
from pipeline.config_loading import as_override, load_config, record_problem, with_absolute_paths
from pipeline.config_yaml import Problem, read_file
from pipeline.errors import ConfigError, EvaluationError, PipelineError
from pipeline.evaluation.comparison.members import Member, MemberRun
from pipeline.records import Record
from pipeline.stages.dataset import dataset_of
from pipeline.stages.fold.identity import configuration_digest, initial_model_of
from pipeline.stages.initial_weights import initial_digest
from pipeline.stages.member_runs import budget_of, read_run
from pipeline.stages.models import FACTS
from pipeline.stages.workspace import Workspace

log = logging.getLogger(__name__)

# The cases that a study's runs are evaluated on as they are made.
MADE_ON = "fold"


class Study(Record):
    """A study's YAML.

    Attributes:
        name: of the comparison and its folder.
        configs: one a member; in the YAML relative to it.
        seeds: each configuration is trained with each.
        folds: each configuration is trained for each.
        overrides: `set` in the YAML: section.key -> value, the same for all, as `--set` does it; paths in the YAML
            relative to it.
        baseline: the configuration that the others are drawn against; None: the first.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    configs: Annotated[tuple[Path, ...], Field(min_length=2)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    folds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    overrides: dict[str, Any] = Field(default={}, alias="set")
    baseline: str | None = None


@dataclass(frozen=True)
class StudyRun:
    """One training of a study.

    Attributes:
        path: the configuration's file.
        member: the configuration's own name.
        config: with the study's overrides and seed.
        overrides: SECTION.KEY=VALUE each, that make it of the file.
        fold: held out.
    """

    path: Path
    member: str
    config: Config
    overrides: tuple[str, ...]
    fold: int

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Workspace(self.config.workspace).run(self.config.name, self.fold)

    def arguments(self) -> list[str]:
        """Return what `medseg` is called with to bring this run up to date."""
        said = [part for override in self.overrides for part in ("--set", override)]
        return ["run", str(self.path), "--fold", str(self.fold), *said, "--workspace", str(self.config.workspace)]

    def read(self, cases: str) -> MemberRun:
        """Read the run.

        Args:
            cases: that it was evaluated on: fold, test, all, or a manifest's name.

        Raises:
            PipelineError: it is not there, not finished, not evaluated, or of another configuration or manifest.
        """
        path = self.folder / FACTS
        if not path.is_file():
            raise EvaluationError(f"{self.folder}: was not trained yet")
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["configuration"] != configuration_digest(self.config):
            raise EvaluationError(f"{self.folder}: was trained with other settings than the study's")
        if facts["manifest"] != dataset_of(self.config).digest():
            raise EvaluationError(
                f"{self.folder}: was trained on other data than {self.config.data.manifest} names now"
            )
        initial = initial_model_of(self.config, self.fold)
        if facts.get("initial model") != (None if initial is None else initial_digest(initial)):
            raise EvaluationError(f"{self.folder}: began with another model than training.init_from names now")
        return read_run(self.folder, cases)


def load_study(path: Path) -> Study:
    """Read a study's YAML.

    Raises:
        ConfigError: it is no study; every error a line, each with its place.
    """
    problems: list[Problem] = []
    tree = read_file(path, problems)
    try:
        study = Study.model_validate_json(json.dumps(tree.plain), strict=True)
    except ValidationError as error:
        problems += [record_problem(tree, found, Study) for found in error.errors()]
    if problems:
        raise ConfigError("\n".join(map(str, sorted(problems))))
    folder = path.parent.resolve()
    configs = tuple((folder / name).resolve() for name in study.configs)
    return study.model_copy(update={"configs": configs, "overrides": with_absolute_paths(study.overrides, folder)})


def study_runs(study: Study, workspace: Path | None) -> list[StudyRun]:
    """Return all trainings of a study, configuration by configuration.

    A run that is not the configuration's own, by its seed or by the study's overrides, gets a name of its own, so that
    it never stands in the way of one that is.

    Raises:
        ConfigError: a configuration is wrong, two have one name, or the baseline is none of them.
    """
    found = [run for path in study.configs for run in _runs_of(study, path, workspace)]
    folders = [run.folder for run in found]
    if twice := sorted({str(folder) for folder in folders if folders.count(folder) > 1}):
        raise ConfigError(f"study {study.name}: named twice: {', '.join(twice)}; give each configuration its own name")
    members = list(dict.fromkeys(run.member for run in found))
    if study.baseline is not None and study.baseline not in members:
        raise ConfigError(f"study {study.name}: baseline {study.baseline}: is none of {', '.join(members)}")
    return found


def _runs_of(study: Study, path: Path, workspace: Path | None) -> Iterator[StudyRun]:
    """Yield the trainings of one configuration."""
    common = [as_override(key, value) for key, value in study.overrides.items()]
    own = load_config(path)
    for seed in study.seeds:
        suffix = (f"-{study.name}" if common else "") + (f"-seed{seed}" if seed != own.seed else "")
        overrides = (*common, *([f"seed={seed}"] if seed != own.seed else []))
        overrides = (*overrides, *([f"name={own.name}{suffix}"] if suffix else []))
        config = load_config(path, overrides)
        config = config.changed(workspace=(workspace or config.workspace).absolute())
        for fold in study.folds:
            yield StudyRun(path, own.name, config, overrides, fold)


def refuse_unequal_budgets(runs: list[StudyRun]) -> None:
    """See that all would be trained as long, before any is.

    Raises:
        EvaluationError: they would not; names each configuration's budget.
    """
    budgets = {run.member: budget_of(run.config.training) for run in runs}
    if len(set(budgets.values())) > 1:
        said = "; ".join(f"{member}: {budget}" for member, budget in budgets.items())
        raise EvaluationError(
            f"different budgets: {said}; give the study one by `set: {{training.budget: ...}}`, or say "
            "--allow-different-budgets"
        )


def study_members(runs: list[StudyRun], cases: str) -> list[Member]:
    """Read a study's members.

    Args:
        runs: of the study.
        cases: that they were evaluated on: fold, test, all, or a manifest's name.

    Raises:
        EvaluationError: runs are missing or unfinished; names each with the command that makes it.
    """
    found: dict[str, list[MemberRun]] = {}
    problems = []
    for run in runs:
        try:
            found.setdefault(run.member, []).append(run.read(cases))
        except PipelineError as error:
            problems.append(f"{error}; run `medseg {shlex.join(run.arguments())}`")
    if problems:
        but = "" if cases == MADE_ON else f"; each is then evaluated by `medseg evaluate RUN --cases {cases}`"
        raise EvaluationError("\n".join([*problems, f"`medseg compare STUDY --run` makes all of them{but}"]))
    return [Member(name, tuple(members)) for name, members in found.items()]


def make_missing(runs: list[StudyRun], device: str) -> None:
    """Bring each run that is not there up to date, one after another, each in a process of its own.

    What is finished is left alone and what was interrupted goes on, as `medseg run` does it. A run that fails does not
    keep the others from being made.
    """
    for number, run in enumerate(runs, start=1):
        try:
            failures = run.read(MADE_ON).failures
        except PipelineError as error:
            log.info("%d of %d: %s", number, len(runs), error)
        else:
            if not failures:
                log.info("%d of %d: %s is there", number, len(runs), run.folder)
                continue
            log.info("%d of %d: %s: %d cases failed, evaluated again", number, len(runs), run.folder, len(failures))
        command = [sys.executable, "-m", "pipeline", *run.arguments(), "--device", device]
        if status := subprocess.run(command, check=False).returncode:
            log.warning("%s: ended with exit code %d", run.folder, status)
