"""DICOM SEG read: the frames of each segment, each put where it says that it lies on a series' grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.errors import GeometryError, VolumeError
from pipeline.geometry import FloatArray
from pipeline.volumes.dicom.annotations.drawn import Drawn, names_apart, pick
from pipeline.volumes.dicom.annotations.placing import Placing
from pipeline.volumes.dicom.headers import pydicom_quiet
from pipeline.volumes.dicom.stacking import LARGEST_DISPLACEMENT
from pipeline.volumes.formats.layout import Array


def segments(
    dataset: Any, placing: Placing, wanted: Sequence[str], where: str, threshold: float = 0.5
) -> Iterator[Drawn]:
    """Yield the segments of a SEG.

    Args:
        dataset: pydicom's.
        placing: of the series onto whose grid they are put.
        wanted: names, in the order in which they come; none: all, in the object's order.
        where: names the object in messages.
        threshold: from which share of its largest value a voxel of a FRACTIONAL segment belongs to it.

    Raises:
        VolumeError: it holds no segment of a name that is wanted, or says not where its frames lie.
        GeometryError: its pixels are not the series'.
    """
    # Number 0 is the background of a label map.
    described = [segment for segment in dataset.get("SegmentSequence") or () if int(segment.SegmentNumber)]
    numbers = [int(segment.SegmentNumber) for segment in described]
    names = names_apart(numbers, [str(segment.get("SegmentLabel") or "") for segment in described])
    frames = _frames(dataset, where)
    kind = str(dataset.get("SegmentationType") or "BINARY")
    places = [_indices(holders, dataset, placing, where) for holders in frames]
    for name in pick(names, wanted, where):
        number = numbers[names.index(name)]
        own = [at for at, holders in enumerate(frames) if kind == "LABELMAP" or _segment_of(holders) == number]
        mask = np.zeros(placing.series.geometry.shape, dtype=np.bool_)
        for at, values in zip(own, _values(dataset, own), strict=True):
            rows, columns = np.nonzero(_inside(values, kind, number, threshold, dataset))
            place = np.rint(places[at] @ np.stack([columns, rows, np.ones_like(rows)])).astype(np.intp)
            mask[tuple(place)] = True
        remark = f"fractions, of which {threshold:g} and more count as inside"
        yield Drawn(name, mask, (remark,) if kind == "FRACTIONAL" else ())


def _frames(dataset: Any, where: str) -> list[list[Any]]:
    """Return of each frame the items in which its attributes stand, its own before those that all share."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence")
    if not per_frame:
        raise VolumeError(f"{where}: a SEG that says nothing of its frames (no per-frame functional groups)")
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or ())
    return [
        [
            item
            for group in (groups, *shared)
            for sequence in group
            if sequence.VR == "SQ"
            for item in sequence.value[:1]
        ]
        for groups in per_frame
    ]


def _found(holders: Sequence[Any], keyword: str) -> Any:
    """Return an attribute of a frame; None where it has none."""
    return next((holder[keyword].value for holder in holders if keyword in holder), None)


def _segment_of(holders: Sequence[Any]) -> int | None:
    """Return the number of the segment that a frame belongs to."""
    number = _found(holders, "ReferencedSegmentNumber")
    return None if number is None else int(number)


def _indices(holders: Sequence[Any], dataset: Any, placing: Placing, where: str) -> FloatArray:
    """Return (3, 3): a frame's (column, row, 1) to column, row and slice of the series."""
    position, orientation, spacing = (
        _found(holders, keyword) for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    )
    if position is None or orientation is None or spacing is None:
        raise VolumeError(f"{where}: a frame of it does not say where it lies in space")
    origin, directions = np.array(position, np.float64), np.array(orientation, np.float64).reshape(2, 3)
    along_row, along_column = directions[0] * float(spacing[1]), directions[1] * float(spacing[0])
    last = np.array([int(dataset.Columns) - 1, int(dataset.Rows) - 1])
    corners = np.array([[0, 0], [last[0], 0], [0, last[1]], last])
    at = placing.to_index(origin + corners @ np.stack([along_row, along_column]))
    nearest = np.rint(at)
    on_centres = np.abs(at - nearest).max() <= LARGEST_DISPLACEMENT
    inside = (nearest >= 0).all() and (nearest < placing.series.geometry.shape).all()
    ways = nearest[1:3] - nearest[0]
    # Along one axis of the series, whichever, a voxel a pixel.
    along_axes = all(sorted(np.abs(way).tolist()) == [0, 0, count] for way, count in zip(ways, last, strict=True))
    if not (on_centres and inside and along_axes):
        raise GeometryError(
            f"{where}: its pixels are not those of {placing.series}, {placing.series.geometry}; "
            "give the series that it was drawn on"
        )
    steps = ways / np.maximum(last, 1)[:, None]
    return np.column_stack([*steps, nearest[0]])


def _values(dataset: Any, frames: Sequence[int]) -> Iterator[Array]:
    """Yield the pixels (rows, columns) of some frames; never all of them at once."""
    if frames and int(dataset.BitsAllocated) == 1 and not dataset.file_meta.TransferSyntaxUID.is_compressed:
        yield from (_bits(dataset, number) for number in frames)
    elif frames:
        yield from pydicom_quiet().pixels.iter_pixels(dataset, indices=list(frames))


def _bits(dataset: Any, number: int) -> Array:
    """Return a frame of single bits, which may begin within a byte (PS3.5 8.2), as pydicom's own iterator knows not."""
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    first = number * rows * columns
    stored = np.frombuffer(dataset.PixelData, np.uint8)[first // 8 : -(-(first + rows * columns) // 8)]
    bits = np.unpackbits(stored, bitorder="little")[first % 8 :][: rows * columns]
    if bits.size < rows * columns:
        raise RuntimeError("the pixels end before the last frame does")
    return bits.reshape(rows, columns)


def _inside(values: Array, kind: str, number: int, threshold: float, dataset: Any) -> Array:
    """Return which pixels of a frame belong to a segment."""
    if kind == "LABELMAP":
        return np.asarray(values == number)
    largest = float(dataset.get("MaximumFractionalValue") or 255)
    return np.asarray(values >= max(1.0, threshold * largest) if kind == "FRACTIONAL" else values > 0)
