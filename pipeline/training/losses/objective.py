"""A network and its loss as one module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.networks.contract import Network
from pipeline.training.losses.overlap import Loss
from pipeline.training.losses.target import Target


class Objective(nn.Module):
    """A network and its loss as one module: what is compiled, distributed and differentiated.

    With deep supervision the loss at each coarser level counts half of the next finer one; the weights sum to one.
    """

    def __init__(self, network: Network, loss: Loss, *, deep_supervision: bool) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.deep_supervision = deep_supervision

    def forward(self, image: Tensor, target: Target | Tensor) -> Tensor:
        """Return the loss of (N, C, *input) against a target, or against what else the loss takes."""
        target = target.classes if isinstance(target, Target) else target
        if not self.deep_supervision:
            return self.loss(self.network(image), target)
        outputs = self.network.deep_supervision(image)
        weights = [0.5**level for level in range(len(outputs))]
        losses = [
            weight * self.loss(logits, _resized(target, logits.shape[2:]))
            for weight, logits in zip(weights, outputs, strict=True)
        ]
        return torch.stack(losses).sum() / sum(weights)


def _resized(target: Tensor, size: torch.Size) -> Tensor:
    """Return class indices on a coarser grid, by the nearest voxel."""
    if target.shape[1:] == size:
        return target
    return F.interpolate(target[:, None].float(), list(size), mode="nearest-exact")[:, 0].long()
