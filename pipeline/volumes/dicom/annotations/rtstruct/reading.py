"""RTSTRUCT read: the closed contours of each ROI, filled on the slices of a series.

A slice takes the contours that lie nearest to it, if they are within half the distance between slices: normally those
in its very plane. They are matched by where they are; what image a contour says that it belongs to is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import GeometryError, VolumeError
from pipeline.geometry import FloatArray
from pipeline.volumes.dicom.annotations.drawn import Drawn, names_apart, pick
from pipeline.volumes.dicom.annotations.placing import Placing
from pipeline.volumes.dicom.annotations.rtstruct.filling import fill
from pipeline.volumes.dicom.stacking import LARGEST_DISPLACEMENT

# PS3.3 C.8.8.6.1: what encloses an area; points and open lines do not.
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_CONTOUR_DATA = 0x30060050
_SHORTEST_CONTOUR = 3
# Of the distance between slices: so near to half way between two, a contour is the upper one's.
_HALF_WAY = 1e-3


@dataclass(frozen=True, eq=False)
class _Contour:
    """A closed contour.

    Attributes:
        height_mm: along the series' normal.
        pixels: (n, 2) column and row.
    """

    height_mm: float
    pixels: FloatArray


def rois(dataset: Any, placing: Placing, wanted: Sequence[str], where: str) -> Iterator[Drawn]:
    """Yield the ROIs of an RTSTRUCT.

    Args:
        dataset: pydicom's.
        placing: of the series onto whose grid they are filled.
        wanted: names, in the order in which they come; none: all, in the object's order.
        where: names the object in messages.

    Raises:
        VolumeError: it holds no ROI of a name that is wanted, or is drawn in another frame of reference.
        GeometryError: a contour lies across the slices.
    """
    described = list(dataset.get("StructureSetROISequence") or ())
    numbers = [int(roi.ROINumber) for roi in described]
    names = names_apart(numbers, [str(roi.get("ROIName") or "") for roi in described])
    items = {int(item.ReferencedROINumber): item for item in dataset.get("ROIContourSequence") or ()}
    for name in pick(names, wanted, where):
        roi = described[names.index(name)]
        refuse_other_frame(roi.get("ReferencedFrameOfReferenceUID"), placing, f"{where}: {name}")
        item = items.get(numbers[names.index(name)])
        yield _filled(name, list(item.get("ContourSequence") or ()) if item else [], placing, where)


def refuse_other_frame(uid: Any, placing: Placing, where: str) -> None:
    """Refuse what is placed in another frame of reference than the series: its millimetres are other ones.

    Raises:
        VolumeError: so it is.
    """
    own = placing.series.frame_of_reference_uid
    if uid and own and str(uid) != own:
        raise VolumeError(
            f"{where}: drawn in another frame of reference than {placing.series}; give the series that it refers to"
        )


def _filled(name: str, items: Sequence[Any], placing: Placing, where: str) -> Drawn:
    """Return a ROI on the series' grid."""
    closed = [item for item in items if item.get("ContourGeometricType") in _CLOSED and _points(item) is not None]
    contours = [_contour(item, placing, f"{where}: {name}") for item in closed]
    slices, rows, columns = placing.shape
    mask = np.zeros((columns, rows, slices), dtype=np.bool_)
    heights = np.array(sorted({round(contour.height_mm, 2) for contour in contours}))
    taken = _taken(heights, placing)
    for number, height in taken.items():
        here = [contour.pixels for contour in contours if round(contour.height_mm, 2) == height]
        mask[:, :, number] = fill(here, (rows, columns)).T
    return Drawn(name, mask, tuple(_remarks(len(items) - len(closed), heights, taken, placing)))


def _points(item: Any) -> FloatArray | None:
    """Return a contour's points (n, 3), LPS mm; None where they enclose nothing."""
    if _CONTOUR_DATA not in item:
        return None
    data = item.get_item(_CONTOUR_DATA)
    # As it stands in the file: pydicom makes an object of each number, and takes 10 times as long.
    values = data.value.split(b"\\") if isinstance(data.value, bytes) else data.value
    try:
        numbers = np.array(values or [], dtype=np.float64)
    except ValueError:
        return None
    return numbers.reshape(-1, 3) if numbers.size >= 3 * _SHORTEST_CONTOUR and numbers.size % 3 == 0 else None


def _contour(item: Any, placing: Placing, where: str) -> _Contour:
    """Return a contour as it lies on the series."""
    points = _points(item)
    assert points is not None
    heights = points @ placing.normal
    if np.ptp(heights) > LARGEST_DISPLACEMENT * placing.step_mm:
        raise GeometryError(
            f"{where}: a contour runs over {np.ptp(heights):.2f} mm across the slices of {placing.series}; "
            "give the series that it was drawn on"
        )
    return _Contour(float(heights.mean()), placing.to_pixels(points))


def _taken(heights: FloatArray, placing: Placing) -> dict[int, float]:
    """Return slice -> height of the contours that it takes."""
    if not heights.size:
        return {}
    reach = placing.step_mm / 2
    margin = _HALF_WAY * placing.step_mm
    taken = {}
    for number, at in enumerate(placing.heights_mm.tolist()):
        nearest = float(heights[np.abs(heights - at).argmin()])
        if -reach - margin < nearest - at <= reach - margin:
            taken[number] = nearest
    return taken


def _remarks(left_out: int, heights: FloatArray, taken: dict[int, float], placing: Placing) -> Iterator[str]:
    """Yield what a user should know of how contours met slices."""
    if left_out:
        yield f"{left_out} points, open or broken contours left out: they enclose nothing"
    lost = len(heights) - len(set(taken.values()))
    if lost:
        yield f"the contours of {lost} of {len(heights)} planes left out: no slice of the series is nearest to them"
    off = [abs(height - placing.heights_mm[number]) for number, height in taken.items()]
    if off and max(off) > LARGEST_DISPLACEMENT * placing.step_mm:
        yield f"contours up to {max(off):.2f} mm beside the slices, each of which took the nearest"
    steps = np.diff(sorted(taken))
    if len(steps) and float(np.median(steps)) > 1:
        yield "contours on some of its slices only; those between stay empty"
