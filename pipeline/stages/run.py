"""`medseg run`: check, preprocess, train and evaluate, each only where it is stale."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import ConfigError, ManifestError
from pipeline.inference.postprocessing import common_rules
from pipeline.model import model_digest
from pipeline.records import digest_of, write_text
from pipeline.stages import check, cross_validation, evaluate, preprocess, train
from pipeline.stages.cross_validation import FoldsReport
from pipeline.stages.evaluate import EvaluationReport
from pipeline.stages.fold.run import complete_fold
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.models import BEST
from pipeline.stages.workspace import Workspace

log = logging.getLogger(__name__)

# Beside an evaluation: the digest of what it was made from.
MADE_FROM = "made_from.sha256"


def run(config: Config, *, fold: str = "0", device: str = "auto", jobs: int | None = None) -> FoldsReport:
    """Run every stage that is stale, in order; what is fresh is skipped, what was interrupted goes on.

    Args:
        config: the experiment.
        fold: the fold to hold out, or "all".
        device: auto, cpu, cuda or cuda:N; of all folds several with commas between them, each of which trains one
            after another.
        jobs: processes of check and preprocess; None: as many as cores and memory admit.

    Returns:
        The run folder of each fold; of all folds those that failed are listed, the others trained and evaluated.

    Raises:
        ManifestError: the check found errors; names them all.
        ConfigError: a device is not there, or one fold is to be trained on several.
    """
    devices = cross_validation.devices_of(device)
    if fold != "all" and len(devices) > 1:
        raise ConfigError(f"--device {device}: several devices train several folds; name one, or say --fold all")
    report = check.run(config.data.manifest, root=config.data.root, workspace=config.workspace, jobs=jobs)
    log.info("%s", report.as_text())
    if report.errors:
        raise ManifestError(
            f"{config.data.manifest}: the check found errors, named above; mend them, or drop the cases"
        )
    preprocess.run(config, jobs=jobs)
    tasks = train.fold_tasks(config, fold, devices[0])
    trained = _trained(config, tasks, device if fold == "all" else None)
    if config.task == "segment":
        for task in tasks:
            if task.fold in trained.folders:
                _evaluate_if_stale(task.folder, _evaluation_digest(task), partial(_evaluate_best, task))
    if len(tasks) > 1 and config.task == "segment" and not trained.failures:
        folder = Workspace(config.workspace).experiment(config.name)
        made_from = digest_of([_evaluation_digest(task) for task in tasks])
        _evaluate_if_stale(folder, made_from, partial(evaluate.run, config, device=devices[0]))
    return trained


def _trained(config: Config, tasks: Sequence[FoldTask], devices: str | None) -> FoldsReport:
    """Train one fold, or where devices are named all of them, as far as they are not finished."""
    for task in tasks:
        if task.is_finished:
            log.info("fold %d: trained already, in %s", task.fold, task.folder)
    if devices is not None:
        return cross_validation.complete(config, device=devices)
    (task,) = tasks
    complete_fold(task)
    return FoldsReport({task.fold: task.folder}, {})


def _evaluate_best(task: FoldTask) -> EvaluationReport:
    """Evaluate a fold's best model on the cases that it has not seen."""
    best, config = str(task.folder / BEST), task.config
    return evaluate.run(best, config=config, device=str(task.device), workspace=config.workspace)


def _evaluate_if_stale(folder: Path, made_from: str, evaluated: Callable[[], EvaluationReport]) -> None:
    """Evaluate the models of a folder, a run's or an experiment's, unless that was made from the very same."""
    record = folder / "evaluation" / "fold" / MADE_FROM
    if record.exists() and record.read_text(encoding="utf-8").strip() == made_from:
        log.info("evaluated already, in %s", record.parent)
    elif not evaluated().failures:
        write_text(record, made_from + "\n")


def _evaluation_digest(task: FoldTask) -> str:
    """Return the digest of what the scores of the best model depend on."""
    section = task.config.evaluation.model_dump(mode="json")
    made_from = [model_digest(task.folder / BEST), section, task.manifest.digest()]
    rules = common_rules([task.folder / BEST])
    return digest_of([*made_from, rules.digest()] if rules.has_rules else made_from)
