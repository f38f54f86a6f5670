"""Patches of prepared cases: which case, where, and the voxels there; a function of seed and index alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.training.randomness import generator

Size = tuple[int, int, int]


class Sliceable(Protocol):
    """An array in memory or a compressed one on disk: what is sliced is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        ...

    def __getitem__(self, box: tuple[slice, ...], /) -> Any:
        """Return the voxels of a box."""
        ...


class PatchCase(Protocol):
    """What the sampler needs of a case: image (C, X, Y, Z), label (X, Y, Z) and an index of voxels per class."""

    @property
    def image(self) -> Sliceable:
        """Normalised image."""
        ...

    @property
    def label(self) -> Sliceable:
        """Class indices."""
        ...

    @property
    def class_voxels(self) -> Mapping[int, NDArray[np.int32]]:
        """Class index -> (n, 3) voxels, a sample of each class."""
        ...


class PatchSampler:
    """Draws patches: every case once in an epoch of cases, a share of them centred on foreground.

    Args:
        cases: the training cases, in a stable order.
        patch_size: voxels that the network is to see.
        read_size: voxels to read, at least the patch: what a rotation turns into the patch lies in the rim.
        foreground_fraction: share of the patches centred on a foreground voxel, its class drawn evenly among the
            case's.
        seed: of every draw.
    """

    def __init__(
        self, cases: Sequence[PatchCase], *, patch_size: Size, read_size: Size, foreground_fraction: float, seed: int
    ) -> None:
        self.cases = cases
        self.patch_size = patch_size
        self.read_size = read_size
        self.foreground_fraction = foreground_fraction
        self.seed = seed

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step: image (N, C, *read_size) float32 and label (N, *read_size) uint8 or int16.

        Beyond the volume the image is 0, the mean of normalised intensities, and the label background.
        """
        first, *rest = (self.patch(step * size + i) for i in range(size))
        images, labels = zip(first, *rest, strict=True)
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))

    def patch(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.integer[Any]]]:
        """Return patch number `index` of the whole training: image (C, *read_size) and label (*read_size)."""
        epoch, position = divmod(index, len(self.cases))
        order = generator(self.seed, "order of cases", epoch).permutation(len(self.cases))
        case = self.cases[order[position]]
        start = self._start(case, generator(self.seed, "patch", index))
        image = np.zeros((case.image.shape[0], *self.read_size), dtype=np.float32)
        label = np.zeros(self.read_size, dtype=case.label[:1, :1, :1].dtype)
        source, target = _overlap(start, self.read_size, case.label.shape)
        image[(slice(None), *target)] = case.image[(slice(None), *source)]
        label[target] = case.label[source]
        return image, label

    def _start(self, case: PatchCase, random: np.random.Generator) -> list[int]:
        """Draw where reading starts, per axis; the patch lies inside the volume where it fits, and around it where
        not.
        """
        patch = np.array(self.patch_size)
        room = np.array(case.label.shape) - patch
        classes = sorted(k for k, voxels in case.class_voxels.items() if k > 0 and len(voxels))
        if classes and random.random() < self.foreground_fraction:
            voxels = case.class_voxels[random.choice(classes)]
            start = voxels[random.integers(len(voxels))] - patch // 2
        else:
            start = random.integers(0, np.maximum(room, 0) + 1)
        inside = np.clip(start, 0, np.maximum(room, 0))
        start = np.where(room < 0, room // 2, inside)
        return [int(n) for n in start - (np.array(self.read_size) - patch) // 2]


def _overlap(start: Sequence[int], size: Size, shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the part of a box that lies in the volume, as slices of the volume and of the box."""
    lower = [max(0, a) for a in start]
    upper = [max(low, min(n, a + s)) for low, n, a, s in zip(lower, shape, start, size, strict=True)]
    source = tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))
    target = tuple(slice(a - s, b - s) for a, b, s in zip(lower, upper, start, strict=True))
    return source, target
