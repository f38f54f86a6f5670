"""What flows from the windows to the labelling, and how the one is kept busy beside the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LogitPlanes:
    """Finished planes of logits, in order along the stream's axis.

    Attributes:
        start: index of the first plane along the stream's axis.
        logits: (K, n, A, B) float32; n planes along the stream's axis, then the two other axes in their order.
    """

    start: int
    logits: Tensor


def ahead(planes: Iterable[LogitPlanes]) -> Iterator[LogitPlanes]:
    """Yield planes while a thread makes the next ones: a GPU runs windows while the CPU labels."""
    source = iter(planes)
    with ThreadPoolExecutor(1, "windows") as pool:
        coming = pool.submit(next, source, None)
        while (some := coming.result()) is not None:
            coming = pool.submit(next, source, None)
            yield some
