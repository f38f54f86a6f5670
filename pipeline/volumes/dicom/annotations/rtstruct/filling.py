"""From contours to pixels: a pixel belongs to a structure if its centre lies within its contours, or on one of them.

Several contours of a plane are taken together by the even-odd rule: what two of them enclose is outside. So holes come
out right whether they are drawn as contours of their own, by XOR (CLOSEDPLANAR_XOR, DICOM PS3.3 C.8.8.6.3) or through a
keyhole, whose channel is passed twice and cancels itself.

A centre on a contour counts as inside because much software draws contours through the centres of the outermost
pixels: half of them would be lost otherwise, always those on one side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import FloatArray

BoolArray = NDArray[np.bool_]

# DICOM keeps coordinates as decimal text: contours of our own have four places, most others' have three.
ON_CONTOUR_PIXELS = 1e-3


@dataclass(frozen=True, eq=False)
class _Crossings:
    """Where edges meet the lines on which pixel centres lie.

    Attributes:
        row: (n,) of the line.
        column: (n,) float64, where the edge meets it.
    """

    row: NDArray[np.intp]
    column: FloatArray


def fill(polygons: Sequence[FloatArray], shape: tuple[int, int]) -> BoolArray:
    """Return which pixels of a plane lie within its contours.

    Args:
        polygons: closed contours, (n, 2) each: column and row, in pixels; an index is a pixel's centre. The last point
            is joined to the first. They may reach beyond the plane.
        shape: rows and columns of the plane.

    Returns:
        (rows, columns); all False where there is no contour.
    """
    if not polygons:
        return np.zeros(shape, dtype=np.bool_)
    start = np.concatenate(polygons)
    stop = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons])
    return (
        _enclosed(start, stop, shape)
        | _touched(start, stop, shape)
        | _touched(start[:, ::-1], stop[:, ::-1], shape[::-1]).T
    )


def _enclosed(start: FloatArray, stop: FloatArray, shape: tuple[int, int]) -> BoolArray:
    """Return the pixels with an odd number of edges to their left."""
    rows, columns = shape
    # Half open: of two edges that meet on a line only one crosses it, unless it is a tip.
    met = _crossings(start, stop, rows, reach=0.0)
    first = np.clip(np.ceil(met.column), 0, columns).astype(np.intp)
    toggles = np.bincount(met.row * (columns + 1) + first, minlength=rows * (columns + 1)).reshape(rows, columns + 1)
    return np.asarray(np.cumsum(toggles[:, :columns], axis=1) % 2 == 1)


def _touched(start: FloatArray, stop: FloatArray, shape: tuple[int, int]) -> BoolArray:
    """Return the pixels whose centre lies on an edge that crosses its row."""
    rows, columns = shape
    met = _crossings(start, stop, rows, reach=ON_CONTOUR_PIXELS)
    nearest = np.rint(met.column)
    on = (np.abs(met.column - nearest) < ON_CONTOUR_PIXELS) & (nearest >= 0) & (nearest < columns)
    touched = np.zeros(shape, dtype=np.bool_)
    touched[met.row[on], nearest[on].astype(np.intp)] = True
    return touched


def _crossings(start: FloatArray, stop: FloatArray, rows: int, reach: float) -> _Crossings:
    """Return where edges meet rows.

    Args:
        start: (n, 2) column and row.
        stop: likewise.
        rows: of the plane.
        reach: how far beyond its ends an edge is taken, in pixels; 0: its lower end belongs to it, the upper does not.
    """
    low, high = np.minimum(start[:, 1], stop[:, 1]) - reach, np.maximum(start[:, 1], stop[:, 1]) + reach
    first = np.clip(np.ceil(low), 0, rows).astype(np.intp)
    after = np.clip(np.ceil(high), 0, rows).astype(np.intp)
    level = start[:, 1] == stop[:, 1]  # It meets its row everywhere: what lies on it is found along the other axis.
    count = np.where(level, 0, np.maximum(after - first, 0))
    edge = np.repeat(np.arange(len(start)), count)
    row = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    share = np.clip((row - start[edge, 1]) / (stop[edge, 1] - start[edge, 1]), 0.0, 1.0)
    return _Crossings(row, start[edge, 0] + share * (stop[edge, 0] - start[edge, 0]))
