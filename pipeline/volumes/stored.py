"""A volume's file as it is stored: the header and voxels of NIfTI (by nibabel), NRRD and MetaImage (by SimpleITK).

ITK's LPS millimetres become RAS+ here. A file that cannot be taken as scalar volumes on a rectangular grid is refused
by name, with the reason.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from pipeline.errors import GeometryError, VolumeError
from pipeline.geometry import FloatArray, Geometry
from pipeline.records import digest_of

Array = NDArray[Any]

NIFTI_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES

# Axes this far from square (a cosine) are rounding of the header's float32; beyond it the grid is sheared.
LARGEST_SHEAR = 1e-3

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # It is its own inverse.

# How MetaImage and NRRD headers name a file of their own for the voxels.
_VOXEL_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file\s*:)\s*(\S.*?)\s*$", re.IGNORECASE | re.MULTILINE)
_LONGEST_ITK_HEADER = 2**16

_NIFTI_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_LONGEST_HEADER = max(_NIFTI_HEADERS)


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

    @property
    def geometry(self) -> Geometry:
        """The grid.

        Raises:
            GeometryError: the spacing is not above 0, or the affine is not finite, singular or sheared.
        """
        if not all(step > 0 for step in self.spacing_mm):
            raise GeometryError(f"{self.path}: the spacing must be above 0 mm on each axis, got {self.spacing_mm}")
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
    if _is_itk(path):
        return _itk_header(path, _itk_reader(path))
    return _nifti_header(path, _start_of(_pair_of(path)[0]))


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
    if _is_itk(path):
        reader = _itk_reader(path)
        header = _itk_header(path, reader)
        return header, _itk_voxels(header, reader)
    header_path, voxel_path = _pair_of(path)
    if header_path != voxel_path:
        header = _nifti_header(path, _start_of(header_path))
        stored = _unpack(voxel_path, bytes_of(voxel_path))
    else:
        stored = _unpack(path, bytes_of(path) if content is None else content)
        header = _nifti_header(path, stored[:_LONGEST_HEADER])
    return header, _nifti_voxels(header, stored, 0 if header_path != voxel_path else 352)


def pick_channel(header: Header, voxels: Array, index: int | None) -> Array:
    """Return one volume (X, Y, Z) of a file's voxels, by its position on the fourth axis.

    Raises:
        VolumeError: the file holds colours or complex numbers, has several volumes and no index was given, or the index
            is beyond them.
    """
    if header.kind != "scalar":
        raise VolumeError(
            f"{header.path}: holds {header.kind} voxels, one real number a voxel is needed; convert it to a grey image"
        )
    count = header.shape[3] if len(header.shape) == 4 else 1
    if index is None and count > 1:
        raise VolumeError(
            f"{header.path}: holds {count} volumes in shape {header.shape}; say which by 'index' in the manifest"
        )
    if (index or 0) >= count:
        raise VolumeError(f"{header.path}: index {index} is beyond its {count} volumes (0 to {count - 1})")
    return voxels[..., index or 0] if voxels.ndim == 4 else voxels


def _kind_of(dtype: np.dtype[Any]) -> Literal["scalar", "colour", "complex"]:
    """Say what a voxel is; RGB is a structure of bytes."""
    return "colour" if dtype.fields else "complex" if dtype.kind == "c" else "scalar"


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files that a volume's name stands for: two for a NIfTI pair or a header that names its voxels' file.

    Raises:
        VolumeError: the header cannot be read, or names several files, or one outside its own folder.
    """
    if not _is_itk(path):
        return tuple(dict.fromkeys(_pair_of(path)))
    named = _voxel_file(path)
    return (path,) if named is None else (path, named)


def content_digest(path: Path, content: bytes | None = None) -> str:
    """Return the SHA-256 hex digest of a volume: of its file's bytes, or of the digests of its several files.

    Args:
        path: the file that names the volume.
        content: its bytes, where they have been read already.

    Raises:
        VolumeError: a file cannot be read.
    """
    digests = [
        hashlib.sha256(content if content is not None and file == path else bytes_of(file)).hexdigest()
        for file in files_of(path)
    ]
    return digests[0] if len(digests) == 1 else digest_of(digests)


def _voxel_file(path: Path) -> Path | None:
    """Return the file that a NRRD or MetaImage header names for its voxels; None where they stand behind the header."""
    header = bytes_of(path, _LONGEST_ITK_HEADER)
    if path.suffix.lower() in (".nrrd", ".nhdr"):
        header = header.replace(b"\r\n", b"\n").split(b"\n\n", 1)[0]
    found = _VOXEL_FILE.search(header)
    name = found.group(1).decode(errors="replace") if found else "LOCAL"
    if name.upper() == "LOCAL":
        return None
    if name.upper().startswith("LIST") or "%" in name:
        raise VolumeError(f"{path}: its voxels stand in several files ({name}); write it as one .nrrd, .mha or .nii.gz")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise VolumeError(f"{path}: names voxels outside its own folder ({name}); put both files into one folder")
    return path.parent / name


def bytes_of(path: Path, count: int = -1) -> bytes:
    """Return a file's bytes, or its first `count`.

    Raises:
        VolumeError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror})") from error


def _start_of(path: Path) -> bytes:
    """Return a NIfTI header's bytes, unpacked."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            return gzip.GzipFile(fileobj=file).read(_LONGEST_HEADER) if packed else file.read(_LONGEST_HEADER)
    except (EOFError, zlib.error) as error:
        raise VolumeError(f"{path}: is cut short or damaged ({error}); copy it again") from error
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror or error})") from error


def _unpack(path: Path, content: bytes) -> bytes:
    """Return the bytes unpacked where they are gzip, whatever the name says."""
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise VolumeError(f"{path}: is cut short or damaged ({error}); copy it again") from error


def _pair_of(path: Path) -> tuple[Path, Path]:
    """Return the files of header and voxels: one and the same but for a .hdr/.img pair."""
    packed = ".gz" if path.name.lower().endswith(".gz") else ""
    bare = path.with_suffix("") if packed else path
    if bare.suffix.lower() not in (".hdr", ".img"):
        return path, path
    return bare.with_suffix(".hdr" + packed), bare.with_suffix(".img" + packed)


def _nifti_header(path: Path, start: bytes) -> Header:
    """Interpret the first bytes of a NIfTI file."""
    order = next((o for o in ("little", "big") if int.from_bytes(start[:4], o) in _NIFTI_HEADERS), None)
    size = int.from_bytes(start[:4], order) if order else 0  # type: ignore[arg-type]
    if order is None or len(start) < size:
        raise VolumeError(f"{path}: is not NIfTI, or cut short: {len(start)} bytes are no header")
    try:
        nifti = _NIFTI_HEADERS[size](start[:size], endianness=order, check=False)
        dtype, shape = nifti.get_data_dtype(), tuple(int(n) for n in nifti.get_data_shape())
    except (HeaderDataError, KeyError, ValueError) as error:
        raise VolumeError(f"{path}: its NIfTI header makes no sense: {error}") from error
    if bytes(nifti["magic"])[:3] not in (b"n+1", b"ni1", b"n+2", b"ni2"):
        raise VolumeError(f"{path}: is Analyze 7.5, which does not say left from right; convert it to NIfTI")
    if nifti["pixdim"][0] != -1:
        nifti["pixdim"][0] = 1  # The standard: the third axis is flipped for -1 only; nibabel takes 1 and -1.
    affine, notes = _chosen_affine(nifti)
    return Header(
        path=path,
        shape=_volume_shape(path, shape),
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
    )


def _volume_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return three axes, or four where several volumes stand in the file; refuse anything else."""
    kept = shape[:3] + tuple(n for n in shape[3:] if n != 1)
    if not 3 <= len(kept) <= 4 or min(kept) < 1:
        raise VolumeError(
            f"{path}: a volume has three axes, or four with several volumes in the file; got shape {shape}"
        )
    return kept


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


def _nifti_voxels(header: Header, stored: bytes, least_offset: int) -> Array:
    """Return a NIfTI file's voxels, scaled where the header says so."""
    offset = max(int(header.nifti["vox_offset"]), least_offset)
    count = int(np.prod(header.shape, dtype=np.int64))
    wanted = count * header.dtype.itemsize
    if len(stored) - offset < wanted:
        got = max(0, len(stored) - offset)
        raise VolumeError(
            f"{header.path}: is cut short: {got} bytes of voxels, its header promises {wanted}; copy it again"
        )
    voxels = np.frombuffer(stored, header.dtype, count, offset).reshape(header.shape, order="F")
    slope, intercept = header.nifti.get_slope_inter()
    if slope is None or (slope, intercept) == (1, 0) or header.kind != "scalar":
        return voxels
    scaled: Array = voxels * np.float64(slope) + np.float64(intercept)
    return scaled


def _is_itk(path: Path) -> bool:
    """Tell whether a file is read by SimpleITK."""
    return path.name.lower().endswith(ITK_SUFFIXES)


def _itk_reader(path: Path) -> Any:
    """Return SimpleITK's reader with the file's information read."""
    import SimpleITK as sitk

    files_of(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise VolumeError(f"{path}: cannot be read: {_itk_reason(error)}") from None
    return reader


def _itk_header(path: Path, reader: Any) -> Header:
    """Interpret SimpleITK's image information; components of a vector count as volumes of one file."""
    import SimpleITK as sitk

    spacing, axes = reader.GetSpacing()[:3], reader.GetDimension()
    direction = np.array(reader.GetDirection()).reshape(axes, axes)
    shape = (*reader.GetSize(), reader.GetNumberOfComponents())
    name = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    affine = np.eye(4)
    if axes >= 3:
        affine[:3, :3], affine[:3, 3] = direction[:3, :3] * spacing, reader.GetOrigin()[:3]
    colour = reader.GetNumberOfComponents() in (3, 4) and "8-bit unsigned" in name
    return Header(
        path=path,
        shape=_volume_shape(path, shape if axes >= 3 else shape[:-1]),
        dtype=np.dtype(object),
        kind="colour" if colour else "complex" if "complex" in name else "scalar",
        affine=LPS_TO_RAS @ affine,
        spacing_mm=spacing,
    )


def _itk_voxels(header: Header, reader: Any) -> Array:
    """Return the voxels in the order of the header's shape."""
    import SimpleITK as sitk

    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise VolumeError(f"{header.path}: cannot be read: {_itk_reason(error)}") from None
    voxels = sitk.GetArrayFromImage(image)  # ([N,] Z, Y, X[, components])
    if image.GetNumberOfComponentsPerPixel() > 1:
        voxels = np.moveaxis(voxels, -1, 0)
    ordered: Array = voxels.transpose().reshape(header.shape, order="F")
    return ordered


def _itk_reason(error: RuntimeError) -> str:
    """Return the last line of an ITK error: the part that says why."""
    return str(error).strip().splitlines()[-1].strip()
