"""DICOM among the inputs of `medseg segment`: which series of a folder are cases, and which one a folder stands for."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import PipelineError, VolumeError
from pipeline.volumes.dicom.choosing import SeriesChoice as SeriesChoice
from pipeline.volumes.dicom.choosing import choose, choose_one, dicom_term
from pipeline.volumes.dicom.headers import is_dicom
from pipeline.volumes.dicom.series import Series, find_series
from pipeline.volumes.stored import is_volume

log = logging.getLogger(__name__)

# FOLDER#KEY and FOLDER#UID name a series; a whole number of nine digits at most is the index of a 4-D file.
_NAMED = re.compile(r"(.+)#([0-9a-f]{10}|[0-9.]{10,64})")
# What a manifest calls a channel's modality, where DICOM has a term for it.
_KNOWN = ("CT", "MR", "PET", "US")


@dataclass(frozen=True)
class DicomOptions:
    """How DICOM folders are read.

    Attributes:
        choice: which of their series.
        untilt: resample what a tilted gantry has sheared; without it such a case fails.
        modalities: channel -> modality, as the model was trained; a series of another is not taken unless asked for.
    """

    choice: SeriesChoice = field(default_factory=SeriesChoice)
    untilt: bool = False
    modalities: Mapping[str, str] = field(default_factory=dict)

    def choice_for(self, channel: str) -> SeriesChoice:
        """Return what a series must be for a channel."""
        modality = self.modalities.get(channel)
        if self.choice.modality or self.choice.uid or modality not in _KNOWN:
            return self.choice
        return self.choice.changed(modality=dicom_term(modality))


class DicomFolders:
    """The folders among a batch's inputs; each is looked through once.

    Args:
        options: how they are read.

    Attributes:
        without: of each folder of which no series fits, what there is.
    """

    def __init__(self, options: DicomOptions) -> None:
        self.options = options
        self.without: list[str] = []
        self._found: dict[Path, list[Series]] = {}

    def cases_of(self, folder: Path, channels: Sequence[str]) -> list[Series] | None:
        """Return the series in a folder and those within that are cases; None where there is no DICOM at all.

        Raises:
            PipelineError: the model has several channels.
        """
        found = self._look(folder)
        if not found:
            return None
        _refuse_channels(folder, channels)
        try:
            chosen = choose(found, self.options.choice_for(channels[0]), folder)
        except VolumeError as error:
            log.warning("%s", error)
            self.without.append(str(error))
            return []
        if left := [one for one in found if one not in chosen]:
            log.info(
                "%s: %d of %d DICOM series are taken; `medseg dicom list` shows all", folder, len(chosen), len(found)
            )
            log.debug("%s: left out: %s", folder, ", ".join(map(str, left)))
        return chosen

    def named(self, text: str, channels: Sequence[str]) -> list[Series] | None:
        """Return the series that FOLDER#KEY or FOLDER#UID names; None where it is none.

        Raises:
            PipelineError: there is no such series, the model has several channels, or it is a slice.
        """
        one = self.one_of(text, channels[0])
        if one is not None:
            _refuse_channels(one.folder, channels)
            return [one]
        path = Path(text)
        if not is_volume(path) and path.is_file() and is_dicom(path):
            raise PipelineError(f"{path}: is a file of a DICOM series; give its folder, {path.parent}")
        return None

    def one_of(self, text: str, channel: str, relative_to: Path = Path()) -> Series | None:
        """Return the series that FOLDER, FOLDER#KEY or FOLDER#UID stands for; None where it is no DICOM folder.

        Args:
            text: a cell of a CSV, or what stands on the command line.
            channel: the model's that it is for.
            relative_to: where a relative path begins.

        Raises:
            PipelineError: none or several fit.
        """
        name, uid = without_key(text)
        folder = relative_to / name
        if not is_folder(folder) or not (found := self._look(folder)):
            return None
        return choose_one(found, SeriesChoice(uid=uid) if uid else self.options.choice_for(channel), folder)

    def _look(self, folder: Path) -> list[Series]:
        """Return all series of a folder."""
        if folder not in self._found:
            self._found[folder] = find_series(folder)
        return self._found[folder]


def without_key(text: str) -> tuple[str, str | None]:
    """Part FOLDER#KEY or FOLDER#UID; without one there is None."""
    named = _NAMED.fullmatch(text)
    return (named[1], named[2]) if named else (text, None)


def _refuse_channels(folder: Path, channels: Sequence[str]) -> None:
    """Refuse a folder of series for a model of several channels: it says not which series is which channel."""
    if len(channels) > 1:
        raise PipelineError(
            f"{folder}: holds DICOM series, and the model has the channels {', '.join(channels)}; say which series is"
            f" which in a CSV with the columns case,{','.join(channels)}, a folder or FOLDER#KEY in each cell"
            f" (`medseg dicom list {folder}` shows the keys)"
        )


def is_folder(path: Path) -> bool:
    """Tell a folder; what cannot be looked at is taken for a file, which fails when it is read."""
    try:
        return path.is_dir()
    except OSError:
        return False
