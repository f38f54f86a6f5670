"""Losses of single voxels: cross-entropy and focal loss, over the voxels that are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.training.distributed import pooled
from pipeline.training.losses.truth import Judged, Truth, judged

Loss = Callable[[Tensor, Truth], Tensor]
Weight = Annotated[float, Field(ge=0)]
Weights = Annotated[tuple[Weight, ...], Field(min_length=1)]
Smoothing = Annotated[float, Field(ge=0, lt=1)]


def cross_entropy(*, label_smoothing: Smoothing = 0.0, class_weights: Weights | None = None) -> Loss:
    """Cross-entropy over all voxels; for regions, the mean of a binary one for each.

    Voxels of which nobody knows are left out; classes that were not annotated count as background with it, and under
    regions leave out the voxels that may hold them.

    Args:
        label_smoothing: share of the reference spread evenly over all classes (Szegedy et al. 2016).
        class_weights: of the voxels of each class, background first, or of each region.
    """
    return focal(gamma=0.0, label_smoothing=label_smoothing, class_weights=class_weights)


def focal(
    *,
    gamma: Weight = 2.0,
    label_smoothing: Smoothing = 0.0,
    class_weights: Weights | None = None,
) -> Loss:
    """Focal loss: cross-entropy that counts less the surer the network rightly is (Lin et al. 2017).

    What is not known is left out as under `cross_entropy`.

    Args:
        gamma: a voxel's cross-entropy is weighted by (1 - probability of what is true) to this power.
        label_smoothing: as for `cross_entropy`.
        class_weights: as for `cross_entropy`; the paper's alpha.
    """
    term = VoxelTerm(gamma, label_smoothing, class_weights)
    return lambda logits, truth: term(judged(logits, truth))


@dataclass(frozen=True)
class VoxelTerm:
    """Focal cross-entropy, the mean over the known voxels of all processes.

    Attributes:
        gamma: 0 for plain cross-entropy.
        label_smoothing: share of the reference spread evenly.
        class_weights: of voxels by their class, or of regions; the mean is weighted.
    """

    gamma: float = 0.0
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def __call__(self, found: Judged) -> Tensor:
        """Return the mean over the voxels that are known; 0 where there is none."""
        losses = -found.of_truth
        if self.label_smoothing:
            losses = (1 - self.label_smoothing) * losses - self.label_smoothing * found.truth.of_any(found.scores)
        if self.gamma:
            # expm1 keeps the digits of 1 - p near p = 1; there a power below one would have no gradient.
            losses = losses * (-found.of_truth.expm1()).clamp_min(1e-7) ** self.gamma
        weights = found.truth.known
        if self.class_weights is not None:
            weights = weights * found.truth.weights(_one_each(self.class_weights, found.scores))
        total, weight = pooled(torch.stack([(losses * weights).sum(), weights.sum()])).unbind()
        return total / weight.clamp_min(1e-12)


def _one_each(class_weights: tuple[float, ...], scores: Tensor) -> Tensor:
    """Return the weights as a tensor (K,)."""
    check_class_weights(class_weights, scores.shape[1])
    # Filled there: a copy from the host would wait for the device.
    return torch.stack([scores.new_full((), weight) for weight in class_weights])


def check_class_weights(class_weights: Sequence[float] | None, outputs: int) -> None:
    """See that there is one weight for each of a network's outputs, where there are any.

    Raises:
        ConfigError: there are more or fewer.
    """
    if class_weights is not None and len(class_weights) != outputs:
        raise ConfigError(
            f"training.loss_options.class_weights: {len(class_weights)} numbers for {outputs} outputs; "
            "give one for each class, background first, or one for each region"
        )
