"""What is drawn for a batch before it is changed: which patches, and by how much; drawn on the host, moved at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Change(NamedTuple):
    """One change, and the patches of a batch that undergo it.

    Attributes:
        rows: (k,) int64, places in the batch, ascending; never empty.
        values: (k, ...) float32: the change's numbers, one set a row.
    """

    rows: Tensor
    values: Tensor


# Name of a change -> whom it befalls; a change that befalls nobody is left out.
Changes = Mapping[str, Change]


class Alone(NamedTuple):
    """A change that a patch undergoes by itself.

    Attributes:
        row: place in the batch.
        number: of the patch in the whole training.
        value: of the change.
    """

    row: int
    number: int
    value: float


class Draws(NamedTuple):
    """What was drawn for a batch.

    Attributes:
        changes: those that many patches undergo at once.
        noise: standard deviations, where each patch has a generator of its own.
        coarse: factors, where each patch has a size of its own.
    """

    changes: Changes
    noise: tuple[Alone, ...]
    coarse: tuple[Alone, ...]


def drawn(name: str, rows: NDArray[np.intp], values: NDArray[np.float64]) -> dict[str, Change]:
    """Return a change of the rows under its name; nothing where there are none.

    Args:
        name: of the change.
        rows: (k,) places in the batch.
        values: (k, ...) numbers.
    """
    if not rows.size:
        return {}
    return {name: Change(torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(values.astype(np.float32)))}


def on_device(changes: Changes, device: torch.device) -> dict[str, Change]:
    """Return changes on a device, moved by one copy that nothing waits for."""
    if device.type == "cpu" or not changes:
        return dict(changes)
    rows, values = zip(*changes.values(), strict=True)
    # Rows first: eight bytes each, they leave the four-byte values on their boundaries.
    moved = _together([*rows, *values], device)
    pairs = zip(moved[: len(rows)], moved[len(rows) :], strict=True)
    return {name: Change(*pair) for name, pair in zip(changes, pairs, strict=True)}


def change_rows(batch: Tensor, changes: Changes, name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the rows of a batch that a change befalls by what a function makes of them and of the values."""
    if change := changes.get(name):
        batch.index_copy_(0, change.rows, function(batch.index_select(0, change.rows), change.values))


def _together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors of the host on a device, moved as one; those of larger numbers first."""
    content = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
    if device.type == "cuda":
        content = content.pin_memory()
    parts = torch.split(content.to(device, non_blocking=True), [tensor.nbytes for tensor in tensors])
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
