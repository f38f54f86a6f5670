"""How far the networks of an ensemble agree, class by class, counted while their windows come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from pipeline.config import Output
from pipeline.inference.windows.tiling import Flip, Size, Tiling, Windowing, flipped
from pipeline.networks.outputs import classes_of

# What a voxel takes: each logit its sum, and of regions a rank in eight bytes and whether it is above 0; its label four
# bytes while it is counted, two beside another network's, and where they agree three indices of eight bytes.
LOGIT_BYTES, LABEL_BYTES = 4 + 8 + 1, 4 + 2 + 24


@dataclass(frozen=True)
class FoldAgreement:
    """How far the label maps of an ensemble's networks agree on the plan's grid.

    Attributes:
        dice: for each class, background first, the mean Dice over all pairs of networks; None where none found it.
    """

    dice: tuple[float | None, ...]


class AgreementCount:
    """Counts the voxels of each network's own label map, and those that two networks share.

    A voxel is labelled by its nearest window alone, so that no network needs a ring of its own.

    Args:
        tiling: where the windows lie.
        windowing: the flips of a window, over which a network's logits are summed.
        networks: how many there are.
        num_logits: channels of the logits.
        output: how a voxel's class follows from its logits.
    """

    def __init__(self, tiling: Tiling, windowing: Windowing, networks: int, num_logits: int, output: Output) -> None:
        self._tiling, self._windowing, self._output = tiling, windowing, output
        self._classes = num_logits + (output == "regions")
        self._sizes = torch.zeros(networks, self._classes, dtype=torch.int64)
        self._shared = torch.zeros(networks, networks, self._classes, dtype=torch.int64)
        self._sum: Tensor | None = None
        self._labels: dict[Size, list[Tensor]] = {}

    def add(self, start: Size, flip: Flip, logits: Tensor) -> None:
        """Add one window's logits (K, *output): all flips of a window in their order, windows network by network."""
        nearest = self._tiling.nearest(start)
        if self._sum is None:
            size = [part.stop - part.start for part in nearest]
            self._sum = torch.zeros(len(logits), *size, dtype=torch.float32, device=logits.device)
        for own, channel in zip(self._sum, self._windowing.class_order(flip, len(logits)), strict=True):
            own.add_(flipped(logits[channel], flip)[nearest])
        if flip == self._windowing.flips[-1]:
            labels = classes_of(self._sum, self._output).to(_label_type(len(logits)))
            self._sum = None
            self._count(start, labels)

    def skip(self, start: Size) -> None:
        """Count the voxels of a window that is left out: all networks say background."""
        voxels = math.prod(part.stop - part.start for part in self._tiling.nearest(start))
        self._sizes[:, 0] += voxels
        self._shared[..., 0] += voxels

    def result(self) -> FoldAgreement:
        """Return how far the networks agree on what was counted."""
        pairs = list(combinations(range(len(self._sizes)), 2))
        shared = torch.stack([self._shared[a, b] for a, b in pairs]).double()  # (pairs, K)
        sizes = torch.stack([self._sizes[a] + self._sizes[b] for a, b in pairs]).double()
        dice = (2 * shared / sizes).nanmean(0)  # a pair that found nothing of a class says nothing of it
        return FoldAgreement(tuple(None if value != value else value for value in dice.tolist()))

    def _count(self, start: Size, labels: Tensor) -> None:
        """Count the next network's labels of a window, and what they share with those of the networks before it."""
        others = self._labels.setdefault(start, [])
        number = len(others)
        self._sizes[number] += self._voxels(labels)
        for other, theirs in enumerate(others):
            self._shared[other, number] += self._voxels(labels[labels == theirs])
        others.append(labels)
        if len(others) == len(self._sizes):
            del self._labels[start]

    def _voxels(self, labels: Tensor) -> Tensor:
        """Return the number of voxels of each class."""
        return torch.bincount(labels.flatten().int(), minlength=self._classes).cpu()


def agreement_bytes(tiling: Tiling, networks: int, num_logits: int) -> int:
    """Return what an AgreementCount takes at most; a single network has none."""
    if networks == 1:
        return 0
    size: list[int] = [max(part.stop - part.start for part in map(axis.nearest, axis.starts)) for axis in tiling.axes]
    slab = math.prod(size[axis] if axis == tiling.axis else n for axis, n in enumerate(tiling.shape))
    waiting = networks * slab * _label_type(num_logits).itemsize
    return waiting + math.prod(size) * (num_logits * LOGIT_BYTES + LABEL_BYTES)


def _label_type(num_logits: int) -> torch.dtype:
    """Return the type in which the labels of a slab's windows wait for those of the other networks: of few bytes."""
    return torch.uint8 if num_logits < 256 else torch.int16
