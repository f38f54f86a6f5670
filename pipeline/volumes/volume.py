"""Volume: voxels that know where they are; reading images and label maps.

`stored.py` knows the files; here they become float32 images and integer label maps. `writing.py` is the other way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import VolumeError
from pipeline.geometry import Geometry
from pipeline.volumes.formats.header import Header
from pipeline.volumes.formats.layout import Array, in_c_order
from pipeline.volumes.stored import pick_channel, read_scalars, read_stored

_LARGEST_LABEL = 2.0**53  # Beyond it a float64 no longer tells one whole number from the next.


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels and their place in space.

    Attributes:
        array: image (C, X, Y, Z) float32, or label map (X, Y, Z) of integers.
        geometry: of the three spatial axes.
    """

    array: Array
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.array.ndim not in (3, 4) or self.array.shape[-3:] != self.geometry.shape:
            raise ValueError(f"array {self.array.shape} does not lie on the grid {self.geometry.shape}")


def read_image(path: Path, index: int | None = None) -> Volume:
    """Read one image.

    Args:
        path: NIfTI, NRRD or MetaImage.
        index: position on the fourth axis of a file with several volumes.

    Returns:
        (1, X, Y, Z) float32, in the file's units; a value beyond float32 becomes infinite.

    Raises:
        VolumeError: the file cannot be read as one scalar volume.
        GeometryError: its grid makes no sense.
    """
    header, scalars = read_scalars(path, index)
    return Volume(scalars[None], header.geometry)


def read_label(path: Path, index: int | None = None) -> Volume:
    """Read one label map.

    Returns:
        (X, Y, Z) in the smallest integer type that holds its values; whole numbers stored as floats are taken.

    Raises:
        VolumeError: the file cannot be read as one volume of whole numbers.
        GeometryError: its grid makes no sense.
    """
    header, voxels = read_stored(path)
    return Volume(whole_numbers(header, pick_channel(header, voxels, index)), header.geometry)


def whole_numbers(header: Header, voxels: Array) -> Array:
    """Return label voxels in the smallest integer type that holds them, in C order.

    Raises:
        VolumeError: a value is not a whole number; names the first.
    """
    if voxels.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            wrong = ~((np.abs(voxels) < _LARGEST_LABEL) & (voxels == np.rint(voxels)))
        if wrong.any():
            place = tuple(int(n) for n in np.argwhere(wrong)[0])
            raise VolumeError(f"{header.path}: a label map holds whole numbers, got {voxels[place]} at voxel {place}")
    elif voxels.dtype.kind == "b":
        voxels = voxels.view(np.uint8)
    return in_c_order(voxels, smallest_type(int(voxels.min()), int(voxels.max())))


def count_values(label: Array) -> dict[int, int]:
    """Return value -> voxels of an integer label map, by value."""
    low = int(label.min())
    span = int(label.max()) - low + 1
    if span <= 2**16:
        # In pieces: bincount makes eight bytes of each voxel.
        flat = label.ravel(order="K")
        pieces = (flat[start : start + 2**20].astype(np.int64) - low for start in range(0, flat.size, 2**20))
        counts = np.sum([np.bincount(piece, minlength=span) for piece in pieces], axis=0)
        return {int(n) + low: int(counts[n]) for n in np.flatnonzero(counts)}
    return {int(value): int(count) for value, count in zip(*np.unique(label, return_counts=True), strict=True)}


def smallest_type(low: int, high: int) -> np.dtype[Any]:
    """Return the smallest integer type that holds both values, unsigned where it can be."""
    # Signed, a type holds -high - 1 if it holds high: 300 beside -1 needs 16 bits, not the 32 that uint16 promotes to.
    return np.min_scalar_type(high if low >= 0 else min(low, -high - 1))
