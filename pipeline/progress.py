"""Progress of long work: a bar on a terminal, plain lines of the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)

Item = TypeVar("Item")

LINE_EVERY_S = 10.0


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield the items and show how far it is.

    On a terminal by a bar with the time left, elsewhere by a line every ten seconds and one at the end.
    """
    if sys.stderr.isatty():
        yield from _bar(items, title, total)
    else:
        yield from _lines(items, title, total)


def _bar(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield the items under a rich progress bar on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, description=title, total=total)


def _lines(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield the items and log how many are done."""
    start = said = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - said > LINE_EVERY_S and done < total:
            said = now
            log.info("%s: %d of %d, %.0f s left", title, done, total, (now - start) / done * (total - done))
    log.info("%s: %d of %d in %.1f s", title, done, total, time.monotonic() - start)
