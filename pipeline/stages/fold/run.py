"""One fold's training from its first step or its checkpoint to its models, tracked."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from pipeline.confidence.calibration import save_calibration
from pipeline.errors import ResourceError, TrainingEnded, TrainingError
from pipeline.hardware import compiled_to_train, deterministic, is_out_of_memory, keep_freed_memory
from pipeline.model import WEIGHTS, weights_sha256
from pipeline.pictures import draw_learning_curves
from pipeline.progress import counter
from pipeline.records import atomic_path, exclusively, write_json
from pipeline.stages.fold.determinism import refuse_nondeterministic
from pipeline.stages.fold.diagnosis import FoldDiagnosis, watchdog_of
from pipeline.stages.fold.hooks import FoldHooks, Listener, unheard_scores
from pipeline.stages.fold.record import RECOUNTS, WEIGHTS_TAG, new_run
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.initialisation import initialise
from pipeline.stages.model_card import write_card
from pipeline.stages.models import BEST, LAST
from pipeline.tracking import Follower, RunLog, SilentLog, metric_history, start_follower
from pipeline.training.budget import Costs, Recount, TimedBudget, pace_of, unchanged
from pipeline.training.checkpoints import load_checkpoint, save_checkpoint
from pipeline.training.diagnosis.stopwatch import FINISHING, STARTING, Stopwatch
from pipeline.training.diagnosis.watchdog import Watchdog
from pipeline.training.distributed import agree, first_awaited, from_first, synchronised, this_share
from pipeline.training.loop import Batch, Batches, is_over, train, train_step
from pipeline.training.state import TrainState

log = logging.getLogger(__name__)

# How long the end of training waits for MLflow; what has not arrived by then is sent by `medseg sync`.
TRACKING_WAIT_S = 15.0

# Validation cases that the probe of a minutes budget looks at.
PROBE_CASES = 3
# The mean of a step settles within a few seconds.
PROBE_S, MOST_PROBE_STEPS = 8.0, 50


def train_fold(
    task: FoldTask, *, resume: bool, listener: Listener = unheard_scores, recount: Recount | None = None
) -> None:
    """Train one fold to the end of its budget, from its checkpoint or anew.

    Processes that train it together all come by here. The first alone holds the run folder and writes into it; what
    stands behind `is_first` talks to no other process.

    Args:
        task: the fold.
        resume: from its checkpoint.
        listener: is told the scores of each validation, and may end the training by raising TrainingEnded.
        recount: how the steps in all are counted as they are done; None: by the clock, where the budget is in minutes.

    Raises:
        TrainingError: the checkpoint is of another configuration, the loss is not finite, another process trains here,
            or the training was to be deterministic and an operator is not.
        TrainingEnded: by the listener.
        ConfigError: nothing fits of the model that `training.init_from` names.
        ResourceError: memory is used up.
    """
    keep_freed_memory()
    _warn_of_unpaired_sides(task)
    busy = TrainingError(f"{task.folder}: is being trained by another process; wait until it is done")
    lock = task.folder.with_name(f".{task.folder.name}.lock")
    held = exclusively(lock, busy) if this_share().is_first else nullcontext()
    with first_awaited(), held, deterministic(task.config.training.deterministic), _lack_of_memory_named(task):
        _train_locked(task, resume=resume, listener=listener, recount=recount)


def complete_fold(task: FoldTask, listener: Listener = unheard_scores, recount: Recount | None = None) -> None:
    """Train a fold, from its checkpoint where there is one of this very training; unless it is finished.

    Raises:
        TrainingError, ConfigError, ResourceError: as `train_fold`.
    """
    if not task.is_finished:
        resume = task.is_begun and task.checkpoint.exists()
        train_fold(task, resume=resume, listener=listener, recount=recount)


@contextmanager
def _lack_of_memory_named(task: FoldTask) -> Iterator[None]:
    """Say what to do where memory is used up."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        patch, patches = "x".join(map(str, task.plan.patch_size)), this_share().batch_size(task.batch_size)
        raise ResourceError(
            f"fold {task.fold}: the memory of {task.device} is used up, with {patches} patches of {patch} voxels "
            f"a batch: {' '.join(str(error).split())[:200]}; set training.activation_checkpointing, then a "
            "smaller training.batch_size with training.accumulate, or plan for less memory (preprocessing.memory_gb, "
            "`medseg preprocess --replan`)"
        ) from error


def _train_locked(task: FoldTask, *, resume: bool, listener: Listener, recount: Recount | None) -> None:
    """Train one fold while no other process does."""
    clock = Stopwatch(task.device)
    with watchdog_of(task, clock) as watchdog:
        follower = _train_watched(task, clock, watchdog, resume=resume, listener=listener, recount=recount)
    if follower is not None:
        follower.wait(TRACKING_WAIT_S)


def _train_watched(
    task: FoldTask, clock: Stopwatch, watchdog: Watchdog, *, resume: bool, listener: Listener, recount: Recount | None
) -> Follower | None:
    """Train one fold while a watchdog watches, and return who still sends to MLflow."""
    began, share = time.monotonic(), this_share()
    with clock(STARTING):
        state = task.new_state()
        batches = task.batches(state.network, clock, clock.reached)
        if task.config.training.deterministic:
            refuse_nondeterministic(task, batches)
        _wrap_step(task, state, batches)
    if resume:
        load_checkpoint(task.checkpoint, state, task.facts_to_resume)
        agree({"checkpoint": (state.step, state.total_steps, state.best_step)})
        tracked = RunLog.resume(task.folder) if share.is_first else SilentLog(task.folder)
    else:
        taken = initialise(task, state)  # before anything is moved or written: it may refuse
        tracked = new_run(task, taken) if share.is_first else SilentLog(task.folder)
    diagnosis = FoldDiagnosis(task, state, batches, clock)
    diagnosis.takes_over(watchdog, tracked)
    hooks = FoldHooks(task, state, tracked, diagnosis, listener)
    try:
        with clock(STARTING):
            by_budget = _begin(hooks, state, began, resume=resume)
        # Only now: MLflow's imports beside the probe would make the steps look dear.
        follower = start_follower(task.folder) if share.is_first else None
        diagnosis.count_to(STARTING)
        with counter(f"fold {task.fold}", state.total_steps, state.step) as advance:
            counted = _counted(diagnosis.batch, lambda: advance(state.total_steps), task.settings.accumulate)
            train(state, counted, task.schedule(state), task.settings, hooks, clock, recount or by_budget)
        with clock(FINISHING):
            if share.is_first:
                _finish(hooks, state)
        diagnosis.count_to(FINISHING)
    except BaseException as error:
        tracked.finish("KILLED" if isinstance(error, KeyboardInterrupt | TrainingEnded) else "FAILED")
        raise
    finally:
        batches.close()
    tracked.finish("FINISHED")
    diagnosis.summarise()
    return follower


def _begin(hooks: FoldHooks, state: TrainState, began: float, *, resume: bool) -> Recount:
    """Find out how long to train, and return how the steps in all are counted from here on; before the first step also
    picture what is learned from, and write the checkpoint of that step.
    """
    tracked = hooks.tracked
    if not resume and this_share().is_first:
        hooks.diagnosis.picture_patches(tracked)
    recount = _budgeted(hooks, state, began, resume=resume)
    if resume:
        log.info("fold %d: going on at step %d of %d", hooks.task.fold, state.step, state.total_steps)
    else:
        parameters = sum(tensor.numel() for tensor in state.network.parameters())
        tracked.params({"training.total_steps": state.total_steps, "network.parameters": parameters})
        tracked.metrics({"network/parameters": parameters}, 0)
        hooks.checkpoint(state)
    return recount


def _warn_of_unpaired_sides(task: FoldTask) -> None:
    """Say so where left and right are flipped but no labels swap: right for one organ, wrong for a pair of them."""
    section, plan = task.config.training.augmentation, task.plan
    axis = plan.left_right_axis
    flips_sides = section.enabled and "xyz"[axis] in section.flip_axes and plan.patch_size[axis] > 1
    if task.needs_labels and flips_sides and len(plan.labels) > 2 and not plan.label_pairs:
        log.warning(
            "training.augmentation.flip_axes flips left and right, and the manifest has no label_pairs: if two of %s "
            "are left and right of one structure, name them there",
            ", ".join(list(plan.labels)[1:]),
        )


def _budgeted(hooks: FoldHooks, state: TrainState, began: float, *, resume: bool) -> Recount:
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
    costs = _probe(hooks, hooks.diagnosis.batch, pictured=not resume)
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


def _probe(hooks: FoldHooks, batches: Batches, *, pictured: bool) -> Costs:
    """Measure a training's parts, on a state that is thrown away, as the first process's clock has them; before the
    first step a picture of it is kept.
    """
    task, state = hooks.task, hooks.task.new_state()
    _wrap_step(task, state, batches)

    def step() -> None:
        train_step(state, batches, task.schedule(state)(0, 1), task.settings)
        state.sums.loss.item()  # waits for the device

    step_s = pace_of(step, most_steps=MOST_PROBE_STEPS, within_s=PROBE_S).step_s
    every = task.validation_cases
    some = every[: PROBE_CASES * this_share().processes]
    start = time.monotonic()
    for case in some[:1] if pictured else ():
        hooks.draw(case, 0)
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
    return Costs(step_s, epoch_end_s, validation_s, calibration_s)


def _wrap_step(task: FoldTask, state: TrainState, batches: Batches) -> None:
    """Compile what a step calls, where the configuration says so and it works here, and join it to other processes."""
    if task.config.training.compile:
        state.objective.compile_network_only()
        state.step_module = compiled_to_train(state.step_module, batches(0), task.dtype)
    state.step_module = synchronised(state.step_module)


def _counted(batches: Batches, advance: Callable[[], None], accumulate: int) -> Batches:
    """Return the batches, the first of each step moving the progress bar on."""

    def batch(number: int) -> Batch:
        if number % accumulate == 0:
            advance()
        return batches(number)

    return batch


def _finish(hooks: FoldHooks, state: TrainState) -> None:
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
    # Last of all: where it is, the training is over.
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
