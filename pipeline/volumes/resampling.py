"""Resampling of images and labels onto another Geometry; the only place where voxels move between grids.

A `Geometry` says where each voxel centre lies, so the target of a resample is a Geometry and nothing else. Where the
two grids are parallel (a permutation, flips, scales and offsets: reorient, crop, pad and respace all at once) each axis
is treated by itself, `interpolation.py` doing an image's sums. Between input and output there is never more than a
slab, however long the volume.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.geometry import FloatArray, Geometry
from pipeline.volumes.axes import AxisMap, AxisMaps, Indices, axis_maps, rounded_along
from pipeline.volumes.interpolation import Image, Interpolation, Order, interpolate, is_taken
from pipeline.volumes.volume import Volume

Array = NDArray[Any]

# Voxels whose coordinates are held at once where grids are not parallel, or whose corners vote: little enough that the
# eight corners' values and weights stay in a core's cache.
_SLAB_VOXELS = 1 << 15
# Voxels of a label map on which agreement is sought at once.
_LABEL_SLAB_VOXELS = 1 << 22


def resample_image(
    image: Volume,
    onto: Geometry,
    *,
    order: Order = 3,
    thick_axis: int | None = None,
    outside: float = 0.0,
    out: Image | None = None,
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
        out: (C, *onto.shape) float32 to write into, and to return; None: an array of its own, or a view.

    Returns:
        (C, *onto.shape) float32 on `onto`.
    """
    maps = axis_maps(image.geometry, onto)
    if maps is not None and all(map(is_taken, maps)):
        taken: Image = _taken(image.array, maps, outside)
        if out is None:
            return Volume(taken, onto)
        out[...] = taken
        return Volume(out, onto)
    result = np.empty((len(image.array), *onto.shape), np.float32) if out is None else out
    orders: list[Order] = [1 if axis == thick_axis else order for axis in range(3)]
    for source, channel in zip(image.array, result, strict=True):
        if maps is None:
            _resample_oblique(Volume(source, image.geometry), min(orders), outside, Volume(channel, onto))
        else:
            _resample_parallel(source, maps, orders, channel)
            _fill(channel, maps, outside)
    return Volume(result, onto)


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
    if all(axis_map.on_centres for axis_map in maps):
        return Volume(_taken(label.array, maps, outside), onto)
    result = np.empty(onto.shape, label.array.dtype)
    _vote_parallel(*_for_slabs(label.array, maps, result))
    _fill(result, maps, outside)
    return Volume(result, onto)


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


def _taken(array: Array, maps: AxisMaps, outside: float) -> Array:
    """Return the last three axes on voxel centres of a target, no value changed; a view where it can be."""
    if all(axis_map.is_identity(axis) for axis, axis_map in enumerate(maps)):
        return array
    leading = array.ndim - 3
    result = array.transpose(*range(leading), *(leading + axis_map.axis for axis_map in maps))
    for axis, axis_map in enumerate(maps):
        result = _take(result, leading + axis, axis_map.lower)
    if not all(axis_map.inside.all() for axis_map in maps):
        result = result.copy() if np.may_share_memory(result, array) else result
        _fill(result, maps, outside)
    return result


def _fill(array: Array, maps: AxisMaps, outside: float) -> None:
    """Put `outside` into the last three axes where they lie beyond the source's box."""
    for axis, axis_map in enumerate(maps):
        beyond = np.flatnonzero(~axis_map.inside)
        if beyond.size:
            np.moveaxis(array, axis - 3, 0)[beyond] = outside


def _for_slabs(source: Array, maps: AxisMaps, result: Array) -> tuple[Array, AxisMaps, Array]:
    """Return views of source and result (X, Y, Z), and maps between them, as slabs are best cut across the first axis.

    That is the outermost in the source's memory that does not grow, so that the work on the others is not repeated
    for voxels in between; all axes run the source's way.
    """
    order = sorted(range(3), key=lambda new: (maps[new].growth > 1, maps[new].axis))
    ways = [-1 if maps[new].coordinates[0] > maps[new].coordinates[-1] else 1 for new in order]
    x, y, z = (maps[new].at(np.arange(result.shape[new])[::way]) for new, way in zip(order, ways, strict=True))
    view = result.transpose(order)[tuple(slice(None, None, way) for way in ways)]
    return source.transpose(x.axis, y.axis, z.axis), (x, y, z), view


def _resample_parallel(source: Image, maps: AxisMaps, orders: Sequence[Order], result: Image) -> None:
    """Resample an image (X, Y, Z) into another whose grid is parallel; beyond the source its outer voxels hold."""
    source, own, view = _for_slabs(source, maps, result)
    order_along: dict[int, Order] = {axis_map.axis: order for axis_map, order in zip(maps, orders, strict=True)}
    interpolate(source, [Interpolation.along(axis_map, order_along[axis_map.axis]) for axis_map in own], view)


def _vote_parallel(array: Array, maps: AxisMaps, result: Array) -> None:
    """Resample a label map by the uniform-corner rule, slab by slab of its first axis, into `result`."""
    disputed = _unused_value(array)
    planes = max(1, _LABEL_SLAB_VOXELS // max(array[0].size, result[0].size))
    for start in range(0, len(result), planes):
        rows = slice(start, min(start + planes, len(result)))
        first = maps[0].at(np.arange(rows.start, rows.stop))
        low, high = int(first.lower.min()), int(first.upper.max()) + 1
        near = AxisMap(first.axis, high - low, first.coordinates - low)
        result[rows] = _vote_slab(np.ascontiguousarray(array[low:high]), (near, *maps[1:]), disputed)


def _vote_slab(array: Array, maps: AxisMaps, disputed: Array) -> Array:
    """Resample a contiguous label map by the uniform-corner rule."""
    result = array.astype(disputed.dtype, copy=False)
    for axis in sorted(range(3), key=lambda axis: maps[axis].growth):
        result = agreed(result, axis, maps[axis], disputed)
    flat = result.reshape(-1)
    open_voxels = np.flatnonzero(flat == disputed)
    for start in range(0, open_voxels.size, _SLAB_VOXELS):
        voxels = open_voxels[start : start + _SLAB_VOXELS]
        x, y, z = (m.at(place) for m, place in zip(maps, np.unravel_index(voxels, result.shape), strict=True))
        flat[voxels] = _vote(array, (x, y, z))
    return result


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


def _resample_oblique(image: Volume, order: Order, outside: float, result: Volume) -> None:
    """Resample an image (X, Y, Z) into another whose grid is not parallel, slab by slab."""
    source, onto = image.geometry, result.geometry
    shrinks = np.abs(np.linalg.inv(source.affine)[:3, :3] @ onto.affine[:3, :3]).max(axis=1)
    sums = [
        Interpolation.coefficients(n, float(shrink), order) for n, shrink in zip(source.shape, shrinks, strict=True)
    ]
    coefficients = np.empty(source.shape, np.float32)
    interpolate(image.array, sums, coefficients)
    for rows in _slabs(onto):
        maps = _oblique_maps(source, onto, rows)
        coordinates = np.stack([axis_map.clamped for axis_map in maps])
        inside = np.logical_and.reduce([axis_map.inside for axis_map in maps])
        values = ndimage.map_coordinates(
            coefficients, coordinates, output=np.float32, order=order, mode="mirror", prefilter=False
        )
        result.array[rows] = np.where(inside, values, np.float32(outside)).reshape(-1, *onto.shape[1:])


def _resample_label_oblique(label: Volume, onto: Geometry, outside: int) -> Array:
    """Resample a label map between grids that are not parallel, slab by slab."""
    result = np.empty(onto.shape, label.array.dtype)
    for rows in _slabs(onto):
        maps = _oblique_maps(label.geometry, onto, rows)
        inside = np.logical_and.reduce([axis_map.inside for axis_map in maps])
        values = np.where(inside, _vote(label.array, maps), np.asarray(outside, label.array.dtype))
        result[rows] = values.reshape(-1, *onto.shape[1:])
    return result
