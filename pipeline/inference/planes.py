"""LogitPlanes: what flows from the windows to the labelling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LogitPlanes:
    """Finished planes of logits, in order along the stream's axis.

    Attributes:
        start: index of the first plane along the stream's axis.
        logits: (K, n, A, B) float32; n planes along the stream's axis, then the two other axes in their order.
    """

    start: int
    logits: Tensor
