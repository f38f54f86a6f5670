"""A network and its loss as one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.networks.contract import Network
from pipeline.training.losses.target import Target
from pipeline.training.losses.truth import Regions, truth_of


class Objective(nn.Module):
    """A network and its loss as one module: what is compiled, distributed and differentiated.

    With deep supervision the loss at each coarser level counts half of the next finer one; the weights sum to one.

    Args:
        network: what is trained.
        loss: of (logits, Truth), or of (output, Tensor) where targets are images.
        deep_supervision: judge the coarser outputs too.
        regions: the class indices of each region that the network's outputs stand for; None: they stand for classes.

    Attributes:
        progress: share of the training that is done, 0 to 1; set before each step, for losses that change with it.
    """

    def __init__(
        self,
        network: Network,
        loss: Callable[[Tensor, Any], Tensor],
        *,
        deep_supervision: bool,
        regions: Regions | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.deep_supervision = deep_supervision
        self.regions = regions
        self.progress = 1.0
        self._judge = Objective._loss_of

    def forward(self, image: Tensor, target: Target | Tensor) -> Tensor:
        """Return the loss of images (N, C, *input) against a target of (N, *output), or against clean images."""
        if isinstance(target, Tensor):
            return self.loss(self.network(image), target)
        outputs = self.network.deep_supervision(image) if self.deep_supervision else [self.network(image)]
        return self._judge(self, outputs, target)

    def compile_network_only(self) -> None:
        """Have torch.compile leave the loss as it is: one that changes with the progress it would compile at each step
        anew.
        """
        self._judge = torch.compiler.disable(self._judge)  # type: ignore[no-untyped-call]

    def _loss_of(self, outputs: Sequence[Tensor], target: Target) -> Tensor:
        """Return the weighted mean of the losses of the logits of all levels, finest first."""
        weights = [0.5**level for level in range(len(outputs))]
        losses = [weight * self._judged(logits, target) for weight, logits in zip(weights, outputs, strict=True)]
        return torch.stack(losses).sum() / sum(weights)

    def _judged(self, logits: Tensor, target: Target) -> Tensor:
        """Return the loss of one level's logits (N, K, X, Y, Z)."""
        own = Target(_resized(target.classes, logits.shape[2:]), target.annotated)
        truth = truth_of(own, logits.shape[1], regions=self.regions, progress=self.progress)
        return self.loss(logits, truth)


def _resized(classes: Tensor, size: torch.Size) -> Tensor:
    """Return class indices on a coarser grid, by the nearest voxel."""
    if classes.shape[1:] == size:
        return classes
    return F.interpolate(classes[:, None].float(), list(size), mode="nearest-exact")[:, 0].long()
