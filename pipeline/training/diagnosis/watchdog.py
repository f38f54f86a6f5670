"""A watchdog: when a training stands still, it says at which stage and case, and where in the code."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Self

from pipeline.training.diagnosis.stopwatch import Stopwatch

log = logging.getLogger(__name__)

# How often it looks: often enough that a stall is told on time, and at least so often in seconds.
LOOKS_PER_STALL, LONGEST_LOOK_S = 10, 30.0
# Calls shown of each thread, the innermost last.
FRAMES = 8


class Watchdog:
    """Warns once of each stall while it is entered: no phase has begun or ended, and no case been reached.

    Args:
        clock: knows the phase under way, and when it last moved.
        stall_s: how long is too long.
        place: says what is worked on, for instance "step 12: cases a, b"; called from the watchdog's thread.
        report: what is to be done with the sentence besides the log's warning; called from the watchdog's thread.

    Attributes:
        last: what was said last; "" where nothing was.
    """

    def __init__(
        self, clock: Stopwatch, stall_s: float, *, place: Callable[[], str], report: Callable[[str], None]
    ) -> None:
        self.clock = clock
        self.stall_s = stall_s
        self.place = place
        self.report = report
        self.last = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        """Look now and then, and bark once at each stall."""
        told = None
        while not self._ended.wait(min(LONGEST_LOOK_S, self.stall_s / LOOKS_PER_STALL)):
            moved_s = self.clock.moved_s
            if moved_s != told and time.monotonic() - moved_s > self.stall_s:
                told = moved_s
                self._bark(time.monotonic() - moved_s)

    def _bark(self, seconds: float) -> None:
        """Say that, and where, training stands still."""
        self.last = said = f"no progress for {seconds / 60:.1f} minutes; {self.clock.phase}, {self.place()}"
        log.warning("%s\n%s", said, stacks(without=threading.get_ident()))
        self.report(said)


def stacks(*, without: int) -> str:
    """Return where each thread of this process is in the code, the main thread first; idle ones of a pool are left out.

    Args:
        without: id of the thread that is left out.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    idle = "_worker"  # where a pool's threads wait for work
    frames = {i: frame for i, frame in sys._current_frames().items() if i != without and frame.f_code.co_name != idle}
    main = threading.main_thread().ident
    shown = []
    for ident in sorted(frames, key=lambda ident: ident != main):
        calls = traceback.extract_stack(frames[ident])[-FRAMES:]
        shown.append(f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_list(calls))}")
    return "\n".join(shown)
