"""Prepared cases as patches are read from them, and where they are kept: on the GPU, in memory, or on disk."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.manifest import Case
from pipeline.data.plan import Plan
from pipeline.data.store import CaseStore, StoredCase
from pipeline.free_memory import available_bytes
from pipeline.training.diagnosis.stopwatch import unheard

log = logging.getLogger(__name__)

Size = tuple[int, int, int]
Place = Literal["GPU", "memory", "disk"]
Annotated = tuple[bool, ...] | None

# Share of the free memory that prepared cases may take, of a GPU as of the machine: there the network needs the most of
# it, here other trainings, validation and the cache of files do.
SHARE = 0.25

# Threads that read a store into memory: they wait for the disk and hash side by side, and decompress one after
# another, for blosc2 keeps Python's lock meanwhile (4.14).
READERS = 4

_WHERE: dict[Place, str] = {"GPU": "on the GPU", "memory": "in memory", "disk": "on disk"}


class PatchCase(Protocol):
    """What the sampler needs of a case: boxes of image and label, and an index of voxels per class."""

    @property
    def id(self) -> str:
        """The case's id."""
        ...

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (C, X, Y, Z) of the image."""
        ...

    @property
    def class_voxels(self) -> Mapping[int, NDArray[np.int32]]:
        """Class index -> (n, 3) voxels, a sample of each class."""
        ...

    @property
    def annotated(self) -> Annotated:
        """Which of the plan's labels were annotated in the case; None: all of them."""
        ...

    def read_image(self, start: Size, stop: Size) -> NDArray[np.float16] | Tensor:
        """Return (C, *(stop - start)) of the normalised image."""
        ...

    def read_label(self, start: Size, stop: Size) -> NDArray[np.uint8] | NDArray[np.int16] | Tensor | None:
        """Return (stop - start) of the class indices; None: background everywhere."""
        ...


@dataclass(frozen=True, eq=False)
class HeldCase:
    """A case whose voxels are in memory, or on a GPU: image (C, X, Y, Z) and label (X, Y, Z)."""

    image: NDArray[np.float16] | Tensor
    label: NDArray[np.uint8] | NDArray[np.int16] | Tensor | None
    class_voxels: Mapping[int, NDArray[np.int32]]
    id: str = ""
    annotated: Annotated = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (C, X, Y, Z) of the image."""
        channels, x, y, z = self.image.shape
        return channels, x, y, z

    def on(self, device: torch.device) -> HeldCase:
        """Return the case with its voxels on a device."""
        label = None if self.label is None else torch.as_tensor(self.label).to(device)
        return replace(self, image=torch.as_tensor(self.image).to(device), label=label)

    def read_image(self, start: Size, stop: Size) -> NDArray[np.float16] | Tensor:
        """Return a view of the image."""
        return self.image[(slice(None), *map(slice, start, stop))]

    def read_label(self, start: Size, stop: Size) -> NDArray[np.uint8] | NDArray[np.int16] | Tensor:
        """Return a view of the label.

        Raises:
            ValueError: the case has no label.
        """
        if self.label is None:
            raise ValueError(f"case {self.id!r} has no label")
        return self.label[tuple(map(slice, start, stop))]


@dataclass(frozen=True, eq=False)
class CaseOnDisk:
    """A case of which each patch is read from the store."""

    stored: StoredCase
    id: str
    annotated: Annotated

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (C, X, Y, Z) of the image."""
        return self.stored.shape

    @property
    def class_voxels(self) -> Mapping[int, NDArray[np.int32]]:
        """Class index -> (n, 3) voxels."""
        return self.stored.class_voxels

    def read_image(self, start: Size, stop: Size) -> NDArray[np.float16]:
        """Decompress the blocks of the image that a box touches."""
        return self.stored.read_image(start, stop)

    def read_label(self, start: Size, stop: Size) -> NDArray[np.uint8] | NDArray[np.int16]:
        """Decompress the blocks of the label that a box touches."""
        return self.stored.read_label(start, stop)


def bytes_of(cases: Sequence[Case], store: CaseStore, plan: Plan) -> int:
    """Return what the prepared images and labels of cases take in memory."""
    label_bytes = 1 if plan.ignored_class <= np.iinfo(np.uint8).max else 2
    voxels = sum(math.prod(store.open(case.id).geometry.shape) for case in cases)
    return voxels * (np.dtype(np.float16).itemsize * len(plan.channels) + label_bytes)


def place_for(needed_bytes: int, device: torch.device, processes: int = 1, *, step_bytes: int = 0) -> Place:
    """Return where prepared cases are kept, and say so: as near to the network as the free memory allows.

    Args:
        needed_bytes: of all cases.
        device: where the network trains.
        processes: how many train together; each keeps its own copy, perhaps all on this machine.
        step_bytes: what a step of training takes on a GPU.
    """
    free: dict[Place, int] = {"GPU": torch.cuda.mem_get_info(device)[0]} if device.type == "cuda" else {}
    free["memory"] = available_bytes() // processes
    place = nearest(needed_bytes, free, step_bytes)
    log.info(
        "%.2f GB of prepared cases are kept %s; free: %s",
        needed_bytes / 1e9,
        _WHERE[place],
        ", ".join(f"{left / 1e9:.1f} GB {_WHERE[where]}" for where, left in free.items()),
    )
    return place


def nearest(needed_bytes: int, free_bytes: Mapping[Place, int], step_bytes: int) -> Place:
    """Return the first place where cases take but a share of what is free, and on a GPU leave a step what it takes."""
    room = {place: SHARE * free for place, free in free_bytes.items()}
    if "GPU" in room:
        room["GPU"] = min(room["GPU"], free_bytes["GPU"] - step_bytes)
    return next((place for place, most in room.items() if needed_bytes <= most), "disk")


def keep(
    cases: Sequence[Case],
    store: CaseStore,
    plan: Plan,
    place: Place,
    device: torch.device,
    reached: Callable[[str], None] = unheard,
) -> list[PatchCase]:
    """Return prepared cases, read into memory or onto the device, or open.

    Args:
        cases: which.
        store: where they lie.
        plan: their channels and labels.
        place: where they shall be.
        device: of the place "GPU".
        reached: is told the id of each case as it is begun; from several threads.

    Raises:
        StoreError: a case is missing or damaged.
    """

    def kept(case: Case) -> PatchCase:
        reached(case.id)
        annotated = _annotated(case, plan)
        if place == "disk":
            stored = store.open(case.id)
            stored.hold()
            return CaseOnDisk(stored, case.id, annotated)
        prepared = store.read(case.id)
        held = HeldCase(prepared.image, prepared.label, prepared.class_voxels, case.id, annotated)
        return held.on(device) if place == "GPU" else held

    with ThreadPoolExecutor(READERS, "store") as readers:
        return list(readers.map(kept, cases))


def _annotated(case: Case, plan: Plan) -> Annotated:
    """Return which of the plan's labels were annotated in a case; None: all."""
    if case.annotated_classes is None:
        return None
    found = case.annotated_classes
    return tuple(name in found or place == 0 for place, name in enumerate(plan.labels))
