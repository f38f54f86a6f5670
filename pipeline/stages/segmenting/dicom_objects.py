"""DICOM objects of a batch: SEG and RTSTRUCT beside the label maps of cases that come from DICOM series.

OUT/CASE.seg.dcm, CASE.rtstruct.dcm
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pipeline.errors import PipelineError, VolumeError
from pipeline.model import DESCRIPTION, read_description
from pipeline.records import Record, digest_of
from pipeline.stages.segmenting.sources import SegmentInput
from pipeline.volumes.dicom.annotations.coding import Coding, read_codes
from pipeline.volumes.dicom.annotations.rtstruct.writing import write_rtstruct
from pipeline.volumes.dicom.annotations.seg.writing import require_highdicom, write_seg
from pipeline.volumes.dicom.annotations.structures import Author, structures_of
from pipeline.volumes.dicom.series import Series
from pipeline.volumes.volume import Volume

ObjectFormat = Literal["seg", "rtstruct"]
WRITERS = {"seg": write_seg, "rtstruct": write_rtstruct}
_SHOWN = 5  # Of the cases that an error is about.


class DicomOutput(Record):
    """Which DICOM objects are written beside a label map, and how.

    Attributes:
        formats: seg, rtstruct; none: no object.
        deidentify: put the case's name in the place of patient and study.
        codes: label -> what it is, of the user's own; others are coded by name.
    """

    formats: tuple[ObjectFormat, ...] = ()
    deidentify: bool = False
    codes: dict[str, Coding] = {}

    @property
    def as_text(self) -> str:
        """All that the objects depend on beside the label map, in words; empty where none are wanted."""
        if not self.formats:
            return ""
        codes = f", codes {digest_of(self.model_dump(mode='json')['codes'])[:8]}" if self.codes else ""
        return f"{', '.join(self.formats)}{' under a pseudonym' if self.deidentify else ''}{codes}"


def dicom_output(names: Sequence[str], codes: Path | None = None, deidentify: bool = False) -> DicomOutput:
    """Return what is wanted, by the names of formats.

    Args:
        names: seg, rtstruct.
        codes: the user's table, a CSV.
        deidentify: put the case's name in the place of patient and study.

    Raises:
        PipelineError: a name is no format, or the table cannot be used.
    """
    formats = _formats_of(names)
    if not formats and (codes or deidentify):
        raise PipelineError("--codes and --deidentify are about DICOM objects; say which by --dicom seg,rtstruct")
    return DicomOutput(formats=formats, deidentify=deidentify, codes=read_codes(codes) if codes else {})


def _formats_of(given: Sequence[str]) -> tuple[ObjectFormat, ...]:
    """Return formats by their names, in our order."""
    if unknown := [name for name in given if name not in WRITERS]:
        raise PipelineError(f"--dicom {','.join(unknown)}: unknown; the formats are {', '.join(WRITERS)}")
    formats: tuple[ObjectFormat, ...] = ("seg", "rtstruct")
    return tuple(one for one in formats if one in given)


def object_file(out: Path, name: str, kind: str) -> Path:
    """Return where a case's object lies."""
    return out / f"{name}.{kind}.dcm"


def remove_objects(out: Path, name: str) -> None:
    """Remove a case's objects: those of an earlier label map would be taken for the new one's."""
    for kind in WRITERS:
        object_file(out, name, kind).unlink(missing_ok=True)


def are_written(out: Path, name: str, written: str, output: DicomOutput) -> bool:
    """Tell whether a case's objects are there as they are wanted, by what was noted of them."""
    return written == output.as_text and all(object_file(out, name, kind).exists() for kind in output.formats)


def author_of(models: Sequence[Path], digests: Sequence[str]) -> Author:
    """Return what objects say of the models that drew them: their experiment's name, and digits of their contents."""
    name = read_description(models[0] / DESCRIPTION).name
    ensemble = f" (ensemble of {len(models)})" if len(models) > 1 else ""
    return Author(kind="AUTOMATIC", name=f"{name}{ensemble}", version=digest_of(list(digests))[:12])


def series_of(source: SegmentInput) -> Series | None:
    """Return the series on whose grid a case's label map lies; None where that is a file."""
    return next(iter(source.files.values())).series


def refuse_cases(cases: Sequence[SegmentInput], output: DicomOutput) -> None:
    """Refuse a batch with cases of which no object can be written, before anything is done.

    Raises:
        PipelineError: there are such cases, or highdicom is missing.
    """
    if not output.formats:
        return
    if "seg" in output.formats:
        require_highdicom()
    problems = {case.name: _problem(case, output) for case in cases}
    wrong = [f"{name}: {problem}" for name, problem in problems.items() if problem]
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more cases"] if len(wrong) > _SHOWN else []
        lines = "\n".join([*wrong[:_SHOWN], *more])
        raise PipelineError(f"--dicom {','.join(output.formats)}: cannot be written of {len(wrong)} cases\n{lines}")


def _problem(case: SegmentInput, output: DicomOutput) -> str:
    """Say why no object can be written of a case; empty where it can."""
    series = series_of(case)
    if series is None:
        return "comes from no DICOM series, to which an object would refer; segment it without --dicom"
    if series.tilt_degrees:
        return "its series is resampled (--untilt), and an object refers to the slices as they are"
    if not series.frame_of_reference_uid:
        return "its images have no frame of reference, by which an object says where it lies"
    if "seg" in output.formats and any(one.frame is not None for one in series.slices):
        return "no SEG is written of an enhanced multi-frame series; take --dicom rtstruct"
    return ""


def write_objects(
    out: Path, case: SegmentInput, label: Volume, labels: dict[str, int], author: Author, output: DicomOutput
) -> str:
    """Write a case's objects, in place of any that were there.

    Args:
        out: the batch's folder.
        case: from a DICOM series.
        label: its label map, (X, Y, Z).
        labels: label name -> value, by class index; the first is the background.
        author: the model.
        output: what is wanted.

    Returns:
        What was written, as `DicomOutput.as_text` has it.

    Raises:
        VolumeError: an object cannot be written of the series.
        OSError: it cannot be written.
    """
    if not output.formats:
        return ""
    remove_objects(out, case.name)
    series = series_of(case)
    if series is None:
        raise VolumeError(f"{case.name}: {_problem(case, output)}")
    structures = structures_of(labels, output.codes)
    pseudonym = case.name if output.deidentify else None
    for kind in output.formats:
        WRITERS[kind](object_file(out, case.name, kind), label, series, structures, author, pseudonym=pseudonym)
    return output.as_text
