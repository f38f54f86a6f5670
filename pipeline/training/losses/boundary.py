"""Boundary loss: a wrong voxel costs its distance to the reference's surface."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipeline.training.distributed import pooled
from pipeline.training.losses.overlap import DiceTerm, Smooth
from pipeline.training.losses.truth import Judged, Truth, judged
from pipeline.training.losses.voxelwise import Loss, VoxelTerm, Weight

# Share of the weight that either term keeps: the boundary's at the beginning, Dice's at the end (Kervadec et al. 2019).
LEAST_SHARE = 0.01


def boundary(
    *,
    reach_voxels: Annotated[int, Field(ge=1)] = 10,
    boundary_weight: Weight = 1.0,
    ce_weight: Weight = 0.0,
    batch: bool = True,
    smooth: Smooth = 1e-5,
) -> Loss:
    """Soft Dice that gives way to the boundary loss as training goes on (Kervadec et al. 2019, "rebalancing").

    A voxel's error is weighted by its distance in voxels to the reference's surface, so that what is far off costs more
    than a border that is not quite right: the paper's integral with its constant kept, which is 0 at best. Voxels of
    which nobody knows have no error and are no surface; a class that was not annotated in a patch's case counts as
    background with it; of a region the voxels that may hold it are left out. A structure that a patch does not hold is
    as far away as the reach.

    Args:
        reach_voxels: distances beyond it count as it; time grows with it.
        boundary_weight: weight of the boundary's term, on top of the share that grows.
        ce_weight: weight of a cross-entropy beside it, the same all the time.
        batch: pool the Dice sums over the batch.
        smooth: added to numerator and denominator of Dice.
    """
    dice, voxels = DiceTerm(batch, smooth), VoxelTerm()

    def loss(logits: Tensor, truth: Truth) -> Tensor:
        found = judged(logits, truth)
        share = LEAST_SHARE + (1 - 2 * LEAST_SHARE) * truth.progress
        far_off = boundary_weight * _surface_error(found, reach_voxels)
        total = (1 - share) * dice(found) + share * far_off
        return total + ce_weight * voxels(found) if ce_weight else total

    return loss


def _surface_error(found: Judged, reach: int) -> Tensor:
    """Return the mean over structures and known voxels of |probability - reference| times distance in voxels."""
    reference, foreground = found.truth.reference, found.truth.foreground
    known = found.truth.known.expand_as(reference)[:, foreground]
    structures = reference[:, foreground].unbind(1), known.unbind(1), found.probabilities[:, foreground].unbind(1)
    # One structure at a time: distances of all at once would be as large as the logits many times over.
    errors = [
        (surface_distance(mask, where > 0, reach) * (probability - mask.float()).abs() * where).sum()
        for mask, where, probability in zip(*structures, strict=True)
    ]
    error, voxels = pooled(torch.stack([torch.stack(errors).sum(), known.sum()])).unbind()
    return error / voxels.clamp_min(1)


@torch.no_grad()
def surface_distance(mask: Tensor, known: Tensor, reach: int) -> Tensor:
    """Return each voxel's distance to the mask's surface, in voxels.

    The distance between a voxel's centre and the nearest on the other side of the surface, less the half voxel that
    lies beyond the surface; exact up to the reach.

    Args:
        mask: (N, X, Y, Z) bool.
        known: (N, X, Y, Z) bool; what is not known is on neither side.
        reach: voxels beyond which distances are not told apart, at least 1.
    """
    outside = _squared_distance(mask & known, reach)
    inside = _squared_distance(~mask & known, reach)
    return torch.where(mask, inside, outside).sqrt() - 0.5


def _squared_distance(sources: Tensor, reach: int) -> Tensor:
    """Return the squared distance of each voxel of (N, X, Y, Z) to the nearest source, at most the reach's square.

    Axis by axis, the smallest of what lies at each offset and the offset's square (Felzenszwalb and Huttenlocher
    2012, without their envelope: offsets are few and every line is taken at once).
    """
    squared = torch.where(sources, 0.0, float(reach**2))
    for axis in (1, 2, 3):
        before, length = squared, squared.shape[axis]
        squared = before.clone()
        for offset in range(1, min(reach, length)):
            there, here = before.narrow(axis, offset, length - offset), before.narrow(axis, 0, length - offset)
            ahead, behind = squared.narrow(axis, 0, length - offset), squared.narrow(axis, offset, length - offset)
            torch.minimum(ahead, there + offset**2, out=ahead)
            torch.minimum(behind, here + offset**2, out=behind)
    return squared
