"""`medseg run`: check, preprocess, train and evaluate, each only where it is stale."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import ManifestError
from pipeline.stages import check, evaluate, preprocess, train
from pipeline.stages.fold_task import BEST, FoldTask

log = logging.getLogger(__name__)


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
    """Bring one fold's run folder up to date and return it."""
    if task.is_finished:
        log.info("fold %d: trained already, in %s", task.fold, task.folder)
    else:
        train.train_fold(task, resume=task.is_begun and task.checkpoint.exists())
    if _is_evaluated(task.folder):
        log.info("fold %d: evaluated already, in %s", task.fold, task.folder / "evaluation")
    else:
        evaluate.run(str(task.folder / BEST), device=str(task.device), workspace=task.config.workspace)
    return task.folder


def _is_evaluated(folder: Path) -> bool:
    """Tell whether the best model's scores are newer than the model."""
    summary, model = folder / "evaluation" / "fold" / "summary.json", folder / BEST / "model.yaml"
    return summary.exists() and model.exists() and summary.stat().st_mtime_ns >= model.stat().st_mtime_ns
