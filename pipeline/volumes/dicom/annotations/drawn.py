"""Structures as they are found in SEG and RTSTRUCT, on their series' grid, and how they become one label map."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import VolumeError
from pipeline.geometry import Geometry
from pipeline.volumes.volume import Volume, smallest_type

Overlap = Literal["refuse", "first", "last"]
_SHOWN = 8  # Of the names or pairs that an error is about.


@dataclass(frozen=True, eq=False)
class Drawn:
    """A structure of a SEG or RTSTRUCT.

    Attributes:
        name: as the object says; it is told from namesakes by its number.
        mask: (columns, rows, slices) on the series' grid.
        remarks: what was made of it that a user should know, or left out.
    """

    name: str
    mask: NDArray[np.bool_]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class LabelMap:
    """One label map of several structures.

    Attributes:
        label: (columns, rows, slices), 0 where no structure is.
        labels: name -> value, "background" first.
        remarks: what a user should know, a line each.
    """

    label: Volume
    labels: dict[str, int]
    remarks: tuple[str, ...]


def names_apart(numbers: Sequence[int], names: Sequence[str]) -> list[str]:
    """Return names that differ: namesakes, and structures without a name, get their numbers."""
    given = [name.strip() or "unnamed" for name in names]
    return [
        name if given.count(name) == 1 and name != "background" else f"{name} #{number}"
        for number, name in zip(numbers, given, strict=True)
    ]


def pick(found: Sequence[str], wanted: Sequence[str], where: str) -> list[str]:
    """Return the names that are wanted, in that order; all where none is named.

    Raises:
        VolumeError: one is not among those found, or none is found.
    """
    missing = [name for name in wanted if name not in found]
    if missing or not found:
        held = ", ".join(found) or "no structure"
        raise VolumeError(f"{where}: has no {', '.join(missing) or 'structures'}; it holds {held}")
    return list(dict.fromkeys(wanted)) or list(found)


def painted(drawn: Iterable[Drawn], geometry: Geometry, overlap: Overlap, where: str) -> LabelMap:
    """Put structures into one label map, with the values 1, 2, ... in their order.

    Args:
        drawn: the structures.
        geometry: of the series.
        overlap: what a voxel of two structures becomes: an error, the first's or the last's.
        where: names the object in messages.

    Raises:
        VolumeError: structures overlap, and may not.
    """
    label = np.zeros(geometry.shape, np.uint16)
    labels = {"background": 0}
    remarks: list[str] = []
    shared: dict[tuple[str, str], int] = {}
    for value, one in enumerate(drawn, start=1):
        names = list(labels)
        under = label[one.mask]
        for other in np.unique(under[under > 0]).tolist():
            shared[names[other], one.name] = int((under == other).sum())
        label[one.mask & (label == 0) if overlap == "first" else one.mask] = value
        labels[one.name] = value
        remarks += [f"{one.name}: {remark}" for remark in one.remarks]
        if not one.mask.any():
            remarks.append(f"{one.name}: empty")
    pairs = [f"{one} and {two} share {count} voxels" for (one, two), count in shared.items()]
    if pairs and overlap == "refuse":
        more = f", and {len(pairs) - _SHOWN} more pairs" if len(pairs) > _SHOWN else ""
        raise VolumeError(
            f"{where}: {', '.join(pairs[:_SHOWN])}{more}; a label map holds one label a voxel: "
            "choose structures by --label, or say by --overlap first or last which of two is kept"
        )
    remarks += [f"{pair}, which the {overlap} of them keeps" for pair in pairs]
    array = label.astype(smallest_type(0, len(labels) - 1))
    return LabelMap(Volume(array, geometry), labels, tuple(remarks))
