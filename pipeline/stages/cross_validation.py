"""`medseg train --fold all`: every fold of an experiment, one after another, or several at a time on several devices.

A fold that fails keeps no other from being trained; `--resume` goes on with each where it stopped.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.hardware import pick_device, threads_per_worker
from pipeline.stages.fold import worker as fold_worker
from pipeline.stages.fold.record import experiment_run
from pipeline.stages.fold.run import train_fold
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.fold.worker import FoldOrder
from pipeline.stages.train import fold_tasks, refuse_nothing_to_resume
from pipeline.stages.worker_processes import log_level, shared_out, start_worker
from pipeline.tracking import Status, send_pending

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
# How long workers may take to write down that they were interrupted.
LAST_WORDS_S = 30.0
TRACKING_WAIT_S = 15.0


@dataclass(frozen=True)
class FoldsReport:
    """What became of an experiment's folds.

    Attributes:
        folders: fold -> its run folder, of those that are trained.
        failures: fold -> why it is not.
    """

    folders: dict[int, Path]
    failures: dict[int, str]

    def as_text(self) -> str:
        """Return which folds are trained, and why the others are not."""
        total = len(self.folders) + len(self.failures)
        failed = [f"failed: fold {fold}: {reason}" for fold, reason in self.failures.items()]
        return "\n".join([f"{len(self.folders)} of {total} folds are trained", *failed])


class _Todo(NamedTuple):
    """A fold to be trained, from its checkpoint or anew."""

    task: FoldTask
    resume: bool


@dataclass(frozen=True)
class _Running:
    """A worker, its fold, its device, and the file in which it says why it failed."""

    process: subprocess.Popen[bytes]
    task: FoldTask
    device: str
    reason: Path

    def close(self) -> None:
        """Close the pipe, which ends what still runs."""
        if self.process.stdin:
            self.process.stdin.close()

    def outcome(self) -> str | None:
        """Return why the training failed, once the process has ended; None where it did not."""
        code = self.process.returncode
        if code == 0:
            return None
        if code < 0:
            return f"killed by signal {-code}{' (out of memory?)' if -code == signal.SIGKILL else ''}"
        if self.reason.exists():
            return self.reason.read_text(encoding="utf-8")
        return f"its process ended with exit code {code}"


def run(config: Config, *, resume: bool = False, device: str = "auto", jobs: int | None = None) -> FoldsReport:
    """Train all folds of an experiment, child runs of one parent in MLflow.

    Args:
        config: the experiment; its data are preprocessed.
        resume: go on with each fold from its last checkpoint, and leave out those that are finished.
        device: auto, cpu, cuda or cuda:N; several with commas between them: a process for each, which takes one fold
            after another.
        jobs: processes; None: one for each device. They share the cores.

    Returns:
        What became of each fold; one that failed is listed with the reason, the others are trained.

    Raises:
        PipelineError: nothing can be trained, or there is nothing to resume.
    """
    devices = devices_of(device, jobs)
    tasks = fold_tasks(config, "all", devices[0])
    if resume:
        refuse_nothing_to_resume(tasks)
    left = [task for task in tasks if not (resume and task.is_finished)]
    return _trained(tasks, [_Todo(task, resume and task.checkpoint.exists()) for task in left], devices)


def complete(config: Config, *, device: str = "auto") -> FoldsReport:
    """Train the folds of an experiment that are not finished, each from its checkpoint where there is one of this very
    training.

    Args:
        config: the experiment; its data are preprocessed.
        device: as of `run`.

    Returns:
        What became of each fold.

    Raises:
        PipelineError: nothing can be trained.
    """
    devices = devices_of(device)
    tasks = fold_tasks(config, "all", devices[0])
    left = [task for task in tasks if not task.is_finished]
    return _trained(tasks, [_Todo(task, task.is_begun and task.checkpoint.exists()) for task in left], devices)


def devices_of(device: str, jobs: int | None = None) -> list[str]:
    """Return the device of each worker.

    Raises:
        PipelineError: one of them is not there: refused here once, rather than by each worker.
    """
    devices = shared_out(device, jobs)
    for one in devices:
        pick_device(one)
    return devices


def _trained(tasks: Sequence[FoldTask], todo: Sequence[_Todo], devices: Sequence[str]) -> FoldsReport:
    """Train what is to be done of an experiment's folds, and report on all."""
    failures: dict[int, str] = {}
    if todo:
        with _experiment_run(todo[0].task, failures), closing(_outcomes(todo, devices)) as outcomes:
            for task, reason in outcomes:
                if reason is not None:
                    log.error("fold %d: %s", task.fold, reason)
                    failures[task.fold] = reason
    return FoldsReport({task.fold: task.folder for task in tasks if task.fold not in failures}, failures)


@contextmanager
def _experiment_run(task: FoldTask, failures: Mapping[int, str]) -> Iterator[None]:
    """Have the run in MLflow that the folds' runs are children of, and say at the end how it went."""
    run_log = experiment_run(task)
    status: Status = "KILLED"
    try:
        yield
        status = "FAILED" if failures else "FINISHED"
    finally:
        run_log.finish(status)
        run_log.close()
        send_pending(run_log.folder, limit_s=TRACKING_WAIT_S)


def _outcomes(todo: Sequence[_Todo], devices: Sequence[str]) -> Generator[tuple[FoldTask, str | None]]:
    """Train folds and yield each with why it failed, or None."""
    return _one_by_one(todo) if len(devices) == 1 else _side_by_side(todo, devices)


def _one_by_one(todo: Sequence[_Todo]) -> Generator[tuple[FoldTask, str | None]]:
    """Train folds in this process, one after another."""
    for task, resume in todo:
        try:
            train_fold(task, resume=resume)
        except PipelineError as error:
            yield task, str(error)
        except Exception as error:
            log.exception("fold %d: failed", task.fold)  # A bug: the traceback is wanted, and so are the other folds.
            yield task, f"{type(error).__name__}: {error}"
        else:
            yield task, None


def _side_by_side(todo: Sequence[_Todo], devices: Sequence[str]) -> Generator[tuple[FoldTask, str | None]]:
    """Train folds in processes, one on each device at a time; whatever ends this ends them."""
    threads = threads_per_worker(len(devices))
    waiting, free, running = deque(todo), deque(devices), list[_Running]()
    with TemporaryDirectory(prefix="medseg-folds-") as folder:
        try:
            while waiting or running:
                while waiting and free:
                    running.append(_start(*waiting.popleft(), free.popleft(), threads, Path(folder)))
                for worker in [worker for worker in running if worker.process.poll() is not None]:
                    running.remove(worker)
                    worker.close()
                    free.append(worker.device)
                    yield worker.task, worker.outcome()
                time.sleep(LOOK_EVERY_S)
        finally:
            _end(running)


def _start(task: FoldTask, resume: bool, device: str, threads: int, folder: Path) -> _Running:
    """Start a worker and tell it what to train."""
    order = FoldOrder(
        config=task.config,
        fold=task.fold,
        resume=resume,
        reason=folder / f"fold_{task.fold}.txt",
        device=device,
        threads=threads,
        log_level=log_level(),
    )
    process = start_worker(fold_worker.__name__, threads=threads)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # One that is dead already has an exit code that says so.
        process.stdin.write(order.as_line())
        process.stdin.flush()
    log.info("fold %d: training on %s, %d threads", task.fold, device, threads)
    return _Running(process, task, device, order.reason)


def _end(workers: Sequence[_Running]) -> None:
    """Interrupt what still runs, and kill what does not listen."""
    for worker in workers:
        worker.close()
    try:
        until = time.monotonic() + LAST_WORDS_S
        for worker in workers:
            worker.process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        log.warning("stopping: a training did not end in time")
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
