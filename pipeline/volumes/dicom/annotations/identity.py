"""Whose an object is: the few attributes of patient and study that tie it to its series, or a pseudonym in their place.

Read by name, so that nothing else of a header can slip into what is written.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.errors import VolumeError
from pipeline.volumes.dicom.headers import pydicom_quiet
from pipeline.volumes.dicom.series import Series

# PS3.3 C.7.1.1 and C.7.2.1: types 1 and 2, who issued the ID, and whether identities were removed before.
_PATIENT = ("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex")
_REMOVED = ("PatientIdentityRemoved", "DeidentificationMethod", "LongitudinalTemporalInformationModified")
_STUDY = ("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName")
# What references and grids are made of.
_IMAGE = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PositionReferenceIndicator"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("Rows", "Columns", "NumberOfFrames", "Modality", "InstanceNumber"),
)
_EMPTIED = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber")
TEXT_ENCODING = "ISO_IR 192"  # UTF-8.
MANUFACTURER, MODEL_NAME = "medseg", "medseg segment"


def source_header(path: Path, pseudonym: str | None = None) -> Any:
    """Read of an image's header what an object that refers to it needs.

    Args:
        path: of the image.
        pseudonym: to stand in the place of patient and study.

    Returns:
        pydicom's dataset, without pixels; types 2 are there, if empty.
    """
    pydicom = pydicom_quiet()
    tags = ["SpecificCharacterSet", *_PATIENT, *_REMOVED, *_STUDY, *_IMAGE]
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags, force=True)
    header.decode()  # Names become text, so that they can be written in another encoding.
    for keyword in (*_PATIENT, *_STUDY):
        if keyword not in header and keyword != "IssuerOfPatientID":
            setattr(header, keyword, "")
    _empty_invalid(header)
    return header if pseudonym is None else _with_pseudonym(header, pseudonym)


def _empty_invalid(header: Any) -> None:
    """Empty dates, times and sexes that are none: an object must be valid, whatever its series is; all are type 2."""
    pydicom = pydicom_quiet()
    kinds = {
        "PatientBirthDate": pydicom.valuerep.DA,
        "StudyDate": pydicom.valuerep.DA,
        "StudyTime": pydicom.valuerep.TM,
    }
    for keyword, kind in kinds.items():
        try:
            kind(header[keyword].value)
        except (ValueError, TypeError):
            setattr(header, keyword, "")
    if header.PatientSex not in ("M", "F", "O"):
        header.PatientSex = ""


def _with_pseudonym(header: Any, pseudonym: str) -> Any:
    """Put a pseudonym in the place of a patient and empty the rest; UIDs stay: an object refers by them."""
    header.PatientName = header.PatientID = pseudonym
    for keyword in (*_EMPTIED, "ReferringPhysicianName"):
        setattr(header, keyword, "")
    header.pop("IssuerOfPatientID", None)
    header.PatientIdentityRemoved = "YES"
    header.DeidentificationMethod = "medseg: pseudonym for the patient, study emptied, UIDs kept"
    return header


def reference_header(series: Series, pseudonym: str | None) -> Any:
    """Return the header of a series' first image, which has what an object refers by.

    Raises:
        VolumeError: it has not.
    """
    header = source_header(series.slices[0].path, pseudonym)
    wanted = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
    if lacks := [keyword for keyword in wanted if not header.get(keyword)]:
        raise VolumeError(
            f"{series}: its images lack {', '.join(lacks)}, by which DICOM objects refer to them; write NIfTI alone"
        )
    return header


def copy_identity(header: Any, target: Any) -> None:
    """Give a new object the patient and the study of an image, and its frame of reference."""
    target.SpecificCharacterSet = TEXT_ENCODING
    kept = (*_PATIENT, *_REMOVED, *_STUDY, "FrameOfReferenceUID")
    for keyword in kept:
        if keyword in header:
            setattr(target, keyword, header[keyword].value)
    target.PositionReferenceIndicator = header.get("PositionReferenceIndicator", "")


def new_uid() -> Any:
    """Return a UID that nobody has: of a random UUID, under 2.25 (PS3.5 B.2)."""
    return pydicom_quiet().uid.generate_uid(prefix=None)


def now() -> tuple[str, str]:
    """Return date and time as DICOM writes them."""
    moment = datetime.datetime.now()  # Local, as DICOM's are where no zone is given.
    return moment.strftime("%Y%m%d"), moment.strftime("%H%M%S")


def software() -> str:
    """Return our name and version."""
    return f"medseg {__version__}"
