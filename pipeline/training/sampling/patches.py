"""Patches of prepared cases: which case, where, and the voxels there; a function of seed and index alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.training.randomness import generator

Size = tuple[int, int, int]


class PatchCase(Protocol):
    """What the sampler needs of a case: boxes of image and label, and an index of voxels per class."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (C, X, Y, Z) of the image."""
        ...

    @property
    def class_voxels(self) -> Mapping[int, NDArray[np.int32]]:
        """Class index -> (n, 3) voxels, a sample of each class."""
        ...

    def read_image(self, start: Size, stop: Size) -> NDArray[np.float16]:
        """Return (C, *(stop - start)) of the normalised image."""
        ...

    def read_label(self, start: Size, stop: Size) -> NDArray[np.uint8] | NDArray[np.int16]:
        """Return (stop - start) of the class indices."""
        ...


@dataclass(frozen=True, eq=False)
class CaseInMemory:
    """A case whose arrays are in memory, image (C, X, Y, Z) and label (X, Y, Z)."""

    image: NDArray[np.float16]
    label: NDArray[np.uint8] | NDArray[np.int16] | None
    class_voxels: Mapping[int, NDArray[np.int32]]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (C, X, Y, Z) of the image."""
        channels, x, y, z = self.image.shape
        return channels, x, y, z

    def read_image(self, start: Size, stop: Size) -> NDArray[np.float16]:
        """Return a view of the image."""
        return self.image[(slice(None), *map(slice, start, stop))]

    def read_label(self, start: Size, stop: Size) -> NDArray[np.uint8] | NDArray[np.int16]:
        """Return a view of the label.

        Raises:
            ValueError: the case has no label.
        """
        if self.label is None:
            raise ValueError("the case has no label")
        return self.label[tuple(map(slice, start, stop))]


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
        images, labels = zip(*(self.patch(step * size + i) for i in range(size)), strict=True)
        return torch.stack(images), torch.stack(labels)

    def patch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return patch number `index` of the whole training: image (C, *read_size) and label (*read_size)."""
        epoch, position = divmod(index, len(self.cases))
        order = generator(self.seed, "order of cases", epoch).permutation(len(self.cases))
        case = self.cases[order[position]]
        start = self._start(case, generator(self.seed, "patch", index))
        lower = [max(0, a) for a in start]
        upper = [min(n, a + size) for n, a, size in zip(case.shape[1:], start, self.read_size, strict=True)]
        box = _size(lower), _size(upper)
        target = tuple(slice(a - s, b - s) for a, b, s in zip(lower, upper, start, strict=True))
        voxels, classes = torch.from_numpy(case.read_image(*box)), torch.from_numpy(case.read_label(*box))
        image = torch.zeros((len(voxels), *self.read_size))
        label = torch.zeros(self.read_size, dtype=classes.dtype)
        image[(slice(None), *target)] = voxels.float()
        label[target] = classes
        return image, label

    def _start(self, case: PatchCase, random: np.random.Generator) -> list[int]:
        """Draw where reading starts, per axis; the patch lies inside the volume where it fits, and around it where
        not.
        """
        patch = np.array(self.patch_size)
        room = np.array(case.shape[1:]) - patch
        classes = sorted(k for k, voxels in case.class_voxels.items() if k > 0 and len(voxels))
        if classes and random.random() < self.foreground_fraction:
            voxels = case.class_voxels[random.choice(classes)]
            start = voxels[random.integers(len(voxels))] - patch // 2
        else:
            start = random.integers(0, np.maximum(room, 0) + 1)
        inside = np.clip(start, 0, np.maximum(room, 0))
        start = np.where(room < 0, room // 2, inside)
        return [int(n) for n in start - (np.array(self.read_size) - patch) // 2]


def _size(numbers: Sequence[int]) -> Size:
    """Return three numbers as a size."""
    x, y, z = numbers
    return x, y, z
