"""Series: the DICOM series of a folder, each with its slices in order and its grid, or the reason why it has none."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.errors import VolumeError
from pipeline.geometry import Geometry, Grid
from pipeline.records import Record, file_digest
from pipeline.volumes.dicom.headers import Kind, Plane, read_planes
from pipeline.volumes.dicom.stacking import along_normal, stack

_KEY_DIGITS = 10
# Of the places in which a series has planes, a volume of it has so many at least; some may be missing.
_WHOLE_STACK = 0.75


class Slice(Record):
    """A slice of a series.

    Attributes:
        path: its file.
        frame: its position in a multi-frame file, from 0; None in a file of one plane.
        sop_uid: of the file.
        position_mm: of its first pixel's centre, in DICOM's own LPS millimetres.
        scale: slope and intercept from stored values to units; they may differ between the slices of one series.
    """

    path: Path
    frame: int | None
    sop_uid: str
    position_mm: tuple[float, ...]
    scale: tuple[float, float]


class Series(Record):
    """A series of a folder, or one of the volumes that it holds.

    Attributes:
        uid, study_uid, frame_of_reference_uid: DICOM's.
        modality: CT, MR, PT, ...
        description: SeriesDescription.
        number: SeriesNumber.
        part: which of the series' volumes it is, where there are several: "EchoTime 2.46"; empty as a rule.
        kind: an image; a localiser, which is no volume; or another object, such as RTSTRUCT.
        slices: in order along the normal: rows, columns and slices are right-handed in LPS.
        grid: of the voxels (columns, rows, slices), to RAS+ mm; sheared where `tilt_degrees` is above 0; None where
            there is a problem.
        tilt_degrees: of the gantry.
        problem: why it cannot be read, with the names of the files; empty where it can.
    """

    uid: str
    study_uid: str
    frame_of_reference_uid: str
    modality: str
    description: str
    number: int | None
    part: str
    kind: Kind
    slices: tuple[Slice, ...]
    grid: Grid | None
    tilt_degrees: float
    problem: str

    @property
    def key(self) -> str:
        """A short name that is the same wherever the files lie, and is nobody's: digits of a hash of the UID."""
        return hashlib.sha256(f"{self.uid} {self.part}".encode()).hexdigest()[:_KEY_DIGITS]

    @property
    def name(self) -> str:
        """A name for a file or a case made of it, that tells nothing of the patient: CT_65b9607c04."""
        return f"{re.sub('[^A-Za-z0-9]', '', self.modality) or 'series'}_{self.key}"

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in the order of their slices; a multi-frame file once."""
        return tuple(dict.fromkeys(one.path for one in self.slices))

    @property
    def folder(self) -> Path:
        """The innermost folder that holds all its files."""
        return Path(os.path.commonpath([file.parent for file in self.files]))

    def refusal(self, untilt: bool = False) -> str:
        """Say why the series cannot be read as a volume; empty where it can.

        Args:
            untilt: resample what a tilted gantry has sheared.
        """
        if self.problem or not self.tilt_degrees or untilt:
            return self.problem
        return (
            f"the gantry was tilted by {self.tilt_degrees:.1f} degrees; --untilt resamples it onto a rectangular grid"
        )

    @property
    def geometry(self) -> Geometry:
        """The grid of the slices as they are.

        Raises:
            VolumeError: there is none.
        """
        if self.grid is None:
            raise VolumeError(f"{self}: {self.problem}")
        return self.grid.geometry

    def __str__(self) -> str:
        return f"DICOM series {self.key} ({self.modality}, {len(self.slices)} slices)"


def find_series(folder: Path) -> list[Series]:
    """Find the DICOM series in a folder and those within; no pixel is read.

    Returns:
        Images, then localisers, then other objects, by number.

    Raises:
        VolumeError: the folder cannot be read.
    """
    groups: dict[tuple[str, Kind], list[Plane]] = {}
    for plane in read_planes(folder):
        groups.setdefault((plane.series_uid, plane.kind), []).append(plane)
    kinds: tuple[Kind, ...] = ("image", "localiser", "other")
    found = [one for (_, kind), planes in groups.items() for one in _volumes(planes, kind)]
    return sorted(found, key=lambda one: (kinds.index(one.kind), one.number or 0, one.uid, one.part))


def _volumes(planes: Sequence[Plane], kind: Kind) -> Iterable[Series]:
    """Yield the volumes of one series: one, unless its slices lie in one place several times and can be parted."""
    if kind == "other":
        yield _series(planes, "", problem=planes[0].problem)
        return
    if kind == "localiser":
        yield _series(planes, "", problem="a localiser, no volume")
        return
    for part, some in _parts(_without_copies(planes)).items():
        stacked = stack(some)
        grid = Grid.of(stacked.geometry) if stacked.geometry else None
        yield _series(stacked.planes, part, grid, stacked.tilt_degrees, stacked.problem)


def _series(
    planes: Sequence[Plane], part: str, grid: Grid | None = None, tilt_degrees: float = 0.0, problem: str = ""
) -> Series:
    """Return the record of planes."""
    first = planes[0]
    slices = tuple(
        Slice(path=one.path, frame=one.frame, sop_uid=one.sop_uid, position_mm=one.position_mm, scale=one.scale)
        for one in planes
    )
    return Series(
        uid=first.series_uid,
        study_uid=first.study_uid,
        frame_of_reference_uid=first.frame_of_reference_uid,
        modality=first.modality,
        description=first.description,
        number=first.number,
        part=part,
        kind=first.kind,
        slices=slices,
        grid=grid,
        tilt_degrees=tilt_degrees,
        problem=problem,
    )


def _without_copies(planes: Sequence[Plane]) -> list[Plane]:
    """Leave out what lies in the folder several times: files of one UID and the same bytes."""
    same: dict[tuple[str, int | None], list[Plane]] = {}
    for plane in planes:
        same.setdefault((plane.sop_uid, plane.frame), []).append(plane)
    kept: list[Plane] = []
    for copies in same.values():
        kept += copies if len(copies) == 1 else {file_digest(plane.path): plane for plane in reversed(copies)}.values()
    return sorted(kept, key=lambda plane: (plane.path, plane.frame or 0))


def _parts(planes: list[Plane]) -> dict[str, list[Plane]]:
    """Part planes that lie in one place several times, by the first attribute that makes whole stacks of them.

    Copies of a series in several folders are parted by folder. Where nothing parts them they stay together: two stacks
    that merely overlap are no two volumes of one place.
    """
    if any(plane.problem for plane in planes) or (places := _places(planes)) == len(planes):
        return {"": planes}
    # Numbered, since a folder's name may be a patient's.
    parents = sorted({plane.path.parent for plane in planes})
    folders = [str(parents.index(plane.path.parent) + 1) for plane in planes]
    told = [dict(plane.told) for plane in planes]
    tags = dict.fromkeys(tag for one in told for tag in one)
    ways = [("copy", folders), *((tag, [one.get(tag, "none") for one in told]) for tag in tags)]
    for what, values in ways:
        parts: dict[str, list[Plane]] = {}
        for value, plane in zip(values, planes, strict=True):
            parts.setdefault(f"{what} {value}", []).append(plane)
        if len(parts) > 1 and all(_places(some) == len(some) >= _WHOLE_STACK * places for some in parts.values()):
            return parts
    return {"": planes}


def _places(planes: Sequence[Plane]) -> int:
    """Return in how many places planes lie: orientation and position along the normal, to a hundredth of a mm."""
    return len({(*(round(cosine, 2) for cosine in one.orientation), round(along_normal(one), 2)) for one in planes})
