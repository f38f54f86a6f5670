"""`medseg sweep`: trainings with other settings, each an experiment of its own, judged by their validation."""

from __future__ import annotations

import logging
import math
import subprocess
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config_yaml import write_yaml
from pipeline.errors import ConfigError, PipelineError, TrainingEnded
from pipeline.hardware import threads_per_worker
from pipeline.model import DESCRIPTION, read_description
from pipeline.progress import lines_only
from pipeline.records import digest_of, exclusively, write_json, write_text
from pipeline.stages import preprocess
from pipeline.stages.dataset import dataset_of
from pipeline.stages.fold.identity import configuration_digest
from pipeline.stages.fold.run import complete_fold
from pipeline.stages.models import BEST
from pipeline.stages.sweeping.search import Outcome, Search, Trial
from pipeline.stages.sweeping.study import Checks, SweepStudy, load_sweep
from pipeline.stages.train import fold_tasks
from pipeline.stages.worker_processes import interrupted_when_parent_ends, shared_out, start_worker
from pipeline.stages.workspace import Workspace
from pipeline.tracking import RunLog, Status, environment_tags, is_tracked, send_pending, tracked_runs

log = logging.getLogger(__name__)

BEST_CONFIG, REPORT = "best.yaml", "sweep.json"
SEND_LIMIT_S = 120.0
# How each outcome ends in MLflow, which has no word for a pruned run; a tag says more.
_STATUS: dict[str, Status] = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True)
class SweepReport:
    """What a sweep has found so far.

    Attributes:
        name: of the sweep.
        metric: by which trials are judged.
        folder: of its results.
        outcomes: of the trials, in their order.
        best: the best one; None: no trial has come to its end.
        importances: share of each parameter in what decides.
    """

    name: str
    metric: str
    folder: Path
    outcomes: tuple[Outcome, ...]
    best: Outcome | None
    importances: dict[str, float]

    def as_text(self) -> str:
        """Return the trials as a table, the best first, and where its configuration lies."""
        lines = [f"trial  state     {self.metric:>10}  settings"]
        for outcome in sorted(self.outcomes, key=lambda outcome: (outcome != self.best, outcome.run)):
            value = "" if outcome.value is None else f"{outcome.value:.4f}"
            settings = ", ".join(f"{key} {_shown(value)}" for key, value in outcome.values.items())
            reason = f"  ({outcome.error})" if outcome.error else ""
            lines.append(f"{outcome.run:5}  {outcome.state:8}  {value:>10}  {settings}{reason}")
        if self.importances:
            shares = ", ".join(f"{key} {share:.0%}" for key, share in self.importances.items())
            lines.append(f"what decides: {shares}")
        if self.best is None:
            return "\n".join([*lines, "no trial has come to its end"])
        return "\n".join([*lines, f"the best: medseg train {self.folder / BEST_CONFIG}"])


def run(
    path: Path,
    *,
    jobs: int = 1,
    device: str = "auto",
    workspace: Path | None = None,
    checks: Checks | None = None,
) -> SweepReport:
    """Train trials until there are enough, and write the best one's configuration; interrupted trials go on.

    Args:
        path: the sweep's YAML.
        jobs: trials at a time, each in a process of its own.
        device: auto, cpu, cuda or cuda:N; of several with commas between them, each process takes one.
        workspace: of the runs; None: the configuration's.
        checks: who knows the options of networks, losses, optimisers and schedules.

    Raises:
        ConfigError: the sweep or its configuration is wrong, or its trials are of other parameters.
        PipelineError: Optuna is not installed.
    """
    study = load_sweep(path, checks)
    base, folder = _base(study, workspace)
    search = Search(study, folder)
    search.begin(_digest(study, base))
    with closing(_sweep_run(study, base, folder)) as tracked:
        tracked.tags(environment_tags())
    devices = shared_out(device, None if jobs == 1 and "," in device else jobs)
    if len(devices) == 1:
        _work(study, search, base, devices[0])
    else:
        _work_in_processes(path, devices, base.workspace)
    report = _reported(study, search, folder)
    _publish(report, study, base)
    return report


def work(path: Path, *, device: str, workspace: Path | None) -> None:
    """Train trials in a process that `run` has started, and end with it."""
    lines_only()
    interrupted_when_parent_ends()
    study = load_sweep(path)
    base, folder = _base(study, workspace)
    _work(study, Search(study, folder), base, device)


def _base(study: SweepStudy, workspace: Path | None) -> tuple[Config, Path]:
    """Return the configuration that is varied, and the sweep's folder."""
    config = study.config_of({}, study.name)
    base = config if workspace is None else config.changed(workspace=workspace.absolute())
    return base, Workspace(base.workspace).sweeps / study.name


def _digest(study: SweepStudy, base: Config) -> str:
    """Return a digest of what all trials share: what the configuration says that none of them varies, and the data."""
    return digest_of([configuration_digest(study.base()), dataset_of(base).digest()])


def _work_in_processes(path: Path, devices: list[str], workspace: Path) -> None:
    """Let processes take trials until there are none left."""
    arguments = ["sweep", str(path), "--worker", "--workspace", str(workspace), "--device"]
    threads = threads_per_worker(len(devices))
    workers = [start_worker("pipeline", *arguments, device, threads=threads) for device in devices]
    try:
        for worker in workers:
            if status := worker.wait():
                log.warning("a process of the sweep ended with exit code %d", status)
    finally:
        _end(workers)


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    """Close the pipes by which workers are held, and wait for them."""
    for worker in workers:
        if worker.stdin is not None:
            worker.stdin.close()
    for worker in workers:
        worker.wait()


def _work(study: SweepStudy, search: Search, base: Config, device: str) -> None:
    """Train one trial after another, until there are enough or the time is up."""
    end = time.monotonic() + (math.inf if study.timeout_minutes is None else 60 * study.timeout_minutes)
    while time.monotonic() < end and (trial := search.next_trial()) is not None:
        _try(study, trial, base, device)


def _try(study: SweepStudy, trial: Trial, base: Config, device: str) -> None:
    """Train a trial; one that fails is listed, and the sweep goes on."""
    name = f"{study.name}-trial-{trial.run:03d}"
    settings = ", ".join(f"{key} {_shown(value)}" for key, value in trial.values.items())
    log.info("%s: %s", name, settings)
    with closing(_trial_run(study, trial, base, name)) as tracked:
        state, tags = "failed", {}
        try:
            config = study.config_of(trial.values, name).changed(workspace=base.workspace)
            value = _value(study, trial, config, device)
            trial.completed(value)
            state = "complete"
            tracked.metrics({f"sweep/{study.metric}": value}, 0)
        except TrainingEnded:
            trial.pruned()
            state = "pruned"
        except PipelineError as error:
            tags = _failed(trial, name, str(error))
        except Exception as error:
            log.exception("%s: failed", name)  # A bug: the traceback is wanted.
            tags = _failed(trial, name, f"{type(error).__name__}: {error}")
        tracked.tags({"medseg.sweep.state": state, **tags})
        tracked.finish(_STATUS[state])


def _failed(trial: Trial, name: str, reason: str) -> dict[str, str]:
    """End a trial without a value, and return what MLflow is told of it."""
    log.warning("%s: failed: %s", name, reason)
    trial.failed(reason)
    return {"medseg.sweep.error": reason}


def _value(study: SweepStudy, trial: Trial, config: Config, device: str) -> float:
    """Train a trial's folds, and return the mean of their best models' scores.

    Raises:
        TrainingEnded: the trial is pruned.
    """
    config = config.changed(tracking=config.tracking.changed(register_as=None, alias=None))
    with exclusively(Workspace(config.workspace).sweeps / study.name / ".preprocess.lock"):
        preprocess.run(config)
    values = []
    for fold in study.folds:
        (task,) = fold_tasks(config, str(fold), device)
        listener = partial(_judge, study, trial, judges=fold == study.folds[0])
        complete_fold(task, listener)
        values.append(_score(study, read_description(task.folder / BEST / DESCRIPTION).scores))
    return sum(values) / len(values)


def _judge(study: SweepStudy, trial: Trial, done: float, scores: dict[str, float], *, judges: bool) -> None:
    """Report a validation's score, and end a trial that is not worth going on; at its end it is done anyway."""
    value = _score(study, scores)
    if judges and trial.is_hopeless(done, value) and done < 1:
        raise TrainingEnded(f"pruned at {done:.0%} of its training, {study.metric} {value:.4f}")


def _score(study: SweepStudy, scores: dict[str, float]) -> float:
    """Return the score by which trials are judged."""
    if study.metric not in scores:
        raise ConfigError(f"sweep {study.name}: metric: no score {study.metric!r}; there are {', '.join(scores)}")
    return scores[study.metric]


def _sweep_run(study: SweepStudy, base: Config, folder: Path) -> RunLog:
    """Open the run in MLflow whose children the trials are, or begin it."""
    return RunLog.ensure_parent(
        folder, uri=base.tracking.uri, workspace=base.workspace, experiment=_experiment(base), name=study.name
    )


def _trial_run(study: SweepStudy, trial: Trial, base: Config, name: str) -> RunLog:
    """Open a trial's run, the parent of its folds', or begin it."""
    folder, parent = Workspace(base.workspace).experiment(name), Workspace(base.workspace).sweeps / study.name
    if is_tracked(folder):
        return RunLog.open(folder)
    tracked = RunLog.create(
        folder,
        uri=base.tracking.uri,
        workspace=base.workspace,
        experiment=_experiment(base),
        name=name,
        parent=parent,
        tags={**environment_tags(), "medseg.sweep": study.name},
    )
    tracked.params(trial.values)
    return tracked


def _experiment(config: Config) -> str:
    """Return the experiment in MLflow, as the trainings have it."""
    return config.tracking.experiment or dataset_of(config).name


def _reported(study: SweepStudy, search: Search, folder: Path) -> SweepReport:
    """Return what was found."""
    outcomes = tuple(search.outcomes())
    complete = [outcome for outcome in outcomes if outcome.state == "complete" and outcome.value is not None]
    sign = 1 if study.direction == "maximize" else -1
    best = max(complete, key=lambda outcome: sign * (outcome.value or 0.0), default=None)
    return SweepReport(study.name, study.metric, folder, outcomes, best, search.importances())


def _publish(report: SweepReport, study: SweepStudy, base: Config) -> None:
    """Write the trials and the best configuration, and log them to the sweep's run."""
    folder = report.folder
    outcomes = [outcome._asdict() for outcome in report.outcomes]
    best = None if report.best is None else report.best._asdict()
    write_json(folder / REPORT, {**asdict(report), "folder": str(folder), "outcomes": outcomes, "best": best})
    with closing(_sweep_run(study, base, folder)) as tracked:
        tracked.artifact(folder / REPORT)
        if report.best is not None and report.best.value is not None:
            said = study.said_of(report.best.values, f"{study.name}-best")
            write_text(folder / BEST_CONFIG, write_yaml({"extends": str(study.config), **said}))
            tracked.artifact(folder / BEST_CONFIG)
            tracked.metrics({f"sweep/best_{study.metric}": report.best.value}, len(report.outcomes))
            tracked.tags({"medseg.sweep.best_trial": str(report.best.run)})
        tracked.finish()
    runs = Workspace(base.workspace).runs
    mine = [run for run in tracked_runs(runs) if run.relative_to(runs).parts[0].startswith(f"{study.name}-trial-")]
    send_pending(folder, *mine, limit_s=SEND_LIMIT_S)


def _shown(value: Any) -> str:
    """Return a setting's value as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
