"""LOSSES: every loss by its name in the YAML; a builder of options that returns (logits, target) -> scalar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline import options as _options
from pipeline.networks.contract import Network

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


LOSSES: dict[str, Callable[..., Loss]] = {
    "dice_ce": dice_ce,
    "cross_entropy": cross_entropy,
}


def build_loss(name: str, options: Mapping[str, Any]) -> Loss:
    """Build a loss of the table: (logits (N, K, X, Y, Z), target (N, X, Y, Z) int64) -> scalar, 0 at best.

    Raises:
        ValueError: the name or an option is wrong.
    """
    return LOSSES[name](**_options.validated_options(LOSSES, name, options))


def check_options(name: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every problem of a loss's name and options as (key, message)."""
    return _options.check_options(LOSSES, name, options)


class Objective(nn.Module):
    """A network and its loss as one module: what is compiled, distributed and differentiated.

    With deep supervision the loss at each coarser level counts half of the next finer one; the weights sum to one.
    """

    def __init__(self, network: Network, loss: Loss, *, deep_supervision: bool) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.deep_supervision = deep_supervision

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Return the loss of (N, C, *input) against (N, *output) int64 class indices, or what else the loss takes."""
        if not self.deep_supervision:
            return self.loss(self.network(image), target)
        outputs = self.network.deep_supervision(image)
        weights = [0.5**level for level in range(len(outputs))]
        losses = [
            weight * self.loss(logits, _resized(target, logits.shape[2:]))
            for weight, logits in zip(weights, outputs, strict=True)
        ]
        return torch.stack(losses).sum() / sum(weights)


def _soft_dice(probabilities: Tensor, target: Tensor, *, batch: bool, smooth: float) -> Tensor:
    """Return the mean soft Dice of the foreground classes."""
    one_hot = torch.zeros_like(probabilities).scatter_(1, target[:, None], 1.0)
    axes = (0, 2, 3, 4) if batch else (2, 3, 4)
    overlap = (probabilities * one_hot).sum(axes)[..., 1:]
    total = (probabilities.sum(axes) + one_hot.sum(axes))[..., 1:]
    return ((2 * overlap + smooth) / (total + smooth)).mean()


def _resized(target: Tensor, size: torch.Size) -> Tensor:
    """Return class indices on a coarser grid, by the nearest voxel."""
    if target.shape[1:] == size:
        return target
    return F.interpolate(target[:, None].float(), list(size), mode="nearest-exact")[:, 0].long()
