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

    From a hole's rightmost point, half a pixel outside its pixels, the row leads through pixels of the structure to a
    point of the outer ring or of a hole that reaches further right, and was therefore joined before.
    """
    outer, *holes = rings
    for hole in sorted(holes, key=lambda ring: -float(ring[:, 0].max())):
        leaves = int(hole[:, 0].argmax())
        column, row = hole[leaves]
        to_the_right = np.where((outer[:, 1] == row) & (outer[:, 0] > column), outer[:, 0], np.inf)
        meets = int(to_the_right.argmin())
        there_and_back = np.concatenate([hole[leaves:], hole[: leaves + 1]])
        outer = np.concatenate([outer[: meets + 1], there_and_back, outer[meets:]])
    return outer


def _straightened(polygon: FloatArray) -> FloatArray:
    """Return a polygon without the points that lie on a straight way from one neighbour to the other."""
    before, after = polygon - np.roll(polygon, 1, axis=0), np.roll(polygon, -1, axis=0) - polygon
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    back = (before * after).sum(axis=1) < 0  # The end of a channel, where that is.
    straightened: FloatArray = polygon[turns | back]
    return straightened
