"""The ring: sums of weighted logits over the planes that windows still reach, and nothing of the volume beyond.

Plane i of the volume lies at i modulo the depth of a window. Weights are the outer product of three vectors, and so is
their sum over a regular grid of windows: there is no count map. Where windows are left out there is a ring of one
channel more, of the weight that is missing.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Output
from pipeline.errors import ResourceError
from pipeline.hardware import is_out_of_memory
from pipeline.inference.planes import LogitPlanes
from pipeline.inference.windows.tiling import Box, Flip, Size, Tiling, Windowing, cut, flipped, outer

# Planes leave together, but few, for they are held again outside the ring: so many, and of so many bytes at most.
PLANES_AT_ONCE, BYTES_AT_ONCE = 16, 2**24

# A GPU adds so many bytes of a window at once: enough to be busy, and little beside what a forward pass takes.
ADDED_BYTES = 2**27

# A voxel that keeps less than this share of its windows' weight is background without further question. Its sum is
# that of corners of windows: none of it lies in the body, for all windows of a voxel in the body are run.
LEAST_SHARE = 1e-3

# Logits of a voxel that no window covers, background's first: certain at any temperature that is fitted (tests hold
# it against those), and finite where they are interpolated, in half precision too.
CERTAIN = 112.0


class Ring:
    """The sum of weighted logits over the planes that windows still reach.

    The axes keep the volume's order, so that sums run along memory.

    Args:
        tiling: where the windows lie.
        windowing: which channels a flip swaps.
        passes: times that each window is seen, in flips and by networks.
        num_logits: channels of the logits.
        output: what background looks like in them.
        device: where the ring lies.
        folder: keeps the sums in a file there, which has no name and is gone with the process; None: in memory.

    Raises:
        ResourceError: there is no room for the ring.
    """

    def __init__(
        self,
        tiling: Tiling,
        windowing: Windowing,
        passes: int,
        num_logits: int,
        output: Output,
        device: torch.device,
        folder: Path | None = None,
    ) -> None:
        self._tiling, self._windowing, self._passes = tiling, windowing, passes
        self._weights = tiling.weights.to(device)
        self._background = [0.0 if k == 0 and output == "softmax" else -CERTAIN for k in range(num_logits)]
        # On a CPU a window's piece of a single class stays in its cache: 8 ms against 22 ms at 20 classes of 96^3.
        self._classes_at_once = 1 if device.type == "cpu" else max(1, ADDED_BYTES // (4 * self._weights.numel()))
        self._finished = 0
        self._extent = [tiling.depth if axis == tiling.axis else n for axis, n in enumerate(tiling.shape)]
        self._missing: Tensor | None = None
        self._file: mmap.mmap | None = None
        if folder is None:
            self._sums = _zeros((num_logits, *self._extent), device)
        else:
            self._sums, self._file = zeros_on_disk((num_logits, *self._extent), folder)

    def add(self, start: Size, flip: Flip, logits: Tensor) -> None:
        """Add one window's logits (K, *output), seen in a flip."""
        order = self._windowing.class_order(flip, len(logits))
        logits = _class_by_class(logits.to(self._sums.device))
        for source, target in self._pieces_of(start):
            weights = self._weights[source]
            for classes, channels in runs(order, self._classes_at_once):
                # The piece has no name, so that its memory, still in the cache, is there for the next one's.
                self._sums[classes, *target].addcmul_(flipped(logits[channels], flip)[:, *source].float(), weights)
        self._let_go()

    def skip(self, start: Size) -> None:
        """Note that a window is left out, in all flips and by all networks."""
        if self._missing is None:
            self._missing = _zeros(self._extent, self._sums.device)
        for source, target in self._pieces_of(start):
            self._missing[target].add_(self._weights[source], alpha=self._passes)

    def finish(self, stop: int) -> Iterator[LogitPlanes]:
        """Yield the planes below `stop` that have not left yet, on the CPU, and make room for the next."""
        axis, depth = self._tiling.axis, self._tiling.depth
        for first, end in self._pieces(self._finished, stop, planes_at_once(self._tiling, len(self._sums))):
            planes = self._sums.narrow(axis + 1, first % depth, end - first)
            logits = self._normalised(planes, first, end)
            planes.zero_()
            self._let_go()
            self._finished = end
            yield LogitPlanes(first, logits.movedim(axis + 1, 1).contiguous().cpu())

    def _normalised(self, planes: Tensor, first: int, stop: int) -> Tensor:
        """Return the planes divided by the weights that they were summed with."""
        totals = self._totals(first, stop)
        if self._missing is None:
            return planes / totals
        missing = self._missing.narrow(self._tiling.axis, first % self._tiling.depth, stop - first)
        covered = totals - missing
        missing.zero_()
        empty = covered < LEAST_SHARE * totals
        logits = planes / covered.masked_fill_(empty, 1)
        for own, value in zip(logits, self._background, strict=True):
            own.masked_fill_(empty, value)
        return logits

    def _totals(self, first: int, stop: int) -> Tensor:
        """Return the sum of the weights at the planes from `first` to `stop`, in the volume's order of axes."""
        vectors = [axis.total for axis in self._tiling.axes]
        vectors[self._tiling.axis] = vectors[self._tiling.axis][first:stop] * self._passes
        return outer(vectors).to(self._sums.device)

    def _pieces_of(self, start: Size) -> Iterator[tuple[Box, Box]]:
        """Yield the pieces of a window that lie together in the ring: in the window's indices, and in the ring's."""
        inside, outside = cut(start, self._weights.shape, self._tiling.shape)
        axis, depth = self._tiling.axis, self._tiling.depth
        shift = inside[axis].start - outside[axis].start
        for first, stop in self._pieces(outside[axis].start, outside[axis].stop):
            source = _along(inside, axis, first + shift, stop + shift)
            yield source, _along(outside, axis, first % depth, (stop - 1) % depth + 1)

    def _pieces(self, first: int, stop: int, longest: int = 2**31) -> Iterator[tuple[int, int]]:
        """Yield the planes from `first` to `stop` in pieces that lie together in the ring."""
        while first < stop:
            end = min(stop, first + longest, first - first % self._tiling.depth + self._tiling.depth)
            yield first, end
            first = end

    def _let_go(self) -> None:
        """Hand what was touched of the file to the kernel's page cache, which gives way where memory is short."""
        if self._file is not None:
            self._file.madvise(mmap.MADV_DONTNEED)


def runs(channels: Sequence[int], longest: int) -> Iterator[tuple[slice, slice]]:
    """Yield the classes in runs whose channels lie side by side too: the classes, and their channels.

    Args:
        channels: of each class.
        longest: run.
    """
    start = 0
    for stop in range(1, len(channels) + 1):
        is_end = stop == len(channels) or channels[stop] != channels[stop - 1] + 1
        if is_end or stop - start == longest:
            yield slice(start, stop), slice(channels[start], channels[stop - 1] + 1)
            start = stop


def plane_bytes(tiling: Tiling, num_logits: int) -> int:
    """Return the bytes of all logits of a plane across the longest axis."""
    return 4 * num_logits * math.prod(n for axis, n in enumerate(tiling.shape) if axis != tiling.axis)


def planes_at_once(tiling: Tiling, num_logits: int) -> int:
    """Return how many finished planes leave together at most."""
    return min(PLANES_AT_ONCE, max(1, BYTES_AT_ONCE // plane_bytes(tiling, num_logits)))


def zeros_on_disk(shape: Sequence[int], folder: Path) -> tuple[Tensor, mmap.mmap]:
    """Return zeros in float32 that lie in a file without a name, and the file's memory.

    All of its space is taken at once: a disk that filled up later would kill the process.

    Raises:
        ResourceError: the disk has no room.
    """
    size = 4 * math.prod(shape)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise ResourceError(
            f"{folder}: no room for {size / 2**30:.1f} GB of unfinished planes ({error.strerror}); free some, "
            "or choose another folder for temporary files (TMPDIR)"
        ) from error
    return torch.frombuffer(memory, dtype=torch.float32).view(*shape), memory


def _zeros(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return zeros in float32, or say what they would have taken."""
    try:
        return torch.zeros(*shape, dtype=torch.float32, device=device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"{device} has no memory for {4 * math.prod(shape) / 2**30:.1f} GB of unfinished planes; `segment` keeps "
            "them on disk with --max-memory; else take a model with a smaller window"
        ) from error


def _class_by_class(logits: Tensor) -> Tensor:
    """Return logits (K, X, Y, Z) with each class's side by side, where a network computes channels last."""
    if logits.stride(0) > 1:
        return logits
    # As a matrix: torch transposes that in a quarter of the time.
    return logits.permute(1, 2, 3, 0).flatten(0, 2).t().contiguous().view(logits.shape)


def _along(box: Box, axis: int, start: int, stop: int) -> Box:
    """Return a box with other bounds along one axis."""
    return (*box[:axis], slice(start, stop), *box[axis + 1 :])
