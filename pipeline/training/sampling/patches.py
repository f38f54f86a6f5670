"""Patches of prepared cases: which case, where, and the voxels there; a function of seed and index alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.training.diagnosis.stopwatch import unheard
from pipeline.training.randomness import generator
from pipeline.training.sampling.cases import PatchCase, Size


class Patches(NamedTuple):
    """Patches as they are read.

    Attributes:
        image: (N, C, *read_size) float16. Beyond the volume it is 0, the mean of normalised intensities.
        label: (N, *read_size) class indices, uint8 or int16. Beyond the volume it is background, also where labels have
            ignored voxels: what is there is known, and in a window that reaches beyond a volume the network is to
            answer so.
        annotated: (N, L) bool, which classes were annotated in each patch's case; None: all, in all cases.
    """

    image: Tensor
    label: Tensor
    annotated: Tensor | None

    def pinned(self) -> Patches:
        """Return the patches where a GPU takes them from without anything waiting."""
        return self._each(lambda part: part if part.is_cuda else part.pin_memory())

    def on(self, device: torch.device) -> Patches:
        """Return the patches on a device; nothing waits for those that are pinned."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def _each(self, moved: Callable[[Tensor], Tensor]) -> Patches:
        """Return the patches with each part moved."""
        return Patches(moved(self.image), moved(self.label), None if self.annotated is None else moved(self.annotated))


class PatchSampler:
    """Draws patches: every case once in an epoch of cases, a share of them centred on foreground.

    Args:
        cases: the training cases, in a stable order.
        patch_size: voxels that the network is to see.
        read_size: voxels to read, at least the patch: what a rotation turns into the patch lies in the rim.
        foreground_fraction: share of the patches centred on a foreground voxel, its class drawn among the case's.
        seed: of every draw.
        class_weights: class index -> how often it is drawn, relative to 1 for those not named; 0: never. A case is seen
            once in an epoch of cases whatever it holds: weights choose within a case.
    """

    def __init__(
        self,
        cases: Sequence[PatchCase],
        *,
        patch_size: Size,
        read_size: Size,
        foreground_fraction: float,
        seed: int,
        class_weights: Mapping[int, float] | None = None,
    ) -> None:
        self.cases = cases
        self.patch_size = patch_size
        self.read_size = read_size
        self.foreground_fraction = foreground_fraction
        self.seed = seed
        self.class_weights = class_weights or {}
        # Also of 100,000 cases the order is drawn once an epoch, not once a patch.
        self._order = lru_cache(4)(self._drawn_order)
        # How many classes there are to tell of; None where all are annotated in all cases.
        self._classes_told = next((len(case.annotated) for case in cases if case.annotated is not None), None)

    def case_of(self, index: int) -> PatchCase:
        """Return the case of patch number `index` of the whole training."""
        epoch, position = divmod(index, len(self.cases))
        return self.cases[int(self._order(epoch)[position])]

    def read(self, indices: Sequence[int], reached: Callable[[str], None] = unheard) -> Patches:
        """Return patches by their numbers in the whole training, in the memory that their cases are in.

        Args:
            indices: the patches' numbers.
            reached: is told the id of each patch's case as it is begun.
        """

        def patch(index: int) -> tuple[Tensor, Tensor]:
            reached(self.case_of(index).id)
            return self.patch(index)

        images, labels = zip(*map(patch, indices), strict=True)
        return Patches(torch.stack(images), torch.stack(labels), self._annotated(indices))

    def patch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one patch: image (C, *read_size) float16 and label (*read_size)."""
        case = self.case_of(index)
        start = self._start(case, generator(self.seed, "patch", index))
        stop = start + self.read_size
        lower, upper = np.maximum(start, 0), np.minimum(stop, case.shape[1:])
        box = _size(lower), _size(upper)
        image, label = torch.as_tensor(case.read_image(*box)), case.read_label(*box)
        classes = image.new_zeros(image.shape[1:], dtype=torch.uint8) if label is None else torch.as_tensor(label)
        # From the last axis to the first, before and behind, as F.pad wants them.
        beyond = np.stack([lower - start, stop - upper], axis=1)[::-1].ravel().tolist()
        return (F.pad(image, beyond), F.pad(classes, beyond)) if any(beyond) else (image, classes)

    def _drawn_order(self, epoch: int) -> NDArray[np.int64]:
        """Draw the order of the cases in an epoch of cases."""
        order: NDArray[np.int64] = generator(self.seed, "order of cases", epoch).permutation(len(self.cases))
        return order

    def _start(self, case: PatchCase, random: np.random.Generator) -> NDArray[np.int64]:
        """Draw where reading starts, per axis; the patch lies inside the volume where it fits, and around it where
        not.
        """
        patch = np.array(self.patch_size)
        room = np.array(case.shape[1:]) - patch
        drawable, chances = self._classes(case)
        if drawable and random.random() < self.foreground_fraction:
            voxels = case.class_voxels[random.choice(drawable, p=chances)]
            start = voxels[random.integers(len(voxels))] - patch // 2
        else:
            start = random.integers(0, np.maximum(room, 0) + 1)
        inside = np.clip(start, 0, np.maximum(room, 0))
        start = np.where(room < 0, room // 2, inside)
        first: NDArray[np.int64] = start - (np.array(self.read_size) - patch) // 2
        return first

    def _classes(self, case: PatchCase) -> tuple[list[int], NDArray[np.float64] | None]:
        """Return the classes that a patch of the case may be centred on, and the chance of each; None: equal ones."""
        weight = self.class_weights
        classes = sorted(
            k for k, voxels in case.class_voxels.items() if k > 0 and len(voxels) and weight.get(k, 1.0) > 0
        )
        if not weight or not classes:
            return classes, None
        weights = np.array([weight.get(index, 1.0) for index in classes])
        return classes, weights / weights.sum()

    def _annotated(self, indices: Sequence[int]) -> Tensor | None:
        """Return which classes were annotated in the cases of patches; the same kind of answer for every batch."""
        if self._classes_told is None:
            return None
        return torch.tensor([self.case_of(index).annotated or (True,) * self._classes_told for index in indices])


def _size(numbers: NDArray[np.int64]) -> Size:
    """Return three numbers as a size."""
    x, y, z = numbers.tolist()
    return x, y, z
