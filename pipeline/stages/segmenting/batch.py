"""A batch in one process: three steps a case, each in its own thread, and no more cases in memory than it admits."""

from __future__ import annotations

import errno
import glob
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from pipeline.stages.segmenting.case import CaseInHand, CaseSteps
from pipeline.stages.segmenting.claims import Claim, Claims
from pipeline.stages.segmenting.inputs import INSTANCES, PROBABILITIES, SegmentInput
from pipeline.stages.segmenting.journal import Journal
from pipeline.stages.segmenting.page import PICTURES
from pipeline.stages.segmenting.report import CaseResult

log = logging.getLogger(__name__)

# How often a case that another process holds is looked at again.
LOOK_AGAIN_S = 0.3
# A case over which so many processes of one run died is given up.
DEATHS_ALLOWED = 2


class Room:
    """Memory for cases: one that does not fit beside those in hand waits for them; alone each is admitted.

    Args:
        limit_bytes: of all cases in hand together.
        stop: ends every waiting.
    """

    def __init__(self, limit_bytes: float, stop: threading.Event) -> None:
        self._limit, self._stop = limit_bytes, stop
        self._taken: dict[str, float] = {}
        self._left = threading.Condition()

    def enter(self, name: str, wanted_bytes: float) -> bool:
        """Wait until a case fits; False where the batch is stopped instead."""
        with self._left:
            while self._taken and sum(self._taken.values()) + wanted_bytes > self._limit:
                if self._stop.is_set():
                    return False
                self._left.wait(LOOK_AGAIN_S)
            self._taken[name] = wanted_bytes
        return not self._stop.is_set()

    def leave(self, name: str) -> None:
        """Free what a case took."""
        with self._left:
            self._taken.pop(name, None)
            self._left.notify_all()


class Batch:
    """The cases of a batch that this process gets hold of.

    Args:
        steps: what is done with a case.
        stop: once it is set, the cases in hand are finished and no other is begun.
        worker: names this process in its claims; None: its number on this machine.

    Attributes:
        journal: of the folder.
        disk_full: nothing more could be written, and the batch was stopped.
    """

    def __init__(self, steps: CaseSteps, stop: threading.Event, worker: str | None = None) -> None:
        settings = steps.settings
        self._steps, self._stop, self._overwrite = steps, stop, settings.overwrite
        self._run, self._out = settings.run, settings.out
        self.disk_full = False
        self._claims = Claims(settings.out, settings.run, worker)
        self.journal = Journal(settings.out, settings.run)
        self._room = Room(steps.room_bytes, stop)

    def results(self, cases: Sequence[SegmentInput]) -> Iterator[CaseResult]:
        """Yield what becomes of each case, as it happens; of a case that a worker of this run has ended, nothing."""
        turns = self._turns(cases)
        try:
            with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
                try:
                    yield from self._pipeline(turns, reader, writer)
                except BaseException:
                    self._stop.set()  # So that the reader waits for nothing.
                    raise
        finally:
            self._claims.give_all_back()

    def _pipeline(
        self, turns: Iterator[tuple[SegmentInput, Claim]], reader: ThreadPoolExecutor, writer: ThreadPoolExecutor
    ) -> Iterator[CaseResult]:
        """Predict one case while the next is read and the last is written."""
        written: Future[CaseResult] | None = None
        ahead = reader.submit(self._read_next, turns)
        while True:
            if written is not None:
                # What is written is told at once, even where the next case must be waited for.
                pending: list[Future[Any]] = [ahead, written]
                wait(pending, return_when=FIRST_COMPLETED)
                if written.done():
                    yield written.result()
                    written = None
            if (case := ahead.result()) is None:
                break
            ahead = reader.submit(self._read_next, turns)
            case.attempt(self._revoke)
            case.attempt(self._steps.predict)
            if written is not None:
                yield written.result()
            written = writer.submit(self._finish, case)
        if written is not None:
            yield written.result()

    def _revoke(self, case: CaseInHand) -> None:
        """Take back what is written down of a case whose files are about to be replaced."""
        if case.source.name in self.journal.done:
            self.journal.revoke(case.source.name)

    def _turns(self, cases: Sequence[SegmentInput]) -> Iterator[tuple[SegmentInput, Claim]]:
        """Yield the cases that nobody else has; last those that others had, or over which a process died."""
        put_off = []
        for case in cases:
            claim = self._take(case.name)
            if claim and not claim.left_before:
                yield case, claim
            elif case.name not in self.journal.of_run:
                put_off.append(case)
                if claim:
                    claim.give_back(ended=False)
        while put_off and not self._stop.is_set():
            for case in tuple(put_off):
                claim = self._take(case.name)
                if claim:
                    yield case, claim
                if claim or case.name in self.journal.of_run:
                    put_off.remove(case)
            if put_off:
                self._stop.wait(LOOK_AGAIN_S)

    def _take(self, name: str) -> Claim | None:
        """Take a case unless it is another's, this run has ended it, or the batch is stopped."""
        if self._stop.is_set():
            return None
        claim = self._claims.take(name)
        # Looked at only now: whoever had the case until a moment ago has written down what became of it.
        self.journal.refresh()
        if claim and name in self.journal.of_run:
            claim.give_back(ended=True)
            return None
        return claim

    def _read_next(self, turns: Iterator[tuple[SegmentInput, Claim]]) -> CaseInHand | None:
        """Read the next case, in the reading thread; None at the end."""
        for source, claim in turns:
            case = CaseInHand.of(source, claim)
            deaths = claim.left_before.count(self._run)
            if deaths >= DEATHS_ALLOWED:
                case.fail(f"the process that worked on it was killed, {deaths} times: out of memory?")
                return case
            # Alone, if a process died over it: then it costs no other case, and is known to be the reason.
            case.attempt(self._steps.measure)
            if not self._room.enter(source.name, math.inf if claim.left_before else case.memory_bytes):
                claim.give_back(ended=False)
                return None
            claim.begin()
            if claim.left_before:
                self._clear_leftovers(source.name)
            case.before = None if self._overwrite else self.journal.done.get(source.name)
            case.attempt(self._steps.read)
            return case
        return None

    def _clear_leftovers(self, name: str) -> None:
        """Remove what a process that died over a case left half written; nobody else writes for this case now."""
        # Eight letters stand in the temporary names: with any number of them those of the case a-NAME would go too.
        for folder in (self._out, *(self._out / own for own in (PICTURES, PROBABILITIES, INSTANCES))):
            for file in folder.glob(f".tmp-{'?' * 8}-{glob.escape(name)}.*"):
                file.unlink(missing_ok=True)

    def _finish(self, case: CaseInHand) -> CaseResult:
        """Write a case's files and take down what became of it, in the writing thread."""
        case.attempt(self._steps.write)
        try:
            self.journal.add(case.result)
        except OSError as error:
            case.fail(str(error), error)
        if case.claim:
            case.claim.give_back(ended=True)
        self._room.leave(case.source.name)
        if case.result.status == "failed":
            log.warning("%s: %s", case.source.name, case.result.reason)
        if isinstance(case.error, OSError) and case.error.errno in (errno.ENOSPC, errno.EDQUOT):
            self.disk_full = True
            self._stop.set()
        return case.result
