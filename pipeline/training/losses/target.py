"""What a patch is to become, and what of it is known."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Target:
    """The reference of a batch of patches.

    Attributes:
        classes: (N, X, Y, Z) int64 class indices of the plan's labels; the index after the last class is a voxel of
            which nobody knows.
        annotated: (N, L) bool: which of the plan's labels were annotated in the patch's case, background included;
            None: all of them.
    """

    classes: Tensor
    annotated: Tensor | None = None
