"""Where windows lie in a volume, and what each of their voxels weighs; nothing here runs a network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.config import InferenceSection, Output
from pipeline.data.plan import Plan

Size = tuple[int, int, int]
Box = tuple[slice, ...]
Flip = tuple[int, ...]
Blending = Literal["gaussian", "constant"]

# Standard deviation of the Gaussian as a share of the window: nnU-Net's value (Isensee et al. 2021).
SIGMA = 1 / 8


@dataclass(frozen=True)
class Windowing:
    """How a volume is cut into windows and put together again; it belongs to the model, for it changes the result.

    Attributes:
        window: voxels of a window's output.
        overlap: share of a window that it has in common with the next, from 0 to below 1; along an axis in which the
            network has a margin there is none.
        blending: weight of a window's voxels in the sum.
        flips: the logits are averaged over these flips, each a tuple of axes; () is the window as it is.
        paired_classes: channels of the logits that swap where a flip holds the left-right axis.
        left_right_axis: the axis that runs between left and right.
    """

    window: Size
    overlap: float = 0.5
    blending: Blending = "gaussian"
    flips: tuple[Flip, ...] = ((),)
    paired_classes: tuple[tuple[int, int], ...] = ()
    left_right_axis: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {self.overlap}")
        if not self.flips:
            raise ValueError("flips: at least one is needed; ((),) is the window as it is")

    @classmethod
    def of(cls, plan: Plan, inference: InferenceSection, output: Output = "softmax") -> Windowing:
        """Return how a model's volumes are cut: with all combinations of the flipped axes, none of them first.

        Across itself a plane of a 2-D network is not flipped: it would stay as it is, and left and right would swap.
        """
        axes = sorted(axis for axis in {*map("xyz".index, inference.flip_axes)} if plan.patch_size[axis] > 1)
        no_background = output == "regions"  # has no channel of its own: a class's is the one before
        return cls(
            window=plan.patch_size,
            overlap=inference.overlap,
            blending=inference.blending,
            flips=tuple(flip for n in range(len(axes) + 1) for flip in itertools.combinations(axes, n)),
            paired_classes=tuple((a - no_background, b - no_background) for a, b in plan.paired_classes),
            left_right_axis=plan.left_right_axis,
        )

    def class_order(self, flip: Flip, num_classes: int) -> list[int]:
        """Return for each class the channel that holds it in the logits of a flipped window."""
        order = list(range(num_classes))
        if self.left_right_axis in flip:
            for left, right in self.paired_classes:
                order[left], order[right] = right, left
        return order


@dataclass(frozen=True)
class AxisTiling:
    """The windows along one axis.

    Attributes:
        starts: first output voxel of each window, ascending; below 0 where the volume is smaller than a window.
        weights: (window,) weight of each output voxel; outputs beyond it are dropped.
        total: (voxels of the volume,) sum of the weights.
    """

    starts: tuple[int, ...]
    weights: Tensor
    total: Tensor

    def nearest(self, start: int) -> slice:
        """Return the voxels of the volume whose nearest window, by its centre, is the one that begins at `start`."""
        number = self.starts.index(start)
        # Half way between the centres of two neighbours; a voxel right there belongs to the later one.
        halfway = [-(-(a + b + len(self.weights) - 1) // 2) for a, b in itertools.pairwise(self.starts)]
        bounds = (0, *halfway, len(self.total))
        return slice(bounds[number], bounds[number + 1])


@dataclass(frozen=True)
class Tiling:
    """The windows of a volume, in slabs along its longest axis.

    Attributes:
        shape: (X, Y, Z) of the volume.
        axis: the longest axis.
        axes: the windows along each axis.
    """

    shape: Size
    axis: int
    axes: tuple[AxisTiling, AxisTiling, AxisTiling]

    @property
    def slabs(self) -> tuple[int, ...]:
        """First plane of each slab: of windows that begin at the same plane of the longest axis."""
        return self.axes[self.axis].starts

    @property
    def depth(self) -> int:
        """Planes of a window along the longest axis."""
        return len(self.axes[self.axis].weights)

    @property
    def count(self) -> int:
        """Number of windows."""
        return math.prod(len(axis.starts) for axis in self.axes)

    @property
    def weights(self) -> Tensor:
        """(*window) weight of each output voxel."""
        return outer([axis.weights for axis in self.axes])

    def starts(self, slab: int) -> list[Size]:
        """Return the first output voxel of each window of a slab."""
        across = [(slab,) if i == self.axis else axis.starts for i, axis in enumerate(self.axes)]
        return [(x, y, z) for x, y, z in itertools.product(*across)]

    def stop(self, start: Size) -> Size:
        """Return where a window ends: its first output voxel beyond the last, along each axis."""
        x, y, z = (at + len(axis.weights) for at, axis in zip(start, self.axes, strict=True))
        return x, y, z

    def nearest(self, start: Size) -> Box:
        """Return the voxels of a window, in its own indices, that lie nearer to its centre than to any other's.

        Over all windows they make up the volume, each voxel once.
        """
        x, y, z = (axis.nearest(at) for at, axis in zip(start, self.axes, strict=True))
        return tuple(slice(part.start - at, part.stop - at) for part, at in zip((x, y, z), start, strict=True))


def tile_volume(shape: Size, output: Size, margin: Size, stride: Size, windowing: Windowing) -> Tiling:
    """Lay windows over a volume.

    Args:
        shape: (X, Y, Z) of the volume.
        output: voxels that the network makes of a window.
        margin: voxels that it loses on each side.
        stride: its pooling factor.
        windowing: overlap and blending.

    Raises:
        ValueError: a window's output does not hold one stride, along an axis with margin.
    """
    x, y, z = (
        _side_by_side(shape[i], output[i], stride[i]) if margin[i] else _overlapping(shape[i], output[i], windowing)
        for i in range(3)
    )
    return Tiling(shape, max(range(3), key=lambda i: shape[i]), (x, y, z))


def cut(start: Sequence[int], size: Sequence[int], shape: Sequence[int]) -> tuple[Box, Box]:
    """Cut a box to a volume.

    Returns:
        The part that lies in the volume, in the box's own indices and in the volume's.
    """
    bounds = [(at, max(at, 0), min(at + length, n)) for at, length, n in zip(start, size, shape, strict=True)]
    return tuple(slice(a - at, b - at) for at, a, b in bounds), tuple(slice(a, b) for _, a, b in bounds)


def flipped(values: Tensor, flip: Flip) -> Tensor:
    """Flip (..., X, Y, Z) along axes of space."""
    return values.flip([axis - 3 for axis in flip]) if flip else values


def outer(vectors: Sequence[Tensor]) -> Tensor:
    """Return the outer product of three vectors, (A, B, C)."""
    a, b, c = vectors
    return a[:, None, None] * b[None, :, None] * c[None, None, :]


def _overlapping(length: int, window: int, windowing: Windowing) -> AxisTiling:
    """Lay windows at even distances of at most (1 - overlap) of a window; centre one over a volume that is smaller."""
    if length <= window:
        starts: tuple[int, ...] = (-((window - length) // 2),)
    else:
        step = max(1, int(window * (1 - windowing.overlap)))
        gaps = math.ceil((length - window) / step)
        starts = tuple(round(i * (length - window) / gaps) for i in range(gaps + 1))
    return _tiling(length, starts, _blending_weights(window, windowing.blending))


def _side_by_side(length: int, output: int, stride: int) -> AxisTiling:
    """Lay windows without overlap, a multiple of the stride apart: they pool the same voxels as one pass would."""
    step = output // stride * stride
    if step == 0:
        raise ValueError(f"a window's output of {output} voxels does not hold the network's stride of {stride}")
    return _tiling(length, tuple(range(0, length, step)), torch.ones(step, dtype=torch.float64))


def _tiling(length: int, starts: tuple[int, ...], weights: Tensor) -> AxisTiling:
    """Sum the weights over the windows, in float64, and round once."""
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        (inside,), (outside,) = cut([start], [len(weights)], [length])
        total[outside] += weights[inside]
    return AxisTiling(starts, weights.float(), total.float())


def _blending_weights(window: int, blending: Blending) -> Tensor:
    """Return (window,) weights, float64, largest in the middle."""
    if blending == "constant":
        return torch.ones(window, dtype=torch.float64)
    distance = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    return torch.exp(-0.5 * (distance / (SIGMA * window)) ** 2)
