"""NIfTI-1 and NIfTI-2 files and .hdr/.img pairs, of either byte order, packed or not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from pipeline.errors import VolumeError
from pipeline.geometry import FloatArray
from pipeline.volumes.formats.header import Header, volume_shape
from pipeline.volumes.formats.layout import Array, bytes_in_order
from pipeline.volumes.formats.streams import reading, unpacked

_NIFTI_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_LONGEST_HEADER = max(_NIFTI_HEADERS)
_LEAST_OFFSET = 352  # Of the voxels in a NIfTI-1 file: its header and four bytes that announce extensions.
_CHUNK_BYTES = 2**20
_MOST_BEFORE, _MOST_BEHIND = 2**28, 2**24  # Bytes of extensions before the voxels, and of anything behind them.


def pair_of(path: Path) -> tuple[Path, Path]:
    """Return the files of header and voxels: one and the same but for a .hdr/.img pair."""
    packed = ".gz" if path.name.lower().endswith(".gz") else ""
    bare = path.with_suffix("") if packed else path
    if bare.suffix.lower() not in (".hdr", ".img"):
        return path, path
    return bare.with_suffix(".hdr" + packed), bare.with_suffix(".img" + packed)


def read_nifti_header(path: Path) -> Header:
    """Read a file's header, no voxels."""
    return _header_of(path, _start_of(pair_of(path)[0]))


def _start_of(path: Path) -> bytes:
    """Return a NIfTI header's bytes, unpacked."""
    with reading(path), unpacked(path) as (stream, _):
        return stream.read(_LONGEST_HEADER)


@contextmanager
def open_nifti(path: Path, content: bytes | None = None) -> Iterator[tuple[Header, BinaryIO]]:
    """Open a NIfTI file or pair at its first voxel, with its header; at the end it is read to its end."""
    header_path, voxel_path = pair_of(path)
    apart = read_nifti_header(path) if header_path != voxel_path else None
    with reading(voxel_path), unpacked(voxel_path, None if apart else content) as (stream, size):
        header = apart or _header_of(path, stream.read(_LONGEST_HEADER))
        offset = max(_offset_of(header), 0 if apart else _LEAST_OFFSET)
        wanted = math.prod(header.shape) * header.dtype.itemsize
        # Before memory is taken: a header may promise anything.
        if size - offset < wanted:
            raise _cut_short(header, max(0, size - offset), wanted)
        stream.seek(offset)
        yield header, stream
        _read_to_the_end(header, stream, offset + wanted)


def read_voxels(header: Header, stream: BinaryIO, shape: tuple[int, ...]) -> Array:
    """Read the next voxels of a NIfTI file as they are stored, x fastest."""
    voxels = np.empty(shape, header.dtype, order="F")
    place = bytes_in_order(voxels.T)
    got = 0
    while got < len(place):
        count = stream.readinto(place[got : got + _CHUNK_BYTES])  # type: ignore[attr-defined]
        if not count:
            raise _cut_short(header, got, len(place))
        got += count
    return voxels


def _read_to_the_end(header: Header, stream: BinaryIO, end: int) -> None:
    """Read what is left: the checksum of a gzip file is only compared at its end."""
    while stream.read(_CHUNK_BYTES):
        # A few bytes more are some programs' habit; a small file may unpack to more than any disk holds.
        if stream.tell() > end + _MOST_BEHIND:
            raise VolumeError(f"{header.path}: holds more than the {end} bytes that its header promises; copy it again")


def scaled_voxels(header: Header, voxels: Array) -> Array:
    """Return voxels in the units that the header's slope and intercept say."""
    slope, intercept = header.scaling
    if (slope, intercept) == (1, 0) or header.kind != "scalar":
        return voxels
    with np.errstate(all="ignore"):  # What is not finite is a value like another, for `check` to find.
        scaled: Array = voxels * np.float64(slope) + np.float64(intercept)
    return scaled


def _cut_short(header: Header, got: int, wanted: int) -> VolumeError:
    """Return the error of a file that holds less than its header promises."""
    return VolumeError(
        f"{header.path}: is cut short: {got} bytes of voxels, its header promises {wanted}; copy it again"
    )


def _offset_of(header: Header) -> int:
    """Return where the header says that the voxels begin."""
    offset = float(header.nifti["vox_offset"])
    if not math.isfinite(offset) or offset > _MOST_BEFORE:
        raise VolumeError(f"{header.path}: its NIfTI header makes no sense: the voxels begin at byte {offset}")
    return int(offset)


@np.errstate(all="ignore")  # What is not finite is judged with the grid, what is out of bounds with the shape.
def _header_of(path: Path, start: bytes) -> Header:
    """Interpret the first bytes of a NIfTI file."""
    order = next((o for o in ("little", "big") if int.from_bytes(start[:4], o) in _NIFTI_HEADERS), None)
    size = int.from_bytes(start[:4], order) if order else 0  # type: ignore[arg-type]
    if order is None or len(start) < size:
        raise VolumeError(f"{path}: is not NIfTI, or cut short: {len(start)} bytes are no header")
    try:
        nifti = _NIFTI_HEADERS[size](start[:size], endianness=order, check=False)
        dtype, shape = nifti.get_data_dtype(), tuple(int(n) for n in nifti.get_data_shape())
        slope, intercept = nifti.get_slope_inter()
    except (HeaderDataError, KeyError, ValueError) as error:
        raise VolumeError(f"{path}: its NIfTI header makes no sense: {error}") from error
    if dtype.kind not in "biufc" and not dtype.fields:
        raise VolumeError(f"{path}: its NIfTI header says no type of voxel (datatype {int(nifti['datatype'])})")
    if bytes(nifti["magic"])[:3] not in (b"n+1", b"ni1", b"n+2", b"ni2"):
        raise VolumeError(f"{path}: is Analyze 7.5, which does not say left from right; convert it to NIfTI")
    if nifti["pixdim"][0] != -1:
        nifti["pixdim"][0] = 1  # The standard: the third axis is flipped for -1 only; nibabel takes 1 and -1.
    affine, notes = _chosen_affine(nifti)
    return Header(
        path=path,
        shape=volume_shape(path, shape),
        dtype=dtype,
        kind=_kind_of(dtype),
        affine=affine,
        spacing_mm=tuple(float(step) for step in nifti["pixdim"][1:4]),
        qform=_qform(nifti),
        sform=nifti.get_sform(),
        qform_code=int(nifti["qform_code"]),
        sform_code=int(nifti["sform_code"]),
        notes=notes,
        nifti=nifti,
        scaling=(1.0, 0.0) if slope is None else (slope, intercept),
    )


def _qform(nifti: Any) -> FloatArray:
    """Return the quaternion's affine; not a number where the quaternion is no rotation."""
    try:
        affine: FloatArray = nifti.get_qform()
    except (HeaderDataError, ValueError):
        affine = np.full((4, 4), np.nan)
    return affine


def _chosen_affine(nifti: Any) -> tuple[FloatArray, tuple[str, ...]]:
    """Return the affine that the codes choose, and what had to be assumed."""
    if nifti["sform_code"] > 0:
        return nifti.get_sform(), ()
    if nifti["qform_code"] > 0:
        return _qform(nifti), ()
    note = "neither qform nor sform says where it lies: orientation assumed from the voxel size alone (LAS)"
    return nifti.get_base_affine(), (note,)


def _kind_of(dtype: np.dtype[Any]) -> Literal["scalar", "colour", "complex"]:
    """Say what a voxel is; RGB is a structure of bytes."""
    return "colour" if dtype.fields else "complex" if dtype.kind == "c" else "scalar"
