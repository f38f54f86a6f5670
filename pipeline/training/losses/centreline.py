"""clDice: overlap of the centrelines of tubes, which a gap costs as much in a thin vessel as in a thick one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipeline.training.distributed import pooled
from pipeline.training.losses.overlap import DiceTerm, Smooth
from pipeline.training.losses.truth import Judged, Truth, judged
from pipeline.training.losses.voxelwise import Loss, VoxelTerm, Weight


def cldice(
    *,
    iterations: Annotated[int, Field(ge=1)] = 3,
    share: Annotated[float, Field(ge=0, le=1)] = 0.5,
    ce_weight: Weight = 0.0,
    batch: bool = True,
    smooth: Smooth = 1e-5,
) -> Loss:
    """Soft Dice plus soft clDice, for vessels, airways and other tubes (Shit et al. 2021); needs MONAI, for skeletons.

    What is not known is no part of reference, prediction or skeleton; a class that was not annotated in a patch's case
    counts as background with it, and its own clDice has no share in that patch.

    Args:
        iterations: of the skeletonisation: at least the largest radius of the tubes, in voxels.
        share: of clDice in the sum; the rest is Dice.
        ce_weight: weight of a cross-entropy beside it.
        batch: pool the sums over the batch.
        smooth: added to numerator and denominator of Dice; clDice has 1, as published.
    """
    from monai.losses.cldice import soft_skel

    dice, voxels = DiceTerm(batch, smooth), VoxelTerm()

    def loss(logits: Tensor, truth: Truth) -> Tensor:
        found = judged(logits, truth)
        lines = _centreline_term(found, lambda mask: soft_skel(mask, iterations), batch=batch)
        total = (1 - share) * dice(found) + share * lines
        return total + ce_weight * voxels(found) if ce_weight else total

    return loss


def _centreline_term(found: Judged, skeleton: Callable[[Tensor], Tensor], *, batch: bool) -> Tensor:
    """Return 1 - the mean over structures of the harmonic mean of the skeletons' precision and sensitivity."""
    truth = found.truth
    predicted = (found.probabilities * truth.known)[:, truth.foreground]
    reference = truth.reference[:, truth.foreground].float()
    predicted_lines, lines = skeleton(predicted), skeleton(reference)
    axes = (0, 2, 3, 4) if batch else (2, 3, 4)
    parts = (predicted_lines * reference, predicted_lines, lines * predicted, lines)
    sums = torch.stack([part.sum(axes) for part in parts])
    on_reference, predicted_length, on_predicted, length = (pooled(sums) if batch else sums).unbind()
    precision = (on_reference + 1) / (predicted_length + 1)
    sensitivity = (on_predicted + 1) / (length + 1)
    return 1 - (2 * precision * sensitivity / (precision + sensitivity)).mean()
