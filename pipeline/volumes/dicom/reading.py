"""A DICOM series becomes a volume, and what can be said of it before a pixel is read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

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
        path=series.folder,
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
    frames_of = cache(stored_frames)  # A multi-frame file is read once.

    def plane_of(one: Slice) -> Array:
        """Return a slice (rows, columns) in its units."""
        frames = stored_frames(one.path, one.sop_uid) if one.frame is None else frames_of(one.path, one.sop_uid)
        if (one.frame or 0) >= len(frames) or frames.shape[1:] != geometry.shape[1::-1]:
            raise VolumeError(f"{one.path.name}: has changed since it was found")
        slope, intercept = one.scale
        return np.asarray(frames[one.frame or 0] * np.float64(slope) + intercept, np.float32)

    with ThreadPoolExecutor(_READERS, "slices") as threads:
        for first in range(0, len(series.slices), _SLICES_AT_ONCE):
            some = series.slices[first : first + _SLICES_AT_ONCE]
            planes = np.stack(list(threads.map(plane_of, some)))  # (slices, rows, columns)
            copy_into(array[0, :, :, first : first + len(some)], planes.transpose(2, 1, 0))
    volume = Volume(array, geometry)
    return untilted(volume) if series.tilt_degrees else volume
