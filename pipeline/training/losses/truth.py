"""What logits are judged by: a target at their resolution, where some voxels and some classes may not be known.

A class that was not annotated in a patch's case hides in its background. Under a softmax the two become one class,
whose probability is the sum of theirs (marginal loss, Shi et al. 2021); under sigmoids the voxels that may hold a
region are left out of its sums.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training.losses.target import Target

Regions = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Truth(ABC):
    """A target as a loss sees it; K counts the network's outputs, classes or regions.

    Attributes:
        known: (N, 1, X, Y, Z) or (N, K, X, Y, Z) float32: 1 for the voxels to be judged, 0 for the others.
        progress: share of the training that is done, 0 to 1.
    """

    known: Tensor
    progress: float

    @property
    @abstractmethod
    def foreground(self) -> slice:
        """The outputs that are structures."""

    @property
    @abstractmethod
    def reference(self) -> Tensor:
        """Which voxels are of a class, or in a region: (N, K, X, Y, Z) bool; none that is not known."""

    @abstractmethod
    def scores(self, logits: Tensor) -> Tensor:
        """Return (N, K, X, Y, Z) float32, what the other methods take: logits made ready once for all of them."""

    @abstractmethod
    def probabilities(self, scores: Tensor) -> Tensor:
        """Return (N, K, X, Y, Z); 0 for classes that are merged into the background."""

    @abstractmethod
    def sums(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return what nearly every loss is made of.

        Returns:
            The log-probability of what is true, shaped as `known`, of voxels that are not known anything finite; and
            the sum of each output's probability over each patch's known voxels, (N, K).
        """

    @abstractmethod
    def of_any(self, scores: Tensor) -> Tensor:
        """Return the mean log-probability over all that could be true, shaped as `known`."""

    @abstractmethod
    def reference_sums(self, values: Tensor) -> Tensor:
        """Return the sum of values, shaped as `known`, over each output's reference in each patch: (N, K)."""

    @abstractmethod
    def weights(self, of_outputs: Tensor) -> Tensor:
        """Return each voxel's weight from those of the K outputs, broadcastable to `known`."""


@dataclass(frozen=True)
class Judged:
    """Logits beside what they are judged by; what several terms of a loss need is computed once.

    Attributes:
        truth: what they are judged by.
        scores: (N, K, X, Y, Z), of `Truth.scores`.
    """

    truth: Truth
    scores: Tensor

    @cached_property
    def probabilities(self) -> Tensor:
        """Of each output, (N, K, X, Y, Z)."""
        return self.truth.probabilities(self.scores)

    @property
    def of_truth(self) -> Tensor:
        """Log-probability of what is true, shaped as `Truth.known`."""
        return self._sums[0]

    @property
    def predicted(self) -> Tensor:
        """Sum of each output's probability over each patch's known voxels, (N, K)."""
        return self._sums[1]

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """Both, from one pass."""
        return self.truth.sums(self.scores)


def judged(logits: Tensor, truth: Truth) -> Judged:
    """Return logits (N, K, X, Y, Z) beside what they are judged by."""
    return Judged(truth, truth.scores(logits))


@dataclass(frozen=True)
class ClassTruth(Truth):
    """Classes that exclude one another: softmax.

    Attributes:
        classes: (N, X, Y, Z) int64; 0 where it is not known.
        merged: (N, K) bool: classes that are part of a patch's background, and the background itself; None: it alone.
        outputs: K.
    """

    classes: Tensor
    merged: Tensor | None
    outputs: int

    @property
    def foreground(self) -> slice:
        """All classes but the background."""
        return slice(1, None)

    @cached_property
    def reference(self) -> Tensor:
        """Which voxels are of a class."""
        index = torch.arange(self.outputs, device=self.classes.device).view(1, -1, 1, 1, 1)
        return (self.classes[:, None] == index) & (self.known > 0)

    def scores(self, logits: Tensor) -> Tensor:
        """Return log-probabilities; those merged into the background are -inf."""
        scores = F.log_softmax(logits.float(), dim=1)
        if self.merged is None:
            return scores
        merged = self.merged[:, :, None, None, None]  # (N, K, 1, 1, 1)
        background = scores.masked_fill(~merged, -math.inf).logsumexp(1, keepdim=True)
        return torch.cat([background, scores[:, 1:].masked_fill(merged[:, 1:], -math.inf)], 1)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probabilities of classes."""
        return scores.exp()

    def sums(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each voxel's class, (N, 1, X, Y, Z), and the classes' sums (N, K)."""
        of_truth, predicted = _ClassSums.apply(scores, self.classes, self.known)  # type: ignore[no-untyped-call]
        return of_truth, predicted

    def of_any(self, scores: Tensor) -> Tensor:
        """Return the mean log-probability over the classes that a voxel can have, (N, 1, X, Y, Z)."""
        if self.merged is None:
            return scores.mean(1, keepdim=True)
        merged = self.merged[:, :, None, None, None]
        others = scores[:, 1:].masked_fill(merged[:, 1:], 0).sum(1, keepdim=True)
        return (scores[:, :1] + others) / (1 + (~merged).sum(1, keepdim=True))

    def reference_sums(self, values: Tensor) -> Tensor:
        """Return the sums over each class's voxels, without a tensor of voxels and classes."""
        # Plane by plane: short sums keep float32's digits, and threads of a GPU have not all to wait for one number.
        planes = self.classes.flatten(0, 1).flatten(1)  # (N * X, Y * Z)
        sums = values.new_zeros(len(planes), self.outputs)
        sums = sums.scatter_add(1, planes, (values * self.known).view_as(planes))
        return sums.view(len(values), -1, self.outputs).sum(1)

    def weights(self, of_outputs: Tensor) -> Tensor:
        """Return the weight of each voxel's class, (N, 1, X, Y, Z)."""
        return of_outputs[self.classes][:, None]


@dataclass(frozen=True)
class RegionTruth(Truth):
    """Regions that may overlap: a sigmoid each.

    Attributes:
        masks: (N, K, X, Y, Z) bool.
    """

    masks: Tensor

    @property
    def foreground(self) -> slice:
        """All regions: what is in none of them has no output."""
        return slice(None)

    @property
    def reference(self) -> Tensor:
        """Which voxels are in a region."""
        return self.masks

    def scores(self, logits: Tensor) -> Tensor:
        """Return the logits themselves."""
        return logits.float()

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probability of each region."""
        return scores.sigmoid()

    def sums(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability of being in a region, or of not being in it, (N, K, X, Y, Z), and sums (N, K)."""
        of_truth = F.logsigmoid(torch.where(self.masks, scores, -scores))
        return of_truth, (scores.sigmoid() * self.known).sum((2, 3, 4))

    def of_any(self, scores: Tensor) -> Tensor:
        """Return the mean log-probability of being in and of not being in each region, (N, K, X, Y, Z)."""
        return (F.logsigmoid(scores) + F.logsigmoid(-scores)) / 2

    def reference_sums(self, values: Tensor) -> Tensor:
        """Return the sums over each region's voxels."""
        return torch.where(self.masks, values, 0).sum((2, 3, 4))

    def weights(self, of_outputs: Tensor) -> Tensor:
        """Return the weight of each region, (K, 1, 1, 1)."""
        return of_outputs[:, None, None, None]


class _ClassSums(torch.autograd.Function):
    """`ClassTruth.sums`, whose gradient is written into one tensor: with many classes each one counts."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, classes: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, 1, X, Y, Z) and (N, K) of log-probabilities (N, K, X, Y, Z)."""
        probabilities = scores.exp().mul_(known)
        ctx.save_for_backward(probabilities, classes)
        return scores.gather(1, classes[:, None]), probabilities.sum((2, 3, 4))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the log-probabilities."""
        of_truth, predicted = gradients
        probabilities, classes = ctx.saved_tensors
        gradient = probabilities * predicted[:, :, None, None, None]
        return gradient.scatter_add_(1, classes[:, None], of_truth), None, None


def truth_of(target: Target, outputs: int, *, regions: Regions | None = None, progress: float = 1.0) -> Truth:
    """Return what logits of the target's resolution are judged by.

    Args:
        target: of (N, X, Y, Z) voxels.
        outputs: the network's: classes, or regions.
        regions: the class indices of each region; None: the outputs are the classes themselves.
        progress: share of the training that is done.
    """
    labels = outputs if regions is None else 1 + max(index for region in regions for index in region)
    known = target.classes < labels
    classes = torch.where(known, target.classes, 0)
    if target.annotated is not None:
        # What was drawn of a class that counts as not annotated is background like the rest of it.
        counts = target.annotated.gather(1, classes.flatten(1)).view_as(classes)
        classes = torch.where(counts, classes, 0)
    if regions is not None:
        return _region_truth(classes, known, target.annotated, regions, progress)
    merged = None if target.annotated is None else _with_background(~target.annotated)
    return ClassTruth(known[:, None].float(), progress, classes, merged, outputs)


def _region_truth(
    classes: Tensor, known: Tensor, annotated: Tensor | None, regions: Regions, progress: float
) -> RegionTruth:
    """Return the truth of regions; where one of a region's labels was not annotated, background may be in it."""
    known = known[:, None]
    masks = torch.stack([_any([classes == index for index in region]) for region in regions], 1) & known
    if annotated is not None:
        whole = torch.stack([~_any([~annotated[:, index] for index in region]) for region in regions], 1)
        known = known & (whole[:, :, None, None, None] | (classes > 0)[:, None])
    return RegionTruth(known.expand_as(masks).float(), progress, masks)


def _with_background(merged: Tensor) -> Tensor:
    """Return (N, K) with the background among what is merged into it."""
    merged = merged.clone()
    merged[:, 0] = True
    return merged


def _any(masks: Sequence[Tensor]) -> Tensor:
    """Return where any of several masks is true."""
    return torch.stack(list(masks)).any(0)
