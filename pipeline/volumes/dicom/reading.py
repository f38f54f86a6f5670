"""A DICOM series becomes a volume, and what can be said of it before a pixel is read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.errors import VolumeError
from pipeline.geometry import Geometry
from pipeline.records import digest_of, file_digest
from pipeline.volumes.dicom.pixels import stored_frames
from pipeline.volumes.dicom.series import Series, Slice
from pipeline.volumes.dicom.untilting import untilted, untilted_geometry
from pipeline.volumes.formats.header import Header
from pipeline.volumes.formats.layout import Array, copy_into
from pipeline.volumes.formats.streams import reading
from pipeline.volumes.volume import Volume

_READERS = 4  # Threads: NumPy, GDCM and the disk leave each other room.
_SLICES_AT_ONCE = 16  # A cache line of each voxel column of float32.
_WHOLE = 2**23  # Beside 16 bits more than this many are beyond float32's 24.


def series_geometry(series: Series, *, untilt: bool = False) -> Geometry:
    """Return the grid of the volume that `read_series` makes.

    Raises:
        VolumeError: it makes none.
    """
    if reason := series.refusal(untilt):
        raise VolumeError(f"{series}: {reason}")
    return untilted_geometry(series.geometry) if series.tilt_degrees else series.geometry


def series_header(series: Series, *, untilt: bool = False) -> Header:
    """Return what is known of a series before a pixel is read, as of any volume.

    Raises:
        VolumeError: no volume can be made of it.
    """
    geometry = series_geometry(series, untilt=untilt)
    return Header(
        path=Path(series.name),
        shape=geometry.shape,
        dtype=np.dtype(np.float32),
        kind="scalar",
        affine=geometry.affine,
        spacing_mm=geometry.spacing_mm,
    )


def series_digest(series: Series, *, untilt: bool = False) -> str:
    """Return the SHA-256 hex digest of a series: of its files' bytes in the order of its slices, whatever their names.

    Raises:
        VolumeError: a file cannot be read.
    """
    digests = []
    for file in series.files:
        with reading(file):
            digests.append(file_digest(file))
    # A file may hold frames of several volumes, and what is read depends on --untilt alone where there is a tilt.
    frames = [one.frame for one in series.slices]
    return digest_of({"files": digests, "frames": frames, "untilt": untilt and bool(series.tilt_degrees)})


def read_series(series: Series, *, untilt: bool = False) -> Volume:
    """Read a series.

    Args:
        series: as `find_series` has found it.
        untilt: resample what a tilted gantry has sheared onto a rectangular grid; without it, that is refused.

    Returns:
        (1, X, Y, Z) float32: columns, rows and slices, in the units of each slice's slope and intercept. What a scanner
        has put beside its field of view (PixelPaddingValue) is a value as any other.

    Raises:
        VolumeError: no volume can be made of it, or a file is missing, damaged, has changed or cannot be decompressed.
    """
    series_geometry(series, untilt=untilt)
    geometry = series.geometry
    array = np.empty((1, *geometry.shape), np.float32)
    multi_frame = {(one.path, one.sop_uid) for one in series.slices if one.frame is not None}
    whole = {path: stored_frames(path, uid) for path, uid in multi_frame}

    def fill(one: Slice, plane: Array) -> None:
        """Write a slice in its units into a plane (rows, columns)."""
        frames = stored_frames(one.path, one.sop_uid) if one.frame is None else whole[one.path]
        number = one.frame or 0
        if number >= len(frames) or frames.shape[1:] != plane.shape:
            raise VolumeError(f"{one.path.name}: has changed since it was found")
        scale_into(plane, frames[number], *one.scale)

    planes = np.empty((_SLICES_AT_ONCE, *geometry.shape[1::-1]), np.float32)  # (slices, rows, columns)
    with ThreadPoolExecutor(_READERS, "slices") as threads:
        for first in range(0, len(series.slices), _SLICES_AT_ONCE):
            some = series.slices[first : first + _SLICES_AT_ONCE]
            list(threads.map(fill, some, planes))
            copy_into(array[0, :, :, first : first + len(some)], planes[: len(some)].transpose(2, 1, 0))
    volume = Volume(array, geometry)
    return untilted(volume) if series.tilt_degrees else volume


def scale_into(plane: Array, stored: Array, slope: float, intercept: float) -> None:
    """Write stored values in their units into a float32 array: as float64 would be rounded."""
    if slope == 1 and intercept.is_integer() and abs(intercept) < _WHOLE and stored.itemsize <= 2:
        # A CT's: float32 holds every sum exactly.
        np.add(stored, np.float32(intercept), out=plane)
    else:
        plane[...] = stored * np.float64(slope) + intercept
