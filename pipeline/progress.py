"""Progress of long work: a bar on a terminal, plain lines of the log elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger(__name__)

Item = TypeVar("Item")

LINE_EVERY_S = 10.0
# The time left follows from the speed over so many items, and seconds of a bar.
RATE_OVER_ITEMS, RATE_OVER_S = 20, 300.0

# Set where several processes share a terminal, whose bars would overwrite one another.
_shared = threading.Event()


def lines_only() -> None:
    """Show no bar from now on: this process shares its terminal with others."""
    _shared.set()


def _shows_bars() -> bool:
    """Tell whether there is a terminal of our own."""
    return sys.stderr.isatty() and not _shared.is_set()


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield the items and show how far it is.

    On a terminal by a bar with the time left, elsewhere by a line every ten seconds and one at the end.
    """
    if _shows_bars():
        yield from _bar(items, title, total)
    else:
        yield from _lines(items, title, total)


def _bar(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield the items under a bar."""
    with _progress() as progress:
        yield from progress.track(items, description=title, total=total)


def _progress() -> Progress:
    """Return rich's progress display on stderr."""
    from rich import progress as rich
    from rich.console import Console

    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
        console=Console(stderr=True),
        speed_estimate_period=RATE_OVER_S,
    )


def _lines(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield the items and log how many are done."""
    start = said = time.monotonic()
    done = 0
    # What was quickly passed over at the beginning says nothing of the time that the rest takes.
    last = deque([start], maxlen=RATE_OVER_ITEMS)
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        last.append(now)
        if now - said > LINE_EVERY_S and done < total:
            said = now
            left = (now - last[0]) / (len(last) - 1) * (total - done)
            log.info("%s: %d of %d, %.0f s left", title, done, total, left)
    log.info("%s: %d of %d in %.1f s", title, done, total, time.monotonic() - start)


@contextmanager
def transferred(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function to call with the bytes that are there and those there will be, None where nobody knows.

    On a terminal it draws a bar with the speed and the time left, elsewhere a line every ten seconds.
    """
    if not _shows_bars():
        yield _transfer_lines(title)
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.DownloadColumn())
    with rich.Progress(
        *columns, rich.TransferSpeedColumn(), rich.TimeRemainingColumn(), console=Console(stderr=True)
    ) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _transfer_lines(title: str) -> Callable[[int, int | None], None]:
    """Return what logs how many bytes are there, every ten seconds."""
    said = time.monotonic()

    def advance(done: int, total: int | None) -> None:
        nonlocal said
        if time.monotonic() - said > LINE_EVERY_S:
            said = time.monotonic()
            log.info("%s: %.1f MB%s", title, done / 1e6, "" if total is None else f" of {total / 1e6:.1f} MB")

    return advance


@contextmanager
def counter(title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function to call at each step done with the steps in all, which may change; a bar with the time left on a
    terminal, nothing elsewhere.
    """
    if not _shows_bars():
        yield lambda total: None
        return
    with _progress() as progress:
        task = progress.add_task(title, total=total, completed=done)
        yield lambda total: progress.update(task, advance=1, total=total)
