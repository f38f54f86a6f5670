"""Which of a folder's series are meant: by UID or key, modality and description."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.errors import VolumeError
from pipeline.records import Record
from pipeline.volumes.dicom.series import Series

# What people and manifests call a modality -> DICOM's own term (PS3.3 C.7.3.1.1.1).
_TERMS = {"MRI": "MR", "PET": "PT"}
_SHOWN = 20  # Of the series that an error lists.


class SeriesChoice(Record):
    """What a series must be; what is None is not asked.

    Attributes:
        uid: its SeriesInstanceUID, or its key as `medseg dicom list` shows it.
        modality: CT, MR, PT, ...; PET and MRI are understood; any case.
        description: part of its description, or a pattern for all of it where it has a * or ?; any case.
    """

    uid: str | None = None
    modality: str | None = None
    description: str | None = None

    def fits(self, series: Series) -> bool:
        """Tell whether a series is meant."""
        return (
            self.uid in (None, series.uid, series.key)
            and (self.modality is None or dicom_term(self.modality) == series.modality.upper())
            and (self.description is None or _describes(self.description, series.description))
        )

    def __str__(self) -> str:
        asked = (("series", self.uid), ("modality", self.modality), ("description", self.description))
        return ", ".join(f"{what} {value!r}" for what, value in asked if value is not None) or "as an image"


def dicom_term(modality: str) -> str:
    """Return DICOM's term for a modality."""
    return _TERMS.get(modality.upper(), modality.upper())


def choose(found: Sequence[Series], choice: SeriesChoice, folder: Path) -> list[Series]:
    """Return the series that are meant: images, or whatever a UID or key names.

    Args:
        found: the series of a folder.
        choice: what is asked of them.
        folder: it, for messages.

    Raises:
        VolumeError: there is none; lists what there is.
    """
    meant = [one for one in found if choice.fits(one) and (one.kind == "image" or choice.uid is not None)]
    if not meant:
        raise VolumeError(f"{folder}: no DICOM series fits {choice}; {listed(found)}")
    return meant


def choose_one(found: Sequence[Series], choice: SeriesChoice, folder: Path) -> Series:
    """Return the one series that is meant; of several that fit, the one that is a volume.

    Raises:
        VolumeError: there is none, or there are several; lists what there is.
    """
    meant = choose(found, choice, folder)
    usable = [one for one in meant if not one.refusal(untilt=True)] or meant
    if len(usable) > 1:
        raise VolumeError(
            f"{folder}: {len(usable)} DICOM series fit {choice}; say which by FOLDER#KEY, or choose; {listed(usable)}"
        )
    return usable[0]


def listed(found: Sequence[Series]) -> str:
    """Return series on one line, for a message."""
    lines = [f"{one.key} {' '.join((one.modality, one.description, one.part)).strip()}" for one in found[:_SHOWN]]
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return f"there are: {', '.join(lines + more)}" if found else "there is none at all"


def _describes(wanted: str, description: str) -> bool:
    """Tell whether a description holds a text, or is as a pattern says; case does not matter."""
    wanted, description = wanted.casefold(), description.casefold()
    return fnmatchcase(description, wanted) if any(sign in wanted for sign in "*?") else wanted in description
