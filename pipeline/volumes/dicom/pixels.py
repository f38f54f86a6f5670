"""Pixels of DICOM files as they are stored, before slope and intercept: plain ones by NumPy, compressed ones by GDCM.

GDCM has rules of its own for slopes, by kind of image; so it gets a file with the pixels' own attributes and nothing
else, neither a slope nor anybody's name, and what comes back is what was compressed.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
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
_IMPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2"  # What is meant where a file says none.


@dataclass(frozen=True)
class _Pixels:
    """What a file says of its pixels, and they, as bytes.

    Attributes:
        name: of the file, for messages.
        sop_uid: its SOPInstanceUID.
        shape: frames, rows, columns.
        allocated, stored, high, signed: bits of a pixel, of them those stored, the highest of these, and whether it is
            a sign.
        syntax, compressed: pydicom's transfer syntax, and whether it is one of the compressed.
        content: pydicom's data set, with the bytes.
    """

    name: str
    sop_uid: str
    shape: tuple[int, int, int]
    allocated: int
    stored: int
    high: int
    signed: bool
    syntax: Any
    compressed: bool
    content: Any


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
    pixels = _read(path)
    if pixels.sop_uid != sop_uid:
        raise VolumeError(f"{path.name}: has changed since it was found")
    if pixels.allocated not in (8, 16, 32) or not 0 < pixels.stored <= pixels.high + 1 <= pixels.allocated:
        raise VolumeError(
            f"{path.name}: {pixels.stored} bits up to bit {pixels.high} of {pixels.allocated}; 8, 16 and 32 are read"
        )
    frames = _decompressed(pixels) if pixels.compressed else _plain(pixels)
    if frames.size != math.prod(pixels.shape):
        raise VolumeError(f"{path.name}: holds {frames.size} pixels, its header promises {math.prod(pixels.shape)}")
    return _significant(frames.reshape(pixels.shape), pixels)


def _read(path: Path) -> _Pixels:
    """Read a file and what it says of its pixels."""
    with reading(path):
        try:
            content = pydicom_quiet().dcmread(path, specific_tags=list(_READ), force=True)
            if "PixelData" not in content:
                raise VolumeError(f"{path.name}: has no pixels, or none of whole numbers; export the series again")
            allocated = int(content.BitsAllocated)
            stored = int(content.get("BitsStored") or allocated)
            syntax = content.file_meta.get("TransferSyntaxUID") or pydicom_quiet().uid.UID(_IMPLICIT_LITTLE_ENDIAN)
            return _Pixels(
                name=path.name,
                sop_uid=str(content.get("SOPInstanceUID") or ""),
                shape=(int(content.get("NumberOfFrames") or 1), int(content.Rows), int(content.Columns)),
                allocated=allocated,
                stored=stored,
                high=int(content.get("HighBit", stored - 1)),
                signed=content.get("PixelRepresentation") == 1,
                syntax=syntax,
                compressed=syntax.is_compressed,
                content=content,
            )
        except (OSError, VolumeError):
            raise
        except Exception as error:  # Whatever damage a file has: pydicom raises what it happens upon.
            raise VolumeError(f"{path.name}: is damaged ({type(error).__name__}); copy it again") from None


def _plain(pixels: _Pixels) -> Array:
    """Return uncompressed pixels, of all bits that are allocated."""
    dtype = np.dtype(f"{'<' if pixels.syntax.is_little_endian else '>'}u{pixels.allocated // 8}")
    wanted = math.prod(pixels.shape) * dtype.itemsize
    content = pixels.content.PixelData
    if len(content) < wanted:
        raise VolumeError(
            f"{pixels.name}: is cut short: {len(content)} bytes of pixels, its header promises {wanted}; copy it again"
        )
    return np.frombuffer(content[:wanted], dtype).astype(dtype.newbyteorder("="), copy=False)


def _decompressed(pixels: _Pixels) -> Array:
    """Return compressed pixels, of all bits that are allocated."""
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory(prefix="medseg-") as folder:
        bare = Path(folder) / "pixels.dcm"
        try:
            _write_bare(bare, pixels)
            reader = sitk.ImageFileReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetFileName(path_for_itk(bare))
            frames: Array = sitk.GetArrayFromImage(reader.Execute())
        except (
            RuntimeError,
            ValueError,
        ):  # GDCM's, and pydicom's where the pieces of a compressed frame make no sense.
            raise VolumeError(
                f"{pixels.name}: cannot be decompressed from {pixels.syntax.name}: damaged, or of a kind that GDCM does"
                " not read; copy it again, or let the archive send it uncompressed"
            ) from None
    if frames.dtype.kind not in "iu" or frames.itemsize * 8 != pixels.allocated:
        raise VolumeError(f"{pixels.name}: decompressed to {frames.dtype}, its header says {pixels.allocated} bits")
    return frames.view(f"u{frames.itemsize}")


def _write_bare(path: Path, pixels: _Pixels) -> None:
    """Write a file of the compressed pixels and what a decoder must know, and no more."""
    pydicom = pydicom_quiet()
    bare = pydicom.Dataset()
    bare.SOPClassUID = _SECONDARY_CAPTURE if pixels.shape[0] == 1 else _MULTI_FRAME_CAPTURE
    bare.SOPInstanceUID = pydicom.uid.generate_uid()
    bare.file_meta = pydicom.dataset.FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = pixels.syntax
    for tag in _PIXEL_ATTRIBUTES:
        if tag in pixels.content:
            bare[tag] = pixels.content[tag]
    bare["PixelData"] = pixels.content["PixelData"]
    bare["PixelData"].is_undefined_length = True
    bare.save_as(path, enforce_file_format=True)


def _significant(frames: Array, pixels: _Pixels) -> Array:
    """Return the bits that are stored, signed where they are: others may hold an overlay, or anything."""
    if pixels.stored == pixels.allocated:
        return frames.view(f"i{frames.itemsize}") if pixels.signed else frames
    mask = np.array((1 << pixels.stored) - 1, frames.dtype)
    values: Array = (frames >> (pixels.high + 1 - pixels.stored)) & mask  # (frames, rows, columns)
    if not pixels.signed:
        return values
    sign = 1 << (pixels.stored - 1)
    extended: Array = (values.astype(np.int64) ^ sign) - sign
    return extended
