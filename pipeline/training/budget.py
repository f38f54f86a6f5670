"""From minutes to steps: a probe at the start measures what a step, an epoch's end and a validation take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import TrainingError
from pipeline.training.distributed import from_first

# The first steps pay for memory and for the choice of kernels.
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Costs:
    """Seconds that parts of a training take.

    Attributes:
        step_s: a step, its batches included.
        epoch_end_s: the checkpoint at the end of an epoch.
        validation_s: a validation of all cases.
        calibration_s: what the best model learns of its own confidence at the end.
    """

    step_s: float
    epoch_end_s: float
    validation_s: float
    calibration_s: float = 0.0


@dataclass(frozen=True)
class Pace:
    """How fast steps are done: the mean seconds of one, and of how many."""

    step_s: float
    steps: int


def pace_of(step: Callable[[], object], *, most_steps: int, within_s: float) -> Pace:
    """Measure steps, after a few that are not counted, until they are enough or a time is over.

    The first process's clock says when, so that all of them do the same steps.

    Args:
        step: does the next step, and waits until the device has done it.
        most_steps: to measure; at least one.
        within_s: seconds after which no other is begun.
    """
    for _ in range(WARMUP_STEPS):
        step()
    start, spent_s, done = time.monotonic(), 0.0, 0
    while done < most_steps and spent_s < within_s:
        step()
        spent_s, done = from_first(time.monotonic() - start), done + 1
    return Pace(spent_s / done, done)


def steps_within(seconds: float, costs: Costs, *, steps_per_epoch: int, validation_every_epochs: int) -> int:
    """Return how many steps fit into a time, with their epoch ends, validations, and what ends the training.

    Raises:
        TrainingError: not even one step fits.
    """
    overhead_s = costs.epoch_end_s / steps_per_epoch + costs.validation_s / (steps_per_epoch * validation_every_epochs)
    steps = int((seconds - costs.validation_s - costs.calibration_s - costs.epoch_end_s) / (costs.step_s + overhead_s))
    if steps < 1:
        raise TrainingError(
            f"training.budget.minutes: no step fits into the {seconds:.0f} s left after start-up: a step takes "
            f"{costs.step_s:.2f} s and a validation {costs.validation_s:.1f} s; allow more minutes"
        )
    return steps
