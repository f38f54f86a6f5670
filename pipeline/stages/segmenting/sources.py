"""What a case to segment is read from: a file or a DICOM series a channel, both asked the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.volumes.dicom.reading import read_series, series_digest, series_header
from pipeline.volumes.dicom.series import Series
from pipeline.volumes.formats.header import Header
from pipeline.volumes.stored import content_digest, read_header
from pipeline.volumes.volume import Volume, read_image


@dataclass(frozen=True)
class ChannelFile:
    """One channel's file, or DICOM series.

    Attributes:
        path: the file; of a series the folder in which it was found.
        index: position in a 4-D file.
        series: as it was found; None for a file.
        untilt: resample a series that a tilted gantry has sheared.
    """

    path: Path
    index: int | None = None
    series: Series | None = None
    untilt: bool = False

    def __str__(self) -> str:
        return f"{self.path}#{self.series.key}" if self.series else str(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, or those of the series."""
        return self.series.files if self.series else (self.path,)

    @property
    def header_source(self) -> Path | None:
        """The file whose header a label map takes over; None for a series, which has none to take."""
        return None if self.series else self.path

    def absolute(self) -> ChannelFile:
        """Return it as it is found from any working folder."""
        series = self.series and self.series.model_copy(
            update={"slices": tuple(one.model_copy(update={"path": one.path.absolute()}) for one in self.series.slices)}
        )
        return replace(self, path=self.path.absolute(), series=series)

    def read_header(self) -> Header:
        """Read what there is to know before the voxels."""
        return series_header(self.series, untilt=self.untilt) if self.series else read_header(self.path)

    def read_image(self) -> Volume:
        """Read the voxels, (1, X, Y, Z) float32."""
        return read_series(self.series, untilt=self.untilt) if self.series else read_image(self.path, self.index)

    def content_digest(self) -> str:
        """Return a digest of the contents, whatever the files' names."""
        return series_digest(self.series, untilt=self.untilt) if self.series else content_digest(self.path)


@dataclass(frozen=True)
class SegmentInput:
    """One case to segment.

    Attributes:
        name: of its label map, without suffix.
        files: channel -> file, in the model's order of channels; at least one.
    """

    name: str
    files: dict[str, ChannelFile]

    def absolute(self) -> SegmentInput:
        """Return the case as it is found from any working folder."""
        return SegmentInput(self.name, {channel: file.absolute() for channel, file in self.files.items()})
