"""Resampling of images and labels onto another Geometry; the only place where voxels move between grids.

A `Geometry` says where each voxel centre lies, so the target of a resample is a Geometry and nothing else. Where the
two grids are parallel (a permutation, flips, scales and offsets: reorient, crop, pad and respace all at once) each axis
is treated by itself: interpolation along one axis is a banded matrix, and the matrix of an axis holds all that happens
to it (anti-aliasing, the spline's prefilter, interpolation), so that an image is read and written once per axis, in
float32, at the speed of a matrix product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.geometry import FloatArray, Geometry
from pipeline.volumes.axes import AxisMap, AxisMaps, Indices, axis_maps, rounded_along
from pipeline.volumes.volume import Volume

Order = Literal[1, 3]
Array = NDArray[Any]
Image = NDArray[np.float32]

# An axis that shrinks by more than this is smoothed first: below it the kernel itself is smooth enough.
_ANTI_ALIAS_ABOVE = 1.5
# Rows of an axis' matrix multiplied at once, and the weight below which its entries are dropped: the prefilter decays
# as 0.27^distance, so that some 15 voxels on either side count.
_BLOCK_ROWS = 64
_NEGLIGIBLE_WEIGHT = 1e-8
# Voxels whose coordinates are held at once where grids are not parallel, or whose corners vote: little enough that the
# eight corners' values and weights stay in a core's cache.
_SLAB_VOXELS = 1 << 15


def resample_image(
    image: Volume, onto: Geometry, *, order: Order = 3, thick_axis: int | None = None, outside: float = 0.0
) -> Volume:
    """Resample an image onto another grid.

    Linear or cubic B-spline interpolation in float32. Axes that shrink by more than 1.5 are smoothed first by the
    Gaussian that turns the source's point spread into the target's. Between an outer voxel's centre and its outer face
    the centre's value holds. Grids that differ by whole voxels, flips and permutations only are not interpolated: the
    result is a view where it can be, and the same array where the grids are one.

    Args:
        image: (C, X, Y, Z) float32, finite.
        onto: the grid wanted.
        order: 1 linear, 3 cubic.
        thick_axis: axis of `onto` that is interpolated linearly whatever the order: across thick slices a cubic
            overshoots. Where the grids are not parallel all axes are then linear.
        outside: value beyond the image's box.

    Returns:
        (C, *onto.shape) float32 on `onto`.
    """
    maps = axis_maps(image.geometry, onto)
    if maps is None:
        return Volume(_resample_oblique(image, onto, 1 if thick_axis is not None else order, outside), onto)
    if all(axis_map.is_identity(axis) for axis, axis_map in enumerate(maps)):
        return Volume(image.array, onto)
    array: Image = image.array.transpose(0, *(axis_map.axis + 1 for axis_map in maps))
    # The axis that grows least goes first: the arrays in between stay as small as they can.
    for axis in sorted(range(3), key=lambda axis: maps[axis].growth):
        array = _resample_axis(array, axis + 1, maps[axis], 1 if axis == thick_axis else order)
    return Volume(_filled(array, image.array, maps, outside), onto)


def resample_label(label: Volume, onto: Geometry, *, thick_axis: int | None = None, outside: int = 0) -> Volume:
    """Resample a label map onto another grid: the value of the largest linear weight, the smallest on a tie.

    Equal to interpolating one 0/1 volume per value and taking the argmax, at a cost that does not depend on the number
    of values: where all corners around a voxel hold one value that value wins; only elsewhere do the corners vote.

    Args:
        label: (X, Y, Z) of any integer type and any values.
        onto: the grid wanted.
        thick_axis: axis of `onto` along which the nearest voxel is taken, where the grids are parallel.
        outside: value beyond the label's box.

    Returns:
        onto.shape, the label's own type, on `onto`.

    Raises:
        ValueError: the label map holds both ends of the widest integer type.
    """
    maps = axis_maps(label.geometry, onto)
    if maps is None:
        return Volume(_resample_label_oblique(label, onto, outside), onto)
    if thick_axis is not None:
        maps = rounded_along(maps, thick_axis)
    array: Array = label.array.transpose([axis_map.axis for axis_map in maps])
    if all(axis_map.on_centres for axis_map in maps):
        for axis, axis_map in enumerate(maps):
            array = _take(array, axis, axis_map.lower)
    else:
        array = _vote_parallel(array, maps)
    return Volume(_filled(array, label.array, maps, outside), onto)


def agreed(classes: Array, axis: int, axis_map: AxisMap, disputed: Array) -> Array:
    """Take a label map along one axis onto a target's voxels, where both neighbours agree on the value.

    Taken along each axis in turn, a voxel ends with a value if all corners of non-zero weight around it hold it.

    Args:
        classes: values of any shape, `disputed` where earlier axes have found no agreement.
        axis: the axis of `classes` to take.
        axis_map: where the target's voxels lie along it.
        disputed: a scalar that stands for no agreement and is no label.

    Returns:
        The shape of `classes` with `axis` as long as the target; `disputed` where the two neighbours differ.
    """
    lower = classes.take(axis_map.lower, axis)
    upper = classes.take(axis_map.upper, axis)
    return np.where(lower == upper, lower, disputed)


def _take(array: Array, axis: int, indices: Indices) -> Array:
    """Take voxels along one axis: as a view where the indices run in steps of 1 or -1."""
    steps = np.diff(indices)
    where: list[slice] = [slice(None)] * array.ndim
    if (steps == 1).all():
        where[axis] = slice(int(indices[0]), int(indices[-1]) + 1)
    elif (steps == -1).all():
        where[axis] = slice(int(indices[0]), int(indices[-1]) - 1 if indices[-1] else None, -1)
    else:
        return array.take(indices, axis)
    return array[tuple(where)]


def _filled(array: Array, source: Array, maps: AxisMaps, outside: float) -> Array:
    """Put `outside` into the last three axes where they lie beyond the source's box; never into the source itself."""
    beyond = [np.flatnonzero(~axis_map.inside) for axis_map in maps]
    if not any(indices.size for indices in beyond):
        return array
    array = array.copy() if np.may_share_memory(array, source) else array
    for axis, indices in enumerate(beyond):
        np.moveaxis(array, axis - 3, 0)[indices] = outside
    return array


def _resample_axis(array: Image, axis: int, axis_map: AxisMap, order: Order) -> Image:
    """Resample (C, X, Y, Z) along one of its axes; coordinates outside take the outermost voxel's value."""
    if axis_map.on_centres and axis_map.shrink <= _ANTI_ALIAS_ABOVE:
        return _take(array, axis, axis_map.lower)
    sources = _source_matrix(axis_map.length, axis_map.shrink, order)
    matrix = np.zeros((axis_map.coordinates.size, axis_map.length))
    for indices, weights in _taps(axis_map, order):
        matrix += weights[:, None] * sources[indices]
    return _multiply_axis(array, axis, matrix)


def _source_matrix(length: int, shrink: float, order: Order) -> FloatArray:
    """Return the (length, length) matrix from an axis' voxels to its coefficients: smoothed and prefiltered."""
    matrix = np.eye(length)
    if shrink > _ANTI_ALIAS_ABOVE:
        # Point spreads as wide at half maximum as the spacing; their variances subtract (Cardoso et al. 2015, MICCAI,
        # "Scale factor point spread function matching").
        sigma_voxels = np.sqrt((shrink**2 - 1) / (8 * np.log(2)))
        matrix = ndimage.gaussian_filter1d(matrix, sigma_voxels, axis=0, mode="nearest")
    if order == 3 and length > 1:
        matrix = ndimage.spline_filter1d(matrix, order=3, axis=0, mode="mirror")
    return matrix


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


def _multiply_axis(array: Image, axis: int, matrix: FloatArray) -> Image:
    """Multiply the (m, n) matrix into an axis of n voxels; it is banded, so block by block of its rows."""
    import torch  # here, since torch takes a second to load and most volumes of most data sets need no interpolation

    before, after = array.shape[:axis], array.shape[axis + 1 :]
    lines = np.require(array, np.float32, ["C", "W"]).reshape(int(np.prod(before)), -1, int(np.prod(after)))
    source = torch.from_numpy(lines)
    result = torch.empty(source.shape[0], len(matrix), source.shape[2])
    for start in range(0, len(matrix), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        used = np.flatnonzero(np.abs(matrix[rows]).max(axis=0) > _NEGLIGIBLE_WEIGHT)
        columns = slice(used[0], used[-1] + 1)
        block = torch.from_numpy(matrix[rows, columns].astype(np.float32))
        if after:
            result[:, rows] = block @ source[:, columns]
        else:  # the last axis: one product of all lines
            torch.mm(source[:, columns, 0], block.T, out=result[:, rows, 0])
    return result.numpy().reshape(*before, len(matrix), *after)


def _vote_parallel(array: Array, maps: AxisMaps) -> Array:
    """Resample a label map whose axes are those of `maps`, by the uniform-corner rule."""
    array = np.ascontiguousarray(array)
    disputed = _unused_value(array)
    result = array.astype(disputed.dtype, copy=False)
    for axis in sorted(range(3), key=lambda axis: maps[axis].growth):
        result = agreed(result, axis, maps[axis], disputed)
    flat = result.reshape(-1)
    open_voxels = np.flatnonzero(flat == disputed)
    for start in range(0, open_voxels.size, _SLAB_VOXELS):
        voxels = open_voxels[start : start + _SLAB_VOXELS]
        x, y, z = (m.at(place) for m, place in zip(maps, np.unravel_index(voxels, result.shape), strict=True))
        flat[voxels] = _vote(array, (x, y, z))
    return result.astype(array.dtype, copy=False)


def _unused_value(array: Array) -> Array:
    """Return an integer that the array does not hold, as a scalar of a type that holds both."""
    lowest, highest = int(array.min()), int(array.max())
    types = [array.dtype, *(np.dtype(name) for name in ("int16", "int32", "int64"))]
    for value, dtype in itertools.product((highest + 1, lowest - 1), types):
        if np.can_cast(array.dtype, dtype) and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            return np.asarray(value, dtype)
    raise ValueError(f"a label map cannot hold both {lowest} and {highest}: no integer is left beside them")


def _vote(array: Array, maps: AxisMaps) -> Array:
    """Return for n voxels, each with a coordinate per axis, the value of the largest weight; the smallest on a tie."""
    values, weights = _corners(np.ascontiguousarray(array), maps)
    winner: Array = values[0].copy()
    disputed = np.flatnonzero((values != winner).any(axis=0))
    values, weights = values[:, disputed], weights[:, disputed]
    best = np.zeros(disputed.size)
    rivals = np.arange(disputed.size)  # voxels of which no value has more than half the weight so far
    for corner in range(8):
        value = values[corner, rivals]
        # Rounded, so that a tie remains one whatever the order of the sum; a value met before scores lower now.
        score = np.round((weights[corner:, rivals] * (values[corner:, rivals] == value)).sum(axis=0), 12)
        first = winner[disputed[rivals]]
        better = (score > best[rivals]) | ((score == best[rivals]) & (value < first))
        best[rivals] = np.where(better, score, best[rivals])
        winner[disputed[rivals]] = np.where(better, value, first)
        rivals = rivals[best[rivals] <= 0.5]
    return winner


def _corners(array: Array, maps: AxisMaps) -> tuple[Array, FloatArray]:
    """Return values and trilinear weights, (8, n) each, of the corners around n voxels of a contiguous array."""
    strides = (array.shape[1] * array.shape[2], array.shape[2], 1)
    places = np.zeros((1, 1), np.intp)
    weights = np.ones((1, 1))
    for m, stride in zip(maps, strides, strict=True):
        sides = np.stack([m.lower, m.upper]) * stride
        places = (places[:, None] + sides).reshape(-1, m.coordinates.size)
        weights = (weights[:, None] * np.stack([1 - m.weight, m.weight])).reshape(-1, m.coordinates.size)
    values: Array = array.reshape(-1).take(places)
    return values, weights


def _slabs(onto: Geometry) -> Iterator[slice]:
    """Yield ranges of the first axis of a grid, of some _SLAB_VOXELS voxels each."""
    planes = max(1, _SLAB_VOXELS // (onto.shape[1] * onto.shape[2]))
    return (slice(start, min(start + planes, onto.shape[0])) for start in range(0, onto.shape[0], planes))


def _oblique_maps(source: Geometry, onto: Geometry, rows: slice) -> AxisMaps:
    """Return, per axis of the source, the coordinates of all voxels in a slab of `onto`, flattened."""
    axes = [np.arange(rows.start, rows.stop), *(np.arange(n) for n in onto.shape[1:])]
    indices = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    coordinates = source.to_index(onto.to_mm(indices))
    x, y, z = (AxisMap(axis, source.shape[axis], coordinates[:, axis]) for axis in range(3))
    return x, y, z


def _resample_oblique(image: Volume, onto: Geometry, order: Order, outside: float) -> Image:
    """Resample an image between grids that are not parallel, slab by slab."""
    shrinks = np.abs(np.linalg.inv(image.geometry.affine)[:3, :3] @ onto.affine[:3, :3]).max(axis=1)
    coefficients: Image = image.array
    for axis, shrink in enumerate(shrinks):
        if order == 3 or shrink > _ANTI_ALIAS_ABOVE:
            matrix = _source_matrix(image.geometry.shape[axis], float(shrink), order)
            coefficients = _multiply_axis(coefficients, axis + 1, matrix)
    result = np.empty((len(coefficients), *onto.shape), np.float32)
    for rows in _slabs(onto):
        maps = _oblique_maps(image.geometry, onto, rows)
        coordinates = np.stack([axis_map.clamped for axis_map in maps])
        inside = np.logical_and.reduce([axis_map.inside for axis_map in maps])
        for channel, source in enumerate(coefficients):
            values = ndimage.map_coordinates(
                source, coordinates, output=np.float32, order=order, mode="mirror", prefilter=False
            )
            result[channel, rows] = np.where(inside, values, np.float32(outside)).reshape(-1, *onto.shape[1:])
    return result


def _resample_label_oblique(label: Volume, onto: Geometry, outside: int) -> Array:
    """Resample a label map between grids that are not parallel, slab by slab."""
    result = np.empty(onto.shape, label.array.dtype)
    for rows in _slabs(onto):
        maps = _oblique_maps(label.geometry, onto, rows)
        inside = np.logical_and.reduce([axis_map.inside for axis_map in maps])
        values = np.where(inside, _vote(label.array, maps), np.asarray(outside, label.array.dtype))
        result[rows] = values.reshape(-1, *onto.shape[1:])
    return result
