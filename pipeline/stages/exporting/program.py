"""A network as an exported program (`torch.export`): it runs wherever torch does, without medseg, on any legal size."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from pipeline.networks import Network
from pipeline.networks.contract import Size, as_size

log = logging.getLogger(__name__)

# Along a free axis a level of one voxel is a case of its own to the exporter, so two strides are the least.
FEWEST_STRIDES = 2
# The largest size that a program answers for; far beyond any memory.
MOST_STRIDES = 2**14


@dataclass(frozen=True)
class LegalSizes:
    """The sizes that an input may have along one axis.

    Attributes:
        smallest: voxels.
        step: between one legal size and the next; 0 where there is only one.
    """

    smallest: int
    step: int

    @property
    def is_free(self) -> bool:
        """Whether there are several."""
        return self.step > 0

    def larger(self, steps: int) -> int:
        """Return the size so many steps above the smallest."""
        return self.smallest + steps * self.step

    def __str__(self) -> str:
        return f"{self.smallest} + {self.step}n" if self.is_free else str(self.smallest)


Sizes = tuple[LegalSizes, LegalSizes, LegalSizes]


@dataclass(frozen=True, eq=False)
class Program:
    """An exported network.

    Attributes:
        exported: takes image (N, C, *input), any N, and returns logits (N, K, *output).
        sizes: legal along each axis.
        window: the input for one of the plan's windows, always legal.
        remarks: why an axis has one size only.
    """

    exported: ExportedProgram
    sizes: Sizes
    window: Size
    remarks: tuple[str, ...]

    @property
    def some_sizes(self) -> list[Size]:
        """A few legal inputs: the window, the smallest, and one larger than that along all free axes."""
        smallest, larger = (as_size(own.larger(steps) for own in self.sizes) for steps in (0, 3))
        return list(dict.fromkeys((self.window, smallest, larger)))


def export_program(network: Network, channels: int, window: Size) -> Program:
    """Export a network in eval mode, with any batch and as free a spatial size as it bears.

    Args:
        network: on the CPU, float32.
        channels: of its image.
        window: voxels of the plan's windows, as the network yields them.

    Raises:
        ValueError: the network cannot be exported at all.
    """
    network.eval()
    size = network.input_size(window)
    sizes, remarks = _legal_sizes(network, window)
    if any(own.is_free for own in sizes):
        try:
            return Program(_exported(network, channels, sizes, size), sizes, size, remarks)
        except Exception as error:  # Of many kinds, by what in the network stands in the way.
            why = f"its size cannot be left free ({_first_line(error)})"
            log.warning("windows of %s voxels only: %s", _by(size), why)
            remarks = (*remarks, why)
    fixed = _fixed(size)
    try:
        return Program(_exported(network, channels, fixed, size), fixed, size, remarks)
    except Exception as error:
        raise ValueError(f"torch.export cannot take this network: {_first_line(error)}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what torch's exporters warn their own developers of to themselves."""
    names = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _legal_sizes(network: Network, window: Size) -> tuple[Sizes, tuple[str, ...]]:
    """Return the sizes that may be left free, and why others may not."""
    size = network.input_size(window)
    try:
        network.input_size(as_size(n + 1 for n in network.output_size(size)))
    except ValueError as error:
        return _fixed(size), (f"one size only: {error}",)
    smallest, remarks, sizes = network.input_size((1, 1, 1)), [], []
    for axis, (least, step, own) in enumerate(zip(smallest, network.stride, size, strict=True)):
        beyond = least % step
        first = step * max(FEWEST_STRIDES, least // step + 1) + beyond
        if window[axis] == 1:  # of a 2-D network, whose planes stand apart: the batch is where more of them go
            sizes.append(LegalSizes(own, 0))
        elif own < first:
            remarks.append(
                f"axis {'xyz'[axis]} stays at {own} voxels: the window is the smallest that the network takes"
            )
            sizes.append(LegalSizes(own, 0))
        else:
            sizes.append(LegalSizes(first, step))
    x, y, z = sizes
    return (x, y, z), tuple(remarks)


def _fixed(size: Size) -> Sizes:
    """Return one size for each axis."""
    x, y, z = (LegalSizes(n, 0) for n in size)
    return x, y, z


def _exported(network: Network, channels: int, sizes: Sizes, window: Size) -> ExportedProgram:
    """Export a network for some sizes, and see that it runs on the window."""
    example = as_size(max(own, legal.larger(legal.is_free)) for own, legal in zip(window, sizes, strict=True))
    # The batch is two: of one, the exporter would think that it is always one.
    image = torch.zeros(2, channels, *example)
    dims: dict[int, Any] = {0: Dim("batch", min=1)}
    for axis, legal in enumerate(sizes):
        if legal.is_free:
            dims[2 + axis] = _dim("xyz"[axis], legal)
    with quietly(), torch.no_grad():
        exported = torch.export.export(network, (image,), dynamic_shapes=(dims,))
        exported.module()(torch.zeros(1, channels, *window))
    return exported


def _dim(name: str, legal: LegalSizes) -> Any:
    """Return an axis' size for the exporter: so many strides, and what a network without padding needs beyond."""
    beyond = legal.smallest % legal.step
    strides: Any = Dim(name, min=legal.smallest // legal.step, max=MOST_STRIDES)
    size = strides if legal.step == 1 else legal.step * strides
    return size + beyond if beyond else size


def _first_line(error: Exception) -> str:
    """Return the beginning of an exporter's error, which goes on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2])[:200]


def _by(size: Size) -> str:
    """Return 64x64x24."""
    return "x".join(map(str, size))
