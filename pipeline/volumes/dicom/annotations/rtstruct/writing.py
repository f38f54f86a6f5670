"""Label maps written as RTSTRUCT (RT Structure Set, PS3.3 A.19): closed contours on the slices of their series."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.geometry import FloatArray
from pipeline.volumes.dicom.annotations.coding import Coding, code_item, dicom_text
from pipeline.volumes.dicom.annotations.identity import (
    MANUFACTURER,
    MODEL_NAME,
    copy_identity,
    new_uid,
    now,
    reference_header,
    software,
)
from pipeline.volumes.dicom.annotations.placing import Placing
from pipeline.volumes.dicom.annotations.rtstruct.tracing import trace
from pipeline.volumes.dicom.annotations.saving import save_object
from pipeline.volumes.dicom.annotations.structures import Author, Structure
from pipeline.volumes.dicom.headers import pydicom_quiet
from pipeline.volumes.dicom.series import Series
from pipeline.volumes.formats.layout import Array
from pipeline.volumes.volume import Volume

SOP_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
# What RT Referenced Study Sequence refers to: a class long retired, whose UID the attribute still wants (type 1).
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
_CONTOUR_DATA = (0x3006, 0x0050)
_SHORTEST_CONTOUR = 3  # Points, of a polygon.
_DECIMALS = 4  # Of a mm: less than a thousandth of any pixel, and within the 16 characters of DS.


def write_rtstruct(
    path: Path,
    label: Volume,
    series: Series,
    structures: Sequence[Structure],
    author: Author,
    *,
    pseudonym: str | None = None,
) -> None:
    """Write a label map as RTSTRUCT, atomically.

    Each connected part of a label in a slice is one CLOSED_PLANAR contour; `tracing` says where it runs and how it goes
    around holes. A structure without a voxel is listed without contours.

    Args:
        path: the file to write.
        label: (X, Y, Z) integers, on the series' grid.
        series: the images that were segmented.
        structures: what is written of the label map.
        author: who drew it.
        pseudonym: in the place of patient and study; None: the series' own, by which archives file the object.

    Raises:
        GeometryError: the label map lies on another grid.
        VolumeError: the series lacks what an object needs to refer to it.
        OSError: the file cannot be written; nothing is left of it.
    """
    pydicom = pydicom_quiet()
    placing = Placing(series)
    planes = placing.planes_of(label)
    header = reference_header(series, pseudonym)
    dataset = _structure_set(header, series, author)
    images = [_image_reference(one.sop_uid, one.frame, header) for one in series.slices]
    dataset.ReferencedFrameOfReferenceSequence = [_frame_of_reference(header, series, images)]
    dataset.StructureSetROISequence = [_roi(structure, header, author) for structure in structures]
    dataset.ROIContourSequence = [_contours(structure, placing, planes, images) for structure in structures]
    dataset.RTROIObservationsSequence = [_observation(structure) for structure in structures]
    # Implicit: with explicit VRs a contour of more than 65,534 bytes has no length that old readers know.
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    save_object(path, dataset, structures)


def _structure_set(header: Any, series: Series, author: Author) -> Any:
    """Return the object without its structures: patient, study, series, equipment, structure set, approval."""
    dataset = pydicom_quiet().Dataset()
    copy_identity(header, dataset)
    dataset.SOPClassUID, dataset.SOPInstanceUID = SOP_CLASS, new_uid()
    date, time = now()
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = date, time
    dataset.SeriesInstanceUID, dataset.SeriesNumber, dataset.Modality = new_uid(), 1, "RTSTRUCT"
    dataset.SeriesDescription = dicom_text(f"Structures by {author.name or MANUFACTURER}")
    dataset.OperatorsName = ""
    dataset.Manufacturer, dataset.ManufacturerModelName = MANUFACTURER, MODEL_NAME
    dataset.SoftwareVersions = software()
    dataset.StructureSetLabel = "medseg"
    dataset.StructureSetDate, dataset.StructureSetTime = date, time
    dataset.InstanceNumber = 1
    dataset.ApprovalStatus = "UNAPPROVED"
    return dataset


def _image_reference(sop_uid: str, frame: int | None, header: Any) -> Any:
    """Return a reference to an image of the series."""
    reference = pydicom_quiet().Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = header.SOPClassUID, sop_uid
    if frame is not None:
        reference.ReferencedFrameNumber = frame + 1
    return reference


def _frame_of_reference(header: Any, series: Series, images: Sequence[Any]) -> Any:
    """Return what the contours refer to: frame of reference, study, series, images."""
    pydicom = pydicom_quiet()
    referenced_series = pydicom.Dataset()
    referenced_series.SeriesInstanceUID = series.uid
    referenced_series.ContourImageSequence = list(images)
    study = pydicom.Dataset()
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY_CLASS, header.StudyInstanceUID
    study.RTReferencedSeriesSequence = [referenced_series]
    frame = pydicom.Dataset()
    frame.FrameOfReferenceUID = header.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _roi(structure: Structure, header: Any, author: Author) -> Any:
    """Return a structure's name and origin."""
    roi = pydicom_quiet().Dataset()
    roi.ROINumber, roi.ROIName = structure.number, dicom_text(structure.name)
    roi.ReferencedFrameOfReferenceUID = header.FrameOfReferenceUID
    roi.ROIGenerationAlgorithm = author.kind
    if author.name:
        roi.ROIGenerationDescription = dicom_text(f"{author.name} {author.version}")
    return roi


def _contours(structure: Structure, placing: Placing, planes: Array, images: Sequence[Any]) -> Any:
    """Return a structure's colour and contours."""
    pydicom = pydicom_quiet()
    item = pydicom.Dataset()
    item.ReferencedROINumber, item.ROIDisplayColor = structure.number, list(structure.colour)
    contours: list[Any] = []
    for number, polygon in _polygons(planes, structure.value):
        contour = pydicom.Dataset()
        contour.ContourImageSequence = [images[number]]
        contour.ContourGeometricType = "CLOSED_PLANAR"
        contour.NumberOfContourPoints, contour.ContourNumber = len(polygon), len(contours) + 1
        # Of the VR OB, as whose bytes nothing is converted; with implicit VRs none is written, and readers know DS.
        contour.add_new(_CONTOUR_DATA, "OB", _decimals(placing.to_mm(number, polygon)))
        contours.append(contour)
    if contours:  # Type 3, and never empty: an empty sequence is refused by some.
        item.ContourSequence = contours
    return item


def _polygons(planes: Array, value: int) -> Iterator[tuple[int, FloatArray]]:
    """Yield slice and contour of each part of a label."""
    for number, plane in enumerate(planes):
        for polygon in trace(plane == value):
            assert len(polygon) >= _SHORTEST_CONTOUR
            yield number, polygon


def _decimals(points_mm: FloatArray) -> bytes:
    """Return coordinates as the bytes of DICOM's decimal strings; pydicom takes 10 times as long for them."""
    rounded = np.round(points_mm.ravel(), _DECIMALS) + 0.0  # No -0.
    text = "\\".join([f"{number:.{_DECIMALS}f}" for number in rounded.tolist()])
    return (text + " " * (len(text) % 2)).encode()


def _observation(structure: Structure) -> Any:
    """Return what a structure is."""
    observation = pydicom_quiet().Dataset()
    observation.ObservationNumber = observation.ReferencedROINumber = structure.number
    observation.ROIObservationLabel = dicom_text(structure.name, 16)
    observation.RTROIIdentificationCodeSequence = [_identification(structure.coding)]
    observation.RTROIInterpretedType = structure.coding.roi_type
    observation.ROIInterpreter = ""
    return observation


def _identification(coding: Coding) -> Any:
    """Return the code of a structure, its side with it."""
    item = code_item(coding.type)
    if coding.side:
        item.SegmentedPropertyTypeModifierCodeSequence = [code_item(coding.side)]
    return item
