"""Worker processes: each segments the cases of one batch that it gets hold of, with a device or a share of the cores.

They are further processes on the same folder: claims say who has which case, the journal what became of it. A worker
that is killed, as the kernel does where memory runs out, costs nobody else: the others take its cases over. Run as a
module, this is a worker; it ends when the batch does, at SIGTERM, or when its parent closes the pipe, dead or alive.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.records import Record, write_json
from pipeline.stages.segmenting.batch import Batch
from pipeline.stages.segmenting.case import CaseSteps, SegmentSettings
from pipeline.stages.segmenting.claims import left_by
from pipeline.stages.segmenting.inputs import BOOKKEEPING, SegmentInput
from pipeline.stages.segmenting.journal import Journal
from pipeline.stages.segmenting.report import CaseResult
from pipeline.stages.worker_processes import begin_work, log_level, start_worker, when_parent_ends

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1
# Exit codes of a worker beside 0.
REFUSED, DISK_FULL = 2, 3


class Task(Record):
    """What a worker is told, but for its device.

    Attributes:
        settings: of the batch.
        cases: in the order in which they are taken.
        threads: of this worker.
        log_level: of our log.
    """

    settings: SegmentSettings
    cases: tuple[SegmentInput, ...]
    threads: int
    log_level: int


@dataclass(frozen=True)
class Worker:
    """A running worker."""

    process: subprocess.Popen[bytes]
    device: str


class Workers:
    """The workers of a batch, seen from their parent.

    Args:
        settings: of the batch; the memory is each worker's.
        devices: one for each worker.
        threads: of each.
        stop: once it is set, the workers finish their cases in hand and end.

    Attributes:
        journal: of the folder.
        disk_full: nothing more could be written, and the batch was stopped.
    """

    def __init__(self, settings: SegmentSettings, devices: Sequence[str], threads: int, stop: threading.Event) -> None:
        self.disk_full = False
        self.journal = Journal(settings.out, settings.run)
        self._settings, self._devices, self._threads, self._stop = settings, devices, threads, stop
        self._task = settings.out / BOOKKEEPING / f"task-{settings.run}.json"
        self._alive: list[Worker] = []

    def results(self, cases: Sequence[SegmentInput]) -> Iterator[CaseResult]:
        """Yield what becomes of each case, as the journal tells.

        Raises:
            PipelineError: every worker came to its end before the batch did.
        """
        names = [case.name for case in cases]
        task = Task(settings=self._settings, cases=tuple(cases), threads=self._threads, log_level=log_level())
        write_json(self._task, task.model_dump(mode="json"))
        told: set[str] = set()
        try:
            for device in self._devices[: len(cases)]:
                self._start(device)
            while not self._ended(names):
                yield from self._news(told)
                time.sleep(LOOK_EVERY_S)
            yield from self._news(told)
        finally:
            self._kill()
        if len(told) < len(cases) and not self._stop.is_set():
            raise PipelineError(f"all workers ended, and {len(cases) - len(told)} cases are left; see what they said")

    def _start(self, device: str) -> None:
        """Start a worker."""
        process = start_worker(__name__, str(self._task), device, threads=self._threads)
        self._alive.append(Worker(process, device))

    def _ended(self, names: Sequence[str]) -> bool:
        """Tell whether all workers have ended; one that was killed over a case is replaced."""
        for worker in tuple(self._alive):
            if self._stop.is_set() and worker.process.stdin:
                worker.process.stdin.close()
            code = worker.process.poll()
            if code is None:
                continue
            self._alive.remove(worker)
            if code == DISK_FULL:
                self.disk_full = True
                self._stop.set()
            elif code < 0:
                self._replace(worker, -code, names)
        return not self._alive

    def _replace(self, worker: Worker, number: int, names: Sequence[str]) -> None:
        """Say that a worker was killed, and start another if it had a case in hand."""
        cases = list(left_by(self._settings.out, worker.process.pid, names))
        why = " (out of memory?)" if number == signal.SIGKILL else ""
        held = ", ".join(cases) or "no case"
        log.warning("a worker was killed by signal %d%s; it had in hand: %s", number, why, held)
        # One that dies before it has a case would die again.
        if cases and not self._stop.is_set():
            self._start(worker.device)

    def _news(self, told: set[str]) -> Iterator[CaseResult]:
        """Yield the results that have not been told."""
        self.journal.refresh()
        for name in [name for name in self.journal.of_run if name not in told]:
            told.add(name)
            yield self.journal.of_run[name]

    def _kill(self) -> None:
        """End what still runs, at once; what it leaves is whole or can be done again."""
        for worker in self._alive:
            worker.process.kill()
            worker.process.wait()
        self._task.unlink(missing_ok=True)


def main() -> None:
    """Work through a batch with whoever else does."""
    path, device = sys.argv[1:]
    # Not by pydantic's own reader, which refuses the escapes of paths that are no UTF-8.
    task = Task.model_validate(json.loads(Path(path).read_bytes()))
    begin_work(task.threads, task.log_level)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # Batch systems send it to all, not the parent alone.
    when_parent_ends(stop.set)
    try:
        batch = Batch(CaseSteps(task.settings.changed(device=device)), stop)
        for _ in batch.results(task.cases):
            pass
    except PipelineError as error:
        log.error("worker on %s: %s", device, error)
        sys.exit(REFUSED)
    sys.exit(DISK_FULL if batch.disk_full else 0)


if __name__ == "__main__":
    main()
