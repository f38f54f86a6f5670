"""PlaneWriter: planes in, along any axis and in any order, a NIfTI file out; the volume is never in memory.

What is written so are probabilities: whole numbers with the header's scl_slope, which every reader multiplies by. There
is no float16 in NIfTI, NRRD or MetaImage; uint16 takes the same two bytes and is as fine or finer above 1/16.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from pipeline.errors import VolumeError
from pipeline.geometry import Geometry
from pipeline.volumes.formats.layout import Array, in_file_order, plane_slices
from pipeline.volumes.writing import nifti_header, write_nifti, writing


class PlaneWriter:
    """Keeps planes in a nameless file beside the one to be written, and writes that when the `with` block ends well.

        with PlaneWriter(path, geometry, volumes=2, dtype="uint8", scale=1 / 255) as writer:
            writer.put(axis, index, planes)

    Planes that are never put are zero. Where the block ends with an error, nothing is left.
    """

    def __init__(
        self,
        path: Path,
        geometry: Geometry,
        *,
        volumes: int,
        dtype: DTypeLike,
        scale: float = 1.0,
        header_of: Path | None = None,
        comment: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the nameless file.

        Args:
            path: the file to write, .nii.gz or .nii.
            geometry: of each volume.
            volumes: how many; a file of one is 3-D, of more 4-D.
            dtype: of the numbers in the file.
            scale: what a reader multiplies them by.
            header_of: an image on the same grid: if it is NIfTI, its very affines, codes and units are written.
            comment: kept as JSON in the NIfTI header.

        Raises:
            VolumeError: the suffix is not NIfTI's.
            ValueError: the geometry is not that of `header_of`.
        """
        if not path.name.lower().endswith((".nii", ".nii.gz")):
            raise VolumeError(f"{path}: unknown format; write .nii.gz or .nii")
        self._path = path
        self._shape = geometry.shape
        self._volumes = volumes
        self._dtype = np.dtype(dtype)
        self._axis: int | None = None
        shape = (*geometry.shape, volumes)[: 3 + (volumes > 1)]
        self._nifti = nifti_header(shape, self._dtype, geometry, header_of=header_of, comment=comment)
        self._nifti.set_slope_inter(scale, 0)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - closed by __exit__

    def put(self, axis: int, index: int, planes: Array) -> None:
        """Keep one plane of each volume.

        Args:
            axis: that the plane is a cut across; the same for all planes.
            index: of the plane on it.
            planes: (volumes, rows, columns) of the writer's type, along the two other axes in order.

        Raises:
            ValueError: another axis than before, or planes of another shape or type.
            OSError: the disk is full.
        """
        self._axis = axis if self._axis is None else self._axis
        expected = (self._volumes, *self._across(axis))
        if axis != self._axis or planes.shape != expected or planes.dtype != self._dtype:
            raise ValueError(
                f"got planes {planes.shape} of {planes.dtype} across axis {axis}, expected {expected} of {self._dtype} "
                f"across axis {self._axis}"
            )
        with writing(self._path):
            self._file.seek(index * planes.nbytes)
            self._file.write(np.ascontiguousarray(planes).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if failed is None:
                self._axis = self._axis or 0
                with writing(self._path):
                    self._file.truncate(math.prod(self._shape) * self._volumes * self._dtype.itemsize)
                    self._file.flush()
                write_nifti(self._path, self._nifti, self._pieces())

    def _across(self, axis: int) -> tuple[int, int]:
        """Return the shape of a plane across an axis."""
        rows, columns = (length for own, length in enumerate(self._shape) if own != axis)
        return rows, columns

    def _pieces(self) -> Iterator[Callable[[], memoryview]]:
        """Yield what makes the bytes of each run of planes of a NIfTI file, x fastest."""
        for volume in range(self._volumes):
            for slices in plane_slices(self._shape, self._dtype.itemsize):
                yield partial(self._piece, volume, slices)

    def _piece(self, volume: int, slices: slice) -> memoryview:
        """Gather some slices (X, Y, n) of a volume from the planes that cross them."""
        assert self._axis is not None
        voxels = np.empty((*self._shape[:2], slices.stop - slices.start), self._dtype, order="F")
        for index in range(slices.start, slices.stop) if self._axis == 2 else range(self._shape[self._axis]):
            plane = self._plane(volume, index)
            if self._axis == 2:
                voxels[:, :, index - slices.start] = plane
            else:
                np.moveaxis(voxels, self._axis, 0)[index] = plane[:, slices]
        return in_file_order(voxels)

    def _plane(self, volume: int, index: int) -> Array:
        """Read one plane of a volume, in any thread."""
        assert self._axis is not None
        rows, columns = self._across(self._axis)
        size = rows * columns * self._dtype.itemsize
        stored = os.pread(self._file.fileno(), size, (index * self._volumes + volume) * size)
        return np.frombuffer(stored, self._dtype).reshape(rows, columns)
