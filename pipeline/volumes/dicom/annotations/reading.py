"""A SEG or RTSTRUCT becomes a label map on the grid of the series that it was drawn on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import VolumeError
from pipeline.volumes.dicom.annotations.drawn import LabelMap, Overlap, painted
from pipeline.volumes.dicom.annotations.placing import Placing
from pipeline.volumes.dicom.annotations.rtstruct.reading import refuse_other_frame, rois
from pipeline.volumes.dicom.annotations.seg.reading import segments
from pipeline.volumes.dicom.headers import is_dicom, pydicom_quiet
from pipeline.volumes.dicom.series import Series

_RTSTRUCT = ("1.2.840.10008.5.1.4.1.1.481.3",)
_SEG = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # The second of label maps.


def read_object(path: Path) -> Any:
    """Read a SEG or RTSTRUCT.

    Returns:
        pydicom's dataset.

    Raises:
        VolumeError: it is none, or cannot be read.
    """
    pydicom = pydicom_quiet()
    try:
        dataset = pydicom.dcmread(path, force=True) if is_dicom(path) else None
    except Exception as error:  # Whatever damage a file has. Not its text, which may quote a patient's data.
        raise VolumeError(f"{path}: its DICOM cannot be read ({type(error).__name__})") from None
    if dataset is None or dataset.get("SOPClassUID") not in (*_RTSTRUCT, *_SEG):
        raise VolumeError(f"{path}: expected a DICOM SEG or RTSTRUCT, and it is neither")
    return dataset


def referenced_series(dataset: Any) -> set[str]:
    """Return the UIDs of the series that a SEG or RTSTRUCT refers to; empty where it does not say."""
    frames = dataset.get("ReferencedFrameOfReferenceSequence") or ()
    studies = [study for frame in frames for study in frame.get("RTReferencedStudySequence") or ()]
    series = [one for study in studies for one in study.get("RTReferencedSeriesSequence") or ()]
    series += dataset.get("ReferencedSeriesSequence") or ()
    return {str(one.SeriesInstanceUID) for one in series if one.get("SeriesInstanceUID")}


def read_annotations(
    path: Path,
    series: Series,
    *,
    wanted: Sequence[str] = (),
    overlap: Overlap = "refuse",
    threshold: float = 0.5,
) -> LabelMap:
    """Read a SEG or RTSTRUCT as a label map.

    Args:
        path: the object.
        series: onto whose grid.
        wanted: names of ROIs or segments, which get the values 1, 2, ... in this order; none: all.
        overlap: what a voxel of two structures becomes: an error, the first's or the last's.
        threshold: from which share of its largest value a voxel of a FRACTIONAL segment belongs to it.

    Raises:
        VolumeError: the object cannot be read, lacks a name, lies in another frame of reference, or structures overlap.
        GeometryError: it was not drawn on the pixels or slices of this series.
    """
    dataset = read_object(path)
    where = str(path)
    placing = Placing(series)
    refuse_other_frame(dataset.get("FrameOfReferenceUID"), placing, where)
    if dataset.SOPClassUID in _RTSTRUCT:
        drawn = rois(dataset, placing, wanted, where)
    else:
        drawn = segments(dataset, placing, wanted, where, threshold)
    try:
        label = painted(drawn, series.geometry, overlap, where)
    except (AttributeError, RuntimeError) as error:  # An attribute is missing; pixels that cannot be decoded.
        raise VolumeError(f"{path}: is damaged or incomplete: {error}") from error
    own = referenced_series(dataset)
    foreign = () if not own or series.uid in own else (f"drawn on another series than {series}; placed by position",)
    return LabelMap(label.label, label.labels, (*foreign, *label.remarks))
