"""Headers of DICOM files, without pixels: which files of a folder are DICOM, and what each plane says of itself.

A plane is a file, or a frame of an enhanced multi-frame file. Files that are no DICOM are passed over by their first
bytes; a DICOMDIR is an index of other files, and passed over too.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import VolumeError
from pipeline.progress import track

log = logging.getLogger(__name__)

Kind = Literal["image", "localiser", "other"]

_MAGIC_AT, _MAGIC = 128, b"DICM"
# Without a preamble a file begins with an element of group 2 or 8, its tag little-endian.
_FIRST_TAGS = tuple(
    group + element
    for group in (b"\x02\x00", b"\x08\x00")
    for element in (b"\x00\x00", b"\x01\x00", b"\x05\x00", b"\x08\x00", b"\x12\x00", b"\x16\x00", b"\x18\x00")
)
_DICOMDIR = "1.2.840.10008.1.3.10"  # Media Storage Directory Storage.
_MANY = 2000  # Files: some seconds, over which it is said how far it is.
_READERS = 8  # Threads: on a network's disk what takes time is waiting.

_STORAGE = "1.2.840.10008.5.1.4.1.1."
# PS3.4 B.5: CT, MR and PET images, their enhanced multi-frame kinds, and those converted to them.
_SLICE_CLASSES = tuple(
    _STORAGE + ending for ending in ("2", "2.1", "2.2", "4", "4.1", "4.3", "4.4", "128", "128.1", "130")
)
# What has rows and columns, and even a place, and is no image: segmentations, parametric maps, radiotherapy's objects.
_NO_IMAGES = tuple(_STORAGE + beginning for beginning in ("30", "66", "67", "68", "481", "88", "11"))
_LOCALISERS = {"LOCALIZER", "SCOUT"}

_IDENTITY = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")
_NAMES = ("Modality", "SeriesDescription", "SeriesNumber", "ImageType", "NumberOfFrames")
_PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")
_VALUES = (
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "RescaleSlope", "RescaleIntercept"),
    "ModalityLUTSequence",
)
_FRAMES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
# What tells the images of one series apart where several lie in one place, in the order in which it is asked.
_TELLING = (
    *("AcquisitionNumber", "EchoNumbers", "EchoTime", "TemporalPositionIdentifier", "DiffusionBValue", "TriggerTime"),
    *("FrameReferenceTime", "InversionTime", "ConvolutionKernel", "EffectiveEchoTime", "TemporalPositionIndex"),
)
_TAGS = [*_IDENTITY, *_NAMES, *_PLACE, *_VALUES, *_FRAMES, *_TELLING]


@dataclass(frozen=True)
class Plane:
    """What one plane's header says.

    Attributes:
        path: its file.
        frame: its position in a multi-frame file; None in a file of one plane.
        sop_uid: of the file.
        series_uid, study_uid, frame_of_reference_uid, modality, description, number: of its series.
        kind: image, localiser, or something else that has no slices.
        size: columns and rows.
        position_mm: of the first pixel's centre, LPS.
        orientation: directions along a row and along a column, LPS.
        spacing_mm: between rows, and between columns, as DICOM has it.
        scale: slope and intercept from stored values to units.
        told: attribute -> value, of those that tell apart images of one place.
        problem: why no volume can be made of it, whatever the others are; empty as a rule.
    """

    path: Path
    frame: int | None
    sop_uid: str
    series_uid: str
    study_uid: str
    frame_of_reference_uid: str
    modality: str
    description: str
    number: int | None
    kind: Kind
    size: tuple[int, int] = (0, 0)
    position_mm: tuple[float, ...] = ()
    orientation: tuple[float, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    scale: tuple[float, float] = (1.0, 0.0)
    told: tuple[tuple[str, str], ...] = ()
    problem: str = ""


def pydicom_quiet() -> Any:
    """Return pydicom, told to keep what it finds wrong with values to itself: they may be a patient's."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    warnings.filterwarnings("ignore", module=r"pydicom\.")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    return pydicom


def read_planes(folder: Path) -> list[Plane]:
    """Read the header of each DICOM file in a folder and those within.

    Returns:
        The planes, by path; of files that cannot be read a warning is left.

    Raises:
        VolumeError: the folder cannot be read.
    """
    pydicom_quiet()
    files = files_in(folder)
    with ThreadPoolExecutor(_READERS, "headers") as threads:
        read: Iterable[tuple[Plane, ...]] = threads.map(planes_of, files)
        if len(files) > _MANY:
            read = track(read, "headers", len(files))
        return [plane for planes in read for plane in planes]


def files_in(folder: Path) -> list[Path]:
    """Return the files in a folder and those within, by path; hidden ones are left out, links are followed once.

    Raises:
        VolumeError: the folder cannot be read.
    """
    if not folder.is_dir():
        raise VolumeError(f"{folder}: is no folder; a DICOM series is read from the folder that holds it")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise VolumeError(f"{folder}: cannot be read (Permission denied)")
    found, seen = [], set()

    def passed_over(error: OSError) -> None:
        log.warning("a folder in %s is passed over: it cannot be read (%s)", folder, error.strerror)

    for root, folders, names in os.walk(folder, followlinks=True, onerror=passed_over):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def is_dicom(path: Path) -> bool:
    """Tell by its first bytes whether a file may be DICOM; one without a preamble is asked more when it is read."""
    try:
        with path.open("rb") as file:
            start = file.read(_MAGIC_AT + len(_MAGIC))
    except OSError as error:
        log.warning("%s: passed over: it cannot be read (%s)", path.name, error.strerror)
        return False
    return start[_MAGIC_AT:] == _MAGIC or start.startswith(_FIRST_TAGS)


def planes_of(path: Path) -> tuple[Plane, ...]:
    """Read a file's header; nothing comes of what is no DICOM object of a series."""
    if not is_dicom(path):
        return ()
    pydicom = pydicom_quiet()
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS, force=True)
        if header.get("SOPClassUID") in (None, _DICOMDIR) or not header.get("SeriesInstanceUID"):
            return ()
        return tuple(_planes(path, header))
    except Exception as error:  # Whatever damage a file has: pydicom raises what it happens upon.
        # Not its text, which may quote a patient's data.
        log.warning("%s: passed over: its DICOM header cannot be read (%s)", path.name, type(error).__name__)
        return ()


def _planes(path: Path, header: Any) -> Iterator[Plane]:
    """Yield the planes of a file."""
    kind = _kind(header)
    plane = Plane(
        path=path,
        frame=None,
        sop_uid=_text(header, "SOPInstanceUID"),
        series_uid=_text(header, "SeriesInstanceUID"),
        study_uid=_text(header, "StudyInstanceUID"),
        frame_of_reference_uid=_text(header, "FrameOfReferenceUID"),
        modality=_text(header, "Modality") or "?",
        description=_text(header, "SeriesDescription"),
        number=_whole(header.get("SeriesNumber")),
        kind=kind,
        problem="" if kind != "other" else f"no slices of a volume ({header.SOPClassUID.name})",
    )
    if kind == "other":
        yield plane
        return
    size = (int(header.get("Columns") or 0), int(header.get("Rows") or 0))
    plane = replace(plane, size=size, problem=_problem(header))
    per_frame = header.get("PerFrameFunctionalGroupsSequence")
    if not per_frame:
        yield _placed(plane, [header])
        return
    shared = list(header.get("SharedFunctionalGroupsSequence") or ())
    for number, groups in enumerate(per_frame):
        holders = [item for group in [groups, *shared] for sequence in group for item in _items(sequence)]
        yield _placed(replace(plane, frame=number), holders)


def _items(sequence: Any) -> Sequence[Any]:
    """Return the first item of a functional group's sequence; nothing where the element is none."""
    return sequence.value[:1] if sequence.VR == "SQ" and sequence.value else ()


def _kind(header: Any) -> Kind:
    """Tell what a file is."""
    uid = str(header.SOPClassUID)
    placed = all(header.get(tag) for tag in _PLACE)
    if any(uid == no or uid.startswith(f"{no}.") for no in _NO_IMAGES) or not (uid in _SLICE_CLASSES or placed):
        return "other"
    return "localiser" if _LOCALISERS & {word.upper() for word in _words(header.get("ImageType"))} else "image"


def _problem(header: Any) -> str:
    """Say why a plane's values can be no volume's; empty where they can."""
    if not header.get("Rows") or not header.get("Columns"):
        return "no rows and columns"
    if (samples := int(header.get("SamplesPerPixel") or 1)) != 1:
        return f"colours, {samples} values a pixel"
    colours = _text(header, "PhotometricInterpretation")
    if colours == "MONOCHROME1":
        return "MONOCHROME1, which programs take for inverted values or for a matter of display; write MONOCHROME2"
    if colours not in ("MONOCHROME2", ""):
        return f"{colours} in place of grey values"
    if header.get("ModalityLUTSequence"):
        return "units by a table (Modality LUT) in place of a slope"
    if int(header.get("NumberOfFrames") or 1) > 1 and not header.get("PerFrameFunctionalGroupsSequence"):
        return "several frames that say not where they lie (no per-frame functional groups)"
    return ""


def _placed(plane: Plane, holders: Sequence[Any]) -> Plane:
    """Return a plane with place and scale, from whichever of a header's parts has them."""

    def found(tag: str) -> Any:
        return next((value for holder in holders if (value := holder.get(tag)) not in (None, "")), None)

    position, orientation, spacing = (
        tuple(float(number) for number in found(tag) or ())
        for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    )
    slope, intercept = found("RescaleSlope"), found("RescaleIntercept")
    told: tuple[tuple[str, str], ...] = (("ImageType", "/".join(_words(found("FrameType") or found("ImageType")))),)
    told += tuple((tag, str(value)) for tag in _TELLING if (value := found(tag)) is not None)
    lacks = [
        name
        for name, numbers, count in (
            ("position", position, 3),
            ("orientation", orientation, 6),
            ("pixel spacing", spacing, 2),
        )
        if len(numbers) != count
    ]
    problem = plane.problem or (f"no {' and no '.join(lacks)} in space" if lacks else "")
    scale = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    if not problem and not (scale[0] and all(map(math.isfinite, scale))):
        problem = f"a slope of {scale[0]} and an intercept of {scale[1]}"
    return replace(
        plane,
        position_mm=position,
        orientation=orientation,
        spacing_mm=spacing,
        scale=scale,
        told=told,
        problem=problem,
    )


def _text(header: Any, tag: str) -> str:
    """Return an attribute as text on one line, what cannot be shown as ?; empty where it is missing."""
    text = " ".join(str(header.get(tag) or "").split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _words(value: Any) -> list[str]:
    """Return the values of an attribute that may have one or several."""
    return [] if value is None else [value] if isinstance(value, str) else [str(word) for word in value]


def _whole(value: Any) -> int | None:
    """Return a whole number; None where it is none."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
