"""Which predicted lesion is which of the reference's: pairs by their overlap, each lesion in one of them at most.

Pairs are taken by falling IoU, each whose two lesions are still free. A pair counts at a threshold where its IoU is at
least the threshold, so that one matching serves all thresholds: what is taken first never depends on what comes after.
Above 0.5 no lesion has two candidates, and the matching is the only one there is (Kirillov et al., CVPR 2019, who ask
for more than 0.5); below, it is what panoptica calls naive threshold matching (Kofler et al., arXiv:2312.02608).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.volumes.components import Components


@dataclass(frozen=True)
class Pair:
    """A lesion of the reference and a predicted one that have voxels in common; both by their numbers, from 1."""

    reference: int
    prediction: int
    iou: float


def overlapping(reference: Components, prediction: Components) -> list[Pair]:
    """Return the pairs that have a voxel in common, by falling IoU, equal ones by their numbers.

    Args:
        reference: lesions.
        prediction: lesions on the same grid.
    """
    both = (reference.numbers > 0) & (prediction.numbers > 0)
    base = prediction.voxels.size + 1
    joint, counts = np.unique(
        reference.numbers[both].astype(np.int64) * base + prediction.numbers[both], return_counts=True
    )
    found = zip(*np.divmod(joint, base), counts, strict=True)
    pairs = [_pair(int(one), int(other), int(common), reference, prediction) for one, other, common in found]
    return sorted(pairs, key=lambda pair: (-pair.iou, pair.reference, pair.prediction))


def matched(pairs: list[Pair]) -> Iterator[Pair]:
    """Yield those of the pairs, which come by falling IoU, whose lesions are in no pair before."""
    taken = set[tuple[str, int]]()
    for pair in pairs:
        own = {("reference", pair.reference), ("prediction", pair.prediction)}
        if taken.isdisjoint(own):
            taken |= own
            yield pair


def _pair(one: int, other: int, common: int, reference: Components, prediction: Components) -> Pair:
    """Return two lesions with the overlap of so many voxels."""
    together = int(reference.voxels[one - 1]) + int(prediction.voxels[other - 1]) - common
    return Pair(one, other, common / together)
