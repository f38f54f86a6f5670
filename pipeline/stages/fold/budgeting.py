"""How long a fold is trained: its budget in steps, and what a minute holds of them."""

from __future__ import annotations

import logging
import time

from pipeline.stages.fold.hooks import FoldHooks
from pipeline.training.budget import Costs, Recount, TimedBudget, unchanged
from pipeline.training.checkpoints import save_checkpoint
from pipeline.training.distributed import from_first, this_share
from pipeline.training.loop import Batches, is_over, pace_of_training
from pipeline.training.state import TrainState

log = logging.getLogger(__name__)

# Validation cases that the probe of a minutes budget looks at.
PROBE_CASES = 3
# The mean of a step settles within a few seconds.
PROBE_S, MOST_PROBE_STEPS = 8.0, 50


def budgeted(hooks: FoldHooks, state: TrainState, began: float, *, resume: bool) -> Recount:
    """Set the steps in all, the same in all processes, and return how they are counted from here on.

    Minutes are turned into steps by a probe; of a resumed training too, for it may be on another machine now.
    """
    task = hooks.task
    section, settings = task.config.training, task.settings
    if section.budget.minutes is None:
        if not resume:
            state.total_steps = section.budgeted_steps or 0
        return unchanged
    if resume and is_over(state, settings):  # killed after its last step
        return unchanged
    costs = probe(hooks, hooks.diagnosis.batch, pictured=not resume)
    # Where no step was done the time before is not counted: it bought nothing.
    state.spent_s = (state.spent_s if state.step else 0.0) + time.monotonic() - began
    budget = TimedBudget(
        60 * section.budget.minutes,
        costs,
        state,
        steps_per_epoch=settings.steps_per_epoch,
        validation_every_epochs=settings.validation_every_epochs,
    )
    state.set_total_steps(budget.probed_steps)
    log.info(
        "fold %d: %d steps fit into %g minutes, at %.3f s each; the clock corrects it",
        *(task.fold, state.total_steps, section.budget.minutes, costs.step_s),
    )
    return budget


def probe(hooks: FoldHooks, batches: Batches, *, pictured: bool) -> Costs:
    """Measure a training's parts, on a state that is thrown away, as the first process's clock has them.

    Args:
        hooks: of the training.
        batches: that it will learn from.
        pictured: keep the picture of a case, as that of step 0.
    """
    task, state = hooks.task, hooks.task.new_state()
    task.wrap_step(state, batches)
    rate, most = task.schedule(state)(0, 1), MOST_PROBE_STEPS
    pace = pace_of_training(state, batches, rate, task.settings, most_steps=most, within_s=PROBE_S)
    every = task.validation_cases
    some = every[: PROBE_CASES * this_share().processes]
    start = time.monotonic()
    hooks.draw_first(0, kept=pictured)
    drawn_s = time.monotonic() - start
    hooks.validation.scores(some, hooks.diagnosis.clock.reached)
    validation_s = drawn_s + (time.monotonic() - start - drawn_s) * len(every) / max(1, len(some))
    start = time.monotonic()
    if this_share().is_first:
        unused = task.folder / "probe.safetensors"
        save_checkpoint(unused, state, task.facts_to_resume)
        unused.unlink()
    epoch_end_s, validation_s = from_first(time.monotonic() - start), from_first(validation_s)
    # The first process alone calibrates, on the cases that all of them have validated.
    calibration_s = task.calibration_passes * validation_s * this_share().processes
    return Costs(pace.step_s, epoch_end_s, validation_s, calibration_s)
