"""Streamed, batched, blended windows: a network over a volume, finished planes of logits leaving in order.

Windows run in order of the volume's longest axis. Their weighted logits are summed in a ring of K x window depth
planes, so that memory does not grow with the length of the scan. A plane below the next window's start is finished: it
is divided by the sum of its weights and handed on. Weights are the outer product of three vectors, and so is their sum
over a regular grid of windows: there is no count map.

A network that loses voxels at its border (`margin`) is given windows that reach beyond their output, and beyond the
volume into zeros; its outputs lie side by side, a multiple of its stride apart, which makes them equal to one pass over
the whole volume.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.hardware import autocast
from pipeline.inference.planes import LogitPlanes
from pipeline.inference.tiling import Box, Flip, Size, Tiling, Windowing, cut, outer, tile_volume

if TYPE_CHECKING:
    from pipeline.networks import Network

log = logging.getLogger(__name__)

# Planes that leave at once: few, for they are held a second time, outside the ring.
PLANES_AT_ONCE = 16

# One forward pass of a window: its first output voxel, and the flip in which the network sees it.
Pass = tuple[Size, Flip]


class LogitStream:
    """The logits of a whole volume, as planes along its longest axis; made by `stream_logits`.

    Iterating runs the network; each plane leaves once, in ascending order, as soon as it is finished.

    Attributes:
        tiling: where the windows lie.
        batch: windows a forward pass; halved for good where the device runs out of memory.
    """

    def __init__(
        self, networks: Sequence[Network], image: Tensor, windowing: Windowing, batch: int, dtype: torch.dtype
    ) -> None:
        _, x, y, z = image.shape
        self.batch = batch
        network = networks[0]
        self._networks, self._image, self._windowing, self._dtype = networks, image, windowing, dtype
        self._device = next(network.parameters()).device
        self._margin = network.margin
        self._input = network.input_size(windowing.window)
        a, b, c = (size - 2 * margin for size, margin in zip(self._input, network.margin, strict=True))
        self._output = (a, b, c)
        self.tiling = tile_volume((x, y, z), self._output, network.margin, network.stride, windowing)

    @property
    def axis(self) -> int:
        """The volume's longest axis, along which planes leave."""
        return self.tiling.axis

    def __iter__(self) -> Iterator[LogitPlanes]:
        """Yield finished planes, on the CPU.

        Raises:
            ValueError: the network's output is not its input less the margin.
            torch.cuda.OutOfMemoryError: the device has no memory for a single window.
        """
        ring: _Ring | None = None
        for slab in self.tiling.slabs:
            if ring is not None:
                yield from ring.finish(slab)
            passes = [(start, flip) for start in self.tiling.starts(slab) for flip in self._windowing.flips]
            for network in self._networks:
                for batch, logits in self._forward_all(network, passes):
                    ring = ring or _Ring(
                        self.tiling, self._windowing, len(self._networks), logits.shape[1], self._device
                    )
                    for (start, flip), own in zip(batch, logits, strict=True):
                        ring.add(start, flip, own)
        if ring is not None:
            yield from ring.finish(self.tiling.shape[self.axis])

    def _forward_all(self, network: Network, passes: list[Pass]) -> Iterator[tuple[list[Pass], Tensor]]:
        """Yield batches with their logits (N, K, *output); one that the device cannot hold is redone in halves."""
        done = 0
        while done < len(passes):
            batch = passes[done : done + self.batch]
            logits = self._forward(network, batch)
            if logits is not None:
                yield batch, logits
                done += len(batch)
            else:
                self.batch = len(batch) // 2
                torch.cuda.empty_cache()
                log.warning("%s is out of memory: going on with %d windows at once", self._device, self.batch)

    # A decorator, not a block in __iter__: a generator would leave the mode on in its consumer's code.
    @torch.inference_mode()
    def _forward(self, network: Network, batch: list[Pass]) -> Tensor | None:
        """Return the logits (N, K, *output) of a batch, or None where the device has no memory for so many windows."""
        try:
            images = self._read(batch).to(self._device)
            with autocast(self._device, self._dtype):
                logits: Tensor = network(images)
        except torch.cuda.OutOfMemoryError:
            # Handled by the caller: while the exception lives, so do the failed pass' tensors.
            if len(batch) == 1:
                raise
            return None
        if logits.shape[2:] != self._output:
            raise ValueError(f"the network makes {tuple(logits.shape[2:])} of {self._input}, not {self._output}")
        return logits

    def _read(self, batch: list[Pass]) -> Tensor:
        """Return the inputs (N, C, *input) of a batch, zeros beyond the volume, flipped."""
        images = self._image.new_zeros((len(batch), len(self._image), *self._input))
        for values, (start, flip) in zip(images, batch, strict=True):
            first = [at - margin for at, margin in zip(start, self._margin, strict=True)]
            inside, outside = cut(first, self._input, self.tiling.shape)
            values[:, *inside] = self._image[:, *outside]
            if flip:
                values.copy_(_flipped(values, flip).clone())
        return images


def stream_logits(
    networks: Sequence[Network], image: Tensor, windowing: Windowing, *, batch: int, dtype: torch.dtype
) -> LogitStream:
    """Run a network, or an ensemble, over a volume in windows.

    Args:
        networks: in eval mode, on one device, where the ring lies too; the logits are their mean.
        image: (C, X, Y, Z) float32, on the CPU or on that device; a volume smaller than a window is padded with zeros,
            centred, and its padding cut off again.
        windowing: how the volume is cut and put together.
        batch: windows a forward pass at most, each flip counted.
        dtype: the network computes in it under autocast; sums are float32.

    Returns:
        The stream of planes: within float32's rounding the weighted sum of all windows divided by the weights' sum.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    return LogitStream(networks, image, windowing, batch, dtype)


class _Ring:
    """The sum of weighted logits over the planes that windows still reach.

    Plane i of the volume lies at i modulo the depth. The axes keep the volume's order, so that sums run along memory.
    """

    def __init__(
        self, tiling: Tiling, windowing: Windowing, networks: int, num_classes: int, device: torch.device
    ) -> None:
        self._tiling = tiling
        self._windowing = windowing
        self._passes = networks * len(windowing.flips)
        self._weights = tiling.weights.to(device)
        self._finished = 0
        extent = [tiling.depth if axis == tiling.axis else n for axis, n in enumerate(tiling.shape)]
        self._sums = torch.zeros((num_classes, *extent), dtype=torch.float32, device=device)

    def add(self, start: Size, flip: Flip, logits: Tensor) -> None:
        """Add one window's logits (K, *output), seen in a flip."""
        order = self._windowing.class_order(flip, len(logits))
        inside, outside = cut(start, self._weights.shape, self._tiling.shape)
        axis = self._tiling.axis
        shift = inside[axis].start - outside[axis].start
        for first, stop in self._pieces(outside[axis].start, outside[axis].stop):
            source = _along(inside, axis, first + shift, stop + shift)
            target = _along(outside, axis, first % self._tiling.depth, (stop - 1) % self._tiling.depth + 1)
            weights = self._weights[source]
            # Class by class, a window's piece stays in the processor's cache: 3 ms against 22 ms at 20 classes of 96^3.
            for sums, channel in zip(self._sums, order, strict=True):
                sums[target].addcmul_(_flipped(logits[channel], flip)[source].float(), weights)

    def finish(self, stop: int) -> Iterator[LogitPlanes]:
        """Yield the planes below `stop` that have not left yet, and make room for the next."""
        axis, depth = self._tiling.axis, self._tiling.depth
        for first, end in self._pieces(self._finished, stop, PLANES_AT_ONCE):
            planes = self._sums.narrow(axis + 1, first % depth, end - first)
            logits = planes / self._totals(first, end)
            planes.zero_()
            self._finished = end
            yield LogitPlanes(first, logits.movedim(axis + 1, 1).contiguous().cpu())

    def _pieces(self, first: int, stop: int, longest: int = 2**31) -> Iterator[tuple[int, int]]:
        """Yield the planes from `first` to `stop` in pieces that lie together in the ring."""
        while first < stop:
            end = min(stop, first + longest, first - first % self._tiling.depth + self._tiling.depth)
            yield first, end
            first = end

    def _totals(self, first: int, stop: int) -> Tensor:
        """Return the sum of the weights at the planes from `first` to `stop`, in the volume's order of axes."""
        vectors = [axis.total for axis in self._tiling.axes]
        vectors[self._tiling.axis] = vectors[self._tiling.axis][first:stop] * self._passes
        return outer(vectors).to(self._sums.device)


def _along(box: Box, axis: int, start: int, stop: int) -> Box:
    """Return a box with other bounds along one axis."""
    return (*box[:axis], slice(start, stop), *box[axis + 1 :])


def _flipped(values: Tensor, flip: Flip) -> Tensor:
    """Flip (..., X, Y, Z) along axes of space."""
    return values.flip([axis - 3 for axis in flip]) if flip else values
