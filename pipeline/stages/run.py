"""`medseg run`: check, preprocess, train and evaluate, each only where it is stale."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.config import Config
from pipeline.data.manifest import load_manifest
from pipeline.errors import ManifestError
from pipeline.stages import check, evaluate, preprocess, train
from pipeline.stages.workspace import Workspace

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
    return [_train_and_evaluate(config, number, device) for number in _folds(config, fold)]


def _folds(config: Config, fold: str) -> tuple[int, ...]:
    """Return the folds that are asked for."""
    return load_manifest(config.data.manifest, config.data.root).folds if fold == "all" else (int(fold),)


def _train_and_evaluate(config: Config, fold: int, device: str) -> Path:
    """Bring one fold's run folder up to date and return it."""
    folder = Workspace(config.workspace).run(config.name, fold)
    if train.is_finished(folder, config):
        log.info("fold %d: trained already, in %s", fold, folder)
    else:
        train.run(config, fold=str(fold), resume=(folder / "checkpoint.safetensors").exists(), device=device)
    if _is_evaluated(folder):
        log.info("fold %d: evaluated already, in %s", fold, folder / "evaluation")
    else:
        evaluate.run(str(folder / "models" / "best"), device=device, workspace=config.workspace)
    return folder


def _is_evaluated(folder: Path) -> bool:
    """Tell whether the best model's scores are newer than the model."""
    summary, model = folder / "evaluation" / "fold" / "summary.json", folder / "models" / "best" / "model.yaml"
    return summary.exists() and model.exists() and summary.stat().st_mtime_ns >= model.stat().st_mtime_ns
