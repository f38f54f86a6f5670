"""Writing label maps, with their image's own header codes, and images; atomically, in the format of the suffix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Extension

from pipeline.errors import VolumeError
from pipeline.geometry import Geometry
from pipeline.records import atomic_path
from pipeline.volumes.stored import LPS_TO_RAS, Array, Header, read_header
from pipeline.volumes.volume import Volume, smallest_type

# What places a NIfTI volume in space, beside pixdim.
_PLACE_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)
# Those of ITK's formats that are one file: of two files the second would keep its temporary name.
_ITK_WRITTEN = (".nrrd", ".mha")
_COMMENT = 6  # NIfTI's registered code of an extension that is free text.


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
