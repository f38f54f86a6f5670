"""`medseg run`: check, preprocess, train and evaluate, each only where it is stale."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import ManifestError
from pipeline.inference.postprocessing import common_rules
from pipeline.model import model_digest
from pipeline.records import digest_of, write_text
from pipeline.stages import check, evaluate, preprocess, train
from pipeline.stages.fold_run import train_fold
from pipeline.stages.fold_task import FoldTask
from pipeline.stages.models import BEST

log = logging.getLogger(__name__)

# Beside an evaluation: the digest of what it was made from.
MADE_FROM = "made_from.sha256"


def run(config: Config, *, fold: str = "0", device: str = "auto", jobs: int | None = None) -> list[Path]:
    """Run every stage that is stale, in order; what is fresh is skipped, what was interrupted goes on.

    Args:
        config: the experiment.
        fold: the fold to hold out, or "all".
        device: auto, cpu, cuda or cuda:N.
        jobs: processes of check and preprocess; None: as many as cores and memory admit.

    Returns:
        The run folder of each fold.

    Raises:
        ManifestError: the check found errors; names them all.
    """
    report = check.run(config.data.manifest, root=config.data.root, workspace=config.workspace, jobs=jobs)
    log.info("%s", report.as_text())
    if report.errors:
        raise ManifestError(
            f"{config.data.manifest}: the check found errors, named above; mend them, or drop the cases"
        )
    preprocess.run(config, jobs=jobs)
    return [_train_and_evaluate(task) for task in train.fold_tasks(config, fold, device)]


def _train_and_evaluate(task: FoldTask) -> Path:
    """Bring one fold's run folder up to date and return it; what does not segment is not evaluated."""
    if task.is_finished:
        log.info("fold %d: trained already, in %s", task.fold, task.folder)
    else:
        train_fold(task, resume=task.is_begun and task.checkpoint.exists())
    if task.config.task != "segment":
        return task.folder
    record, made_from = task.folder / "evaluation" / "fold" / MADE_FROM, _evaluation_digest(task)
    if record.exists() and record.read_text(encoding="utf-8").strip() == made_from:
        log.info("fold %d: evaluated already, in %s", task.fold, record.parent)
    else:
        best = str(task.folder / BEST)
        report = evaluate.run(best, config=task.config, device=str(task.device), workspace=task.config.workspace)
        if not report.failures:
            write_text(record, made_from + "\n")
    return task.folder


def _evaluation_digest(task: FoldTask) -> str:
    """Return the digest of what the scores of the best model depend on."""
    section = task.config.evaluation.model_dump(mode="json")
    made_from = [model_digest(task.folder / BEST), section, task.manifest.digest()]
    rules = common_rules([task.folder / BEST])
    return digest_of([*made_from, rules.digest()] if rules.has_rules else made_from)
