"""`medseg dicom list` and `convert`: what DICOM series a folder holds, and those that are meant as NIfTI.

A series becomes MODALITY_KEY.nii.gz, with what is known of it beside it as .json; in neither is a patient's name,
number or date, nor the name of a folder, which may be any of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import PipelineError, VolumeError
from pipeline.geometry import Geometry
from pipeline.progress import track
from pipeline.records import write_json
from pipeline.volumes.dicom.choosing import SeriesChoice, choose, listed
from pipeline.volumes.dicom.patient import Patient, patient_of
from pipeline.volumes.dicom.reading import read_series
from pipeline.volumes.dicom.series import Series, find_series
from pipeline.volumes.formats.layout import Array
from pipeline.volumes.volume import Volume
from pipeline.volumes.writing import write_image

log = logging.getLogger(__name__)

SUFFIX = ".nii.gz"
_HEADINGS = ("key", "modality", "slices", "size and spacing", "description", "folder", "usable")


@dataclass(frozen=True)
class SeriesList:
    """What a folder holds.

    Attributes:
        folder: that was looked through, with those within.
        series: images first.
        patients: of each series, where they are to be shown; else none.
    """

    folder: Path
    series: tuple[Series, ...]
    patients: tuple[Patient, ...] = ()

    def as_json(self) -> list[dict[str, Any]]:
        """Return the series as JSON has it."""
        rows = [description_of(one) | {"folder": os.path.relpath(one.folder, self.folder)} for one in self.series]
        for row, patient in zip(rows, self.patients, strict=False):
            row["patient"] = patient.model_dump()
        return rows

    def as_text(self) -> str:
        """Return the series as a table."""
        if not self.series:
            return f"{self.folder}: no DICOM series"
        rows = [_HEADINGS, *(_cells(one, self.folder) for one in self.series)]
        if self.patients:
            shown = ["patient", *(" ".join(filter(None, one.model_dump().values())) for one in self.patients)]
            rows = [(*row, patient) for row, patient in zip(rows, shown, strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


@dataclass(frozen=True)
class Conversion:
    """What became of the series that were meant.

    Attributes:
        out: folder of the volumes.
        written: their files.
        kept: files that were there already.
        failures: series -> why it could not be converted.
    """

    out: Path
    written: tuple[Path, ...]
    kept: tuple[Path, ...]
    failures: dict[str, str]

    def as_text(self) -> str:
        """Return what was done, a line each."""
        lines = [f"{path}: written" for path in self.written]
        lines += [f"{path}: was there already; --force writes it anew" for path in self.kept]
        return "\n".join([*lines, *(f"{series}: failed: {reason}" for series, reason in self.failures.items())])


def list_series(folder: Path, *, show_patient: bool = False) -> SeriesList:
    """List the DICOM series in a folder and those within.

    Args:
        folder: where to look.
        show_patient: name the patient of each.

    Raises:
        VolumeError: the folder cannot be read.
    """
    found = tuple(find_series(folder))
    return SeriesList(folder, found, tuple(map(patient_of, found)) if show_patient else ())


def convert(
    folder: Path, out: Path, *, choice: SeriesChoice, every: bool = False, untilt: bool = False, force: bool = False
) -> Conversion:
    """Write DICOM series as NIfTI; one that cannot be read is listed with the reason, the rest go on.

    Args:
        folder: where to look for them, with those within.
        out: folder of the volumes.
        choice: which of them; all that fit are converted.
        every: all images; without it and a choice there must be a single one.
        untilt: resample what a tilted gantry has sheared.
        force: write anew what is there.

    Raises:
        PipelineError: no series fits, there are several and none was chosen, or the volumes would land beside DICOM.
        OSError: a volume cannot be written.
    """
    found = find_series(folder)
    chosen = choose(found, choice, folder)
    if len(chosen) > 1 and not every and choice == SeriesChoice():
        raise PipelineError(
            f"{folder}: holds {len(chosen)} image series; say which by --series, --modality or --description, or --all;"
            f" {listed(chosen)}"
        )
    _refuse_beside(out, chosen)
    written, kept, failures = [], [], {}
    for one in track(chosen, "convert", len(chosen)):
        path = out / (one.name + SUFFIX)
        if path.exists() and not force:
            kept.append(path)
            continue
        try:
            volume = read_series(one, untilt=untilt)
        except VolumeError as error:
            failures[str(one)] = str(error).removeprefix(f"{one}: ")
            continue
        write_json(path.with_name(path.name.removesuffix(SUFFIX) + ".json"), description_of(one, untilt))
        write_image(path, Volume(_smallest(volume.array), volume.geometry))
        written.append(path)
    return Conversion(out, tuple(written), tuple(kept), failures)


def description_of(series: Series, untilt: bool = False) -> dict[str, Any]:
    """Return what is known of a series as JSON has it, without anything of its patient."""
    geometry = series.grid.geometry if series.grid else None
    return {
        "key": series.key,
        "series_uid": series.uid,
        "modality": series.modality,
        "number": series.number,
        "description": series.description,
        "part": series.part,
        "kind": series.kind,
        "slices": len(series.slices),
        "shape": list(geometry.shape) if geometry else None,
        "spacing_mm": [round(step, 6) for step in geometry.spacing_mm] if geometry else None,
        "orientation": geometry.orientation if geometry else None,
        "tilt_degrees": round(series.tilt_degrees, 3),
        "usable": not series.refusal(untilt),
        "problem": series.refusal(untilt),
    }


def _cells(series: Series, folder: Path) -> tuple[str, ...]:
    """Return the cells of a series' line."""
    return (
        series.key,
        series.modality,
        str(len(series.slices)),
        _grid_text(series.grid.geometry) if series.grid else "-",
        " ".join((series.description, series.part)).strip() or "-",
        os.path.relpath(series.folder, folder),
        series.refusal() or "yes",
    )


def _grid_text(geometry: Geometry) -> str:
    """Return size, spacing and orientation of a grid."""
    return str(geometry).replace(" at ", " ")


def _refuse_beside(out: Path, chosen: Sequence[Series]) -> None:
    """Refuse to write among the files that are read."""
    real = Path(os.path.realpath(out))
    for one in chosen:
        if any(Path(os.path.realpath(file.parent)) == real for file in one.files):
            raise PipelineError(f"{out}: holds the DICOM files themselves; choose a folder of its own for the volumes")


def _smallest(array: Array) -> Array:
    """Return values as 16-bit integers where they are such, as most scanners' are; else as they came."""
    held = np.iinfo(np.int16)
    if array.min() < held.min or array.max() > held.max or not np.array_equal(array, np.rint(array)):
        return array
    return array.astype(np.int16)
