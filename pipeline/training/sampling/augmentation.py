"""Augmentation of a whole batch on the training device: one draw for image and label.

Rotation, scaling, shift and elastic deformation are composed into one sampling grid per patch, and image and label are
interpolated once. What is drawn is keyed by (seed, number of the patch), so that a patch does not depend on the batch,
the process, the thread or a restart; to the last bit on a CPU. It is drawn on the host, moved to the device by one
copy, and applied there to many patches at once; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config import AugmentationSection
from pipeline.data.plan import Millimetres
from pipeline.networks.contract import Size
from pipeline.training.sampling.changes import Draws, on_device
from pipeline.training.sampling.deformation import Deformation, flip_of
from pipeline.training.sampling.intensity import Intensity


class Augmentation:
    """Random changes of a batch.

    Args:
        section: probabilities and ranges.
        patch_size: voxels of the image returned.
        target_size: voxels of the label returned, its centre: fewer where the network loses some at its border.
        left_right_axis: axis of the plan's grid between left and right, whose flip swaps classes.
        paired_classes: class indices that swap.
        num_classes: classes that a label may hold, background included, and ignored voxels where there are any: they
            are deformed as one more class.
        spacing_mm: of the voxels.
        seed: of every draw.
    """

    def __init__(
        self,
        section: AugmentationSection,
        *,
        patch_size: Size,
        target_size: Size,
        left_right_axis: int,
        paired_classes: tuple[tuple[int, int], ...],
        num_classes: int,
        spacing_mm: Millimetres,
        seed: int,
    ) -> None:
        self.enabled = section.enabled
        self.patch_size = patch_size
        self.deformation = Deformation(
            section,
            patch_size=patch_size,
            target_size=target_size,
            num_classes=num_classes,
            spacing_mm=spacing_mm,
            seed=seed,
        )
        self.intensity = Intensity(section, seed)
        self._sides = flip_of(left_right_axis)
        self._swapped = torch.arange(num_classes)
        for a, b in paired_classes:
            self._swapped[[a, b]] = torch.tensor([b, a])

    @property
    def read_size(self) -> Size:
        """Voxels that a patch is made of."""
        return self.deformation.read_size if self.enabled else self.patch_size

    def draw(self, indices: Sequence[int]) -> Draws:
        """Draw how patches are changed, by their numbers in the whole training; on the host, in any thread."""
        if not self.enabled:
            return Draws({}, (), ())
        draws = self.intensity.draw(indices)
        return draws._replace(changes={**self.deformation.draw(indices), **draws.changes})

    def __call__(self, image: Tensor, label: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Change a batch.

        Args:
            image: (N, C, *read_size) float32.
            label: (N, *read_size) integer class indices, on the same device.
            draws: for these patches.

        Returns:
            image (N, C, *patch_size) float32 and label (N, *target_size) int64.
        """
        changes = on_device(draws.changes, image.device)
        changed, target = self.deformation(image, label, changes)
        if flip := changes.get(self._sides):
            self._swapped = self._swapped.to(image.device)
            target.index_copy_(0, flip.rows, self._swapped[target.index_select(0, flip.rows)])
        self.intensity(changed, draws._replace(changes=changes))
        return changed, target
