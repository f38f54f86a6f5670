"""Parity: how near an exported network comes to the one that was trained, on windows of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import Output
from pipeline.data.plan import Plan
from pipeline.inference.deciding import DECISIONS
from pipeline.inference.windows.tiling import Windowing, cut, tile_volume
from pipeline.networks import Network
from pipeline.networks.contract import Size
from pipeline.records import Record

# Windows looked at of an image, spread evenly over it: at the size of the plan's windows, and at each other size.
WINDOWS, WINDOWS_OF_OTHER_SIZE = 6, 1

# Logits may differ by this share of the largest of them, or of 1: float32 sums in another order.
LOGIT_TOLERANCE = 1e-3
# Labels that must agree: of all voxels, and of those that either calls a structure, which may be few beside the rest.
LEAST_EQUAL, LEAST_EQUAL_IN_STRUCTURES = 0.9999, 0.99

Run = Callable[[Tensor], NDArray[np.float32]]


class Parity(Record):
    """How near an export comes to the model.

    Attributes:
        format: bundle, onnx or pt2.
        images: what was looked at.
        sizes: inputs that were run, in voxels.
        voxels: compared.
        logit_difference: largest of all; None where only label maps are compared.
        logit_tolerance: largest that passes.
        equal_labels: share of voxels with the same label.
        least_equal: smallest that passes.
        equal_in_structures: share of the voxels with the same label among those that either calls a structure; None
            where there are none.
        least_equal_in_structures: smallest that passes.
        versions: package -> version.
        remarks: what a user must know.
    """

    format: str
    images: str
    sizes: tuple[Size, ...]
    voxels: int
    logit_difference: float | None
    logit_tolerance: float | None
    equal_labels: float
    least_equal: float
    equal_in_structures: float | None
    least_equal_in_structures: float = LEAST_EQUAL_IN_STRUCTURES
    versions: dict[str, str]
    remarks: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the export is as good as the model."""
        near = self.logit_difference is None or self.logit_difference <= (self.logit_tolerance or 0.0)
        inside = self.equal_in_structures is None or self.equal_in_structures >= self.least_equal_in_structures
        return near and inside and self.equal_labels >= self.least_equal

    def as_text(self) -> str:
        """Return the figures in a line, and each remark in one."""
        logits = (
            ""
            if self.logit_difference is None
            else f"logits differ by {self.logit_difference:.2g} at most ({self.logit_tolerance:.2g} pass), "
        )
        sizes = ", ".join("x".join(map(str, size)) for size in self.sizes)
        inside = "" if self.equal_in_structures is None else f", {self.equal_in_structures:.3%} of those in structures"
        equal = f"{self.equal_labels:.4%} of {self.voxels:,} labels equal{inside}"
        line = f"parity on {self.images}: {logits}{equal}; sizes {sizes}"
        return "\n".join([line, *self.remarks])


@dataclass
class Agreement:
    """How many voxels have the same label.

    Attributes:
        voxels, equal: compared, and with the same label.
        structure_voxels, structure_equal: the same of those that either calls a structure.
    """

    voxels: int = 0
    equal: int = 0
    structure_voxels: int = 0
    structure_equal: int = 0

    def add(self, ours: NDArray[Any], theirs: NDArray[Any], background: int = 0) -> None:
        """Compare two label maps of one shape."""
        same, structure = ours == theirs, (ours != background) | (theirs != background)
        self.voxels += same.size
        self.equal += int(same.sum())
        self.structure_voxels += int(structure.sum())
        self.structure_equal += int((same & structure).sum())

    @property
    def share(self) -> float:
        """Share of the voxels with the same label."""
        return self.equal / self.voxels

    @property
    def share_in_structures(self) -> float | None:
        """The same of those that either calls a structure; None where there are none."""
        return self.structure_equal / self.structure_voxels if self.structure_voxels else None


@dataclass(frozen=True, eq=False)
class Difference:
    """How two networks' answers differ.

    Attributes:
        logits: largest difference.
        tolerance: largest that passes.
        labels: how many are the same.
    """

    logits: float
    tolerance: float
    labels: Agreement


def compare_windows(
    network: Network, run: Run, images: Sequence[NDArray[np.float32]], plan: Plan, output: Output, sizes: Sequence[Size]
) -> Difference:
    """Run both on the same windows.

    Args:
        network: the trained one, on the CPU, in eval mode.
        run: the export: image (N, C, *input) -> logits (N, K, *output).
        images: (C, X, Y, Z) on the plan's grid, normalised.
        plan: says how windows lie.
        output: what the logits are of.
        sizes: of inputs; the first is the plan's window.
    """
    decide = DECISIONS[output].classes
    worst, largest, labels = 0.0, 1.0, Agreement()
    for image in images:
        for number, size in enumerate(sizes):
            batch = _windows(network, image, plan, size, WINDOWS_OF_OTHER_SIZE if number else WINDOWS)
            with torch.inference_mode():
                ours = network(batch).numpy()
            theirs = run(batch)
            if ours.shape != theirs.shape:
                raise ValueError(f"the export makes {theirs.shape} of an input of {size}, the network {ours.shape}")
            worst = max(worst, float(np.abs(ours - theirs).max()))
            largest = max(largest, float(np.abs(ours).max()))
            for mine, its in zip(ours, theirs, strict=True):
                labels.add(decide(mine.reshape(len(mine), -1)), decide(its.reshape(len(its), -1)))
    return Difference(worst, LOGIT_TOLERANCE * largest, labels)


def _windows(network: Network, image: NDArray[np.float32], plan: Plan, size: Size, most: int) -> Tensor:
    """Return inputs (N, C, *size) of an image, as windows of that size would lie in it; zeros beyond it."""
    _, x, y, z = image.shape
    windowing = Windowing(network.output_size(size))
    tiling = tile_volume((x, y, z), network.output_size(size), network.margin, network.stride, windowing)
    starts = [start for slab in tiling.slabs for start in tiling.starts(slab)]
    chosen = np.unique(np.linspace(0, len(starts) - 1, most).round().astype(int))
    if most == 1:
        chosen = np.array([len(starts) // 2])
    batch = np.zeros((len(chosen), len(image), *size), np.float32)
    for values, number in zip(batch, chosen, strict=True):
        first = [at - margin for at, margin in zip(starts[number], network.margin, strict=True)]
        inside, outside = cut(first, size, (x, y, z))
        values[:, *inside] = image[:, *outside]
    return torch.from_numpy(batch)


def program_run(module: Any) -> Run:
    """Return an exported program's module as a function of arrays."""

    def run(batch: Tensor) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = module(batch).numpy()
        return logits

    return run
