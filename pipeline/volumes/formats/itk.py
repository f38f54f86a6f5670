"""NRRD and MetaImage files, read and written by SimpleITK; its LPS millimetres become RAS+ here, and back."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import VolumeError
from pipeline.volumes.formats.header import Header, volume_shape
from pipeline.volumes.formats.layout import Array
from pipeline.volumes.formats.streams import LARGEST_RATIO, bytes_of, reading

ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # It is its own inverse.

# How MetaImage and NRRD headers name a file of their own for the voxels.
_VOXEL_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file\s*:)\s*(\S.*?)\s*$", re.IGNORECASE | re.MULTILINE)
_LONGEST_ITK_HEADER = 2**16
# Their counts, which ITK takes on trust: -1 axes end the process, and a header may promise more voxels than any memory.
_AXES = re.compile(rb"^\s*(?:NDims|dimension)\s*[=:](.*)$", re.MULTILINE)
_SIZES = re.compile(rb"^\s*(?:DimSize|sizes)\s*[=:](.*)$", re.MULTILINE)
_COMPONENTS = re.compile(rb"^\s*ElementNumberOfChannels\s*[=:](.*)$", re.MULTILINE)
_PACKED = re.compile(rb"^\s*(?:CompressedData\s*[=:]\s*[tT1]|encoding\s*:\s*(?:gz|bz))", re.MULTILINE)
_COUNT = re.compile(rb"0*[1-9][0-9]{0,8}")
# Beyond a field's own buffer; comments and key:=value lines have none.
_LONG_WORD = re.compile(rb"^(?!#|[^\n]*:=)[^\n]*?[^\s]{250}", re.MULTILINE)
_MOST_AXES = 10  # That MetaImage has room for.


def is_itk(path: Path) -> bool:
    """Tell whether a file is read by SimpleITK."""
    return path.name.lower().endswith(ITK_SUFFIXES)


def voxel_file(path: Path) -> Path | None:
    """Return the file that a NRRD or MetaImage header names for its voxels; None where they stand behind the header."""
    found = _VOXEL_FILE.search(_text_of(path))
    name = found.group(1).decode(errors="replace") if found else "LOCAL"
    if name.upper() == "LOCAL":
        return None
    if name.upper().startswith("LIST") or "%" in name:
        raise VolumeError(f"{path}: its voxels stand in several files ({name}); write it as one .nrrd, .mha or .nii.gz")
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise VolumeError(f"{path}: names voxels outside its own folder ({name!r}); put both files into one folder")
    return path.parent / name


def path_for_itk(path: Path) -> str:
    """Return a path as SimpleITK takes it: one whose bytes are no UTF-8 would end the process.

    Raises:
        VolumeError: it is such a one.
    """
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise VolumeError(f"{path}: ITK takes no path that is not UTF-8; rename it, or convert it to NIfTI") from None
    return text


def _text_of(path: Path) -> bytes:
    """Return the lines of a header, without the voxels that may stand behind it."""
    header = bytes_of(path, _LONGEST_ITK_HEADER).replace(b"\r\n", b"\n")
    if path.suffix.lower() in (".nrrd", ".nhdr"):
        return header.split(b"\n\n", 1)[0]
    last = _VOXEL_FILE.search(header)
    return header[: last.end()] if last else header


def _refuse_counts(path: Path) -> None:
    """Refuse a header whose counts make no sense, or promise more voxels than its file can hold."""
    text = _text_of(path)
    if _LONG_WORD.search(text):
        raise VolumeError(f"{path}: cannot be read: a word of its header is longer than any name or number")
    axes, sizes = _counts(path, text, _AXES, "axes"), _counts(path, text, _SIZES, "voxels an axis")
    components = _counts(path, text, _COMPONENTS, "channels") if _COMPONENTS.search(text) else [1]
    if len(axes) != 1 or len(components) != 1 or axes[0] > _MOST_AXES or len(sizes) != axes[0]:
        raise VolumeError(f"{path}: cannot be read: its header gives {axes} axes and {sizes} voxels along them")
    promised = math.prod([*sizes, *components])  # of a byte each at least
    with reading(path):
        held = (voxel_file(path) or path).stat().st_size * (LARGEST_RATIO if _PACKED.search(text) else 1)
    if promised > held:
        raise VolumeError(
            f"{path}: is cut short: its header promises {promised} voxels, its file holds {held} bytes at most;"
            " copy it again"
        )


def _counts(path: Path, text: bytes, pattern: re.Pattern[bytes], what: str) -> list[int]:
    """Return the whole numbers from 1 that a header says under a key."""
    said = pattern.findall(text)
    words = said[0].split() if len(said) == 1 else []
    if not words or not all(_COUNT.fullmatch(word) for word in words):
        got = b", ".join(said).decode(errors="replace").strip()
        raise VolumeError(f"{path}: cannot be read: its header gives {got[:80]!r} as the number of {what}")
    return [int(word) for word in words]


def read_itk_header(path: Path) -> Header:
    """Read a file's header, no voxels."""
    return _header_of(path, _itk_reader(path))


def read_itk_image(path: Path) -> tuple[Header, Any]:
    """Read a file by SimpleITK."""
    reader = _itk_reader(path)
    header = _header_of(path, reader)
    try:
        return header, reader.Execute()
    except RuntimeError as error:
        raise VolumeError(f"{path}: cannot be read: {_itk_reason(error)}") from None


def itk_voxels(header: Header, image: Any) -> Array:
    """Return a view of an image's voxels in the order of the header's shape; it lives as long as the image."""
    import SimpleITK as sitk

    voxels = sitk.GetArrayViewFromImage(image)  # ([N,] Z, Y, X[, components])
    if image.GetNumberOfComponentsPerPixel() > 1:
        voxels = np.moveaxis(voxels, -1, 0)
    ordered: Array = voxels.transpose().reshape(header.shape, order="F")
    return ordered


def _itk_reader(path: Path) -> Any:
    """Return SimpleITK's reader with the file's information read."""
    import SimpleITK as sitk

    _refuse_counts(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(path_for_itk(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise VolumeError(f"{path}: cannot be read: {_itk_reason(error)}") from None
    return reader


def _header_of(path: Path, reader: Any) -> Header:
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
        shape=volume_shape(path, shape if axes >= 3 else shape[:-1]),
        dtype=np.dtype(object),
        kind="colour" if colour else "complex" if "complex" in name else "scalar",
        affine=LPS_TO_RAS @ affine,
        spacing_mm=spacing,
    )


def _itk_reason(error: RuntimeError) -> str:
    """Return the last line of an ITK error: the part that says why."""
    return str(error).strip().splitlines()[-1].strip()
