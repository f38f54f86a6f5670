"""Grids in space: which one the network sees an image on, and where one grid's voxels lie on another.

An index names a voxel's centre; affines map it to RAS+ millimetres, as MONAI's do. A new spacing keeps the outer
corners of the outer voxels, so that anatomy does not move by half a voxel; MONAI's Spacing keeps the first voxel's
centre.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LETTERS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
# A coordinate this near to a voxel's centre is that centre: headers are rounded.
_ON_CENTRE_VOXELS = 1e-4


@dataclass(frozen=True, eq=False)
class Grid:
    """A shape and an affine."""

    shape: tuple[int, ...]
    affine: Array

    @property
    def spacing_mm(self) -> Array:
        """Distance between voxel centres along each axis."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    def reoriented(self, code: str) -> Grid:
        """Return the same voxels with axes permuted and flipped to a code such as "RAS"."""
        cosines = self.affine[:3, :3] / self.spacing_mm
        best = max(
            itertools.permutations(range(3)), key=lambda p: round(sum(abs(cosines[p[a], a]) for a in range(3)), 9)
        )
        own = {best[axis]: (axis, 1 if cosines[best[axis], axis] > 0 else -1) for axis in range(3)}
        affine = np.eye(4)
        affine[:3, 3] = self.affine[:3, 3]
        shape = []
        for new, letter in enumerate(code):
            world, wanted = _LETTERS[letter]
            old, sign = own[world]
            shape.append(self.shape[old])
            affine[:3, new] = self.affine[:3, old] * sign * wanted
            if sign * wanted < 0:
                affine[:3, 3] += self.affine[:3, old] * (self.shape[old] - 1)
        return Grid(tuple(shape), affine)

    def cropped(self, start: Sequence[int], stop: Sequence[int]) -> Grid:
        """Return the box from `start` to `stop`, exclusive."""
        affine = self.affine.copy()
        affine[:3, 3] = self.affine[:3, :3] @ np.asarray(start) + self.affine[:3, 3]
        return Grid(tuple(int(b - a) for a, b in zip(start, stop, strict=True)), affine)

    def respaced(self, spacing_mm: Sequence[float]) -> Grid:
        """Return a grid over the same box at about this spacing."""
        wanted = zip(self.shape, self.spacing_mm, spacing_mm, strict=True)
        shape = tuple(max(1, round(float(n * old / new))) for n, old, new in wanted)
        scale = np.array(self.shape) / np.array(shape)
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, :3] * scale
        affine[:3, 3] = self.affine[:3, :3] @ ((scale - 1) / 2) + self.affine[:3, 3]
        return Grid(shape, affine)


@dataclass(frozen=True, eq=False)
class AlongAxis:
    """Where the voxels along one axis of a grid lie on another grid.

    Attributes:
        axis: of the other grid.
        length: voxels of the other grid along it.
        coordinates: (n,) indices there.
    """

    axis: int
    length: int
    coordinates: Array

    @property
    def inside(self) -> Array:
        """(n,) whether they lie in the other grid's box."""
        margin = 0.5 + _ON_CENTRE_VOXELS
        return np.asarray((self.coordinates >= -margin) & (self.coordinates <= self.length - 1 + margin))

    @property
    def clamped(self) -> Array:
        """(n,) the coordinates, at most the outermost centres."""
        return np.asarray(np.clip(self.coordinates, 0.0, self.length - 1.0))

    @property
    def shrink(self) -> float:
        """Voxels of the other grid that one voxel spans."""
        steps = np.diff(self.coordinates)
        return float(abs(steps).mean()) if steps.size else 1.0

    def neighbours(self, nearest: bool = False) -> tuple[Array, Array, Array]:
        """Return the voxel at or before each coordinate, the one after, and the weight of the latter."""
        at = np.minimum(np.floor(self.clamped + 0.5), self.length - 1) if nearest else self.clamped
        lower = np.floor(at).astype(np.intp)
        weight = at - lower
        return lower, lower + (weight > 0), weight


def along_axes(source: Grid, onto: Grid) -> list[AlongAxis]:
    """Return where the voxels of a grid lie on another that is parallel to it, axis by axis.

    Raises:
        ValueError: the grids are not parallel.
    """
    to_source = np.linalg.inv(source.affine) @ onto.affine
    scales, offsets = to_source[:3, :3], to_source[:3, 3]
    axes = [int(axis) for axis in np.abs(scales).argmax(axis=0)]
    if sorted(axes) != [0, 1, 2]:
        raise ValueError("the grids are not parallel")
    maps = []
    for new, axis in enumerate(axes):
        coordinates = scales[axis, new] * np.arange(onto.shape[new]) + offsets[axis]
        nearest = np.rint(coordinates)
        near = np.abs(coordinates - nearest) < _ON_CENTRE_VOXELS
        maps.append(AlongAxis(axis, source.shape[axis], np.where(near, nearest, coordinates)))
    return maps
