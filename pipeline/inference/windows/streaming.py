"""Streamed, batched, blended windows: networks over a volume, finished planes of logits leaving in order.

Windows run in order of the volume's longest axis. Their weighted logits are summed in a ring of K x window depth
planes, so that memory does not grow with the length of the scan. A plane below the next window's start is finished: it
is divided by the sum of its weights and handed on.

The networks of an ensemble see the windows of a slab one after the other, so that the order of sums does not depend on
how many windows run at once; the last bit of what is summed does, where a network's kernels round differently in
batches of different sizes. A window without body is not run at all.

A network that loses voxels at its border (`margin`) is given windows that reach beyond their output, and beyond the
volume into zeros; its outputs lie side by side, a multiple of its stride apart, which makes them equal to one pass over
the whole volume.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.config import Output
from pipeline.errors import ResourceError
from pipeline.hardware import autocast, is_out_of_memory
from pipeline.inference.planes import LogitPlanes
from pipeline.inference.windows.agreement import AgreementCount, FoldAgreement
from pipeline.inference.windows.ring import Ring
from pipeline.inference.windows.tiling import Flip, Size, Tiling, Windowing, cut, flipped, tile_volume
from pipeline.networks.footprint import footprint
from pipeline.volumes.body import Body

if TYPE_CHECKING:
    from pipeline.networks import Network

log = logging.getLogger(__name__)

# Voxels of a forward pass, from which on a larger batch gains nothing (a GPU that cannot hold as many halves it).
BATCH_VOXELS = {"cpu": 64**3, "cuda": 4 * 128**3}

# One forward pass of a window: its first output voxel, and the flip in which the network sees it.
Pass = tuple[Size, Flip]


class LogitStream:
    """The logits of a whole volume, as planes along its longest axis; made by `stream_logits`.

    Iterating runs the networks; each plane leaves once, in ascending order, as soon as it is finished.

    Attributes:
        tiling: where the windows lie.
        batch: windows a forward pass; halved for good where the device runs out of memory.
        run: windows that were run, each counted once, whatever its flips and networks.
        skipped: windows that were left out, for they hold no body.
        device: where the networks are.
        agreement: how far an ensemble's networks agree, once all planes have left; None of one network.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        image: Tensor,
        windowing: Windowing,
        *,
        output: Output,
        batch: int,
        dtype: torch.dtype,
        body: Body | None,
        ring_folder: Path | None,
    ) -> None:
        _, x, y, z = image.shape
        self.batch, self.run, self.skipped = batch, 0, 0
        self.agreement: FoldAgreement | None = None
        self._networks, self._image, self._windowing, self._dtype = networks, image, windowing, dtype
        self._kind, self._body, self._ring_folder = output, body, ring_folder
        self.device = next(networks[0].parameters()).device
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._input, self._margin = networks[0].input_size(windowing.window), networks[0].margin
        self._output = networks[0].output_size(self._input)
        self.tiling = tiling_of(networks, (x, y, z), windowing)

    @property
    def axis(self) -> int:
        """The volume's longest axis, along which planes leave."""
        return self.tiling.axis

    def __iter__(self) -> Iterator[LogitPlanes]:
        """Yield finished planes, on the CPU.

        Raises:
            ValueError: a network's output is not its input less the margin.
            ResourceError: there is no memory for a single window, or for the ring.
        """
        self.run = self.skipped = 0
        num_logits = footprint(self._networks[0], len(self._image), self._input).num_logits
        ring = self._new_ring(num_logits)
        agreement = self._new_agreement(num_logits)
        sums: list[Ring | AgreementCount] = [ring, agreement] if agreement else [ring]
        for slab in self.tiling.slabs:
            yield from ring.finish(slab)
            starts = self._starts(slab, sums)
            passes = [(start, flip) for start in starts for flip in self._windowing.flips]
            for network in self._networks:
                self._add(network, passes, sums)
        yield from ring.finish(self.tiling.shape[self.axis])
        self.agreement = agreement.result() if agreement else None

    def _new_ring(self, num_logits: int) -> Ring:
        """Return an empty ring on the networks' device; one on disk lies on the CPU."""
        passes = len(self._networks) * len(self._windowing.flips)
        device = self.device if self._ring_folder is None else torch.device("cpu")
        return Ring(self.tiling, self._windowing, passes, num_logits, self._kind, device, self._ring_folder)

    def _new_agreement(self, num_logits: int) -> AgreementCount | None:
        """Return an empty count of an ensemble's agreement."""
        if len(self._networks) == 1:
            return None
        return AgreementCount(self.tiling, self._windowing, len(self._networks), num_logits, self._kind)

    def _starts(self, slab: int, sums: Sequence[Ring | AgreementCount]) -> list[Size]:
        """Return the windows of a slab that hold body, and have the others noted as left out."""
        kept = []
        for start in self.tiling.starts(slab):
            if self._body is None or self._body.any_in(start, self.tiling.stop(start)):
                kept.append(start)
            else:
                for sum_ in sums:
                    sum_.skip(start)
                self.skipped += 1
        self.run += len(kept)
        return kept

    def _add(self, network: Network, passes: list[Pass], sums: Sequence[Ring | AgreementCount]) -> None:
        """Add the logits of each pass to the sums; a batch that the device cannot hold is redone in halves."""
        done = 0
        while done < len(passes):
            batch = passes[done : done + self.batch]
            if self._is_added(network, batch, sums):
                done += len(batch)
            else:
                self.batch = len(batch) // 2
                torch.cuda.empty_cache()
                log.warning("%s is out of memory: going on with %d windows at once", self.device, self.batch)

    def _is_added(self, network: Network, batch: list[Pass], sums: Sequence[Ring | AgreementCount]) -> bool:
        """Run a batch and add its logits (K, *output) to the sums; False where there is no memory for so many windows.

        A function of its own, so that no name keeps these logits while the next batch is run.
        """
        logits = self._forward(network, batch)
        if logits is None:
            return False
        for (start, flip), own in zip(batch, logits, strict=True):
            for sum_ in sums:
                sum_.add(start, flip, own)
        return True

    # A decorator, not a block in __iter__: a generator would leave the mode on in its consumer's code.
    @torch.inference_mode()
    def _forward(self, network: Network, batch: list[Pass]) -> Tensor | None:
        """Return the logits (N, K, *output) of a batch, or None where there is no memory for so many windows."""
        try:
            images = self._moved(self._read(batch))
            with autocast(self.device, self._dtype):
                logits: Tensor = network(images)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise ResourceError(
                    f"{self.device} has no memory for a single window of {self._input} voxels; free some, take "
                    "another device, or a model with a smaller window"
                ) from error
            # Handled by the caller: while the exception lives, so do the failed pass' tensors.
            return None
        if logits.shape[2:] != self._output:
            raise ValueError(f"the network makes {tuple(logits.shape[2:])} of {self._input}, not {self._output}")
        return logits

    def _moved(self, images: Tensor) -> Tensor:
        """Bring a batch to the device; to a GPU from pinned memory in a queue of its own, while it runs the last."""
        if self._copies is None or images.is_cuda:
            return images.to(self.device)
        with torch.cuda.stream(self._copies):
            moved = images.pin_memory().to(self.device, non_blocking=True)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._copies)
        moved.record_stream(now)
        return moved

    def _read(self, batch: list[Pass]) -> Tensor:
        """Return the inputs (N, C, *input) of a batch, zeros beyond the volume, flipped."""
        images = self._image.new_zeros((len(batch), len(self._image), *self._input))
        for values, (start, flip) in zip(images, batch, strict=True):
            first = [at - margin for at, margin in zip(start, self._margin, strict=True)]
            inside, outside = cut(first, self._input, self.tiling.shape)
            values[:, *inside] = self._image[:, *outside]
            if flip:
                values.copy_(flipped(values, flip).clone())
        return images


def stream_logits(
    networks: Sequence[Network],
    image: Tensor,
    windowing: Windowing,
    *,
    batch: int,
    dtype: torch.dtype,
    output: Output = "softmax",
    body: Body | None = None,
    ring_folder: Path | None = None,
) -> LogitStream:
    """Run a network, or an ensemble, over a volume in windows.

    Args:
        networks: in eval mode, on one device, where the ring lies too; the logits are their mean.
        image: (C, X, Y, Z) float32, on the CPU or on that device; a volume smaller than a window is padded with zeros,
            centred, and its padding cut off again.
        windowing: how the volume is cut and put together.
        batch: windows a forward pass at most, each flip counted.
        dtype: the networks compute in it under autocast; sums are float32.
        output: what the logits stand for: it says what certain background looks like.
        body: windows without any of it are not run. Within the body the same windows are summed, so with a batch of 1
            the logits are the same bit for bit; voxels that no window covers are certain background. None: all are run.
        ring_folder: the unfinished planes lie in a file there; None: in memory.

    Returns:
        The stream of planes: within float32's rounding the weighted sum of all windows divided by the weights' sum.

    Raises:
        ValueError: the batch is empty, or the networks want windows of different sizes or at different places.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    return LogitStream(
        networks, image, windowing, output=output, batch=batch, dtype=dtype, body=body, ring_folder=ring_folder
    )


def tiling_of(networks: Sequence[Network], shape: Size, windowing: Windowing) -> Tiling:
    """Lay the windows of an ensemble over a volume.

    Raises:
        ValueError: its networks want windows of different sizes or at different places.
    """
    first, *others = networks
    size = first.input_size(windowing.window)
    tiling = tile_volume(shape, first.output_size(size), first.margin, first.stride, windowing)
    for other in others:
        own = other.input_size(windowing.window)
        theirs = tile_volume(shape, other.output_size(own), other.margin, other.stride, windowing)
        if (own, other.margin, [a.starts for a in theirs.axes]) != (
            size,
            first.margin,
            [a.starts for a in tiling.axes],
        ):
            raise ValueError(f"the networks of an ensemble read windows of {size} and {own} voxels; they must agree")
    return tiling


def windows_at_once(network: Network, window: Size, device: torch.device, dtype: torch.dtype) -> int:
    """Return the windows of a forward pass that keep a device busy."""
    # On a CPU torch convolves a single small image in float32 by one thread: two take little longer than one.
    least = 2 if (device.type, dtype) == ("cpu", torch.float32) else 1
    return max(least, BATCH_VOXELS.get(device.type, 1) // math.prod(network.input_size(window)))
