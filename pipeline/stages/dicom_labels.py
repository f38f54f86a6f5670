"""`medseg dicom labels`: what people have drawn in a SEG or RTSTRUCT, as a label map to train on.

The label map lies on the grid of the series that was drawn on, as `medseg dicom convert` writes it; LABEL.csv beside it
says which value is which structure.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.records import write_text
from pipeline.volumes.dicom.annotations.drawn import LabelMap, Overlap
from pipeline.volumes.dicom.annotations.reading import read_annotations, read_object, referenced_series
from pipeline.volumes.dicom.choosing import SeriesChoice, choose_one
from pipeline.volumes.dicom.series import Series, find_series
from pipeline.volumes.volume import count_values
from pipeline.volumes.writing import write_label

log = logging.getLogger(__name__)

SUFFIX = ".nii.gz"
_COLUMNS = ("label", "value", "voxels", "volume_ml")


@dataclass(frozen=True)
class ImportedLabels:
    """What a SEG or RTSTRUCT has become.

    Attributes:
        out: the label map.
        series: that it lies on.
        rows: label, value, voxels and ml of each structure.
        remarks: what a user should know, a line each.
    """

    out: Path
    series: Series
    rows: tuple[tuple[str, int, int, float], ...]
    remarks: tuple[str, ...]

    def as_csv(self) -> str:
        """Return the table of labels."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([_COLUMNS, *((*row[:3], f"{row[3]:.4f}") for row in self.rows)])
        return text.getvalue()

    def as_text(self) -> str:
        """Return what was found, for people."""
        lines = [f"{value:5}  {label}: {voxels} voxels, {ml:.2f} ml" for label, value, voxels, ml in self.rows]
        lines += [f"note: {remark}" for remark in self.remarks]
        return "\n".join(
            [*lines, f"{self.out}: on the grid of {self.series}; {table_of(self.out).name} names the labels"]
        )


def table_of(out: Path) -> Path:
    """Return where the table of a label map's labels lies."""
    return out.with_name(out.name.removesuffix(SUFFIX) + ".csv")


def import_labels(
    source: Path,
    series: str,
    out: Path,
    *,
    wanted: Sequence[str] = (),
    overlap: Overlap = "refuse",
    threshold: float = 0.5,
    force: bool = False,
) -> ImportedLabels:
    """Write a SEG or RTSTRUCT as a label map.

    Args:
        source: the object.
        series: folder of the series that it was drawn on, or FOLDER#KEY; of several in it, the one it refers to.
        out: the label map to write, .nii.gz.
        wanted: structures, in the order of their values 1, 2, ...; none: all.
        overlap: what a voxel of two structures becomes.
        threshold: from which share of its largest value a voxel of a FRACTIONAL segment belongs to it.
        force: replace a label map that is there.

    Raises:
        PipelineError: the object or its series cannot be used, or the label map may not be written there.
        OSError: it cannot be written.
    """
    if not out.name.endswith(SUFFIX):
        raise PipelineError(f"{out}: a label map is written as {SUFFIX}")
    if out.exists() and not force:
        raise PipelineError(f"{out}: is there already; --force writes it anew")
    chosen = _series_of(read_object(source), series)
    if any(os.path.realpath(file.parent) == os.path.realpath(out.parent) for file in (source, *chosen.files)):
        raise PipelineError(f"{out}: lies among the DICOM files that are read; choose another folder")
    read = read_annotations(source, chosen, wanted=wanted, overlap=overlap, threshold=threshold)
    imported = ImportedLabels(out, chosen, tuple(_rows(read)), read.remarks)
    write_text(table_of(out), imported.as_csv())
    write_label(out, read.label, names=read.labels)
    return imported


def _series_of(dataset: Any, text: str) -> Series:
    """Return the series that an object is put onto: the one that is named, else the one that it refers to."""
    folder, number_sign, key = text.rpartition("#")
    path = Path(folder) if number_sign and not Path(text).exists() else Path(text)
    found = find_series(path)
    if path != Path(text):
        return choose_one(found, SeriesChoice(uid=key), path)
    uids = referenced_series(dataset)
    referred = [one for one in found if one.uid in uids and one.kind == "image"]
    return choose_one(referred or found, SeriesChoice(), path)


def _rows(read: LabelMap) -> list[tuple[str, int, int, float]]:
    """Return label, value, voxels and ml of each structure."""
    counts = count_values(read.label.array)
    ml = read.label.geometry.voxel_volume_ml
    return [
        (name, value, counts.get(value, 0), counts.get(value, 0) * ml) for name, value in read.labels.items() if value
    ]
