"""Deciding: how the logits of a voxel become its class, for a softmax over classes and for overlapping regions.

    softmax   the largest logit, the first of equal ones
    regions   the last region whose logit is above 0, else background

Both are settled between corners by the corners alone where these agree. A linear interpolation is a convex combination
of its corners. If one logit is at least any other at all corners, it is so between them. If a region's logit is above 0
at all corners it is above 0 between them, and if those of all later regions are at most 0 at all corners they are
between them: so where the last region above 0, or background, is one at all corners, it is so between them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Output

Classes = NDArray[Any]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Decision:
    """How the logits of one kind of network become classes.

    A voxel's class is found by going through its logits in order: one that is above the bar takes the voxel. A softmax
    then raises the bar to it; that of regions stays at 0.

    Attributes:
        first_class: the class of the first logit; a region's class is one more than its index, 0 is background.
        bar: what a logit must be above to take the voxel.
        rises: whether the bar is raised.
    """

    first_class: int
    bar: float
    rises: bool

    def count(self, logits: int) -> int:
        """Return the number of classes, background included, of so many logits."""
        return logits + self.first_class

    def classes(self, logits: Logits) -> Classes:
        """Return the class at each voxel.

        Args:
            logits: (K, V), finite.

        Returns:
            (V,) of the smallest unsigned type that holds the number of classes, too.
        """
        ranks = _ranks(len(logits))[:, None]
        # By the greatest rank of a logit that takes the voxel: in a tenth of the time of numpy's argmax.
        if self.rises:
            return np.asarray(len(logits) - ((logits == logits.max(axis=0)) * ranks[::-1]).max(axis=0), ranks.dtype)
        return np.asarray(((logits > self.bar) * ranks).max(axis=0), ranks.dtype)

    def possible(self, low: Logits, high: Logits) -> NDArray[np.bool_]:
        """Tell which logits can take a voxel somewhere in a cell.

        Args:
            low: (M, K) the smallest of each logit's corners.
            high: (M, K) the largest.

        Returns:
            (M, K), at least one for each cell whose corners disagree.
        """
        if self.rises:
            return np.asarray(high >= low.max(axis=1, keepdims=True))
        # A region that is above 0 at all corners leaves none of its cell to those before it.
        ranks = _ranks(low.shape[1])
        return np.asarray((high > self.bar) & (ranks >= ((low > self.bar) * ranks).max(axis=1, keepdims=True)))


def _ranks(count: int) -> Classes:
    """Return (count,) ranks from 1, of the smallest unsigned type that holds the number of classes, too."""
    return np.arange(1, count + 1, dtype=np.min_scalar_type(count + 1))


DECISIONS: dict[Output, Decision] = {
    "softmax": Decision(first_class=0, bar=-np.inf, rises=True),
    "regions": Decision(first_class=1, bar=0.0, rises=False),
}
