"""Where the pixels of a series lie in DICOM's LPS millimetres, and label maps plane by plane on them.

Slices are told by where they are, never by their number: a label map's axes may run any other way than the series'.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.errors import GeometryError
from pipeline.geometry import FloatArray
from pipeline.volumes.dicom.series import Series
from pipeline.volumes.formats.itk import LPS_TO_RAS
from pipeline.volumes.formats.layout import Array, copy_into
from pipeline.volumes.volume import Volume


@dataclass(frozen=True, eq=False)
class Placing:
    """The planes of a series in space, each at its own position.

    Attributes:
        series: one that is a volume.
    """

    series: Series

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""
        columns, rows, slices = self.series.geometry.shape
        return slices, rows, columns

    @cached_property
    def _affine(self) -> FloatArray:
        """(4, 4) from column, row, slice to LPS mm."""
        return np.asarray(LPS_TO_RAS @ self.series.geometry.affine)

    @cached_property
    def origins_mm(self) -> FloatArray:
        """(slices, 3) the first pixel's centre of each slice, LPS."""
        return np.array([one.position_mm for one in self.series.slices])

    @cached_property
    def normal(self) -> FloatArray:
        """(3,) the unit vector across the slices, in the direction in which they follow one another."""
        across = np.cross(self._affine[:3, 0], self._affine[:3, 1])
        return np.asarray(across / np.linalg.norm(across) * np.sign(across @ self._affine[:3, 2]))

    @cached_property
    def heights_mm(self) -> FloatArray:
        """(slices,) how far each slice lies along the normal, ascending."""
        return np.asarray(self.origins_mm @ self.normal)

    @property
    def step_mm(self) -> float:
        """The distance between neighbouring slices."""
        return float(np.diff(self.heights_mm).mean())

    def to_mm(self, number: int, pixels: FloatArray) -> FloatArray:
        """Map (n, 2) columns and rows on a slice, whole or fractional, to (n, 3) LPS mm."""
        return np.asarray(self.origins_mm[number] + pixels @ self._affine[:3, :2].T)

    def to_pixels(self, points_mm: FloatArray) -> FloatArray:
        """Map (n, 3) LPS mm to (n, 2) columns and rows of whatever slice they lie on."""
        # Each slice has its own origin, but a difference along the normal alone moves no pixel.
        nearest = int(np.abs(self.heights_mm - float(points_mm.mean(axis=0) @ self.normal)).argmin())
        axes = self._affine[:3, :2]
        return np.asarray((points_mm - self.origins_mm[nearest]) @ np.linalg.pinv(axes).T)

    def to_index(self, points_mm: FloatArray) -> FloatArray:
        """Map (n, 3) LPS mm to (n, 3) column, row and slice."""
        inverse = np.linalg.inv(self._affine)
        return np.asarray(points_mm @ inverse[:3, :3].T + inverse[:3, 3])

    def planes_of(self, label: Volume) -> Array:
        """Return a label map as (slices, rows, columns) of the series, in C order.

        Args:
            label: (X, Y, Z) on the series' grid, its axes in any order and direction.

        Raises:
            GeometryError: it lies on another grid.
        """
        own = self.series.geometry
        turned = label.geometry.reoriented(own.orientation)
        if not turned.matches(own):
            raise GeometryError(
                f"the label map's grid, {label.geometry}, is not that of {self.series}, {own}; "
                "DICOM refers to the series' own pixels: resample the label map onto it"
            )
        axes = label.geometry.axes_for(own.orientation)
        array = label.array.transpose([old for old, _ in axes])[tuple(slice(None, None, sign) for _, sign in axes)]
        planes = np.empty(array.shape, array.dtype, order="F")
        copy_into(planes, array)
        return planes.transpose()
