"""What a volume's file says of itself, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.errors import GeometryError, VolumeError
from pipeline.geometry import FloatArray, Geometry

# Axes this far from square (a cosine) are rounding of the header's float32; beyond it the grid is sheared.
LARGEST_SHEAR = 1e-3
# No scanner is as large; squares of what damaged headers say instead are beyond float64.
FARTHEST_MM = 1e6


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says of itself before any voxel is read.

    Attributes:
        path: the file.
        shape: (X, Y, Z), or (X, Y, Z, N) where N volumes stand in one file; later axes of length 1 are left out.
        dtype: of the voxels as stored.
        kind: scalar; colour (RGB) and complex voxels are refused when they are read.
        affine: (4, 4) voxel index to RAS+ mm, not judged yet: the sform where its code is above 0, else the qform where
            its code is, else NIfTI's base affine (voxel size only).
        qform, sform: NIfTI's two affines whatever their codes; None for other formats.
        qform_code, sform_code: what the two refer to; 0 says unknown.
        spacing_mm: what the header states beside the affine.
        notes: what was assumed.
        nifti: nibabel's header, for writing a label map with the same codes; None for other formats.
        scaling: slope and intercept from stored NIfTI voxels to their units.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    kind: Literal["scalar", "colour", "complex"]
    affine: FloatArray
    spacing_mm: tuple[float, ...]
    qform: FloatArray | None = None
    sform: FloatArray | None = None
    qform_code: int = 0
    sform_code: int = 0
    notes: tuple[str, ...] = ()
    nifti: Any = None
    scaling: tuple[float, float] = (1.0, 0.0)

    @property
    def geometry(self) -> Geometry:
        """The grid.

        Raises:
            GeometryError: the spacing is not above 0, or the affine is not finite, far beyond any scanner,
                singular or sheared.
        """
        if not all(step > 0 for step in self.spacing_mm):
            raise GeometryError(f"{self.path}: the spacing must be above 0 mm on each axis, got {self.spacing_mm}")
        if (np.abs(self.affine) > FARTHEST_MM).any():
            raise GeometryError(
                f"{self.path}: the affine must be finite, within a kilometre; got {self.affine.tolist()}"
            )
        try:
            geometry = Geometry(self.shape[:3], self.affine)  # type: ignore[arg-type]
        except GeometryError as error:
            raise GeometryError(f"{self.path}: {error}; mend the header") from None
        if geometry.shear > LARGEST_SHEAR:
            raise GeometryError(
                f"{self.path}: the grid is sheared: two axes meet at a cosine of {geometry.shear:.4f}, at most"
                f" {LARGEST_SHEAR} is taken; resample the volume onto a rectangular grid"
            )
        return geometry


def volume_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return three axes, or four where several volumes stand in the file; refuse anything else."""
    kept = shape[:3] + tuple(n for n in shape[3:] if n != 1)
    if not 3 <= len(kept) <= 4 or min(kept) < 1:
        raise VolumeError(
            f"{path}: a volume has three axes, or four with several volumes in the file; got shape {shape}"
        )
    return kept
