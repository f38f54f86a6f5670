"""Batches: patches read, moved to the device and augmented, by their number."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, Protocol

import torch
from torch import Tensor

from pipeline.training.diagnosis.stopwatch import AUGMENTATION, WAITING, Clock, untimed
from pipeline.training.distributed import ALONE, Share
from pipeline.training.losses.target import Target
from pipeline.training.sampling.augmentation import Augmentation
from pipeline.training.sampling.cases import Place
from pipeline.training.sampling.changes import Draws
from pipeline.training.sampling.patches import Patches, PatchSampler

# Batches that are read while the network learns from one; more where there are more threads to read them.
READ_AHEAD = 3


class CaseBatches(Protocol):
    """Batches by their number, that know of which cases they are."""

    def __call__(self, number: int) -> tuple[Tensor, Target | Tensor]:
        """Return a batch."""
        ...

    def cases_of(self, number: int) -> tuple[str, ...]:
        """Return the id of each patch's case."""
        ...

    def cases_at_work(self, number: int) -> tuple[str, ...]:
        """Return the id of the case that is being read for a batch; of each patch's case once all are read."""
        ...

    def close(self) -> None:
        """End what reads ahead."""
        ...


class Batches:
    """Number -> image (N, C, *patch) float32 and its target, augmented, on the device.

    Threads read the batches that come next; which thread reads what changes nothing: a batch is a function of its
    number. Close it when training ends.

    Args:
        sampler: reads patches.
        augmentation: changes them.
        batch_size: patches of a batch of this process.
        device: where the network is.
        workers: threads that read ahead; 0: none, a batch is read when it is asked for.
        share: which process this is of those that train together. Batch b of all of them is the patches from
            b * processes * batch_size on, in the order of the processes.
        clock: measures the waiting and the augmentation.
    """

    def __init__(
        self,
        sampler: PatchSampler,
        augmentation: Augmentation,
        *,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        share: Share = ALONE,
        clock: Clock = untimed,
    ) -> None:
        self.sampler = sampler
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.device = device
        self.share = share
        self.clock = clock
        self._readers = ThreadPoolExecutor(workers, "patches") if workers else None
        self._read_ahead = max(READ_AHEAD, workers)
        self._ahead: dict[int, Future[tuple[Patches, Draws]]] = {}
        self._being_read: dict[int, str] = {}

    def __call__(self, number: int) -> tuple[Tensor, Target]:
        """Return a batch."""
        with self.clock(WAITING):
            patches, draws = self._next(number)
            patches = patches.on(self.device)
        with self.clock(AUGMENTATION):
            # Only now float32: half the bytes are moved.
            image, classes = self.augmentation(patches.image.float(), patches.label, draws)
            return image.contiguous(memory_format=torch.channels_last_3d), Target(classes, patches.annotated)

    def indices(self, number: int) -> range:
        """Return the numbers, in the whole training, of a batch's patches."""
        first = self.share.part(number) * self.batch_size
        return range(first, first + self.batch_size)

    def cases_of(self, number: int) -> tuple[str, ...]:
        """Return the ids of the cases of a batch, patch by patch."""
        return tuple(self.sampler.case_of(index).id for index in self.indices(number))

    def cases_at_work(self, number: int) -> tuple[str, ...]:
        """Return the id of the case that is being read for a batch; of each patch's case once all are read."""
        being_read = self._being_read.get(number)
        return (being_read,) if being_read is not None else self.cases_of(number)

    def close(self) -> None:
        """End the threads; what they have begun to read is dropped."""
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        self._ahead.clear()

    def _next(self, number: int) -> tuple[Patches, Draws]:
        """Return a batch as it is read, and have those after it read."""
        if self._readers is None:
            return self._read(number)
        coming = range(number, number + 1 + self._read_ahead)
        # A training that goes back, or on at another place, will not ask for the others.
        for left in [ahead for ahead in self._ahead if ahead not in coming]:
            self._ahead.pop(left).cancel()
        for ahead in coming:
            if ahead not in self._ahead:
                self._ahead[ahead] = self._readers.submit(self._read, ahead)
        return self._ahead.pop(number).result()

    def _read(self, number: int) -> tuple[Patches, Draws]:
        """Read a batch's patches, and draw how they are changed."""
        indices = self.indices(number)
        try:
            patches = self.sampler.read(indices, lambda case: self._being_read.__setitem__(number, case))
        finally:
            self._being_read.pop(number, None)
        return patches.pinned() if self.device.type == "cuda" else patches, self.augmentation.draw(indices)


def workers_for(chosen: int | Literal["auto"], place: Place, device: torch.device) -> int:
    """Return how many threads read ahead.

    auto: a GPU that reads from disk is fed by four, which wait for the disk side by side and decompress one after
    another; else by one, that draws while the network's backward pass leaves Python alone. A CPU that trains has a core
    to spare only while it would wait for the disk.
    """
    if chosen != "auto":
        return chosen
    if device.type == "cuda":
        return 4 if place == "disk" else 1
    return 1 if place == "disk" else 0
