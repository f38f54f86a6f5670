"""Lesions of one case: found as connected components, and each matched with one of the other side at most.

Lesions below the smallest volume are left out of reference and prediction alike before anything is compared: what is
predicted over a lesion that was too small to count is then spurious, if it is large enough itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.lesions.matching import Pair, matched, overlapping
from pipeline.evaluation.structures import Box, StructureMasks, Structures
from pipeline.geometry import Geometry
from pipeline.volumes.components import Components, Connectivity

Side = Literal["reference", "prediction"]


@dataclass(frozen=True)
class LesionRules:
    """How lesions are told apart and counted.

    Attributes:
        structures: names of those that are counted lesion by lesion; empty: none is.
        iou_thresholds: rising.
        connectivity: of the voxels of one lesion.
        smallest_mm3: lesions below it are left out.
    """

    structures: tuple[str, ...] = ()
    iou_thresholds: tuple[float, ...] = (0.1, 0.25, 0.5)
    connectivity: Connectivity = 26
    smallest_mm3: float = 0.0


@dataclass(frozen=True)
class Lesion:
    """One lesion of the reference, or one predicted.

    Attributes:
        side: where it is from.
        number: within its case, structure and side, the largest is 1.
        volume_ml: its own.
        centre_mm: the mean of its voxels' centres, RAS+.
        is_touched: whether it has a voxel in common with the other side.
        partner: number of the one that it is matched with; None: it has none.
        iou, dice: with its partner; 0 where it has none.
    """

    side: Side
    number: int
    volume_ml: float
    centre_mm: tuple[float, float, float]
    is_touched: bool = False
    partner: int | None = None
    iou: float = 0.0
    dice: float = 0.0

    @property
    def status(self) -> str:
        """Matched; touched, where another is the partner of what it overlaps with; else missed or spurious."""
        if self.partner is not None:
            return "matched"
        return "touched" if self.is_touched else "missed" if self.side == "reference" else "spurious"


@dataclass(frozen=True)
class LesionScore:
    """One structure of one case, lesion by lesion.

    Attributes:
        class_name: of the structure.
        lesions: of the reference, then the predicted ones; each the largest first.
    """

    class_name: str
    lesions: tuple[Lesion, ...]

    def of(self, side: Side) -> list[Lesion]:
        """Return the lesions of one side."""
        return [lesion for lesion in self.lesions if lesion.side == side]


def score_lesions(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    native: Geometry,
    structures: Structures,
    rules: LesionRules,
) -> tuple[LesionScore, ...]:
    """Find and match the lesions of one case.

    Args:
        prediction: (X, Y, Z) class indices on the native grid; 0 is the background.
        reference: the same of the label drawn by people.
        native: that grid.
        structures: what is scored; voxels that the reference ignores are of no lesion, on either side.
        rules: which of them are counted lesion by lesion, and how.

    Returns:
        One for each structure that is counted and that people looked for, in the structures' order.

    Raises:
        ValueError: the grids differ, or an array holds an index outside the classes.
    """
    if not rules.structures:
        return ()
    masks = structures.masks(prediction, reference)
    counted = [found for found in masks if found.name in rules.structures and found.name not in structures.unknown]
    return tuple(_score(found, native, rules) for found in counted)


def _score(masks: StructureMasks, native: Geometry, rules: LesionRules) -> LesionScore:
    """Score one structure."""
    smallest_voxels = rules.smallest_mm3 / (1000 * native.voxel_volume_ml)
    found: dict[Side, Components] = {
        "reference": Components.of(masks.reference, rules.connectivity, smallest_voxels),
        "prediction": Components.of(masks.prediction, rules.connectivity, smallest_voxels),
    }
    pairs = overlapping(found["reference"], found["prediction"])
    chosen = [*matched(pairs)]
    sides = [_lesions(side, components, masks.box, native, pairs, chosen) for side, components in found.items()]
    return LesionScore(masks.name, tuple(lesion for side in sides for lesion in side))


def _lesions(
    side: Side, components: Components, box: Box, native: Geometry, pairs: Sequence[Pair], chosen: Sequence[Pair]
) -> list[Lesion]:
    """Return one side's lesions."""
    start = np.array([part.start for part in box])
    centres = native.to_mm(components.centres + start)
    touched = {getattr(pair, side) for pair in pairs}
    own = {getattr(pair, side): pair for pair in chosen}
    other: Side = "prediction" if side == "reference" else "reference"
    return [
        Lesion(
            side=side,
            number=number,
            volume_ml=int(voxels) * native.voxel_volume_ml,
            centre_mm=tuple(map(float, centre)),  # type: ignore[arg-type]
            is_touched=number in touched,
            partner=getattr(own[number], other) if number in own else None,
            iou=own[number].iou if number in own else 0.0,
            # Of the same two masks: 2 IoU / (1 + IoU).
            dice=2 * own[number].iou / (1 + own[number].iou) if number in own else 0.0,
        )
        for number, (voxels, centre) in enumerate(zip(components.voxels, centres, strict=True), start=1)
    ]
