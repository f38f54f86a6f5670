"""What of a case is scored: its labels or its regions, those that people looked for, where they know what is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import Case
from pipeline.data.plan import Plan

Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]


@dataclass(frozen=True, eq=False)
class StructureMasks:
    """One structure in the prediction and in the reference.

    Attributes:
        name: of the structure.
        box: around it in both, on the native grid; empty where it is in neither.
        prediction, reference: (X, Y, Z) within that box.
    """

    name: str
    box: Box
    prediction: Mask
    reference: Mask


@dataclass(frozen=True)
class Structures:
    """What of a case is scored.

    Attributes:
        classes: name -> its class indices, none of them 0, the background: a label has one, a region several.
        ignored: class index in the reference of voxels of which nobody knows what they are; None: there are none.
        unknown: names of the structures that nobody looked for in this case.
    """

    classes: Mapping[str, tuple[int, ...]]
    ignored: int | None = None
    unknown: frozenset[str] = frozenset()

    @classmethod
    def of(cls, plan: Plan, case: Case) -> Self:
        """Return what a model of a plan is scored by in a case: regions where it has learned them, else labels."""
        names, classes = list(plan.labels), plan.structures
        unknown = (name for name, own in classes.items() if not case.is_annotated(names[index] for index in own))
        return cls(classes, plan.ignored_class if plan.has_ignored else None, frozenset(unknown))

    @classmethod
    def of_labels(cls, plan: Plan) -> Self:
        """Return the labels, also where regions are learned, of a case in which people looked for all of them."""
        classes = {name: (index,) for index, name in enumerate(plan.labels) if index}
        return cls(classes, plan.ignored_class if plan.has_ignored else None)

    @property
    def any_known(self) -> bool:
        """Whether people looked for any of them in this case."""
        return len(self.unknown) < len(self.classes)

    @property
    def num_classes(self) -> int:
        """One more than the largest class index."""
        return 1 + max(index for own in self.classes.values() for index in own)

    def masks(self, prediction: NDArray[np.integer], reference: NDArray[np.integer]) -> Iterator[StructureMasks]:
        """Yield each structure's masks; what the reference ignores is in neither.

        Args:
            prediction: (X, Y, Z) class indices on the native grid; 0 is the background.
            reference: the same of the label drawn by people.

        Raises:
            ValueError: the grids differ, or an array holds an index outside the classes.
        """
        if self.ignored is not None and prediction.shape == reference.shape:
            known = reference != self.ignored
            prediction, reference = (np.where(known, array, 0).astype(array.dtype) for array in (prediction, reference))
        _check(prediction, reference, self.num_classes)
        boxes = _boxes(prediction, reference, self.num_classes)
        for name, own in self.classes.items():
            box = _around([boxes[index - 1] for index in own])
            yield StructureMasks(name, box, _within(prediction[box], own), _within(reference[box], own))


def _within(classes: NDArray[np.integer], own: Iterable[int]) -> Mask:
    """Return the mask of the voxels of some classes."""
    return reduce(np.logical_or, (classes == index for index in own))


def _check(prediction: NDArray[np.integer], reference: NDArray[np.integer], classes: int) -> None:
    """Refuse arrays that are not class indices on one grid."""
    if prediction.ndim != 3 or prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} must share one 3-D grid")
    for name, array in (("prediction", prediction), ("reference", reference)):
        if array.min() < 0 or array.max() >= classes:
            raise ValueError(f"{name}: class indices {array.min()} to {array.max()}, expected 0 to {classes - 1}")


def _boxes(prediction: NDArray[np.integer], reference: NDArray[np.integer], classes: int) -> list[Box | None]:
    """Return for each foreground class the box that holds it in both arrays; None where it is in neither."""
    # Imported here: others name structures and never look for one.
    from scipy.ndimage import find_objects

    found = zip(*(find_objects(array, max_label=classes - 1) for array in (prediction, reference)), strict=True)
    return [None if pair == (None, None) else _around(pair) for pair in found]


def _around(boxes: Iterable[Box | None]) -> Box:
    """Return the smallest box that holds all given; an empty one where there are none."""
    there = [box for box in boxes if box is not None]
    if not there:
        return slice(0, 0), slice(0, 0), slice(0, 0)
    x, y, z = (_span(slices) for slices in zip(*there, strict=True))
    return x, y, z


def _span(slices: tuple[slice, ...]) -> slice:
    """Return the smallest slice that holds all given."""
    return slice(min(part.start for part in slices), max(part.stop for part in slices))
