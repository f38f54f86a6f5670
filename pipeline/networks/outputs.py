"""What a network's logits stand for, where they are torch's: the class of each voxel."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config import Output


def classes_of(logits: Tensor, output: Output) -> Tensor:
    """Return the class (...) int64 of each voxel of logits (K, ...).

    Args:
        logits: of K classes, or of K regions that may overlap.
        output: softmax: the largest logit, the first of equal ones; regions: the last above 0, whose class is one more
            than its index, else the background, 0.
    """
    if output == "softmax":
        return logits.argmax(0)
    ranks = torch.arange(1, len(logits) + 1, device=logits.device).view(-1, *[1] * (logits.ndim - 1))
    return ((logits > 0) * ranks).amax(0)
