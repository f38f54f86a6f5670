"""`medseg train`: one fold after another, each in a run folder of its own, from which a killed run goes on.

By one process, or by all those that a launcher such as `torchrun` has started.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline import __version__
from pipeline.config import Config, Task
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError, TrainingError
from pipeline.hardware import pick_device
from pipeline.stages.dataset import dataset_of
from pipeline.stages.denoising_task import DenoisingTask
from pipeline.stages.fold.run import train_fold
from pipeline.stages.fold.task import FoldTask
from pipeline.training.distributed import agree, from_first, joined

log = logging.getLogger(__name__)

# What a configuration's `task` trains.
TASKS: dict[Task, type[FoldTask]] = {"segment": FoldTask, "denoise": DenoisingTask}


def run(config: Config, *, fold: str = "0", resume: bool = False, device: str = "auto") -> list[Path]:
    """Train on all folds but one, and validate on that one.

    Args:
        config: the experiment; its data are preprocessed.
        fold: the fold to hold out, or "all": one after another, those that are done already left out with `resume`.
        resume: go on from the last checkpoint.
        device: auto, cpu, cuda or cuda:N; of several processes each takes the GPU of its number.

    Returns:
        The run folder of each fold.

    Raises:
        TrainingError: nothing to resume, a checkpoint of another configuration, a loss that is not finite, or
            processes that were started differently or lost one another.
        StoreError: a case is not preprocessed.
    """
    with joined(device) as chosen:
        agree({"--fold and --resume": (fold, resume), "medseg and torch": (__version__, str(torch.__version__))})
        tasks = fold_tasks(config, fold, str(chosen))
        if resume:
            refuse_nothing_to_resume(tasks)
        for task in tasks:
            _train_or_leave(task, resume)
    return [task.folder for task in tasks]


def _train_or_leave(task: FoldTask, resume: bool) -> None:
    """Train a fold, unless it is finished; what its folder holds is decided by the first process, who changes it."""
    agree(task.facts_to_resume)
    if from_first(resume and task.is_finished):
        log.info("fold %d: finished already, in %s", task.fold, task.folder)
    else:
        train_fold(task, resume=bool(from_first(resume and task.checkpoint.exists())))


def fold_tasks(config: Config, fold: str, device: str) -> list[FoldTask]:
    """Return what there is to train.

    Of all folds each registers its model, and the first has the alias, as if it were trained alone: validation scores
    of different folds are of different cases, and do not say which model is better.

    Raises:
        ConfigError: the manifest has no such fold, or the device is not there.
        StoreError: a case is not preprocessed.
    """
    manifest = dataset_of(config)
    numbers = chosen_folds(manifest, fold)
    chosen = pick_device(device)
    others = config.changed(tracking=config.tracking.changed(alias=None))
    return [
        TASKS[config.task].prepare(config if number == numbers[0] else others, manifest, number, chosen)
        for number in numbers
    ]


def chosen_folds(manifest: Manifest, fold: str) -> tuple[int, ...]:
    """Return the folds that `--fold` means.

    Raises:
        ConfigError: the manifest has no such fold, or none at all.
    """
    if not manifest.folds:
        raise ConfigError(
            f"{manifest.name}: no case of the manifest has a fold, so there is none to train on; `medseg manifest` "
            "splits a data set into folds"
        )
    if fold != "all" and (not fold.isdecimal() or int(fold) not in manifest.folds):
        raise ConfigError(f"--fold {fold}: the manifest has folds {', '.join(map(str, manifest.folds))}; or say all")
    return manifest.folds if fold == "all" else (int(fold),)


def refuse_nothing_to_resume(tasks: Sequence[FoldTask]) -> None:
    """Raise where none of the folds was begun.

    Raises:
        TrainingError: there is no checkpoint.
    """
    if not any(task.checkpoint.exists() or task.is_finished for task in tasks):
        raise TrainingError(f"{tasks[0].checkpoint}: no checkpoint to resume from; start without --resume")
