"""Geometry: where a grid of voxels lies in space, and all that can be said without looking at a voxel.

An index (i, j, k) names a voxel's CENTRE; the affine maps it to RAS+ millimetres (x to the patient's right, y to the
front, z to the head), as NIfTI and nibabel do. DICOM's and ITK's LPS is converted where files are read, and nowhere
else.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import GeometryError
from pipeline.records import Record

FloatArray = NDArray[np.float64]
Row = tuple[float, float, float, float]

# Each anatomical letter as (axis of the world, sign): R is +x, L is -x.
_LETTERS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


@dataclass(frozen=True, eq=False)
class Geometry:
    """A grid in space: its shape and the affine from voxel index to millimetres.

    Attributes:
        shape: voxels along the three axes, each at least 1.
        affine: (4, 4) float64, invertible; maps a voxel centre's index to RAS+ millimetres.

    Raises:
        GeometryError: the shape is empty, or the affine is not finite, has a zero-length or parallel axis, or a last
            row other than 0 0 0 1.
    """

    shape: tuple[int, int, int]
    affine: FloatArray

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "affine", affine)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise GeometryError(f"a grid needs three axes of at least one voxel, got shape {self.shape}")
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.allclose(affine[3], [0, 0, 0, 1]):
            raise GeometryError(f"the affine must be 4x4, finite, with last row 0 0 0 1; got {affine.tolist()}")
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if (lengths <= 0).any():
            raise GeometryError(f"the spacing must be above 0 mm on each axis, got {_by(lengths)} mm")
        # The determinant of the unit axes is the volume they span: 1 when orthogonal, 0 when two are parallel.
        if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
            raise GeometryError(f"the affine is singular: two axes of the grid are parallel; got {affine.tolist()}")
        affine.setflags(write=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Geometry) and self.shape == other.shape and np.array_equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes()))

    def __str__(self) -> str:
        return f"{_by(self.shape)} at {_by(self.spacing_mm)} mm, {self.orientation}"

    @cached_property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along each axis, in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in ml."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @cached_property
    def world_axes(self) -> tuple[tuple[int, int], ...]:
        """For each voxel axis the world axis nearest to it, and the sign: ((0, -1), (1, 1), (2, 1)) is LAS.

        The assignment with the largest sum of cosines over all permutations, so that no world axis is named twice even
        at 45 degrees.
        """
        cosines = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        # Rounded so that an exact 45 degrees falls to the first permutation on every machine.
        best = max(
            itertools.permutations(range(3)), key=lambda p: round(sum(abs(cosines[p[a], a]) for a in range(3)), 9)
        )
        return tuple((best[axis], 1 if cosines[best[axis], axis] > 0 else -1) for axis in range(3))

    @property
    def orientation(self) -> str:
        """The axis code: "RAS" means that the indices grow to the right, to the front and to the head."""
        names = {value: letter for letter, value in _LETTERS.items()}
        return "".join(names[axis] for axis in self.world_axes)

    @property
    def shear(self) -> float:
        """The largest cosine between two axes: 0 for a rectangular grid."""
        unit = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(np.abs(unit.T @ unit - np.eye(3)).max())

    @property
    def corners_mm(self) -> FloatArray:
        """(8, 3) centres of the corner voxels, in mm."""
        return self.to_mm(np.array(list(itertools.product(*((0, n - 1) for n in self.shape)))))

    def to_mm(self, indices: NDArray[np.generic]) -> FloatArray:
        """Map (..., 3) voxel indices, whole or fractional, to (..., 3) RAS+ millimetres."""
        return np.asarray(indices, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_index(self, points_mm: NDArray[np.generic]) -> FloatArray:
        """Map (..., 3) RAS+ millimetres to (..., 3) fractional voxel indices."""
        inverse = np.asarray(np.linalg.inv(self.affine), dtype=np.float64)
        return np.asarray(points_mm, dtype=np.float64) @ inverse[:3, :3].T + inverse[:3, 3]

    def axes_for(self, orientation: str) -> tuple[tuple[int, int], ...]:
        """For each axis of `orientation` the own axis it comes from, and -1 where it runs the other way, else 1.

        Raises:
            ValueError: the code does not name each of left-right, front-back and head-feet once.
        """
        wanted = [_LETTERS.get(letter, (-1, 0)) for letter in orientation]
        if sorted(axis for axis, _ in wanted) != [0, 1, 2]:
            raise ValueError(f"an orientation names R or L, A or P, S or I once each, got {orientation!r}")
        own = {axis: (index, sign) for index, (axis, sign) in enumerate(self.world_axes)}
        return tuple((own[axis][0], own[axis][1] * sign) for axis, sign in wanted)

    def reoriented(self, orientation: str) -> Geometry:
        """Return the same voxels with their axes permuted and flipped to an axis code such as "RAS"."""
        affine = np.eye(4)
        affine[:3, 3] = self.affine[:3, 3]
        for new, (old, sign) in enumerate(self.axes_for(orientation)):
            affine[:3, new] = self.affine[:3, old] * sign
            if sign < 0:
                affine[:3, 3] += self.affine[:3, old] * (self.shape[old] - 1)
        shape = tuple(self.shape[old] for old, _ in self.axes_for(orientation))
        return Geometry(shape, affine)  # type: ignore[arg-type]

    def cropped(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> Geometry:
        """Return the box from `start` to `stop` (exclusive), in voxels; it may reach beyond the grid.

        Raises:
            GeometryError: the box is empty.
        """
        affine = self.affine.copy()
        affine[:3, 3] = self.to_mm(np.array(start))
        return Geometry(tuple(b - a for a, b in zip(start, stop, strict=True)), affine)  # type: ignore[arg-type]

    def respaced(self, spacing_mm: tuple[float, float, float]) -> Geometry:
        """Return a grid over the same box, outer voxel corners kept, at about the given spacing.

        The shape is round(extent / spacing), at least 1, and the spacing is then adjusted so that the corners stay:
        half a voxel more or less on a side would move the anatomy.
        """
        if min(spacing_mm) <= 0:
            raise ValueError(f"a spacing must be above 0 mm, got {spacing_mm}")
        shape = tuple(
            max(1, round(n * old / new)) for n, old, new in zip(self.shape, self.spacing_mm, spacing_mm, strict=True)
        )
        scale = np.array(self.shape) / np.array(shape)
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, :3] * scale
        affine[:3, 3] = self.to_mm((scale - 1) / 2)
        return Geometry(shape, affine)  # type: ignore[arg-type]

    def displacement_voxels(self, other: Geometry) -> float:
        """Return how far the farthest corner voxel lies from its namesake in `other`, in voxels of this grid.

        Infinite where the shapes differ.
        """
        if self.shape != other.shape:
            return float("inf")
        shift_mm = np.linalg.norm(other.corners_mm - self.corners_mm, axis=1).max()
        return float(shift_mm / min(self.spacing_mm))

    def matches(self, other: Geometry, tolerance_voxels: float = 0.1) -> bool:
        """Tell whether both grids are one: same shape, and corners displaced by less than the tolerance."""
        return self.displacement_voxels(other) < tolerance_voxels


class Grid(Record):
    """A Geometry as it is written to a file; its numbers survive to the last bit.

    Attributes:
        shape: voxels along the three axes.
        affine: the rows of the matrix from voxel index to RAS+ mm.
    """

    shape: tuple[int, int, int]
    affine: tuple[Row, Row, Row, Row]

    @classmethod
    def of(cls, geometry: Geometry) -> Grid:
        """Return a geometry as a record."""
        return cls(shape=geometry.shape, affine=tuple(map(tuple, geometry.affine.tolist())))

    @property
    def geometry(self) -> Geometry:
        """The record as a geometry."""
        return Geometry(self.shape, np.array(self.affine))


def _by(numbers: NDArray[np.generic] | tuple[float, ...]) -> str:
    """Format numbers as 512x512x74 or 0.70x0.70x5.00."""
    return "x".join(str(n) if isinstance(n, int) else f"{n:.2f}" for n in numbers)
