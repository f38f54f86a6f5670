"""Pixels of DICOM files as they are stored, before slope and intercept: plain ones by NumPy, compressed ones by GDCM.

GDCM has rules of its own for slopes, by kind of image; so it gets a file with the pixels' own attributes and nothing
else, neither a slope nor anybody's name, and what comes back is what was compressed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import VolumeError
from pipeline.volumes.dicom.headers import pydicom_quiet
from pipeline.volumes.formats.itk import path_for_itk
from pipeline.volumes.formats.layout import Array
from pipeline.volumes.formats.streams import reading

# PS3.3 C.7.6.3: what a decoder must know of the pixels.
_PIXEL_ATTRIBUTES = (
    *("SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
)
_READ = ("SOPInstanceUID", *_PIXEL_ATTRIBUTES, "PixelData")
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_MULTI_FRAME_CAPTURE = "1.2.840.10008.5.1.4.1.1.7.3"


def stored_frames(path: Path, sop_uid: str) -> Array:
    """Read a file's pixels.

    Args:
        path: the file.
        sop_uid: which the file had when it was found.

    Returns:
        (frames, rows, columns) of integers, of the bits that are stored and no others.

    Raises:
        VolumeError: the file is missing, is cut short, has changed, or is compressed in a way that GDCM does not know.
    """
    with reading(path):
        try:
            content = pydicom_quiet().dcmread(path, specific_tags=list(_READ), force=True)
            uid = content.get("SOPInstanceUID")
            syntax = content.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2")
            shape = (int(content.get("NumberOfFrames") or 1), int(content.Rows), int(content.Columns))
        except OSError:
            raise
        except Exception as error:  # Whatever damage a file has: pydicom raises what it happens upon.
            raise VolumeError(f"{path.name}: is damaged ({type(error).__name__}); copy it again") from None
    if uid != sop_uid:
        raise VolumeError(f"{path.name}: has changed since it was found")
    if "PixelData" not in content:
        raise VolumeError(f"{path.name}: has no pixels, or none of whole numbers; export the series again")
    if content.BitsAllocated not in (8, 16, 32):
        raise VolumeError(f"{path.name}: has pixels of {content.BitsAllocated} bits; 8, 16 and 32 are read")
    stored = _decompressed(path, content, syntax) if syntax.is_compressed else _plain(path, content, syntax, shape)
    if stored.size != np.prod(shape):
        raise VolumeError(f"{path.name}: holds {stored.size} pixels, its header promises {np.prod(shape)}")
    return _significant(stored.reshape(shape), content)


def _plain(path: Path, content: Any, syntax: Any, shape: tuple[int, int, int]) -> Array:
    """Return uncompressed pixels, of all bits that are allocated."""
    dtype = np.dtype(f"{'<' if syntax.is_little_endian else '>'}u{content.BitsAllocated // 8}")
    wanted = int(np.prod(shape)) * dtype.itemsize
    pixels = content.PixelData
    if len(pixels) < wanted:
        raise VolumeError(
            f"{path.name}: is cut short: {len(pixels)} bytes of pixels, its header promises {wanted}; copy it again"
        )
    return np.frombuffer(pixels[:wanted], dtype).astype(dtype.newbyteorder("="), copy=False)


def _decompressed(path: Path, content: Any, syntax: Any) -> Array:
    """Return compressed pixels, of all bits that are allocated."""
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory(prefix="medseg-") as folder:
        bare = Path(folder) / "pixels.dcm"
        _write_bare(bare, content, syntax)
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(path_for_itk(bare))
        try:
            stored: Array = sitk.GetArrayFromImage(reader.Execute())
        except RuntimeError:
            raise VolumeError(
                f"{path.name}: cannot be decompressed from {syntax.name}: damaged, or of a kind that GDCM does not"
                " read; copy it again, or let the archive send it uncompressed"
            ) from None
    if stored.dtype.kind not in "iu" or stored.itemsize * 8 != content.BitsAllocated:
        raise VolumeError(f"{path.name}: decompressed to {stored.dtype}, its header says {content.BitsAllocated} bits")
    return stored.view(f"u{stored.itemsize}")


def _write_bare(path: Path, content: Any, syntax: Any) -> None:
    """Write a file of the compressed pixels and what a decoder must know, and no more."""
    pydicom = pydicom_quiet()
    bare = pydicom.Dataset()
    bare.SOPClassUID = _SECONDARY_CAPTURE if int(content.get("NumberOfFrames") or 1) == 1 else _MULTI_FRAME_CAPTURE
    bare.SOPInstanceUID = pydicom.uid.generate_uid()
    bare.file_meta = pydicom.dataset.FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = syntax
    for tag in _PIXEL_ATTRIBUTES:
        if tag in content:
            bare[tag] = content[tag]
    bare["PixelData"] = content["PixelData"]
    bare["PixelData"].is_undefined_length = True
    bare.save_as(path, enforce_file_format=True)


def _significant(pixels: Array, content: Any) -> Array:
    """Return the bits that are stored, signed where they are: others may hold an overlay, or anything."""
    allocated, signed = content.BitsAllocated, content.get("PixelRepresentation") == 1
    bits = int(content.get("BitsStored") or allocated)
    high = int(content.get("HighBit", bits - 1))
    if bits == allocated:
        return pixels.view(f"i{pixels.itemsize}") if signed else pixels
    # (frames, rows, columns): the sign bit is the highest stored one.
    values: Array = (pixels >> (high + 1 - bits)) & np.array((1 << bits) - 1, pixels.dtype)
    if not signed:
        return values
    sign = 1 << (bits - 1)
    extended: Array = (values.astype(np.int64) ^ sign) - sign
    return extended
