"""One fold's training from its first step or its checkpoint to its models, tracked."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from pipeline.errors import ResourceError, TrainingEnded, TrainingError
from pipeline.hardware import deterministic, is_out_of_memory, keep_freed_memory
from pipeline.progress import counter
from pipeline.records import exclusively
from pipeline.stages.fold.budgeting import budgeted
from pipeline.stages.fold.determinism import refuse_nondeterministic
from pipeline.stages.fold.diagnosis import FoldDiagnosis, watchdog_of
from pipeline.stages.fold.finishing import finish
from pipeline.stages.fold.hooks import FoldHooks, Listener, unheard_scores
from pipeline.stages.fold.record import new_run
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.initialisation import initialise
from pipeline.tracking import Follower, RunLog, SilentLog, start_follower
from pipeline.training.budget import Recount
from pipeline.training.checkpoints import load_checkpoint
from pipeline.training.diagnosis.stopwatch import FINISHING, STARTING, Stopwatch
from pipeline.training.diagnosis.watchdog import Watchdog
from pipeline.training.distributed import agree, first_awaited, this_share
from pipeline.training.loop import Batch, Batches, train
from pipeline.training.state import TrainState

log = logging.getLogger(__name__)

# How long the end of training waits for MLflow; what has not arrived by then is sent by `medseg sync`.
TRACKING_WAIT_S = 15.0


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
    _warn_of_nothing_to_score(task)
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
            "`medseg preprocess --replan`), and train anew: --resume keeps to the settings that a training began with"
        ) from error


def _train_locked(task: FoldTask, *, resume: bool, listener: Listener, recount: Recount | None) -> None:
    """Train one fold while no other process does."""
    # Of what is kept open the log is closed last: a watchdog writes into it to its own end.
    with ExitStack() as kept, watchdog_of(task, Stopwatch(task.device)) as watchdog:
        follower = _train_watched(task, watchdog, kept, resume=resume, listener=listener, recount=recount)
    if follower is not None:
        follower.wait(TRACKING_WAIT_S)


def _train_watched(
    task: FoldTask,
    watchdog: Watchdog,
    kept: ExitStack,
    *,
    resume: bool,
    listener: Listener,
    recount: Recount | None,
) -> Follower | None:
    """Train one fold while a watchdog watches, keep its log open, and return who still sends to MLflow."""
    began, share, clock = time.monotonic(), this_share(), watchdog.clock
    with clock(STARTING):
        state = task.new_state()
        batches = task.batches(state.network, clock, clock.reached)
        if task.config.training.deterministic:
            refuse_nondeterministic(task, batches)
        task.wrap_step(state, batches)
    if resume:
        load_checkpoint(task.checkpoint, state, task.facts_to_resume)
        agree({"checkpoint": (state.step, state.total_steps, state.best_step)})
        tracked = RunLog.resume(task.folder) if share.is_first else SilentLog(task.folder)
    else:
        taken = initialise(task, state)  # before anything is moved or written: it may refuse
        tracked = new_run(task, taken) if share.is_first else SilentLog(task.folder)
    kept.callback(tracked.close)
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
                finish(hooks, state)
        diagnosis.count_to(FINISHING)
    except BaseException as error:
        tracked.finish("KILLED" if isinstance(error, KeyboardInterrupt | TrainingEnded) else "FAILED")
        raise
    else:
        # Last of all: a training is over once its log says so.
        tracked.finish("FINISHED")
    finally:
        batches.close()
    diagnosis.summarise()
    return follower


def _begin(hooks: FoldHooks, state: TrainState, began: float, *, resume: bool) -> Recount:
    """Find out how long to train, and return how the steps in all are counted from here on; before the first step also
    picture what is learned from, and write the checkpoint of that step.
    """
    tracked = hooks.tracked
    if not resume and this_share().is_first:
        hooks.diagnosis.picture_patches(tracked)
    recount = budgeted(hooks, state, began, resume=resume)
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


def _warn_of_nothing_to_score(task: FoldTask) -> None:
    """Say so where no model can be told from another."""
    if not task.is_scored:
        wanted = "case with a label" if task.needs_labels else "case"
        log.warning("fold %d: holds no %s to validate on; the last model is taken for the best", task.fold, wanted)


def _counted(batches: Batches, advance: Callable[[], None], accumulate: int) -> Batches:
    """Return the batches, the first of each step moving the progress bar on."""

    def batch(number: int) -> Batch:
        if number % accumulate == 0:
            advance()
        return batches(number)

    return batch
