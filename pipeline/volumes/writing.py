"""Writing label maps, with their image's own header codes, and images; atomically, in the format of the suffix."""

from __future__ import annotations

import errno
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Extension
from numpy.typing import DTypeLike

from pipeline.errors import VolumeError
from pipeline.geometry import Geometry
from pipeline.records import atomic_path
from pipeline.volumes.formats.itk import LPS_TO_RAS, path_for_itk
from pipeline.volumes.formats.layout import Array, in_file_order, plane_slices
from pipeline.volumes.formats.streams import write_gzip
from pipeline.volumes.label_tables import label_colours
from pipeline.volumes.stored import read_header
from pipeline.volumes.volume import Volume, smallest_type

# What places a NIfTI volume in space, beside pixdim.
_PLACE_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)
# Those of ITK's formats that are one file: of two files the second would keep its temporary name.
_ITK_WRITTEN = (".nrrd", ".mha")
_COMMENT = 6  # NIfTI's registered code of an extension that is free text.
_LONGEST_NIFTI1_AXIS = 2**15 - 1
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_label(
    path: Path, label: Volume, *, header_of: Path | None = None, names: Mapping[str, int] | None = None
) -> None:
    """Write a label map atomically, in the smallest integer type.

    Args:
        path: the file to write, .nii.gz as a rule; the suffix decides the format.
        label: (X, Y, Z) integers.
        header_of: the image that was segmented: if it is NIfTI, the label map gets its very affines, codes and units.
        names: label name -> value, by class index; kept with their colours as JSON in a comment of the NIfTI header.

    Raises:
        ValueError: the label does not lie on the grid of `header_of`.
        OSError: the file cannot be written, the disk being full or another reason; nothing is left of it.
    """
    array = label.array.astype(smallest_type(int(label.array.min()), int(label.array.max())), copy=False)
    comment = {"labels": dict(names), "colours": label_colours(names)} if names else None
    nifti = nifti_header(array.shape, array.dtype, label.geometry, header_of=header_of, comment=comment)
    _write(path, array, label.geometry, nifti)


def write_image(path: Path, image: Volume) -> None:
    """Write an image (C, X, Y, Z) atomically: 3-D for one channel, 4-D for more; the suffix decides the format."""
    array = image.array[0] if len(image.array) == 1 else np.moveaxis(image.array, 0, -1)
    _write(path, array, image.geometry, nifti_header(array.shape, array.dtype, image.geometry))


def nifti_header(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    geometry: Geometry,
    *,
    header_of: Path | None = None,
    comment: Mapping[str, Any] | None = None,
) -> Any:
    """Return a NIfTI header.

    Args:
        shape: (X, Y, Z), or (X, Y, Z, N).
        dtype: of the voxels.
        geometry: of each volume.
        header_of: an image on the same grid: if it is NIfTI, its very affines, codes and units are taken.
        comment: kept as JSON in an extension of free text.

    Raises:
        ValueError: the geometry is not that of `header_of`.
    """
    like = read_header(header_of) if header_of else None
    if like and not like.geometry.matches(geometry, 1e-3):
        raise ValueError(f"the grid {geometry} is not that of {header_of}, {like.geometry}")
    if like is None or like.nifti is None:
        made = nib.Nifti1Header() if max(shape) <= _LONGEST_NIFTI1_AXIS else nib.Nifti2Header()
        made.set_data_shape(shape)
        made.set_qform(geometry.affine, code=1)
        made.set_sform(geometry.affine, code=1)
        made.set_xyzt_units("mm")
    else:
        made = type(like.nifti)()  # Little-endian, whatever the other's is.
        made.set_data_shape(shape)
        for field in _PLACE_FIELDS:
            made[field] = like.nifti[field]
        made["pixdim"][:4] = like.nifti["pixdim"][:4]
    made.set_data_dtype(dtype)
    made.set_slope_inter(1, 0)
    if comment:
        made.extensions.append(Nifti1Extension(_COMMENT, json.dumps(dict(comment)).encode()))
    return made


def write_nifti(path: Path, nifti: Any, voxels: Iterable[Callable[[], memoryview]]) -> None:
    """Write a NIfTI file atomically, piece by piece.

    Args:
        path: the file to write, .nii.gz or .nii.
        nifti: its header.
        voxels: each makes some of the bytes of the voxels, in the file's order; called in threads.

    Raises:
        OSError: the file cannot be written, the disk being full or another reason; nothing is left of it.
    """
    header: Callable[[], memoryview] = partial(_header_bytes, nifti)
    pieces = itertools.chain([header], voxels)
    with writing(path), atomic_path(path) as temporary, temporary.open("wb") as file:
        if path.name.lower().endswith(".gz"):
            write_gzip(file, pieces)
        else:
            for piece in pieces:
                file.write(piece())


def packed_nifti(volume: Volume, scaling: tuple[float, float] = (1, 0)) -> bytes:
    """Return a volume (X, Y, Z) as the bytes of a .nii.gz file.

    Args:
        volume: of a type that NIfTI knows.
        scaling: slope and intercept from the voxels to what they stand for.
    """
    nifti = nifti_header(volume.array.shape, volume.array.dtype, volume.geometry)
    nifti.set_slope_inter(*scaling)
    content = io.BytesIO()
    write_gzip(content, [partial(_header_bytes, nifti), *_voxel_pieces(volume.array)])
    return content.getvalue()


def _write(path: Path, array: Array, geometry: Geometry, nifti: Any) -> None:
    """Write voxels (X, Y, Z) or (X, Y, Z, N) atomically in the format of the suffix."""
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        write_nifti(path, nifti, _voxel_pieces(array))
    elif name.endswith(_ITK_WRITTEN):
        with writing(path), atomic_path(path) as temporary:
            _write_itk(temporary, array, geometry)
    else:
        raise VolumeError(f"{path}: unknown format; write .nii.gz, .nii, {', '.join(_ITK_WRITTEN)}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file could not be written, and why."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full; make room and run it again" if error.errno in _DISK_FULL else error.strerror
        raise OSError(error.errno, f"{path}: could not be written: {reason or error}") from error


def _header_bytes(nifti: Any) -> memoryview:
    """Return the bytes of a NIfTI file before its voxels."""
    start = io.BytesIO()
    nifti.write_to(start)
    return start.getbuffer()


def _voxel_pieces(array: Array) -> Iterator[Callable[[], memoryview]]:
    """Yield what makes the bytes of each run of planes of a NIfTI file, x fastest."""
    for volume in [array] if array.ndim == 3 else np.moveaxis(array, 3, 0):
        for planes in plane_slices(volume.shape, volume.itemsize):
            yield partial(in_file_order, volume[..., planes])


def _write_itk(path: Path, array: Array, geometry: Geometry) -> None:
    """Write voxels through SimpleITK, in its LPS millimetres."""
    import SimpleITK as sitk

    affine = LPS_TO_RAS @ geometry.affine
    image = sitk.GetImageFromArray(array.transpose()) if array.ndim == 3 else _itk_vector(array)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetSpacing(geometry.spacing_mm)
    image.SetDirection((affine[:3, :3] / geometry.spacing_mm).ravel().tolist())
    try:
        sitk.WriteImage(image, path_for_itk(path), True)
    except RuntimeError as error:
        raise OSError(errno.EIO, str(error).strip().splitlines()[-1].strip()) from error


def _itk_vector(array: Array) -> Any:
    """Return (X, Y, Z, N) voxels as an ITK image with N components a voxel."""
    import SimpleITK as sitk

    return sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0, 3)), isVector=True)
