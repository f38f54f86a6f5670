"""What a fold's training leaves when its budget is spent: learning curves, both models, and their confidence."""

from __future__ import annotations

import logging

from pipeline.confidence.calibration import save_calibration
from pipeline.model import WEIGHTS, weights_sha256
from pipeline.pictures import draw_learning_curves
from pipeline.records import atomic_path, write_json
from pipeline.stages.fold.hooks import FoldHooks
from pipeline.stages.fold.record import RECOUNTS, WEIGHTS_TAG
from pipeline.stages.model_card import write_card
from pipeline.stages.models import BEST, LAST
from pipeline.tracking import metric_history
from pipeline.training.state import TrainState

log = logging.getLogger(__name__)


def finish(hooks: FoldHooks, state: TrainState) -> None:
    """Draw the learning curves, hand the best model to tracking, and write the last one."""
    task, tracked = hooks.task, hooks.tracked
    picture = task.folder / "learning_curves.png"
    with atomic_path(picture) as temporary:
        draw_learning_curves(metric_history(task.folder)).savefig(temporary)
    tracked.artifact(picture)
    tracked.metrics({"best/score": state.best_score, "best/step": state.best_step}, state.step)
    if state.recounts:
        write_json(task.folder / RECOUNTS, list(state.recounts.items()))
        tracked.artifact(task.folder / RECOUNTS)
    _calibrate(hooks, state.step)
    tracked.model(task.folder / BEST, task.config.tracking.register_as, task.config.tracking.alias)
    hooks.save_model(state, LAST, {})
    digests = {name.name: weights_sha256(task.folder / name / WEIGHTS) for name in (BEST, LAST)}
    tracked.tags({WEIGHTS_TAG + name: digest for name, digest in digests.items()})
    log.info("fold %d: SHA-256 of the weights, %s", task.fold, ", ".join(f"{n} {d}" for n, d in digests.items()))


def _calibrate(hooks: FoldHooks, step: int) -> None:
    """Write into the best model's folder what its validation cases teach about its confidence."""
    task, tracked = hooks.task, hooks.tracked
    calibration = task.calibration(task.folder / BEST, hooks.diagnosis.clock.reached)
    if calibration is None:
        return
    save_calibration(task.folder / BEST, calibration)
    write_card(task.folder / BEST)
    tracked.metrics(
        {
            "calibration/temperature": calibration.temperature,
            "calibration/ece": calibration.after.ece,
            "calibration/ece_uncalibrated": calibration.before.ece,
            "calibration/brier": calibration.after.brier,
            "calibration/brier_uncalibrated": calibration.before.brier,
        },
        step,
    )
    log.info(
        "fold %d: temperature %.3f, calibration error %.4f (%.4f without)",
        *(task.fold, calibration.temperature, calibration.after.ece, calibration.before.ece),
    )
