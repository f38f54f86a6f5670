"""A network over a volume in windows: where they lie, what they weigh, flips; as medseg does it, in one piece.

MONAI's SlidingWindowInferer lays the last window against the border, knows no flips, and returns a volume of a wrong
size for a network that loses voxels at its own border.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Axis = tuple[list[int], Tensor]  # first voxel of each window, and the weight of each of its voxels


@dataclass
class PlannedWindows:
    """Callable as a MONAI inferer: (inputs, network) -> logits of the inputs' size.

    Attributes:
        window: voxels that the network makes of a window.
        input_size: voxels that it reads for them.
        margin: voxels that it loses on each side.
        stride: its pooling factor.
        overlap: share of a window in common with the next, where there is no margin.
        gaussian: whether voxels weigh by a Gaussian of an eighth of the window, or all the same.
        flips: axes of space that are flipped in each pass; the logits are the passes' mean.
        left_right_axis: the axis between left and right.
        swapped: channels of the logits that swap in a flip of that axis.
        batch: windows a forward pass.
    """

    window: Sequence[int]
    input_size: Sequence[int]
    margin: Sequence[int]
    stride: Sequence[int]
    overlap: float
    gaussian: bool
    flips: Sequence[Sequence[int]] = field(default_factory=lambda: [[]])
    left_right_axis: int = 0
    swapped: Sequence[Sequence[int]] = ()
    batch: int = 1

    @torch.no_grad()
    def __call__(
        self, inputs: Tensor, network: Callable[[Tensor], Tensor], *_args: object, **_options: object
    ) -> Tensor:
        """Return the logits (N, K, X, Y, Z) of images (N, C, X, Y, Z)."""
        return torch.stack([self._one(torch.as_tensor(image), network) for image in inputs])

    def _one(self, image: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the logits of one image."""
        shape = image.shape[1:]
        axes = [self._axis(axis, length) for axis, length in enumerate(shape)]
        weights = [axis[1].float() for axis in axes]
        weight = (weights[0][:, None, None] * weights[1][:, None] * weights[2]).to(image.device)
        sums, total = None, torch.zeros(shape, device=image.device)
        passes = [(start, flip) for start in itertools.product(*(axis[0] for axis in axes)) for flip in self.flips]
        for some in _batches(passes, self.batch):
            logits = network(torch.stack([self._read(image, *one) for one in some])).float()
            if sums is None:
                sums = torch.zeros((logits.shape[1], *shape), device=image.device)
            for (start, flip), own in zip(some, logits, strict=True):
                inside, outside = _cut(start, weight.shape, shape)
                seen = self._unswapped(own.flip([axis + 1 for axis in flip]), flip)
                sums[:, *outside] += (seen[:, *inside]) * weight[inside]
                total[outside] += weight[inside]
        assert sums is not None
        return sums / total

    def _axis(self, axis: int, length: int) -> Axis:
        """Lay the windows along one axis."""
        window = self.window[axis]
        if self.margin[axis]:  # side by side, a multiple of the stride apart
            step = window // self.stride[axis] * self.stride[axis]
            return list(range(0, length, step)), torch.ones(step, dtype=torch.float64)
        if length <= window:
            starts = [-((window - length) // 2)]
        else:
            gaps = math.ceil((length - window) / max(1, int(window * (1 - self.overlap))))
            starts = [round(i * (length - window) / gaps) for i in range(gaps + 1)]
        if not self.gaussian:
            return starts, torch.ones(window, dtype=torch.float64)
        distance = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
        return starts, torch.exp(-0.5 * (distance / (window / 8)) ** 2)

    def _read(self, image: Tensor, start: Sequence[int], flip: Sequence[int]) -> Tensor:
        """Return what the network reads for a window, zeros beyond the image, flipped."""
        values = image.new_zeros((len(image), *self.input_size))
        first = [at - margin for at, margin in zip(start, self.margin, strict=True)]
        inside, outside = _cut(first, self.input_size, image.shape[1:])
        values[:, *inside] = image[:, *outside]
        return values.flip([axis + 1 for axis in flip])

    def _unswapped(self, logits: Tensor, flip: Sequence[int]) -> Tensor:
        """Return a flipped window's logits with left and right where they belong."""
        order = list(range(len(logits)))
        if self.left_right_axis in flip:
            for left, right in self.swapped:
                order[left], order[right] = right, left
        return logits[order]


def _batches(
    passes: Sequence[tuple[tuple[int, ...], Sequence[int]]], size: int
) -> Iterator[Sequence[tuple[tuple[int, ...], Sequence[int]]]]:
    """Yield so many passes at a time."""
    for first in range(0, len(passes), size):
        yield passes[first : first + size]


def _cut(
    start: Sequence[int], size: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the part of a box that lies in a volume, in the box's indices and in the volume's."""
    bounds = [(at, max(at, 0), min(at + length, n)) for at, length, n in zip(start, size, shape, strict=True)]
    return tuple(slice(a - at, b - at) for at, a, b in bounds), tuple(slice(a, b) for _, a, b in bounds)
