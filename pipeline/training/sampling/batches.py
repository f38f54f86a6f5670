"""Batches: patches read, moved to the device and augmented, by the number of the step."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pipeline.training.distributed import ALONE, Share
from pipeline.training.losses.target import Target
from pipeline.training.sampling.augmentation import Augmentation
from pipeline.training.sampling.patches import PatchSampler

# Batches read ahead of a GPU. A CPU that trains has no core to spare for it.
READ_AHEAD = 4


class Batches:
    """Number -> image (N, C, *patch) float32 and target of (N, *patch) class indices, augmented, on the device.

    Of several processes each has its share of a batch; together they have the patches that one would have.

    Ahead of a GPU, threads read the next steps' patches into pinned memory; which thread reads what changes nothing:
    a batch is a function of its step.
    """

    def __init__(
        self,
        sampler: PatchSampler,
        augmentation: Augmentation,
        *,
        batch_size: int,
        device: torch.device,
        share: Share = ALONE,
    ) -> None:
        self.sampler = sampler
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.device = device
        self.share = share
        self._reader = ThreadPoolExecutor(2, "patches") if device.type == "cuda" else None
        self._ahead: dict[int, Future[tuple[Tensor, Tensor]]] = {}

    def __call__(self, number: int) -> tuple[Tensor, Target]:
        """Return this process's share of a batch."""
        step = self.share.part(number)
        image, label = self._read(step) if self._reader is None else self._read_ahead(self._reader, step)
        image = image.to(self.device, non_blocking=True)
        label = label.to(self.device, non_blocking=True)
        image, classes = self.augmentation(image, label, step * self.batch_size)
        return image.contiguous(memory_format=torch.channels_last_3d), Target(classes)

    def _read_ahead(self, reader: ThreadPoolExecutor, step: int) -> tuple[Tensor, Tensor]:
        """Return the patches of a step, and have those of the next read."""
        for ahead in range(step, step + READ_AHEAD * self.share.processes, self.share.processes):
            if ahead not in self._ahead:
                self._ahead[ahead] = reader.submit(self._read, ahead)
        return self._ahead.pop(step).result()

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        """Read the patches of a step."""
        image, label = self.sampler.batch(step, self.batch_size)
        return (image.pin_memory(), label.pin_memory()) if self._reader else (image, label)
