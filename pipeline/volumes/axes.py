"""AxisMap: where the voxels of one grid lie along the axes of another, when the two are parallel.

All that resampling between parallel grids needs to know of space: for each axis of the target which axis of the source
it runs along, and where on it each of its voxels falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import FloatArray, Geometry

Indices = NDArray[np.intp]

# Headers keep affines in float32: over 512 voxels and 250 mm their rounding moves a voxel by some 3e-5 of itself. A
# coordinate this near to a voxel centre is that centre, and grids that diverge by less than the second are parallel.
_ON_CENTRE_VOXELS = 1e-4
_PARALLEL_VOXELS = 1e-3


@dataclass(frozen=True, eq=False)
class AxisMap:
    """Where the voxels along one axis of a target grid lie on the source grid.

    Attributes:
        axis: the axis of the source that this axis of the target runs along.
        length: voxels of the source along it.
        coordinates: (n,) float64, the index on the source of each of the target's n voxel centres; may lie outside.
    """

    axis: int
    length: int
    coordinates: FloatArray

    @cached_property
    def inside(self) -> NDArray[np.bool_]:
        """(n,) whether the centre lies in the source's box: at most half a voxel beyond its outer centres."""
        margin = 0.5 + _ON_CENTRE_VOXELS
        return np.asarray((self.coordinates >= -margin) & (self.coordinates <= self.length - 1 + margin))

    @cached_property
    def clamped(self) -> FloatArray:
        """(n,) the coordinates, moved to the outermost voxel centre where they lie beyond it."""
        return np.clip(self.coordinates, 0.0, self.length - 1.0)

    @cached_property
    def lower(self) -> Indices:
        """(n,) index of the voxel at or before the coordinate."""
        return np.floor(self.clamped).astype(np.intp)

    @cached_property
    def weight(self) -> FloatArray:
        """(n,) the share of `upper` in a linear interpolation, from 0 to below 1."""
        return self.clamped - self.lower

    @cached_property
    def upper(self) -> Indices:
        """(n,) index of the voxel after the coordinate; `lower` again where that has no weight."""
        return self.lower + (self.weight > 0)

    @property
    def on_centres(self) -> bool:
        """Whether each coordinate is a voxel centre, so that nothing is interpolated."""
        return not self.weight.any()

    @property
    def shrink(self) -> float:
        """How many voxels of the source one voxel of the target spans; 1 for a single voxel."""
        steps = np.diff(self.coordinates)
        return float(abs(steps).mean()) if steps.size else 1.0

    @property
    def growth(self) -> float:
        """Voxels of the target per voxel of the source."""
        return self.coordinates.size / self.length

    def is_identity(self, axis: int) -> bool:
        """Tell whether this, as the map of the target's axis `axis`, leaves all voxels where they are."""
        return self.axis == axis and np.array_equal(self.coordinates, np.arange(self.length))

    def at(self, voxels: Indices) -> AxisMap:
        """Return the map of some of the target's voxels, in any order and number."""
        return AxisMap(self.axis, self.length, self.coordinates[voxels])

    def rounded(self) -> AxisMap:
        """Return the map to the nearest voxel centre (half way: the upper one)."""
        nearest = np.minimum(np.floor(self.clamped + 0.5), self.length - 1)
        return AxisMap(self.axis, self.length, np.where(self.inside, nearest, self.coordinates))


AxisMaps = tuple[AxisMap, AxisMap, AxisMap]


def axis_maps(source: Geometry, onto: Geometry) -> AxisMaps | None:
    """Describe a resample axis by axis, where the two grids are parallel.

    Args:
        source: the grid that has the voxels.
        onto: the grid that wants them.

    Returns:
        One map per axis of `onto`, or None where an axis of one grid runs along no single axis of the other.
    """
    to_source = np.linalg.inv(source.affine) @ onto.affine
    scales, offsets = to_source[:3, :3], to_source[:3, 3]
    axes = [int(axis) for axis in np.abs(scales).argmax(axis=0)]
    astray = np.abs(scales) * (np.array(onto.shape) - 1)
    astray[axes, range(3)] = 0.0
    if sorted(axes) != [0, 1, 2] or astray.max() > _PARALLEL_VOXELS:
        return None
    coordinates = (scales[axis, new] * np.arange(onto.shape[new]) + offsets[axis] for new, axis in enumerate(axes))
    x, y, z = (
        AxisMap(axis, source.shape[axis], _on_centres(along)) for axis, along in zip(axes, coordinates, strict=True)
    )
    return x, y, z


def rounded_along(maps: AxisMaps, axis: int) -> AxisMaps:
    """Return the maps with that of one axis of the target rounded to the nearest voxel centre."""
    x, y, z = (axis_map.rounded() if own == axis else axis_map for own, axis_map in enumerate(maps))
    return x, y, z


def _on_centres(coordinates: FloatArray) -> FloatArray:
    """Return coordinates, those that miss a voxel centre by no more than a header's rounding moved onto it."""
    nearest = np.rint(coordinates)
    return np.where(np.abs(coordinates - nearest) < _ON_CENTRE_VOXELS, nearest, coordinates)
