"""NRRD and MetaImage files, read and written by SimpleITK; its LPS millimetres become RAS+ here, and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import VolumeError
from pipeline.volumes.formats.header import Header, volume_shape
from pipeline.volumes.formats.layout import Array
from pipeline.volumes.formats.streams import bytes_of

ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # It is its own inverse.

# How MetaImage and NRRD headers name a file of their own for the voxels.
_VOXEL_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file\s*:)\s*(\S.*?)\s*$", re.IGNORECASE | re.MULTILINE)
_LONGEST_ITK_HEADER = 2**16


def is_itk(path: Path) -> bool:
    """Tell whether a file is read by SimpleITK."""
    return path.name.lower().endswith(ITK_SUFFIXES)


def voxel_file(path: Path) -> Path | None:
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

    voxel_file(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
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
