"""Bringing a case's files into another data set: linked where they can stay as they are, else converted."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.data.manifest import Case, ImageFile, Manifest
from pipeline.errors import PipelineError, VolumeError
from pipeline.geometry import Geometry
from pipeline.volumes.formats.header import Header
from pipeline.volumes.relabelling import relabelled
from pipeline.volumes.stored import read_header
from pipeline.volumes.volume import Volume, read_image, read_label, smallest_type
from pipeline.volumes.writing import write_image, write_label

Links = Literal["symbolic", "hard", "copy"]

ENDING = ".nii.gz"


@dataclass(frozen=True)
class Bringing:
    """How files are brought over.

    Attributes:
        manifest: of the data set; its files are read, never written.
        links: what stands for a file that can stay as it is.
        resample: bring channels on other grids onto the case's own, in place of refusing them.
    """

    manifest: Manifest
    links: Links = "symbolic"
    resample: bool = False

    def of(self, case: Case) -> CaseFiles:
        """Return a case's files."""
        return CaseFiles(self, case)


@dataclass(frozen=True)
class CaseFiles:
    """The files of one case, and what brings them over."""

    how: Bringing
    case: Case

    @cached_property
    def headers(self) -> dict[str, Header]:
        """Each channel's header; the label's under an empty name."""
        files = {**self.case.images, **({"": self.case.label} if self.case.label else {})}
        return {name: read_header(self._path(file)) for name, file in files.items()}

    @property
    def grid(self) -> Geometry:
        """The case's own grid: the label's, else the first channel's."""
        return self.headers.get("", next(iter(self.headers.values()))).geometry

    def problems(self, *, one_grid: bool) -> Iterator[str]:
        """Yield why files cannot be brought over: they cannot be read, or channels lie on other grids.

        Args:
            one_grid: whether all channels must lie on the case's own grid.
        """
        try:
            grids = {name: header.geometry for name, header in self.headers.items()}
        except PipelineError as error:
            yield str(error)
            return
        if one_grid and not self.how.resample:
            for name, grid in grids.items():
                if not grid.matches(self.grid):
                    yield f"channel {name!r} lies on another grid, {grid}, than the case, {self.grid}; use --resample"

    def bring_image(self, channel: str, to: Path, *, one_grid: bool) -> None:
        """Bring a channel over as a 3-D file.

        Args:
            channel: its name.
            to: the file to make.
            one_grid: put it on the case's own grid.
        """
        file, header = self.case.images[channel], self.headers[channel]
        stays = not one_grid or _is_one(header.geometry, self.grid)
        if stays and len(header.shape) == 3 and self._path(file).name.lower().endswith(ENDING):
            self._link(file, to)
        else:
            write_image(to, self._image(file, one_grid))

    def bring_stacked(self, to: Path) -> None:
        """Bring all channels over as one 4-D file on the case's own grid, in the manifest's order."""
        images = [self._image(self.case.images[name], True).array for name in self.how.manifest.channels]
        write_image(to, Volume(np.concatenate(images), self.grid))

    def bring_label(self, to: Path, table: Mapping[int, int]) -> None:
        """Bring the label over.

        Args:
            to: the file to make.
            table: value in the file -> value that is written.
        """
        file = self.case.label
        if file is None:
            raise ValueError(f"case {self.case.id!r} has no label")
        path, header = self._path(file), self.headers[""]
        stays = all(value == written for value, written in table.items())
        if stays and len(header.shape) == 3 and path.name.lower().endswith(ENDING):
            self._link(file, to)
            return
        label = read_label(path, file.index)
        kind = smallest_type(min(table.values()), max(table.values()))
        values = relabelled(label.array, table, kind, f"the manifest's, {sorted(table)}")
        write_label(to, Volume(values, label.geometry), header_of=path)

    def _image(self, file: ImageFile, one_grid: bool) -> Volume:
        """Read an image, on the case's own grid where it shall be."""
        image = read_image(self._path(file), file.index)
        if not one_grid:
            return image
        if image.geometry.matches(self.grid):
            return Volume(image.array, self.grid)
        # Not at the top: it takes scipy, and files that are linked need none.
        from pipeline.volumes.resampling import resample_image

        if not np.isfinite(image.array).all():
            raise VolumeError(f"{self._path(file)}: holds voxels that are not finite, so it cannot be resampled")
        return resample_image(image, self.grid, order=1)

    def _link(self, file: ImageFile, to: Path) -> None:
        """Let a file stand at another place too, or copy it."""
        path = self._path(file)
        to.parent.mkdir(parents=True, exist_ok=True)
        if self.how.links == "copy":
            shutil.copyfile(path, to)
        elif self.how.links == "symbolic":
            to.symlink_to(path)
        else:
            try:
                os.link(os.path.realpath(path), to)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                    raise
                raise VolumeError(
                    f"{path}: cannot be linked ({error.strerror}); use symbolic links, or --copy"
                ) from error

    def _path(self, file: ImageFile) -> Path:
        """Return where a file lies."""
        return self.how.manifest.path_of(file).absolute()


def _is_one(grid: Geometry, other: Geometry) -> bool:
    """Tell whether grids are one but for float32's rounding, which every program's own check passes."""
    return grid.shape == other.shape and bool(np.allclose(grid.affine, other.affine, rtol=1e-6, atol=1e-5))
