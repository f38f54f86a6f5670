"""Writing a DICOM object that speaks of structures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.records import atomic_path
from pipeline.volumes.dicom.annotations.coding import coding_schemes
from pipeline.volumes.dicom.annotations.structures import Structure
from pipeline.volumes.writing import writing


def save_object(path: Path, dataset: Any, structures: Sequence[Structure]) -> None:
    """Write an object atomically, with the private schemes of its structures' codes explained.

    Raises:
        OSError: the file cannot be written; nothing is left of it.
    """
    if schemes := coding_schemes(structure.coding for structure in structures):
        dataset.CodingSchemeIdentificationSequence = schemes
    with writing(path), atomic_path(path) as temporary:
        dataset.save_as(temporary, enforce_file_format=True)
