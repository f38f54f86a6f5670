"""The one queue of a service: who waits, who is at work, what is kept to be fetched; every change is on disk first."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.stages.segmenting.batch import DEATHS_ALLOWED
from pipeline.stages.segmenting.report import CaseResult
from pipeline.stages.serving.job import TAG_SHOWN, Failure, Job
from pipeline.stages.serving.spool import Spool

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many jobs wait as may."""


class Stopping(Exception):
    """The service comes to its end; a job that waits is taken up at its next start."""


@dataclass(frozen=True)
class Ended:
    """What became of a job: its case's result, or why there is none."""

    result: CaseResult | None = None
    failure: Failure | None = None
    reason: str | None = None


class JobQueue:
    """Jobs in the order of their acceptance; may be used from any thread.

    Args:
        spool: where they lie.
        capacity: how many may wait, uploads under way among them.
        keep_s: how long a result waits to be fetched.
    """

    def __init__(self, spool: Spool, capacity: int, keep_s: float) -> None:
        self.spool, self.capacity, self._keep_s = spool, capacity, keep_s
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[str] = deque()
        self._uploads = 0
        self._unwanted: set[str] = set()
        self._ends: dict[str, list[Future[Job]]] = {}
        self._changed = threading.Condition()
        self._stopped = False

    def load(self, model: str) -> int:
        """Take up what an earlier service has left; a job for another model fails. Return how many wait."""
        with self._changed:
            for job in self.spool.jobs():
                self._jobs[job.tag] = job
                if job.has_ended:
                    continue
                if job.model != model:
                    reason = "the service was started with another model since; send it again"
                    self._end(job, Ended(failure="death", reason=reason))
                elif job.attempts >= DEATHS_ALLOWED:
                    self._end(job, _died(job))
                else:
                    self._jobs[job.tag] = job.changed(state="queued")
                    self._waiting.append(job.tag)
            return len(self._waiting)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the queue while a job is uploaded.

        Raises:
            QueueFull: there is none.
            Stopping: nothing is accepted any more.
        """
        with self._changed:
            if self._stopped:
                raise Stopping
            if self._uploads + len(self._waiting) >= self.capacity:
                raise QueueFull
            self._uploads += 1
        try:
            yield
        finally:
            with self._changed:
                self._uploads -= 1

    def add(self, job: Job) -> None:
        """Accept an uploaded job, within its `place`."""
        self.spool.accept(job)
        with self._changed:
            self._jobs[job.tag] = job
            self._waiting.append(job.tag)
            self._changed.notify_all()

    def take(self, still: Callable[[], bool] = lambda: True, *, wait: bool = True) -> Job | None:
        """Take the next job; whoever does so writes it down by `note` once it is begun.

        Args:
            still: is asked again after each `wake`.
            wait: for a job, where there is none.

        Returns:
            The job, running; None where there is none, the service stops, or `still` says no.
        """
        with self._changed:
            while wait and not self._waiting and not self._stopped and still():
                self._changed.wait()
            if self._stopped or not self._waiting or not still():
                return None
            tag = self._waiting.popleft()
            self._jobs[tag] = self._jobs[tag].changed(state="running", attempts=self._jobs[tag].attempts + 1)
            return self._jobs[tag]

    def note(self, job: Job) -> None:
        """Write down that a job is running: if the service dies from now on, it is known over what."""
        self._write(job)

    def wake(self) -> None:
        """Let whoever waits for a job look whether it still wants one."""
        with self._changed:
            self._changed.notify_all()

    def give_back(self, job: Job, *, blamed: bool) -> None:
        """Put a job back whose worker came to its end.

        Args:
            job: as it was taken.
            blamed: the worker may have died over it: the second time the job fails.
        """
        with self._changed:
            if job.tag in self._unwanted:
                self._drop(job.tag)
            elif blamed and job.attempts >= DEATHS_ALLOWED:
                self._end(job, _died(job))
            else:
                self._put(job.changed(state="queued", attempts=job.attempts - (not blamed)))
                self._waiting.appendleft(job.tag)
                self._changed.notify_all()

    def end(self, job: Job, ended: Ended) -> None:
        """Take down what became of a job; of one that nobody wants any more nothing is kept."""
        with self._changed:
            if job.tag in self._unwanted:
                self._drop(job.tag)
            else:
                self._end(job, ended)

    def find(self, tag: str, owner: str) -> Job | None:
        """Return a client's job; None where it has none of that tag."""
        with self._changed:
            job = self._jobs.get(tag)
            return job if job and job.owner == owner and tag not in self._unwanted else None

    def position(self, tag: str) -> int | None:
        """Return how many jobs are before one that waits; None where it does not."""
        with self._changed:
            return self._waiting.index(tag) if tag in self._waiting else None

    def ended(self, tag: str) -> Future[Job]:
        """Return a promise of a job's end; it fails with `Stopping` where the service ends before."""
        future: Future[Job] = Future()
        with self._changed:
            job = self._jobs[tag]
            if job.has_ended:
                future.set_result(job)
            else:
                self._ends.setdefault(tag, []).append(future)
        return future

    def remove(self, tag: str) -> None:
        """Let nothing be left of a job; one at work is finished first, and its result dropped."""
        with self._changed:
            job = self._jobs.get(tag)
            if job is None:
                return
            if job.state == "running":
                self._unwanted.add(tag)
                return
            if tag in self._waiting:
                self._waiting.remove(tag)
            self._drop(tag)

    def expire(self, now_s: float | None = None) -> int:
        """Remove results that were not fetched in time; return how many."""
        now_s = time.time() if now_s is None else now_s
        with self._changed:
            old = [j.tag for j in self._jobs.values() if j.ended_s is not None and j.ended_s + self._keep_s < now_s]
            for tag in old:
                self._drop(tag)
        return len(old)

    def stop(self) -> None:
        """Accept nothing more and begin nothing more; who waits for the end of a job that waits itself is told."""
        with self._changed:
            self._stopped = True
            for tag in self._waiting:
                self._tell(tag, Stopping())
            self._changed.notify_all()

    def release(self) -> None:
        """Tell whoever still waits that the service ends."""
        with self._changed:
            for tag in tuple(self._ends):
                self._tell(tag, Stopping())

    def counts(self) -> dict[str, int]:
        """Return how many jobs are in each state, and how many uploads are under way."""
        with self._changed:
            states = [job.state for job in self._jobs.values()]
            return {"uploading": self._uploads} | {
                state: states.count(state) for state in ("queued", "running", "done", "failed")
            }

    def _put(self, job: Job) -> Job:
        """Write a job down, and know it as it is now."""
        self._write(job)
        self._jobs[job.tag] = job
        return job

    def _write(self, job: Job) -> None:
        """Write a job down."""
        try:
            self.spool.write(job)
        except OSError as error:  # A full disk: what is known here is right, and a restart would do the job again.
            log.error("job %s: cannot be written down: %s", job.tag[:TAG_SHOWN], error.strerror)

    def _end(self, job: Job, ended: Ended) -> None:
        """Take down a job's end, remove its images, and tell who waits for it."""
        state = "done" if ended.result else "failed"
        changes = {"state": state, "failure": ended.failure, "reason": ended.reason, "result": ended.result}
        self._put(job.changed(**changes, ended_s=time.time()))
        self.spool.clear(self._jobs[job.tag])
        self._tell(job.tag, None)

    def _tell(self, tag: str, error: Exception | None) -> None:
        """Keep the promises of a job's end, or break them."""
        for future in self._ends.pop(tag, ()):
            if not future.set_running_or_notify_cancel():
                continue
            if error:
                future.set_exception(error)
            else:
                future.set_result(self._jobs[tag])

    def _drop(self, tag: str) -> None:
        """Forget a job and remove what there is of it."""
        self._tell(tag, Stopping())
        self._jobs.pop(tag, None)
        self._unwanted.discard(tag)
        self.spool.remove(tag)


def _died(job: Job) -> Ended:
    """Return the end of a job over which workers died."""
    reason = f"the process that worked on it was killed, {job.attempts} times: out of memory?"
    return Ended(failure="death", reason=reason)
