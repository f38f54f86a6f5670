"""Planes of logits on the plan's grid become a label map on the native grid: exactly, streaming, in little memory.

What is wanted is the argmax of all K logit volumes interpolated to the native grid; never made are those volumes.
Linear interpolation is a convex combination of eight corners: a class that is the argmax at all corners of non-zero
weight is the argmax at every point between them (the uniform-corner rule). Only in the cells whose corners disagree are
logits interpolated, and there only of the classes that can win: a class whose largest corner lies below another's
smallest is out. The winners are found in float64, so that the label map equals that of interpolating all K volumes in
float64; float32 logits that differ at all differ by far more than float64 rounds, which is why leads of a few ulps need
no special care.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import FloatArray, Geometry
from pipeline.inference.planes import LogitPlanes
from pipeline.volumes.axes import AxisMap, Indices, axis_maps
from pipeline.volumes.resampling import agreed

Classes = NDArray[Any]
Logits = NDArray[np.float32]

# Corner logits gathered at once, 8 x K x cells: 16 MB of float32.
_GATHERED_LOGITS = 1 << 22


@dataclass(frozen=True, eq=False)
class _Axis:
    """The voxels of one native axis that lie in the plan's box, and the cells of the plan's grid that they lie in.

    A cell is the gap between two neighbouring planes of the plan's grid, or one plane where voxels lie just on it.
    """

    voxels: slice
    weight: FloatArray  # (n,) of the cell's upper plane
    cell: Indices  # (n,) index into cells
    cells: AxisMap  # .lower and .upper of each cell, ascending


@dataclass(frozen=True, eq=False)
class _Plane:
    """One plane of the plan's grid."""

    logits: Logits  # (K, A * B)
    classes: Classes  # (cells of A, cells of B): the class of all corners of a cell, or K where they disagree


@dataclass(frozen=True, eq=False)
class _Candidates:
    """M cells whose corners disagree, and the P classes that can win in them: cell after cell, classes ascending."""

    first: Indices  # (M,) each cell's first candidate
    count: Indices  # (M,) each cell's number of candidates, at least 1
    classes: Indices  # (P,)
    corners: FloatArray  # (1 or 2 planes, 2 rows, 2 columns, P) logits


def label_from_planes(
    planes: Iterable[LogitPlanes], *, axis: int, prepared: Geometry, native: Geometry, thick_axis: int | None = None
) -> Classes:
    """Label the native grid from logits on the plan's grid, as they come.

    Equal, voxel for voxel, to interpolating all K logit volumes in float64, first along `axis`, then along the two
    others in order, and taking the argmax, the first of equal classes. Native voxels outside the plan's grid (a crop)
    are background; within it, coordinates beyond an outermost voxel's centre are moved onto it. Memory: the result, two
    planes of K logits, and a bounded number of cells.

    Args:
        planes: all planes of (K, n, A, B) finite logits, in ascending order; they may be overwritten once the next are
            asked for.
        axis: axis of the plan's grid that the planes are stacked along; A and B are the two others, in order.
        prepared: the plan's grid of this case.
        native: the grid wanted, parallel to `prepared`.
        thick_axis: axis of the plan's grid along which the nearest plane counts, not the two around.

    Returns:
        native.shape, class indices of the smallest unsigned type, in memory in the order of the planes.

    Raises:
        ValueError: the grids are not parallel, or planes are missing or out of order.
    """
    maps = axis_maps(prepared, native)
    if maps is None:
        raise ValueError(f"the plan's grid ({prepared}) is not parallel to the native one ({native})")
    # Native axes in the order of the planes: along the stream, the rows, the columns.
    order = sorted(range(3), key=lambda own: (maps[own].axis != axis, maps[own].axis))
    stream, rows, columns = (_axis(maps[own].rounded() if maps[own].axis == thick_axis else maps[own]) for own in order)
    labels: Classes = np.zeros([native.shape[own] for own in order], np.uint8)
    lower: _Plane | None = None
    count = 0
    for upper in _planes(planes, rows, columns):
        if lower is None:
            labels = labels.astype(np.min_scalar_type(len(upper.logits) - 1), copy=False)
            inside = labels[stream.voxels, rows.voxels, columns.voxels]
        for cell in np.flatnonzero(stream.cells.upper == count):
            around = (upper,) if lower is None or stream.cells.lower[cell] == count else (lower, upper)
            voxels = np.flatnonzero(stream.cell == cell)
            inside[voxels] = _label_cell(around, stream.weight[voxels], rows, columns)
        lower, count = upper, count + 1
    if count != prepared.shape[axis]:
        raise ValueError(f"got {count} planes of logits along axis {axis}, expected {prepared.shape[axis]}")
    return labels.transpose(np.argsort(order))


def _axis(axis_map: AxisMap) -> _Axis:
    """Sort the voxels of one native axis that lie in the plan's box into cells."""
    inside = np.flatnonzero(axis_map.inside)
    voxels = slice(int(inside[0]), int(inside[-1]) + 1) if inside.size else slice(0, 0)
    within = axis_map.at(inside)
    _, first, cell = np.unique(within.lower + within.upper, return_index=True, return_inverse=True)
    return _Axis(voxels, within.weight, cell, within.at(first))


def _planes(planes: Iterable[LogitPlanes], rows: _Axis, columns: _Axis) -> Iterator[_Plane]:
    """Yield plane by plane, each with the classes that its cells' corners agree on."""
    expected = 0
    for several in planes:
        if several.start != expected:
            raise ValueError(f"got planes of logits from {several.start} on, expected {expected}")
        num_classes, count = several.logits.shape[:2]
        expected += count
        disputed = np.asarray(num_classes, np.min_scalar_type(num_classes))
        for plane in range(count):
            logits: Logits = several.logits[:, plane].numpy().copy()  # the next planes may overwrite it
            classes = logits.argmax(axis=0).astype(disputed.dtype)
            classes = agreed(agreed(classes, 0, rows.cells, disputed), 1, columns.cells, disputed)
            yield _Plane(logits.reshape(num_classes, -1), classes)


def _label_cell(around: tuple[_Plane, ...], weights: FloatArray, rows: _Axis, columns: _Axis) -> Classes:
    """Label the n native planes that lie between two planes of the plan's grid, or on one.

    Args:
        around: the plane below and the plane above, or the only one.
        weights: (n,) of the plane above.
        rows: the native rows in the plan's box.
        columns: the native columns in it.

    Returns:
        (n, rows, columns) class indices.
    """
    disputed = len(around[0].logits)
    lower, upper = around[0].classes, around[-1].classes
    classes = np.where(lower == upper, lower, np.asarray(disputed, lower.dtype))
    plane = classes[rows.cell][:, columns.cell]
    labels = np.repeat(plane[None], len(weights), axis=0)
    cells = np.flatnonzero(classes == disputed)
    row, column = np.nonzero(plane == disputed)
    cell = np.searchsorted(cells, rows.cell[row] * classes.shape[1] + columns.cell[column])
    step = max(1, _GATHERED_LOGITS // (8 * disputed))
    for start in range(0, cells.size, step):
        part = slice(None) if cells.size <= step else np.flatnonzero((cell >= start) & (cell < start + step))
        candidates = _candidates(around, cells[start : start + step], rows.cells, columns.cells)
        r, c, of = row[part], column[part], cell[part] - start
        for label, weight in zip(labels, weights, strict=True):
            label[r, c] = _winners(candidates, of, weight, rows.weight[r], columns.weight[c])
    return labels


def _candidates(around: tuple[_Plane, ...], cells: Indices, rows: AxisMap, columns: AxisMap) -> _Candidates:
    """Find the classes that can win in some cells, given by their flat indices."""
    row, column = np.divmod(cells, columns.coordinates.size)
    corners = [
        r[row] * columns.length + c[column] for r in (rows.lower, rows.upper) for c in (columns.lower, columns.upper)
    ]
    logits = np.stack([plane.logits.take(corner, axis=1) for plane in around for corner in corners])  # (4 or 8, K, M)
    possible = logits.max(axis=0) >= logits.min(axis=0).max(axis=0)
    cell, classes = np.nonzero(possible.T)
    count = np.bincount(cell, minlength=cells.size)
    values = logits[:, classes, cell].astype(np.float64)
    return _Candidates(np.cumsum(count) - count, count, classes, values.reshape(len(around), 2, 2, -1))


def _winners(
    candidates: _Candidates, cell: Indices, weight: float, row_weight: FloatArray, column_weight: FloatArray
) -> Indices:
    """Return the class of the largest interpolated logit, the first of equal ones, at V voxels of one native plane.

    Args:
        candidates: of the cells.
        cell: (V,) the voxels' cells.
        weight: of the plane above, for this native plane.
        row_weight: (V,) of the row after.
        column_weight: (V,) of the column after.
    """
    corners = (1 - weight) * candidates.corners[0] + weight * candidates.corners[-1]  # (2 rows, 2 columns, P)
    best = np.full(cell.size, -np.inf)
    winner = np.zeros(cell.size, np.intp)
    rivals = np.arange(cell.size)
    for rank in range(int(candidates.count[cell].max(initial=0))):
        rivals = rivals[candidates.count[cell[rivals]] > rank]
        candidate = candidates.first[cell[rivals]] + rank
        r, c = row_weight[rivals], column_weight[rivals]
        before, after = ((1 - r) * corners[0, side][candidate] + r * corners[1, side][candidate] for side in (0, 1))
        value = (1 - c) * before + c * after
        better = value > best[rivals]
        best[rivals[better]] = value[better]
        winner[rivals[better]] = candidates.classes[candidate[better]]
    return winner
