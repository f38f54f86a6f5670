"""A volume's file as it is stored, whatever its format: its name, header, voxels and digest.

`formats/` knows NIfTI, NRRD and MetaImage. A file that cannot be taken as scalar volumes on a rectangular grid is
refused by name, with the reason.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np

from pipeline.errors import VolumeError
from pipeline.records import digest_of, file_digest
from pipeline.volumes.formats.header import Header
from pipeline.volumes.formats.itk import ITK_SUFFIXES, is_itk, itk_voxels, read_itk_header, read_itk_image, voxel_file
from pipeline.volumes.formats.layout import Array, copy_into, in_c_order, plane_slices
from pipeline.volumes.formats.nifti import (
    open_nifti,
    pair_of,
    read_nifti_header,
    read_voxels,
    scaled_voxels,
)
from pipeline.volumes.formats.streams import reading

NIFTI_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz")
SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES


def is_volume(path: Path) -> bool:
    """Tell by its name whether a file is a volume that can be read."""
    return path.name.lower().endswith(SUFFIXES)


def stem_of(path: Path) -> str:
    """Return a file's name without its format's suffix: hippocampus_003 of hippocampus_003.nii.gz."""
    suffix = max((s for s in SUFFIXES if path.name.lower().endswith(s)), key=len, default=path.suffix)
    return path.name.removesuffix(path.name[len(path.name) - len(suffix) :]) if suffix else path.name


def read_header(path: Path) -> Header:
    """Read a file's header, no voxels.

    Raises:
        VolumeError: the file is missing, cut short or of no known format.
    """
    return read_itk_header(path) if is_itk(path) else read_nifti_header(path)


def read_stored(path: Path, content: bytes | None = None) -> tuple[Header, Array]:
    """Read a file once, as it is stored.

    Args:
        path: the file.
        content: the file's bytes, where they have been read already; a NIfTI pair and ITK's formats are read by path.

    Returns:
        Its header, and (X, Y, Z) or (X, Y, Z, N) voxels in the file's own type, scaled where the header says so.

    Raises:
        VolumeError: the file is missing, cut short or of no known format.
    """
    if is_itk(path):
        header, image = read_itk_image(path)
        return header, itk_voxels(header, image).copy(order="K")
    with open_nifti(path, content) as (header, stream):
        voxels = scaled_voxels(header, read_voxels(header, stream, header.shape))
    return header, voxels


def read_scalars(path: Path, index: int | None = None) -> tuple[Header, Array]:
    """Read one volume as real numbers, some planes at a time: beside the result next to nothing is in memory.

    Args:
        path: the file.
        index: position on the fourth axis of a file with several volumes.

    Returns:
        Its header, and (X, Y, Z) float32 in C order, scaled where the header says so; what is beyond float32 becomes
        infinite.

    Raises:
        VolumeError: as `read_stored` and `pick_channel`.
    """
    with np.errstate(all="ignore"):
        if is_itk(path):
            header, image = read_itk_image(path)
            return header, in_c_order(pick_channel(header, itk_voxels(header, image), index), np.dtype(np.float32))
        with open_nifti(path) as (header, stream):
            before = _channel_position(header, index) * math.prod(header.shape[:3])
            stream.seek(before * header.dtype.itemsize, 1)
            scalars = np.empty(header.shape[:3], np.float32)
            for planes in plane_slices(scalars.shape, scalars.itemsize):
                piece = read_voxels(header, stream, (*header.shape[:2], planes.stop - planes.start))
                copy_into(scalars[..., planes], scaled_voxels(header, piece))
    return header, scalars


def pick_channel(header: Header, voxels: Array, index: int | None) -> Array:
    """Return one volume (X, Y, Z) of a file's voxels, by its position on the fourth axis.

    Raises:
        VolumeError: the file holds colours or complex numbers, has several volumes and no index was given, or the index
            is beyond them.
    """
    position = _channel_position(header, index)
    return voxels[..., position] if voxels.ndim == 4 else voxels


def _channel_position(header: Header, index: int | None) -> int:
    """Return which of a file's volumes is meant; refuse what `pick_channel` refuses."""
    if header.kind != "scalar":
        raise VolumeError(
            f"{header.path}: holds {header.kind} voxels, one real number a voxel is needed; convert it to a grey image"
        )
    count = header.shape[3] if len(header.shape) == 4 else 1
    if index is None and count > 1:
        raise VolumeError(
            f"{header.path}: holds {count} volumes in shape {header.shape}; say which by 'index' in a manifest, or by"
            f" {header.path.name}#0 to #{count - 1} in a CSV or on the command line"
        )
    if (index or 0) >= count:
        raise VolumeError(f"{header.path}: index {index} is beyond its {count} volumes (0 to {count - 1})")
    return index or 0


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files that a volume's name stands for: two for a NIfTI pair or a header that names its voxels' file.

    Raises:
        VolumeError: the header cannot be read, or names several files, or one outside its own folder.
    """
    if not is_itk(path):
        return tuple(dict.fromkeys(pair_of(path)))
    named = voxel_file(path)
    return (path,) if named is None else (path, named)


def content_digest(path: Path, content: bytes | None = None) -> str:
    """Return the SHA-256 hex digest of a volume: of its file's bytes, or of the digests of its several files.

    Args:
        path: the file that names the volume.
        content: its bytes, where they have been read already.

    Raises:
        VolumeError: a file cannot be read.
    """
    digests = []
    for file in files_of(path):
        with reading(file):
            read_already = content if file == path else None
            digests.append(file_digest(file) if read_already is None else hashlib.sha256(read_already).hexdigest())
    return digests[0] if len(digests) == 1 else digest_of(digests)
