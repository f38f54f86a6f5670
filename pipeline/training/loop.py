"""The training loop on one page, top to bottom.

Everything that a step needs is a function of its number: the batch, the learning rate, the seed of dropout. What is
left to remember stands in TrainState, and a run that was killed goes on from its last checkpoint with the very weights
it would have had.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.hardware import autocast
from pipeline.training.optimisation import Schedule
from pipeline.training.randomness import torch_seed
from pipeline.training.state import TrainState, averaged_tensors, update_average

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopSettings:
    """How to run the loop.

    Attributes:
        steps_per_epoch: steps between two epoch ends.
        validation_every_epochs: epochs between two validations; the end of training is always validated.
        early_stop_validations: stop after so many without a better score; None: never.
        checkpoint_s: longest time between two checkpoints.
        gradient_clip: largest norm; None: no clipping.
        ema_decay: decay of the running mean of the weights; None: no mean.
        dtype: type under autocast.
        device: where the network is.
        seed: of dropout.
    """

    steps_per_epoch: int
    validation_every_epochs: int
    early_stop_validations: int | None
    checkpoint_s: float
    gradient_clip: float | None
    ema_decay: float | None
    dtype: torch.dtype
    device: torch.device
    seed: int


class Hooks(Protocol):
    """What the stage does at the loop's turning points."""

    def validate(self, state: TrainState) -> dict[str, float]:
        """Return the scores of full volumes by name; "score" is the one that decides."""
        ...

    def improved(self, state: TrainState, scores: dict[str, float]) -> None:
        """Keep the model: it is the best so far."""
        ...

    def checkpoint(self, state: TrainState) -> None:
        """Write the state where a resumed run finds it."""
        ...

    def epoch_ended(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Report an epoch's metrics."""
        ...


Batches = Callable[[int], tuple[Tensor, Tensor]]


def train(state: TrainState, batches: Batches, schedule: Schedule, settings: LoopSettings, hooks: Hooks) -> None:
    """Train until the budget is spent or validation stops getting better.

    Args:
        state: where training stands; changed in place.
        batches: step -> image (N, C, *patch) and target (N, *patch) int64, on the device.
        schedule: (step, total steps) -> learning rate.
        settings: how.
        hooks: what the stage does at each validation, checkpoint and epoch end.

    Raises:
        TrainingError: the loss is not finite.
    """
    epoch_start = saved = time.monotonic()
    while state.step < state.total_steps and not _stopped_early(state, settings):
        train_step(state, batches(state.step), schedule(state.step, state.total_steps), settings)
        ended = state.step % settings.steps_per_epoch == 0 or state.step == state.total_steps
        if ended:
            metrics = _epoch_metrics(state, settings, time.monotonic() - epoch_start, schedule)
            if _validation_due(state, settings):
                metrics |= _validate(state, hooks)
            hooks.epoch_ended(state, metrics)
            epoch_start = time.monotonic()
        if ended or time.monotonic() - saved > settings.checkpoint_s:
            hooks.checkpoint(state)
            saved = time.monotonic()
    if _stopped_early(state, settings):
        log.info("stopped early: %d validations without a better one", state.stale_validations)


def train_step(state: TrainState, batch: tuple[Tensor, Tensor], learning_rate: float, settings: LoopSettings) -> None:
    """Do one optimiser step and count it."""
    # Dropout draws from torch's own generator: seeded by the step, it needs no place in the checkpoint.
    torch.manual_seed(torch_seed(settings.seed, "dropout", state.step))
    for group in state.optimiser.param_groups:
        group["lr"] = learning_rate
    state.objective.train()
    state.optimiser.zero_grad(set_to_none=True)
    with autocast(settings.device, settings.dtype):
        loss = state.objective(*batch)
    state.scaler.scale(loss).backward()
    if settings.gradient_clip is not None:
        state.scaler.unscale_(state.optimiser)
        torch.nn.utils.clip_grad_norm_(state.network.parameters(), settings.gradient_clip)
    state.scaler.step(state.optimiser)
    state.scaler.update()
    state.loss_sum += loss.detach()
    state.step += 1
    if state.average is not None and settings.ema_decay is not None:
        update_average(state.average, averaged_tensors(state.network), settings.ema_decay, state.step)


def _stopped_early(state: TrainState, settings: LoopSettings) -> bool:
    """Tell whether validation has not got better for long enough; also of a run resumed at that point."""
    return settings.early_stop_validations is not None and state.stale_validations >= settings.early_stop_validations


def _validation_due(state: TrainState, settings: LoopSettings) -> bool:
    """Tell whether this end of an epoch is one for validation."""
    every = settings.steps_per_epoch * settings.validation_every_epochs
    return state.step % every == 0 or state.step == state.total_steps


def _validate(state: TrainState, hooks: Hooks) -> dict[str, float]:
    """Score full volumes, and keep the model where it is the best so far."""
    scores = hooks.validate(state)
    if scores["score"] > state.best_score:
        state.best_score, state.best_step, state.stale_validations = scores["score"], state.step, 0
        hooks.improved(state, scores)
    else:
        state.stale_validations += 1
    return {f"val/{name}": value for name, value in scores.items()}


def _epoch_metrics(state: TrainState, settings: LoopSettings, seconds: float, schedule: Schedule) -> dict[str, float]:
    """Return the epoch's mean loss, learning rate and speed; reads the loss from the device."""
    steps = (state.step - 1) % settings.steps_per_epoch + 1
    loss = state.loss_sum.item() / steps
    state.loss_sum.zero_()
    if not math.isfinite(loss):
        raise TrainingError(
            f"the training loss is {loss} by step {state.step}; lower training.learning_rate, or set "
            "training.precision: fp32 to see whether it is the half precision"
        )
    return {
        "train/loss": loss,
        "train/learning_rate": schedule(state.step - 1, state.total_steps),
        "train/steps_per_s": steps / seconds,
    }
