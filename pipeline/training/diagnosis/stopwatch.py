"""Where an epoch's time goes: phases that share the time out among themselves, on a GPU by its own clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

WAITING, AUGMENTATION, STEPS = "waiting for data", "augmentation", "forward and backward"
VALIDATION, CHECKPOINTS, LOGGING, REST = "validation", "checkpoints", "logging", "the rest"
# What comes before the first step, and after the last.
STARTING, FINISHING = "starting", "finishing"
PHASES = (WAITING, AUGMENTATION, STEPS, VALIDATION, CHECKPOINTS, LOGGING, REST)

Clock = Callable[[str], AbstractContextManager[None]]


# How to mark a moment, and how to tell the seconds between two marks.
_Marks = tuple[Callable[[], Any], Callable[[Any, Any], float]]


def untimed(phase: str) -> AbstractContextManager[None]:
    """Stand where a stopwatch may stand, and measure nothing."""
    return nullcontext()


def unheard(case: str) -> None:
    """Stand where cases that are reached may be told, and tell nobody."""


class Stopwatch:
    """Shares time out among phases; of phases within one another the innermost counts.

    On a GPU the marks between phases are CUDA events among the work that is queued: they tell when the device got
    there, not when Python did, and nothing waits for them before `read`. A device that idles until a batch comes was
    waiting for data; one that is still busy with the last step was not, however long Python stood there.

    For one thread: that of the loop.

    Args:
        device: where the network trains.
        now: the processor's clock in seconds; a GPU has its own.

    Attributes:
        case: id of the case that was reached within the phase; "" where none was.
        moved_s: when a phase last began or ended, or a case was reached, by `time.monotonic`.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        marks: _Marks = _device_marks(device) if device.type == "cuda" else (now, _difference)
        self._mark, self._seconds = marks
        self._stack = [REST]
        self._timeline = [(REST, self._mark())]
        self.case = ""
        self.moved_s = time.monotonic()

    @property
    def phase(self) -> str:
        """The phase under way."""
        return self._stack[-1]

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time within to a phase."""
        self._stack.append(phase)
        self._turn()
        try:
            yield
        finally:
            self._stack.pop()
            self._turn()

    def reached(self, case: str) -> None:
        """Say which case is begun within a phase: the phase goes on, and does not stand still."""
        self.case, self.moved_s = case, time.monotonic()

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase since the last reading, and begin anew; waits for the device."""
        self._turn()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in zip(self._timeline, self._timeline[1:], strict=False):
            seconds[phase] = seconds.get(phase, 0.0) + self._seconds(start, end)
        del self._timeline[:-1]
        return seconds

    def _turn(self) -> None:
        """Mark that from here on time belongs to another phase."""
        self._timeline.append((self.phase, self._mark()))
        self.reached("")


def _difference(start: float, end: float) -> float:
    """Return the seconds between two readings of the processor's clock."""
    return end - start


def _device_marks(device: torch.device) -> _Marks:
    """Return how to mark a moment among a GPU's work, and how to tell the seconds between two marks."""

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    return mark, seconds
