"""What of a case is scored: its labels or its regions, those that people looked for, where they know what is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from pipeline.data.manifest import Case
from pipeline.data.plan import Plan


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
    def num_classes(self) -> int:
        """One more than the largest class index."""
        return 1 + max(index for own in self.classes.values() for index in own)
