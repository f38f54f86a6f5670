"""From pixels to contours: closed polygons half way between the centres of pixels within and without.

Marching squares at 0.5 on the mask: the polygon passes half a pixel outside the outermost centres, its corners cut. So
filling it gives the very mask again, and its area is that of the mask less half a pixel a contour (1/8 of a pixel at
each corner turned outwards, given back at each turned inwards). Contours through the outermost centres, as some
software draws them, would lose half a pixel on every side; contours around the pixels would be stairs.

Pixels that touch at corners only are parted. A hole is joined to its outer contour by a keyhole: a channel of no
width, which DICOM PS3.3 C.8.8.6.3 describes for CLOSED_PLANAR contours, and the one way in which readers that unite the
contours of a plane, that take them by XOR, and that follow the even-odd rule all see the hole. The channel runs along a
row of pixels of the structure, so that software that fills what lies on an edge does no harm there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import FloatArray


def trace(mask: NDArray[np.bool_]) -> list[FloatArray]:
    """Return the contours of a structure in a plane.

    Args:
        mask: (rows, columns), True in the structure.

    Returns:
        A closed polygon for each connected part, holes and all: (n, 2) column and row, in pixels; an index is a
        pixel's centre; the first point is not repeated, no three neighbours lie on a line. Empty for an empty mask.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return []
    window = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    corner = np.array([columns[0] - 1, rows[0] - 1], dtype=np.float64)
    return [_straightened(_joined(rings)) + corner for rings in _parts(np.pad(window, 1))]


def _parts(mask: NDArray[np.bool_]) -> list[list[FloatArray]]:
    """Return of each connected part its outer ring, and those of its holes; every crossing of a row is a point."""
    import contourpy

    generator: Any = contourpy.contour_generator(z=mask.astype(np.float64), fill_type=contourpy.FillType.OuterOffset)
    points, offsets = generator.filled(0.5, 2.0)
    return [
        [part[first : last - 1] for first, last in pairwise(cuts)] for part, cuts in zip(points, offsets, strict=True)
    ]


def _joined(rings: list[FloatArray]) -> FloatArray:
    """Return one polygon of an outer ring and holes, each joined by a channel to what lies next to its right.

    From a hole's rightmost point, half a pixel outside its pixels, the row leads through pixels of the structure to the
    next point of any ring on that row: of the outer one, or of a hole that reaches further right. So channels lead from
    hole to hole and out, and all rings are passed in one walk.
    """
    if len(rings) == 1:
        return rings[0]
    points = np.concatenate(rings)
    starts = np.cumsum([0, *map(len, rings)]).tolist()
    order = np.lexsort((points[:, 0], points[:, 1]))
    after = np.empty(len(points), np.intp)
    after[order] = np.roll(order, -1)  # The next point on a row; of its last one it means nothing.
    ways = [list(range(first, last)) for first, last in pairwise(starts)]
    joined: dict[int, list[int]] = {}
    for ring, way in zip(rings[1:], ways[1:], strict=True):
        leaves = int(ring[:, 0].argmax())
        joined[int(after[way[leaves]])] = [*way[leaves:], *way[: leaves + 1]]
    return np.asarray(points[_walk(ways[0], joined)])


def _walk(outer: list[int], joined: dict[int, list[int]]) -> list[int]:
    """Return the points of a way round in order, at some of which another is gone round, and so on.

    Args:
        outer: the first way.
        joined: point -> the way that is gone from there, and back to there.
    """
    passed: list[int] = []
    ways = [iter(outer)]  # No recursion: a thousand holes may stand in a row.
    left_at: list[int] = []
    while ways:
        point = next((point for point in _taken(ways[-1], passed) if point in joined), None)
        if point is not None:
            ways.append(iter(joined[point]))
            left_at.append(point)
        else:
            ways.pop()
            passed += [left_at.pop()] if left_at else []
    return passed


def _taken(way: Iterator[int], passed: list[int]) -> Iterator[int]:
    """Yield the points of a way, and note each as passed."""
    for point in way:
        passed.append(point)
        yield point


def _straightened(polygon: FloatArray) -> FloatArray:
    """Return a polygon without the points that lie on a straight way from one neighbour to the other."""
    before, after = polygon - np.roll(polygon, 1, axis=0), np.roll(polygon, -1, axis=0) - polygon
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    back = (before * after).sum(axis=1) < 0  # The end of a channel, where that is.
    straightened: FloatArray = polygon[turns | back]
    return straightened
