"""The steps from the last checkpoint to one that was not finite once more, and that one taken apart."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.training.budget import Recount, unchanged
from pipeline.training.diagnosis.finiteness import Fault, faulty_weight, inspect
from pipeline.training.loop import Batches, LoopSettings, batch_loss, train_step
from pipeline.training.optimisation import Schedule
from pipeline.training.state import TrainState


@dataclass(frozen=True)
class Finding:
    """Which step is to blame, and for what.

    Attributes:
        step: its number, from 0.
        batch: number of the batch in which the fault is; None where no batch is to blame.
        fault: what was the first not to be finite.
    """

    step: int
    batch: int | None
    fault: Fault

    @property
    def order(self) -> tuple[int, ...]:
        """Which of several processes' findings came about first."""
        return self.step, -1 if self.batch is None else self.batch, *self.fault.order


def replay(
    state: TrainState,
    batches: Batches,
    schedule: Schedule,
    settings: LoopSettings,
    bad_step: int,
    recount: Recount = unchanged,
) -> Finding | None:
    """Do the steps before a bad one again, and return what in that one is the first not to be finite.

    Args:
        state: as the last checkpoint has it; changed in place.
        batches: as training has them.
        schedule: as training has it.
        settings: as training has them.
        bad_step: the step, from 0, whose loss or gradient was not finite.
        recount: how the steps in all were counted.

    Returns:
        The finding; None where all was finite this time, as it may be on a GPU, which does not round twice alike, or
        where the fault is in the batch of another process. Processes that train together do the same passes, whatever
        each of them finds.
    """
    if name := faulty_weight(state.network):
        return Finding(state.step, None, Fault("weights", name))
    state.set_total_steps(recount(state))
    while state.step < bad_step:
        train_step(state, batches, schedule(state.step, state.total_steps), settings)
        state.set_total_steps(recount(state))
    if name := faulty_weight(state.network):
        return Finding(bad_step - 1, None, Fault("step", name))
    state.objective.train()
    numbers = range(bad_step * settings.accumulate, (bad_step + 1) * settings.accumulate)
    faults = [(number, _fault_of(state, batches, settings, number)) for number in numbers]
    return next((Finding(bad_step, number, fault) for number, fault in faults if fault), None)


def _fault_of(state: TrainState, batches: Batches, settings: LoopSettings, number: int) -> Fault | None:
    """Return what in a batch is the first not to be finite."""
    batch = batches(number)
    return inspect(
        state.network,
        batch[0],
        lambda: batch_loss(state.objective, batch, number, settings),
        backward=not state.scaler.is_enabled(),
    )
