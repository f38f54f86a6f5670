"""Interpolation of an image between parallel grids: one banded matrix an axis, applied to a slab at a time.

The matrix of an axis holds all that happens to it: anti-aliasing, the spline's prefilter, interpolation. It is made
and multiplied a block of rows at a time, and the image goes through all three axes in slabs across its first, so that
what lies between input and output does not grow with the volume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.geometry import FloatArray
from pipeline.volumes.axes import AxisMap, Indices

Order = Literal[1, 3]
Image = NDArray[np.float32]

# An axis that shrinks by more than this is smoothed first: below it the kernel itself is smooth enough.
_ANTI_ALIAS_ABOVE = 1.5
# The weight below which a matrix' entries are dropped, and how far a block's own voxels are seen to reach: the
# prefilter decays as 0.27^distance, the Gaussian is cut at four sigma.
_NEGLIGIBLE_WEIGHT = 1e-8
_PREFILTER_REACH = 24
_GAUSSIAN_SIGMAS = 4
# Rows of a matrix multiplied at once: more waste products with zeros, fewer waste calls.
_BLOCK_ROWS = 32
# Bytes of the largest array in between, where a slab of one row is not larger already.
_SLAB_BYTES = 16 << 20


def is_taken(axis_map: AxisMap) -> bool:
    """Tell whether an axis' voxels are taken as they are: neither interpolated nor smoothed."""
    return axis_map.on_centres and axis_map.shrink <= _ANTI_ALIAS_ABOVE


@dataclass(frozen=True, eq=False)
class Band:
    """Some rows of an axis' matrix, and the columns where they are not zero.

    Attributes:
        rows: voxels of the result.
        columns: voxels of the source.
        weights: (rows, columns) float32.
    """

    rows: slice
    columns: slice
    weights: Image


@dataclass(frozen=True, eq=False)
class Interpolation:
    """What becomes of one axis: each voxel of the result is a weighted sum of a few smoothed, prefiltered ones.

    Attributes:
        length: voxels of the source along it.
        shrink: how many voxels of the source one of the result spans.
        order: of the spline.
        taps: indices (n,) and weights (n,) of the coefficients that make up each of the n voxels of the result.
    """

    length: int
    shrink: float
    order: Order
    taps: tuple[tuple[Indices, FloatArray], ...]

    @classmethod
    def along(cls, axis_map: AxisMap, order: Order) -> Interpolation:
        """Describe the interpolation at an axis map's coordinates; on voxel centres there is none."""
        own: Order = 1 if is_taken(axis_map) else order
        return cls(axis_map.length, axis_map.shrink, own, tuple(_taps(axis_map, own)))

    @classmethod
    def coefficients(cls, length: int, shrink: float, order: Order) -> Interpolation:
        """Describe smoothing and prefilter alone."""
        return cls(length, shrink, order, ((np.arange(length), np.ones(length)),))

    @property
    def size(self) -> int:
        """Voxels of the result."""
        return self.taps[0][0].size

    @property
    def copied(self) -> slice | None:
        """The neighbouring voxels of the source that the result is, unchanged; None where it is not."""
        (indices, weights), *others = self.taps
        plain = self.order == 1 and self.shrink <= _ANTI_ALIAS_ABOVE and (weights == 1).all()
        if plain and (np.diff(indices) == 1).all() and not any(weights.any() for _, weights in others):
            return slice(int(indices[0]), int(indices[-1]) + 1)
        return None

    def band(self, rows: slice) -> Band:
        """Return some rows of the matrix; what lies beyond their reach is not looked at."""
        taps = [(indices[rows], weights[rows]) for indices, weights in self.taps]
        reach = _reach(self.shrink, self.order)
        start = max(min(int(indices.min()) for indices, _ in taps) - reach, 0)
        stop = min(max(int(indices.max()) for indices, _ in taps) + 1 + reach, self.length)
        sources = _source_matrix(stop - start, self.shrink, self.order)
        matrix = np.zeros((taps[0][0].size, stop - start))
        for indices, weights in taps:
            matrix += weights[:, None] * sources[indices - start]
        used = np.flatnonzero(np.abs(matrix).max(axis=0) > _NEGLIGIBLE_WEIGHT)
        first, last = int(used[0]), int(used[-1]) + 1
        return Band(rows, slice(start + first, start + last), matrix[:, first:last].astype(np.float32))


def interpolate(source: Image, axes: Sequence[Interpolation], out: Image) -> None:
    """Interpolate one image along its three axes, slab by slab of its first.

    Args:
        source: (X, Y, Z), any strides.
        axes: what becomes of each of its axes.
        out: written into; the voxels of the result in the order of the source's axes, any strides.
    """
    # The axis that grows least goes first: what lies in between stays as small as it can.
    others = sorted((1, 2), key=lambda axis: axes[axis].size / axes[axis].length)
    bands = {axis: [axes[axis].band(rows) for rows in _blocks(axes[axis].size, _BLOCK_ROWS)] for axis in others}
    most = _SLAB_BYTES // (4 * max(source[0].size, out[0].size))
    with _one_thread():
        for rows in _blocks(len(out), min(max(most, 1), _BLOCK_ROWS)):
            slab = _across(source, axes[0], rows)
            for axis in others:
                columns = axes[axis].copied
                if columns is None:
                    slab = _along(slab, axis, bands[axis])
                else:
                    slab = slab[:, columns] if axis == 1 else slab[:, :, columns]
            out[rows] = slab


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let this thread's products be made by one thread: each is too short for several to wait for one another.

    On two cores with other work one thread takes 0.2 to 0.3 s for 512x512x400 voxels, two take 1.0 to 3.5.
    """
    import torch  # here, since torch takes a second to load and most volumes of most data sets need no interpolation

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _blocks(size: int, block: int) -> Iterator[slice]:
    """Yield ranges of at most `block` of `size` rows."""
    return (slice(start, min(start + block, size)) for start in range(0, size, block))


def _taps(axis_map: AxisMap, order: Order) -> Iterator[tuple[Indices, FloatArray]]:
    """Yield indices and weights, (n,) each, of the coefficients that make up each voxel."""
    t, last = axis_map.weight, axis_map.length - 1
    if order == 1 or last == 0:
        yield from ((axis_map.lower, 1 - t), (axis_map.upper, t))
        return
    # The cubic B-spline at distances 1 + t, t, 1 - t, 2 - t (Unser 1999, IEEE Signal Processing Magazine 16(6)),
    # mirrored about the outermost voxel centres.
    weights = ((1 - t) ** 3 / 6, 2 / 3 - t**2 + t**3 / 2, 2 / 3 - (1 - t) ** 2 + (1 - t) ** 3 / 2, t**3 / 6)
    for step, weight in zip((-1, 0, 1, 2), weights, strict=True):
        yield np.abs(last - np.abs(last - np.abs(axis_map.lower + step))), weight


def _sigma_voxels(shrink: float) -> float:
    """Return the Gaussian that turns the source's point spread into the target's; 0 where none is needed.

    Point spreads are as wide at half maximum as the spacing; their variances subtract (Cardoso et al. 2015, MICCAI,
    "Scale factor point spread function matching").
    """
    return float(np.sqrt((shrink**2 - 1) / (8 * np.log(2)))) if shrink > _ANTI_ALIAS_ABOVE else 0.0


def _reach(shrink: float, order: Order) -> int:
    """Return how many voxels away another still counts in a smoothed, prefiltered one."""
    return round(_GAUSSIAN_SIGMAS * _sigma_voxels(shrink)) + (_PREFILTER_REACH if order == 3 else 0)


def _source_matrix(length: int, shrink: float, order: Order) -> FloatArray:
    """Return the (length, length) matrix from an axis' voxels to its coefficients: smoothed and prefiltered."""
    matrix = np.eye(length)
    if shrink > _ANTI_ALIAS_ABOVE:
        sigma = _sigma_voxels(shrink)
        matrix = ndimage.gaussian_filter1d(matrix, sigma, axis=0, mode="nearest", truncate=_GAUSSIAN_SIGMAS)
    if order == 3 and length > 1:
        matrix = ndimage.spline_filter1d(matrix, order=3, axis=0, mode="mirror")
    return matrix


def _across(source: Image, axis: Interpolation, rows: slice) -> Image:
    """Return some planes of (X, Y, Z), interpolated along its first axis."""
    import torch

    if axis.copied is not None:
        return source[axis.copied][rows]
    band = axis.band(rows)
    planes = torch.from_numpy(_own(source[band.columns])).reshape(band.weights.shape[1], -1)
    result: Image = (torch.from_numpy(band.weights) @ planes).numpy()
    return result.reshape(-1, *source.shape[1:])


def _along(array: Image, axis: int, bands: Sequence[Band]) -> Image:
    """Multiply a matrix into axis 1 or 2 of (X, Y, Z)."""
    import torch

    source = torch.from_numpy(_own(array))
    size = bands[-1].rows.stop
    result = torch.empty((len(array), size, array.shape[2]) if axis == 1 else (*array.shape[:2], size))
    lines, sums = source.reshape(-1, array.shape[2]), result.reshape(-1, result.shape[2])
    for band in bands:
        weights = torch.from_numpy(band.weights)
        if axis == 1:
            result[:, band.rows] = weights @ source[:, band.columns]
        else:  # the last axis: one product of all lines
            torch.mm(lines[:, band.columns], weights.T, out=sums[:, band.rows])
    return result.numpy()


def _own(array: Image) -> Image:
    """Return an array as torch takes it: contiguous and writable."""
    return np.require(array, np.float32, ["C", "W"])
