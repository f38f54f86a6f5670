"""From planes to a stack: their order along the normal, the grid that they lie on, or the reason why on none.

Positions alone say where slices lie; what a header calls its slices' thickness or number is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import GeometryError
from pipeline.geometry import FloatArray, Geometry
from pipeline.volumes.dicom.headers import Plane
from pipeline.volumes.formats.header import LARGEST_SHEAR
from pipeline.volumes.formats.itk import LPS_TO_RAS

# Positions are rounded, to 0.1 mm by some scanners: beyond this share of a step a slice is elsewhere.
LARGEST_DISPLACEMENT = 0.1
# Cosines and pixel spacings of one series differ by no more than their rounding.
_SAME = 1e-3
_SHOWN = 5  # Of the files that a problem is about.


@dataclass(frozen=True)
class Stack:
    """Planes in order along the normal of the first, right-handed with its rows and columns.

    Attributes:
        planes: in that order, where there is one; else as they came.
        geometry: of the voxels (columns, rows, planes), RAS+ mm; sheared where the gantry was tilted; None with a
            problem.
        tilt_degrees: between the normal and the direction in which the slices follow one another; 0 where it is none.
        problem: why there is no grid, with the files; empty where there is one.
    """

    planes: tuple[Plane, ...]
    geometry: Geometry | None = None
    tilt_degrees: float = 0.0
    problem: str = ""


def stack(planes: Sequence[Plane]) -> Stack:
    """Order the planes of a series and find their grid."""
    problem = _unlike(planes)
    if problem:
        return Stack(tuple(planes), problem=problem)
    row, column, normal = _axes(planes[0])
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], rtol=0, atol=2 * _SAME):
        return Stack(tuple(planes), problem="rows and columns are not at right angles (ImageOrientationPatient)")
    ordered = tuple(sorted(planes, key=lambda plane: (float(np.dot(plane.position_mm, normal)), plane.path)))
    positions = np.array([plane.position_mm for plane in ordered])
    problem = _unstacked(ordered, positions, normal)
    if problem:
        return Stack(ordered, problem=problem)
    step = (positions[-1] - positions[0]) / (len(ordered) - 1)
    problem = _astray(ordered, positions, step)
    if problem:
        return Stack(ordered, problem=problem)
    between_rows, between_columns = ordered[0].spacing_mm
    affine = np.eye(4)
    affine[:3] = np.column_stack([row * between_columns, column * between_rows, step, positions[0]])
    try:
        geometry = Geometry((*ordered[0].size, len(ordered)), LPS_TO_RAS @ affine)
    except GeometryError as error:
        return Stack(ordered, problem=str(error))
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    return Stack(ordered, geometry, tilt if geometry.shear > LARGEST_SHEAR else 0.0)


def along_normal(plane: Plane) -> float:
    """Return how far a plane lies along its own normal, in mm."""
    return float(np.dot(plane.position_mm, _axes(plane)[2]))


def _axes(plane: Plane) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the directions along a plane's rows and columns, and its normal."""
    row, column = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    normal = np.cross(row, column)
    return row, column, normal / max(float(np.linalg.norm(normal)), 1e-12)


def _unlike(planes: Sequence[Plane]) -> str:
    """Say which planes cannot be of one stack, for what they are; empty where all can."""
    broken = [plane for plane in planes if plane.problem]
    if broken:
        return f"{broken[0].problem}: {names([plane for plane in broken if plane.problem == broken[0].problem])}"
    first = planes[0]
    asked: list[tuple[str, Callable[[Plane], Hashable]]] = [
        ("size", lambda plane: "x".join(map(str, plane.size))),
        ("frame of reference", lambda plane: plane.frame_of_reference_uid),
        ("orientation", lambda plane: _rounded(plane.orientation, first.orientation)),
        ("pixel spacing", lambda plane: _rounded(plane.spacing_mm, first.spacing_mm)),
    ]
    for what, key in asked:
        kinds: dict[Hashable, list[Plane]] = {}
        for plane in planes:
            kinds.setdefault(key(plane), []).append(plane)
        if len(kinds) > 1:
            most, *others = sorted(kinds.values(), key=len, reverse=True)
            odd = [plane for kind in others for plane in kind]
            return (
                f"slices of more than one {what}: {names(odd)} differ from the other {len(most)};"
                " put those that belong together into a folder of their own"
            )
    return ""


def _rounded(numbers: Sequence[float], like: Sequence[float]) -> tuple[float, ...]:
    """Return numbers, or those that they should be like where they are within rounding."""
    return tuple(like) if np.allclose(numbers, like, rtol=0, atol=_SAME) else tuple(np.round(numbers, 3).tolist())


def _unstacked(planes: Sequence[Plane], positions: FloatArray, normal: FloatArray) -> str:
    """Say what is wrong with the distances between ordered planes; empty where they are even."""
    if len(planes) < 2:
        return "one slice alone: there is no distance between slices"
    gaps = np.diff(positions @ normal)
    usual = float(np.median(gaps))
    doubled = np.flatnonzero(gaps < max(1e-3, LARGEST_DISPLACEMENT * usual))
    if len(doubled):
        pairs = [planes[number + side] for number in doubled.tolist() for side in (0, 1)]
        return f"several slices in one place: {names(list(dict.fromkeys(pairs)))}; {_told_apart(pairs)}"
    odd = np.flatnonzero(np.abs(gaps - usual) > LARGEST_DISPLACEMENT * usual).tolist()
    if not odd:
        return ""
    said = [
        f"{gaps[number]:.2f} mm between {name(planes[number])} and {name(planes[number + 1])}"
        + _missing(gaps[number] / usual)
        for number in odd[:_SHOWN]
    ]
    more = [f"and {len(odd) - _SHOWN} more"] if len(odd) > _SHOWN else []
    return (
        f"{len(odd)} of {len(gaps)} distances between slices are not {usual:.2f} mm: {', '.join([*said, *more])};"
        " find the slices that are missing, or part the series where it changes"
    )


def _missing(steps: float) -> str:
    """Say how many slices a gap of so many steps lacks, where it is a whole number."""
    count = round(steps) - 1
    if count < 1 or abs(steps - round(steps)) > LARGEST_DISPLACEMENT:
        return ""
    return f" ({count} missing)"


def _told_apart(planes: Sequence[Plane]) -> str:
    """Say what tells planes of one place apart."""
    values: dict[str, set[str]] = {}
    for plane in planes:
        for tag, value in plane.told:
            values.setdefault(tag, set()).add(value)
    differing = [tag for tag, found in values.items() if len(found) > 1]
    if not differing:
        return "no attribute tells them apart; keep one of each"
    return f"they differ in {', '.join(differing)}; put one of each into a folder of its own"


def _astray(planes: Sequence[Plane], positions: FloatArray, step: FloatArray) -> str:
    """Say which planes lie off the straight line through the first and the last; empty where none does."""
    line = positions[0] + np.arange(len(planes))[:, None] * step
    limit = LARGEST_DISPLACEMENT * max(float(np.linalg.norm(step)), min(planes[0].spacing_mm))
    off = np.linalg.norm(positions - line, axis=1)
    astray = [plane for plane, distance in zip(planes, off.tolist(), strict=True) if distance > limit]
    if not astray:
        return ""
    return f"slices up to {off.max():.2f} mm away from an even stack: {names(astray)}; part the series where it changes"


def name(plane: Plane) -> str:
    """Return a plane's name for a message: its file's, without folders, and its frame."""
    return plane.path.name if plane.frame is None else f"frame {plane.frame + 1} of {plane.path.name}"


def names(planes: Sequence[Plane]) -> str:
    """Return some planes' names, and how many more there are."""
    more = f" and {len(planes) - _SHOWN} more" if len(planes) > _SHOWN else ""
    return ", ".join(name(plane) for plane in planes[:_SHOWN]) + more
