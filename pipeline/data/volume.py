"""Volume: voxels that know where they are; reading images and label maps, of a file or of a case, and writing them.

`stored.py` knows the files; here they become float32 images and integer label maps, and the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Extension

from pipeline.data.manifest import Case, ImageFile, Manifest
from pipeline.data.stored import (
    LPS_TO_RAS,
    Array,
    Header,
    is_volume,
    pick_channel,
    read_header,
    read_stored,
    stem_of,
)
from pipeline.errors import VolumeError
from pipeline.geometry import Geometry
from pipeline.records import atomic_path

__all__ = [
    "Header",
    "Volume",
    "count_values",
    "is_volume",
    "read_case_images",
    "read_case_label",
    "read_file",
    "read_header",
]
__all__ += ["read_image", "read_label", "smallest_type", "stem_of", "whole_numbers", "write_image", "write_label"]

# What places a NIfTI volume in space, beside pixdim.
_PLACE_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)
# Those of ITK's formats that are one file: of two files the second would keep its temporary name.
_ITK_WRITTEN = (".nrrd", ".mha")
_COMMENT = 6  # NIfTI's registered code of an extension that is free text.


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
        (1, X, Y, Z) float32, in the file's units.

    Raises:
        VolumeError: the file cannot be read as one scalar volume.
        GeometryError: its grid makes no sense.
    """
    header, voxels = read_stored(path)
    picked = pick_channel(header, voxels, index)
    with np.errstate(over="ignore"):  # A float64 beyond float32 becomes infinite, which `check` reports.
        return Volume(picked.astype(np.float32, order="C")[None], header.geometry)


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
        wrong = ~(np.isfinite(voxels) & (voxels == np.rint(voxels)))
        if wrong.any():
            place = tuple(int(n) for n in np.argwhere(wrong)[0])
            raise VolumeError(f"{header.path}: a label map holds whole numbers, got {voxels[place]} at voxel {place}")
    elif voxels.dtype.kind == "b":
        voxels = voxels.view(np.uint8)
    return voxels.astype(smallest_type(int(voxels.min()), int(voxels.max())), order="C")


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


def read_file(manifest: Manifest, file: ImageFile) -> Volume:
    """Read the image that a manifest names."""
    return read_image(manifest.path_of(file), file.index)


def read_case_images(manifest: Manifest, case: Case) -> dict[str, Volume]:
    """Read a case's channels, each on its own grid, in the manifest's order; those the case lacks are left out."""
    return {name: read_file(manifest, case.images[name]) for name in manifest.channels if name in case.images}


def read_case_label(manifest: Manifest, case: Case, images: Mapping[str, Volume]) -> Volume | None:
    """Read a case's label; None where it has none.

    It takes over the grid of the first image whose corners lie within a tenth of a voxel of its own, since headers are
    rounded; where there is none it keeps its own.
    """
    if case.label is None:
        return None
    label = read_label(manifest.path_of(case.label), case.label.index)
    grids = (image.geometry for image in images.values())
    return replace(label, geometry=next((grid for grid in grids if grid.matches(label.geometry)), label.geometry))


def write_label(
    path: Path, label: Volume, *, header_of: Path | None = None, names: Mapping[str, int] | None = None
) -> None:
    """Write a label map atomically, in the smallest integer type.

    Args:
        path: the file to write, .nii.gz as a rule; the suffix decides the format.
        label: (X, Y, Z) integers.
        header_of: the image that was segmented: if it is NIfTI, the label map gets its very affines, codes and units.
        names: label name -> value, kept as JSON in a comment of the NIfTI header.

    Raises:
        ValueError: the label does not lie on the grid of `header_of`.
    """
    header = read_header(header_of) if header_of else None
    if header and not header.geometry.matches(label.geometry, 1e-3):
        raise ValueError(f"the label's grid {label.geometry} is not that of {header_of}, {header.geometry}")
    array = label.array.astype(smallest_type(int(label.array.min()), int(label.array.max())), copy=False)
    _write(path, array, label.geometry, _nifti_header(array, label.geometry, header), names or {})


def write_image(path: Path, image: Volume) -> None:
    """Write an image (C, X, Y, Z) atomically: 3-D for one channel, 4-D for more; the suffix decides the format."""
    array = image.array[0] if len(image.array) == 1 else np.moveaxis(image.array, 0, -1)
    _write(path, array, image.geometry, _nifti_header(array, image.geometry, None), {})


def _nifti_header(array: Array, geometry: Geometry, like: Header | None) -> Any:
    """Return a NIfTI header: with the place, codes and units of `like`, where that is NIfTI, else the grid's affine."""
    if like is None or like.nifti is None:
        made = nib.Nifti1Header()
        made.set_data_shape(array.shape)
        made.set_qform(geometry.affine, code=1)
        made.set_sform(geometry.affine, code=1)
        made.set_xyzt_units("mm")
    else:
        made = type(like.nifti)()  # Little-endian, whatever the other's is.
        made.set_data_shape(array.shape)
        for field in _PLACE_FIELDS:
            made[field] = like.nifti[field]
        made["pixdim"][:4] = like.nifti["pixdim"][:4]
    made.set_data_dtype(array.dtype)
    made.set_slope_inter(1, 0)
    return made


def _write(path: Path, array: Array, geometry: Geometry, nifti: Any, names: Mapping[str, int]) -> None:
    """Write voxels (X, Y, Z) or (X, Y, Z, N) atomically in the format of the suffix."""
    if names:
        nifti.extensions.append(Nifti1Extension(_COMMENT, json.dumps({"labels": dict(names)}).encode()))
    with atomic_path(path) as temporary:
        if path.name.lower().endswith(_ITK_WRITTEN):
            _write_itk(temporary, array, geometry)
        elif path.name.lower().endswith((".nii", ".nii.gz")):
            image = nib.Nifti2Image if isinstance(nifti, nib.Nifti2Header) else nib.Nifti1Image
            # Without an affine of its own, nibabel leaves the header's fields and codes as they are.
            image(array, None, nifti).to_filename(temporary)
        else:
            raise VolumeError(f"{path}: unknown format; write .nii.gz, .nii, {', '.join(_ITK_WRITTEN)}")


def _write_itk(path: Path, array: Array, geometry: Geometry) -> None:
    """Write voxels through SimpleITK, in its LPS millimetres."""
    import SimpleITK as sitk

    affine = LPS_TO_RAS @ geometry.affine
    image = sitk.GetImageFromArray(array.transpose()) if array.ndim == 3 else _itk_vector(array)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetSpacing(geometry.spacing_mm)
    image.SetDirection((affine[:3, :3] / geometry.spacing_mm).ravel().tolist())
    sitk.WriteImage(image, str(path), True)


def _itk_vector(array: Array) -> Any:
    """Return (X, Y, Z, N) voxels as an ITK image with N components a voxel."""
    import SimpleITK as sitk

    return sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0, 3)), isVector=True)
