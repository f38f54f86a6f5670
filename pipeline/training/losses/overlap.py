"""Losses of overlap and of single voxels, over all voxels of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
Weight = Annotated[float, Field(ge=0)]


def dice_ce(
    *,
    batch: bool = True,
    dice_weight: Weight = 1.0,
    ce_weight: Weight = 1.0,
    smooth: Annotated[float, Field(gt=0)] = 1e-5,
) -> Loss:
    """Soft Dice over the foreground classes plus cross-entropy, both over all voxels (Isensee et al. 2021).

    Args:
        batch: pool the Dice sums over the batch, so that a patch without a class doesn't ask for none of it at any
            price.
        dice_weight: weight of the Dice term.
        ce_weight: weight of the cross-entropy.
        smooth: added to numerator and denominator, so that an absent class that is not predicted scores 1.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        log_probabilities = F.log_softmax(logits.float(), dim=1)
        cross_entropy = F.nll_loss(log_probabilities, target)
        dice = _soft_dice(log_probabilities.exp(), target, batch=batch, smooth=smooth)
        return ce_weight * cross_entropy + dice_weight * (1 - dice)

    return loss


def cross_entropy() -> Loss:
    """Cross-entropy over all voxels."""
    return lambda logits, target: F.cross_entropy(logits.float(), target)


def mean_squared_error(output: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error over all voxels and channels: what `task: denoise` learns by; no segmentation's loss."""
    return F.mse_loss(output.float(), clean)


def _soft_dice(probabilities: Tensor, target: Tensor, *, batch: bool, smooth: float) -> Tensor:
    """Return the mean soft Dice of the foreground classes."""
    one_hot = torch.zeros_like(probabilities).scatter_(1, target[:, None], 1.0)
    axes = (0, 2, 3, 4) if batch else (2, 3, 4)
    overlap = (probabilities * one_hot).sum(axes)[..., 1:]
    total = (probabilities.sum(axes) + one_hot.sum(axes))[..., 1:]
    return ((2 * overlap + smooth) / (total + smooth)).mean()
