"""From minutes to steps: a probe tells how many will fit, and the clock corrects it as they are done."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.errors import TrainingError
from pipeline.training.distributed import from_first
from pipeline.training.state import TrainState

# The first steps pay for memory and for the choice of kernels.
WARMUP_STEPS = 3
# The steps of a budget in minutes are counted anew about so often, and then at every half of what is left.
COUNTS = 20
# The probe is believed as if so many seconds had gone by its pace: a few slow steps do not end a short training.
TRUST_S = 60.0

Recount = Callable[[TrainState], int]


def unchanged(state: TrainState) -> int:
    """Leave the steps in all as they are: of a budget in steps."""
    return state.total_steps


def repeated(recounts: Mapping[int, int]) -> Recount:
    """Return what counts the steps in all as a training has done before: step -> steps in all from there on."""
    return lambda state: recounts.get(state.step, state.total_steps)


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


class TimedBudget:
    """A budget in seconds, and the steps that it holds.

    What the probe found a step, an epoch's end and a validation to take is off by as much as the machine has been
    slower or faster since: by the time that the steps so far have taken over the time that they should have taken.
    Other work on the machine, or a clock that drops in the heat, then costs steps and not minutes. The first steps pay
    for memory, the choice of kernels and the start of tracking: what they take is gone, and no measure of the others.

    Args:
        seconds: of the budget, start-up and the end included.
        costs: as the probe found them.
        state: at the first step from here on; of its budget `spent_s` are gone.
        steps_per_epoch: steps between two epoch ends.
        validation_every_epochs: epochs between two validations.

    Attributes:
        probed_steps: steps in all by the probe alone.

    Raises:
        TrainingError: not even one step fits. A training that goes on has one at least, and is validated.
    """

    def __init__(
        self, seconds: float, costs: Costs, state: TrainState, *, steps_per_epoch: int, validation_every_epochs: int
    ) -> None:
        self._seconds, self._costs = seconds, costs
        self._epoch, self._validation = steps_per_epoch, steps_per_epoch * validation_every_epochs
        left_s = seconds - from_first(state.spent_s)
        self._measured_from: tuple[int, float] | None = None
        steps = self._steps_within(left_s, state.step, state.step)
        if steps < 1 and state.step == 0:
            raise TrainingError(
                f"training.budget.minutes: no step fits into the {left_s:.0f} s left after start-up: a step takes "
                f"{costs.step_s:.2f} s and a validation {costs.validation_s:.1f} s; allow more minutes"
            )
        self.probed_steps = state.step + max(1, steps)
        self._first = state.step
        self._due = self._next(state.step, self.probed_steps)

    def __call__(self, state: TrainState) -> int:
        """Return the steps in all, the same in all processes; they are counted anew now and then."""
        step = state.step
        if step < self._due or step == state.total_steps:
            return state.total_steps
        spent_s = from_first(state.spent_s)
        left_s = (self._seconds - spent_s) / self._slower(step, spent_s)
        # Where an epoch ends with this step, its end is still to come.
        total_steps = step + self._steps_within(left_s, step, step - 1)
        self._due = self._next(step, total_steps)
        return total_steps

    def _slower(self, step: int, spent_s: float) -> float:
        """Return how many times as long as by the probe things take."""
        if self._measured_from is None:
            self._measured_from = step, spent_s
        first, first_s = self._measured_from
        expected_s = self._expected_s(step - first, first - 1, step)
        return (spent_s - first_s + TRUST_S) / (expected_s + TRUST_S)

    def _next(self, step: int, total_steps: int) -> int:
        """Return the step after which to count again."""
        return step + max(1, min((total_steps - self._first) // COUNTS, (total_steps - step) // 2))

    def _steps_within(self, seconds: float, step: int, ended: int) -> int:
        """Return how many steps fit after this one, with the epoch ends after step `ended`, and the training's end."""
        costs = self._costs
        seconds -= costs.validation_s + costs.calibration_s + costs.epoch_end_s
        most = max(0, int(seconds / costs.step_s))
        return bisect_right(range(1, most + 1), seconds, key=lambda more: self._expected_s(more, ended, step + more))

    def _expected_s(self, steps: int, after: int, to: int) -> float:
        """Return what steps take by the probe, with what epochs end with after one step and before another."""
        costs = self._costs
        ends, validations = ((to - 1) // every - after // every for every in (self._epoch, self._validation))
        return steps * costs.step_s + ends * costs.epoch_end_s + validations * costs.validation_s
