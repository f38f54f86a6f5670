"""Rules that may be applied to a label's components, and what its Dice is after each.

That follows from the volumes of the components and from what each has in common with the reference: a case is looked
at once, and a rule costs a sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.data.plan import Plan
from pipeline.geometry import FloatArray
from pipeline.inference.postprocessing import kept
from pipeline.volumes.components import VOLUME_SLACK, components_of

# Where thresholds are tried: quantiles of the volumes of all components, and of those beside the largest of a case.
QUANTILES, QUANTILES_BESIDE = (0.01, 0.02, 0.05, 0.1), (0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class Rule:
    """What stays of a label: its largest component, or its components of at least a volume."""

    largest_only: bool = False
    smallest_ml: float = 0.0

    def as_text(self) -> str:
        """Name the rule."""
        return "largest component" if self.largest_only else f"at least {self.smallest_ml:g} ml"


@dataclass(frozen=True, eq=False)
class Pieces:
    """The components of one label in one prediction.

    Attributes:
        volumes_ml: (n,) of each.
        known: (n,) voxels of each of which the reference says what they are.
        common: (n,) voxels of each that are of the label in the reference.
        reference: voxels of the label in the reference.
    """

    volumes_ml: FloatArray
    known: NDArray[Any]
    common: NDArray[Any]
    reference: int

    def dice(self, rule: Rule) -> float:
        """Return the Dice of what a rule leaves; 1 where rightly nothing is left, nan where there never was anything.

        A structure that is missed or invented counts 0, as where members are compared.
        """
        if self.reference == 0 and self.known.sum() == 0:
            return math.nan
        stays = kept(self.volumes_ml, rule.smallest_ml, rule.largest_only)
        total = self.reference + int(self.known[stays].sum())
        return 2 * int(self.common[stays].sum()) / total if total else 1.0


def pieces_of(classes: NDArray[Any], reference: NDArray[Any], plan: Plan, voxel_ml: float) -> dict[str, Pieces]:
    """Take a prediction apart: label -> its components.

    Args:
        classes: (X, Y, Z) class indices that were predicted.
        reference: (X, Y, Z) class indices that people drew, with those of voxels that they left open.
        plan: names the labels, in the order of their class indices.
        voxel_ml: volume of a voxel.
    """
    known = reference != plan.ignored_class
    boxes = ndimage.find_objects(classes, max_label=len(plan.labels) - 1)
    found = {}
    for index, name in enumerate(plan.labels):
        if index:
            found[name] = _take_apart(classes == index, reference == index, known, boxes[index - 1], voxel_ml)
    return found


def candidates(pieces: Sequence[Pieces]) -> list[Rule]:
    """Return the rules to try: thresholds from the volumes of the components, without a look at the references."""
    volumes = np.concatenate([one.volumes_ml for one in pieces]) if pieces else np.zeros(0)
    if not volumes.size:
        return []
    beside = np.concatenate([np.sort(one.volumes_ml)[:-1] for one in pieces])
    found = set(np.quantile(volumes, QUANTILES, method="lower").tolist())
    if beside.size:
        found |= set(np.quantile(beside, QUANTILES_BESIDE, method="lower").tolist())
    thresholds = sorted({_just_above(volume) for volume in found})
    largest = [Rule(largest_only=True)] if beside.size else []
    return [*largest, *(Rule(smallest_ml=ml) for ml in thresholds)]


def _just_above(volume: float) -> float:
    """Return the next number of three significant digits: a threshold that takes components of this volume."""
    volume *= 1 + VOLUME_SLACK
    step = 10.0 ** (math.floor(math.log10(volume)) - 2)
    return float(f"{(math.floor(volume / step) + 1) * step:.3g}")


def _take_apart(
    mask: NDArray[np.bool_],
    drawn: NDArray[np.bool_],
    known: NDArray[np.bool_],
    box: tuple[slice, ...] | None,
    voxel_ml: float,
) -> Pieces:
    """Return the components of a mask, which lies in a box; None: it is empty."""
    reference = int(drawn.sum())
    if box is None:
        nothing = np.zeros(0, np.int64)
        return Pieces(nothing.astype(np.float64), nothing, nothing, reference)
    components = components_of(mask[box])
    number = int(components.max()) + 1
    sizes, inside, common = (
        np.bincount(components[where].ravel(), minlength=number)[1:] for where in (..., known[box], drawn[box])
    )
    return Pieces(np.asarray(sizes * voxel_ml, np.float64), inside, common, reference)
