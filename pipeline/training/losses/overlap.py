"""Losses of overlap: how many voxels of a structure are found, and how many are of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.training.distributed import pooled
from pipeline.training.losses.truth import Judged, Truth, judged
from pipeline.training.losses.voxelwise import Loss, Smoothing, VoxelTerm, Weight, Weights

Smooth = Annotated[float, Field(gt=0)]


def dice_ce(
    *,
    batch: bool = True,
    dice_weight: Weight = 1.0,
    ce_weight: Weight = 1.0,
    smooth: Smooth = 1e-5,
    include_background: bool = False,
    label_smoothing: Smoothing = 0.0,
    class_weights: Weights | None = None,
) -> Loss:
    """Soft Dice over the foreground classes plus cross-entropy, both over all voxels (Isensee et al. 2021).

    Voxels of which nobody knows are in no sum. A class that was not annotated in a patch's case counts as background
    with it, and its own Dice has no share in that patch; of a region the voxels that may hold it are left out.

    Args:
        batch: pool the Dice sums over the batch, so that a patch without a class doesn't ask for none of it at any
            price.
        dice_weight: weight of the Dice term.
        ce_weight: weight of the cross-entropy.
        smooth: added to numerator and denominator, so that an absent class that is not predicted scores 1.
        include_background: Dice of the background too; regions have none.
        label_smoothing: of the cross-entropy: share of the reference spread evenly over all classes.
        class_weights: of the cross-entropy: of the voxels of each class, background first, or of each region.
    """
    return WithVoxelTerm(
        DiceTerm(batch, smooth, include_background),
        VoxelTerm(label_smoothing=label_smoothing, class_weights=class_weights),
        overlap_weight=dice_weight,
        voxel_weight=ce_weight,
    )


def dice_focal(
    *,
    batch: bool = True,
    dice_weight: Weight = 1.0,
    focal_weight: Weight = 1.0,
    gamma: Weight = 2.0,
    smooth: Smooth = 1e-5,
    include_background: bool = False,
    class_weights: Weights | None = None,
) -> Loss:
    """Soft Dice plus focal loss (Zhu et al. 2019): for structures that are few voxels among many easy ones.

    What is not known is left out as under `dice_ce`.

    Args:
        batch: pool the Dice sums over the batch.
        dice_weight: weight of the Dice term.
        focal_weight: weight of the focal term.
        gamma: a voxel's cross-entropy is weighted by (1 - probability of what is true) to this power.
        smooth: added to numerator and denominator.
        include_background: Dice of the background too; regions have none.
        class_weights: of the focal term: of the voxels of each class, background first, or of each region.
    """
    return WithVoxelTerm(
        DiceTerm(batch, smooth, include_background),
        VoxelTerm(gamma, class_weights=class_weights),
        overlap_weight=dice_weight,
        voxel_weight=focal_weight,
    )


def tversky(
    *,
    alpha: Weight = 0.3,
    beta: Weight = 0.7,
    gamma: Annotated[float, Field(ge=1, le=3)] = 1.0,
    ce_weight: Weight = 0.0,
    batch: bool = True,
    smooth: Smooth = 1e-5,
    include_background: bool = False,
) -> Loss:
    """Tversky loss: Dice in which a voxel too many and one too few weigh differently (Salehi et al. 2017).

    What is not known is left out as under `dice_ce`.

    Args:
        alpha: weight of false positives.
        beta: weight of false negatives; above alpha, small structures are found rather than missed.
        gamma: above 1 the focal Tversky loss, each class's loss to the power 1 / gamma (Abraham and Khan 2019, who
            found 4/3 best).
        ce_weight: weight of a cross-entropy beside it.
        batch: pool the sums over the batch.
        smooth: added to numerator and denominator.
        include_background: the background's too; regions have none.
    """
    term = TverskyTerm(alpha, beta, gamma, batch, smooth, include_background)
    return WithVoxelTerm(term, VoxelTerm(), overlap_weight=1.0, voxel_weight=ce_weight)


def generalised_dice(
    *,
    ce_weight: Weight = 0.0,
    batch: bool = True,
    smooth: Smooth = 1e-5,
    include_background: bool = True,
) -> Loss:
    """Generalised Dice: one ratio for all classes, weighted by their inverse squared volumes (Sudre et al. 2017).

    A class that is absent has the weight of the rarest that is there. What is not known is left out as under `dice_ce`.

    Args:
        ce_weight: weight of a cross-entropy beside it.
        batch: pool the sums over the batch.
        smooth: added to numerator and denominator, in voxels of the rarest class.
        include_background: the background's share too; regions have none.
    """
    term = GeneralisedDiceTerm(batch, smooth, include_background)
    return WithVoxelTerm(term, VoxelTerm(), overlap_weight=1.0, voxel_weight=ce_weight)


@dataclass(frozen=True)
class WithVoxelTerm:
    """A weighted sum of a loss of overlap and one of voxels; a weight of 0 saves the term."""

    overlap: Callable[[Judged], Tensor]
    voxels: VoxelTerm
    overlap_weight: float
    voxel_weight: float

    def __call__(self, logits: Tensor, truth: Truth) -> Tensor:
        """Return the loss of logits (N, K, X, Y, Z)."""
        found = judged(logits, truth)
        loss = found.scores.new_zeros(())
        if self.voxel_weight:
            loss = loss + self.voxel_weight * self.voxels(found)
        if self.overlap_weight:
            loss = loss + self.overlap_weight * self.overlap(found)
        return loss


@dataclass(frozen=True)
class DiceTerm:
    """1 - the mean soft Dice of the classes."""

    batch: bool = True
    smooth: float = 1e-5
    include_background: bool = False

    def __call__(self, found: Judged) -> Tensor:
        """Return the loss of judged logits."""
        sums = overlap_sums(found, batch=self.batch, background=self.include_background)
        total = sums.predicted + sums.reference
        return 1 - ((2 * sums.overlap + self.smooth) / (total + self.smooth)).mean()


@dataclass(frozen=True)
class TverskyTerm:
    """The mean over the classes of (1 - Tversky index) to the power 1 / gamma."""

    alpha: float
    beta: float
    gamma: float
    batch: bool
    smooth: float
    include_background: bool

    def __call__(self, found: Judged) -> Tensor:
        """Return the loss of judged logits."""
        sums = overlap_sums(found, batch=self.batch, background=self.include_background)
        wrong = self.alpha * (sums.predicted - sums.overlap) + self.beta * (sums.reference - sums.overlap)
        losses = wrong / (sums.overlap + wrong + self.smooth)
        if self.gamma == 1:
            return losses.mean()
        # At 0 the root has no slope; there is nothing left to learn either.
        return (losses.clamp_min(1e-7) ** (1 / self.gamma)).mean()


@dataclass(frozen=True)
class GeneralisedDiceTerm:
    """1 - the ratio of the weighted sums over the classes."""

    batch: bool
    smooth: float
    include_background: bool

    def __call__(self, found: Judged) -> Tensor:
        """Return the loss of judged logits."""
        sums = overlap_sums(found, batch=self.batch, background=self.include_background)
        # Relative to the rarest class, whose weight is 1, and so that of one that is absent.
        volumes = sums.reference
        rarest = torch.where(volumes > 0, volumes, torch.inf).amin(-1, keepdim=True)
        weights = torch.where(volumes > 0, (rarest / volumes) ** 2, 1.0)
        overlap = (weights * sums.overlap).sum(-1)
        total = (weights * (sums.predicted + sums.reference)).sum(-1)
        return 1 - ((2 * overlap + self.smooth) / (total + self.smooth)).mean()


@dataclass(frozen=True)
class OverlapSums:
    """Sums over the known voxels, (K) of the batches of all processes, or (N, K) of single patches.

    Attributes:
        overlap: probability within the reference.
        predicted: probability.
        reference: voxels of the reference.
    """

    overlap: Tensor
    predicted: Tensor
    reference: Tensor


def overlap_sums(found: Judged, *, batch: bool, background: bool) -> OverlapSums:
    """Add up what losses of overlap are made of.

    Args:
        found: judged logits.
        batch: over all patches of all processes; else over each patch.
        background: of the first class too; regions have no background.
    """
    truth = found.truth
    overlap = truth.reference_sums(found.of_truth.exp())
    reference = truth.reference_sums(truth.known)
    sums = torch.stack([overlap, found.predicted, reference])[..., slice(None) if background else truth.foreground]
    return OverlapSums(*(pooled(sums.sum(1)) if batch else sums).unbind())


def mean_squared_error(output: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error over all voxels and channels: what `task: denoise` learns by; no segmentation's loss."""
    return F.mse_loss(output.float(), clean)
