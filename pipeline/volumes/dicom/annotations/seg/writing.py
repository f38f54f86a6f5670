"""Label maps written as DICOM SEG (Segmentation, PS3.3 A.51) of type BINARY, through highdicom."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import __version__
from pipeline.errors import PipelineError, VolumeError
from pipeline.volumes.dicom.annotations.coding import Concept, code_item, dicom_text
from pipeline.volumes.dicom.annotations.identity import (
    MANUFACTURER,
    MODEL_NAME,
    TEXT_ENCODING,
    new_uid,
    reference_header,
    software,
    source_header,
)
from pipeline.volumes.dicom.annotations.placing import Placing
from pipeline.volumes.dicom.annotations.saving import save_object
from pipeline.volumes.dicom.annotations.structures import Author, Structure
from pipeline.volumes.dicom.series import Series
from pipeline.volumes.formats.layout import Array
from pipeline.volumes.volume import Volume, smallest_type

_ALGORITHM_NAME = "medseg"  # Where the labels come from no model.


def require_highdicom() -> Any:
    """Return highdicom.

    Raises:
        PipelineError: it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise PipelineError(
            "DICOM SEG is written by highdicom, which is missing; pip install '.[dicom]' in medseg's checkout"
        ) from error
    # What it finds wrong with values it keeps to itself: they may be a patient's.
    warnings.filterwarnings("ignore", module=r"highdicom\.")
    logging.getLogger("highdicom").setLevel(logging.CRITICAL)
    return highdicom


def write_seg(
    path: Path,
    label: Volume,
    series: Series,
    structures: Sequence[Structure],
    author: Author,
    *,
    pseudonym: str | None = None,
) -> None:
    """Write a label map as DICOM SEG, atomically: a segment for each structure, a frame for each slice that it is in.

    A structure without a voxel is listed without frames.

    Args:
        path: the file to write.
        label: (X, Y, Z) integers, on the series' grid.
        series: the images that were segmented.
        structures: what is written of the label map.
        author: who drew it.
        pseudonym: in the place of patient and study; None: the series' own, by which archives file the object.

    Raises:
        PipelineError: highdicom is not installed.
        GeometryError: the label map lies on another grid.
        VolumeError: the series lacks what an object needs to refer to it.
        OSError: the file cannot be written; nothing is left of it.
    """
    highdicom = require_highdicom()
    planes = Placing(series).planes_of(label)
    reference_header(series, pseudonym)
    if any(one.frame is not None for one in series.slices):
        raise VolumeError(
            f"{series}: a DICOM SEG of enhanced multi-frame images is not written; RTSTRUCT and NIfTI are"
        )
    sources = [source_header(one.path, pseudonym) for one in series.slices]
    dataset = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=_numbered(planes, structures),
        segmentation_type="BINARY",
        segment_descriptions=[_described(structure, author, highdicom) for structure in structures],
        series_instance_uid=new_uid(),
        series_number=1,
        sop_instance_uid=new_uid(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL_NAME,
        software_versions=software(),
        device_serial_number="0",
        content_label="MEDSEG",
        content_description=dicom_text(f"Segmentation by {author.name or _ALGORITHM_NAME}"),
        content_creator_name=MANUFACTURER,
        series_description=dicom_text(f"Segmentation by {author.name or _ALGORITHM_NAME}"),
        specific_character_set=TEXT_ENCODING,
    )
    save_object(path, dataset, structures)


def _numbered(planes: Array, structures: Sequence[Structure]) -> Array:
    """Return planes of the label map with the numbers of segments in place of its values, 0 elsewhere."""
    numbered = np.zeros(planes.shape, smallest_type(0, len(structures)))
    for structure in structures:
        numbered[planes == structure.value] = structure.number
    return numbered


def _described(structure: Structure, author: Author, highdicom: Any) -> Any:
    """Return a segment's description."""
    coding = structure.coding
    algorithm = None
    if author.kind != "MANUAL":
        algorithm = highdicom.AlgorithmIdentificationSequence(
            name=dicom_text(author.name or _ALGORITHM_NAME),
            family=_coded(Concept(value="123110", scheme="DCM", meaning="Artificial Intelligence"), highdicom),
            version=dicom_text(author.version or __version__),
            source=software(),
        )
    described = highdicom.seg.SegmentDescription(
        segment_number=structure.number,
        segment_label=dicom_text(structure.name),
        segmented_property_category=_coded(coding.category, highdicom),
        segmented_property_type=_coded(coding.type, highdicom),
        algorithm_type=author.kind,
        algorithm_identification=algorithm,
        display_color=highdicom.color.CIELabColor.from_rgb(*structure.colour),
    )
    if coding.side:
        described.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
            code_item(coding.side)
        ]
    return described


def _coded(concept: Concept, highdicom: Any) -> Any:
    """Return a code as highdicom has it."""
    return highdicom.sr.CodedConcept(concept.value, concept.scheme, concept.meaning)
