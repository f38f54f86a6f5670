"""Whose a series is: read only where it is asked for, and kept out of logs and files."""

from __future__ import annotations

from pipeline.records import Record
from pipeline.volumes.dicom.headers import pydicom_quiet
from pipeline.volumes.dicom.series import Series

_ATTRIBUTES = {"name": "PatientName", "id": "PatientID", "study_date": "StudyDate"}


class Patient(Record):
    """A patient, and the date of a study, as DICOM writes them."""

    name: str
    id: str
    study_date: str


def patient_of(series: Series) -> Patient:
    """Read whose a series is, from its first file."""
    header = pydicom_quiet().dcmread(
        series.files[0], stop_before_pixels=True, specific_tags=list(_ATTRIBUTES.values()), force=True
    )
    return Patient(**{field: str(header.get(tag) or "") for field, tag in _ATTRIBUTES.items()})
