"""Worker processes seen from the service: started, given jobs, asked about headers, replaced when they die."""

from __future__ import annotations

import itertools
import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.records import write_json
from pipeline.stages.segmenting.case import SegmentSettings
from pipeline.stages.serving import worker
from pipeline.stages.serving.job import TAG_SHOWN, Job
from pipeline.stages.serving.messages import READY, Answer, Order, WorkerTask
from pipeline.stages.serving.queueing import Ended, JobQueue
from pipeline.stages.worker_processes import log_level, start_worker

log = logging.getLogger(__name__)

_TASK = "worker.json"
# A job that a worker has, the promise of its answer, and when it got it.
Begun = tuple[Job, Future[Answer], float]
# One that dies again and again is started more and more slowly.
_LONGEST_PAUSE_S = 30.0


class WorkerDied(Exception):
    """A worker came to its end before it answered.

    Args:
        code: its exit code; below 0 the number of a signal.
        blamed: it may have died over what it was asked here: the first of the headers that it was to examine, or the
            case in hand where there were none.
    """

    def __init__(self, code: int, *, blamed: bool) -> None:
        super().__init__(f"by signal {-code}" if code < 0 else f"with exit code {code}")
        self.code, self.blamed = code, blamed


class Worker:
    """A worker process.

    Args:
        task: file of its task.
        device: that it works on.
        threads: of it.
        on_death: is called when it has died.
    """

    def __init__(self, task: Path, device: str, threads: int, on_death: Callable[[], None] = lambda: None) -> None:
        self._process = start_worker(worker.__name__, str(task), device, threads=threads, stdout=subprocess.PIPE)
        self._numbers = itertools.count(READY + 1)
        # Two locks: a pipe that is full must not keep answers from being read.
        self._mutex, self._writing = threading.Lock(), threading.Lock()
        self._on_death = on_death
        self._asked: dict[int, tuple[str, Future[Answer]]] = {READY: ("start", Future())}
        self._code: int | None = None
        self.ready = self._asked[READY][1]
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not died yet, as far as is known."""
        return self._code is None

    @property
    def is_ready(self) -> bool:
        """Whether its models are loaded."""
        return self.is_alive and self.ready.done() and not self.ready.exception() and not self.ready.result().failure

    def segment(self, tag: str, files: Mapping[str, Path], folder: Path) -> Future[Answer]:
        """Let a case be segmented into a folder; the promise fails with `WorkerDied`."""
        number = next(self._numbers)
        return self._ask(Order(number=number, kind="segment", name=tag, folder=folder, files=dict(files)))

    def examine(self, tag: str, files: Mapping[str, Path], folder: Path) -> Future[Answer]:
        """Let a case's headers be examined; the promise fails with `WorkerDied`."""
        number = next(self._numbers)
        return self._ask(Order(number=number, kind="examine", name=tag, folder=folder, files=dict(files)))

    def refuse_dead(self) -> None:
        """Raise `WorkerDied` where it has."""
        if self._code is not None:
            raise WorkerDied(self._code, blamed=False)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
        self._listening.join()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def _ask(self, order: Order) -> Future[Answer]:
        """Send an order."""
        future: Future[Answer] = Future()
        line = order.model_dump_json().encode() + b"\n"
        with self._mutex:
            if self._code is not None:
                future.set_exception(WorkerDied(self._code, blamed=False))
                return future
            self._asked[order.number] = (order.kind, future)
        assert self._process.stdin is not None
        with self._writing, suppress(BrokenPipeError):  # Then it is dead, as the listening thread is about to learn.
            self._process.stdin.write(line)
            self._process.stdin.flush()
        return future

    def _listen(self) -> None:
        """Keep promises as answers come; when they end, so does the worker."""
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                answer = Answer.model_validate_json(line)
                with self._mutex:
                    _, future = self._asked.pop(answer.number)
                if future.set_running_or_notify_cancel():
                    future.set_result(answer)
        self._process.kill()
        code = self._process.wait()
        with self._mutex:
            self._code = code
            asked, self._asked = self._asked, {}
        # It takes one order of each kind at a time, in their order.
        kinds = {kind: number for number, (kind, _) in reversed(asked.items())}
        suspect = kinds.get("examine", kinds.get("segment"))
        for number, (_, future) in asked.items():
            if future.set_running_or_notify_cancel():
                future.set_exception(WorkerDied(code, blamed=number == suspect))
        self._on_death()


class Pool:
    """The workers of a service: each takes the next job of the queue, and another takes its place when it dies.

    Args:
        settings: of every case.
        devices: of the workers.
        threads: of each.
        jobs: the queue.
        job_s: a job may take so long.

    Attributes:
        refusal: why a worker cannot begin, in words; None while all is well.
        deaths: how many workers died.
        busy_s: what workers spent on jobs.
    """

    def __init__(
        self, settings: SegmentSettings, devices: Sequence[str], threads: int, jobs: JobQueue, job_s: float
    ) -> None:
        self._settings, self._devices, self._threads, self._jobs, self._job_s = settings, devices, threads, jobs, job_s
        self.refusal: str | None = None
        self.deaths, self.busy_s = 0, 0.0
        self._task = jobs.spool.folder / _TASK
        self._stop = threading.Event()
        self._alive: list[Worker] = []
        self._keepers: list[threading.Thread] = []

    def start(self) -> None:
        """Start the workers; their models are loaded when `ready` says so."""
        task = WorkerTask(settings=self._settings, threads=self._threads, log_level=log_level())
        write_json(self._task, task.model_dump(mode="json"))
        self._keepers = [threading.Thread(target=self._keep, args=(device,), daemon=True) for device in self._devices]
        for keeper in self._keepers:
            keeper.start()

    def ready(self) -> Worker | None:
        """Return a worker that has its models loaded; None where there is none."""
        return next((one for one in tuple(self._alive) if one.is_ready), None)

    def stop(self, grace_s: float) -> None:
        """Let the jobs in hand be finished, those that are not in so many seconds put back, and end the workers."""
        self._stop.set()
        self._jobs.stop()
        until = time.monotonic() + grace_s
        for keeper in self._keepers:
            if self.ready() is not None:
                keeper.join(max(0.0, until - time.monotonic()))
        for one in tuple(self._alive):
            one.kill()
        for keeper in self._keepers:
            keeper.join()
        self._task.unlink(missing_ok=True)

    def _keep(self, device: str) -> None:
        """Keep one worker at work, and replace it when it dies."""
        fruitless = 0
        while not self._stop.is_set():
            one = Worker(self._task, device, self._threads, self._jobs.wake)
            self._alive.append(one)
            done = [0]
            try:
                answer = one.ready.result()
                if answer.reason:
                    raise PipelineError(answer.reason)
                log.info("a worker (%d) has the models loaded on %s", one.pid, device)
                self._work(one, done)
            except WorkerDied as death:
                if not self._stop.is_set():
                    self.deaths += 1
                    why = " (out of memory?)" if death.code == -signal.SIGKILL else ""
                    log.warning("a worker (%d) ended %s%s; another takes its place", one.pid, death, why)
            except PipelineError as error:
                self.refusal = str(error)
                return
            except Exception:
                # A bug of ours: the queue must go on all the same.
                log.exception("the thread that keeps a worker failed")
            finally:
                self._alive.remove(one)
                one.kill()
            fruitless = 0 if done[0] else fruitless + 1
            self._stop.wait(min(_LONGEST_PAUSE_S, 2.0 ** (fruitless - 1) - 1 if fruitless else 0.0))

    def _work(self, one: Worker, done: list[int]) -> None:
        """Give a worker one job after another, until the service stops or the worker dies."""
        begun = self._begin(one)
        while begun is not None:
            job, future, start = begun
            try:
                answer = future.result(self._job_s)
            except WorkerDied as death:
                self._jobs.give_back(job, blamed=death.blamed and not self._stop.is_set())
                raise
            except TimeoutError:
                self._give_up(job)
                return
            # The next is begun before this one's end is on the disk, for which the worker need not wait.
            following = self._begin(one, wait=False)
            done[0] += 1
            self._take_down(job, answer, time.monotonic() - start)
            begun = following or self._begin(one)
        one.refuse_dead()

    def _begin(self, one: Worker, *, wait: bool = True) -> Begun | None:
        """Give a worker the next job; None where there is none, the service stops, or the worker has died."""
        job = self._jobs.take(lambda: one.is_alive, wait=wait)
        if job is None:
            return None
        spool = self._jobs.spool
        begun = job, one.segment(job.tag, spool.files_of(job), spool.folder_of(job.tag)), time.monotonic()
        self._jobs.note(job)
        return begun

    def _take_down(self, job: Job, answer: Answer, taken_s: float) -> None:
        """Take down what a worker made of a job."""
        self.busy_s += taken_s
        self._jobs.end(job, Ended(answer.result, answer.failure, answer.reason))
        what = "done" if answer.result else f"failed ({answer.failure})"
        log.info("job %s: %s in %.2f s", job.tag[:TAG_SHOWN], what, taken_s)

    def _give_up(self, job: Job) -> None:
        """End a job that takes too long; its worker, which knows of no end, goes with it."""
        reason = f"took longer than {self._job_s / 60:g} minutes, and was ended"
        log.warning("job %s: %s", job.tag[:TAG_SHOWN], reason)
        self._jobs.end(job, Ended(failure="death", reason=reason))
