"""The training loop on one page, top to bottom.

Everything that a step needs is a function of its number: the batches, the learning rate, the seed of dropout. What is
left to remember stands in TrainState, and a run that was killed goes on from its last checkpoint with the very weights
it would have had; unless its budget is in minutes, for then the clock has a say in the learning rate.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.hardware import autocast
from pipeline.training.budget import Pace, Recount, pace_of, unchanged
from pipeline.training.diagnosis.stopwatch import CHECKPOINTS, LOGGING, STEPS, VALIDATION, WAITING, Clock, untimed
from pipeline.training.distributed import average_buffers, averaged, this_share, unsynchronised
from pipeline.training.losses.target import Target
from pipeline.training.optimisation import Schedule, set_learning_rate
from pipeline.training.randomness import torch_seed
from pipeline.training.state import TrainState, update_average

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
        accumulate: batches whose gradients are averaged into one step.
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
    accumulate: int = 1


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

    def not_finite(self, state: TrainState, step: int) -> TrainingError:
        """Return the error of a loss or gradient that was not finite first at a step, counted from 0: says where it
        came from.
        """
        ...


Batch = tuple[Tensor, Target | Tensor]
Batches = Callable[[int], Batch]


def train(
    state: TrainState,
    batches: Batches,
    schedule: Schedule,
    settings: LoopSettings,
    hooks: Hooks,
    clock: Clock = untimed,
    recount: Recount = unchanged,
) -> None:
    """Train until the budget is spent or validation stops getting better.

    Args:
        state: where training stands; changed in place.
        batches: number -> image (N, C, *patch) and its target, on the device; step s takes the numbers from
            s * accumulate on.
        schedule: (step, total steps) -> learning rate.
        settings: how.
        hooks: what the stage does at each validation, checkpoint and epoch end.
        clock: measures the phases.
        recount: state after a step -> steps in all, the same in all processes.

    Raises:
        TrainingError: a loss or gradient is not finite; no checkpoint and no model is written of what it led to.
    """
    epoch_start = saved = spent = time.monotonic()
    first = state.step  # of the epoch, as far as it is done here
    while not is_over(state, settings):
        learning_rate = schedule(state.step, state.total_steps)
        train_step(state, batches, learning_rate, settings, clock)
        spent = _spend(state, spent)
        state.set_total_steps(recount(state))
        ended = state.step % settings.steps_per_epoch == 0 or state.step == state.total_steps
        due = ended or time.monotonic() - saved > settings.checkpoint_s
        if due:
            with clock(STEPS):  # waits for the device's last steps
                bad_step = int(state.sums.bad_step)
            # Only at an epoch's end do all processes look: a clock is each one's own.
            if bad_step >= 0 and (ended or this_share().processes == 1):
                raise hooks.not_finite(state, bad_step)
        if ended:
            speed = (state.step - first) / (time.monotonic() - epoch_start)
            metrics = _epoch_metrics(state, settings, speed, learning_rate)
            if _validation_due(state, settings):
                with clock(VALIDATION):
                    metrics |= _validate(state, hooks)
            with clock(LOGGING):
                hooks.epoch_ended(state, metrics)
            epoch_start, first = time.monotonic(), state.step
        if due and bad_step < 0:
            spent = _spend(state, spent)
            with clock(CHECKPOINTS):
                hooks.checkpoint(state)
            saved = time.monotonic()
    if _stopped_early(state, settings):
        log.info("stopped early: %d validations without a better one", state.stale_validations)


def is_over(state: TrainState, settings: LoopSettings) -> bool:
    """Tell whether no step is left to do; also of a run resumed at that point."""
    return state.step >= state.total_steps or _stopped_early(state, settings)


def _spend(state: TrainState, since: float) -> float:
    """Count the time since a moment as spent on training, and return the moment that it is now."""
    now = time.monotonic()
    state.spent_s += now - since
    return now


def train_step(
    state: TrainState, batches: Batches, learning_rate: float, settings: LoopSettings, clock: Clock = untimed
) -> None:
    """Do one optimiser step and count it; nothing here waits for the device."""
    set_learning_rate(state.optimiser, learning_rate)
    state.objective.progress = min(1.0, state.step / max(1, state.total_steps))
    if not state.network.training:  # after a validation; it goes through all modules
        state.step_module.train()
    state.optimiser.zero_grad(set_to_none=True)
    first, last = state.step * settings.accumulate, (state.step + 1) * settings.accumulate - 1
    losses = []
    for number in range(first, last + 1):
        with clock(WAITING):
            batch = batches(number)
        with clock(STEPS), nullcontext() if number == last else unsynchronised(state.step_module):
            losses.append(_backward(state, batch, number, settings))
    with clock(STEPS):
        norm = _clipped(state, settings.gradient_clip)
        state.scaler.step(state.optimiser)
        state.scaler.update()
        loss = averaged(torch.stack(losses).mean())
        state.sums.add(loss, norm, state.step, may_overflow=state.scaler.is_enabled())
        average_buffers(state.network)
        state.step += 1
        if state.average is not None and settings.ema_decay is not None:
            update_average(state.average, state.followed, settings.ema_decay, state.step)


def pace_of_training(
    state: TrainState,
    batches: Batches,
    learning_rate: float,
    settings: LoopSettings,
    *,
    most_steps: int,
    within_s: float,
) -> Pace:
    """Return how fast steps are done, the wait for the device included; as `pace_of`."""

    def step() -> None:
        train_step(state, batches, learning_rate, settings)
        state.sums.loss.item()  # waits for the device

    return pace_of(step, most_steps=most_steps, within_s=within_s)


def _backward(state: TrainState, batch: Batch, number: int, settings: LoopSettings) -> Tensor:
    """Add a batch's share to the gradients, and return its loss."""
    loss = batch_loss(state.step_module, batch, number, settings)
    state.scaler.scale(loss / settings.accumulate).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def batch_loss(objective: Callable[..., Tensor], batch: Batch, number: int, settings: LoopSettings) -> Tensor:
    """Return what an objective makes of a batch, as training has it computed."""
    # Dropout draws from torch's own generator: seeded by the batch's number, it needs no place in the checkpoint.
    torch.manual_seed(torch_seed(settings.seed, "dropout", this_share().part(number)))
    with autocast(settings.device, settings.dtype):
        return objective(*batch)


def _clipped(state: TrainState, largest: float | None) -> Tensor:
    """Clip the gradients, if they are to be, and return the norm that they had."""
    state.scaler.unscale_(state.optimiser)
    parameters = [parameter for group in state.optimiser.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def _stopped_early(state: TrainState, settings: LoopSettings) -> bool:
    """Tell whether validation has not got better for long enough; also of a run resumed at that point."""
    return settings.early_stop_validations is not None and state.stale_validations >= settings.early_stop_validations


def _validation_due(state: TrainState, settings: LoopSettings) -> bool:
    """Tell whether this end of an epoch is one for validation."""
    every = settings.steps_per_epoch * settings.validation_every_epochs
    return state.step % every == 0 or state.step == state.total_steps


def _validate(state: TrainState, hooks: Hooks) -> dict[str, float]:
    """Score full volumes, and keep the model where none was better so far: of equal ones the last.

    Raises:
        ValueError: the score is infinite or no number, by which no model could be chosen.
    """
    scores = hooks.validate(state)
    if not math.isfinite(scores["score"]):
        raise ValueError(f"validation at step {state.step}: the score is {scores['score']}; expected a finite number")
    state.stale_validations = 0 if scores["score"] > state.best_score else state.stale_validations + 1
    if scores["score"] >= state.best_score:
        state.best_score, state.best_step = scores["score"], state.step
        hooks.improved(state, scores)
    return {f"val/{name}": value for name, value in scores.items()}


def _epoch_metrics(state: TrainState, settings: LoopSettings, speed: float, learning_rate: float) -> dict[str, float]:
    """Return the epoch's mean loss and gradient norm, last learning rate and speed, and begin the next epoch's sums."""
    steps = (state.step - 1) % settings.steps_per_epoch + 1
    sums, norms = state.sums, int(state.sums.norms)
    metrics = {
        "train/loss": sums.loss.item() / steps,
        "train/learning_rate": learning_rate,
        "train/steps_per_s": speed,
    }
    if norms:
        metrics["train/gradient_norm"] = sums.gradient_norm.item() / norms
    else:
        log.warning("no step of the epoch counted: fp16 overflowed at each; set training.precision to bf16 or fp32")
    sums.begin_epoch()
    return metrics
