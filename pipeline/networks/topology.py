"""The levels of networks that pool: how many, and with which kernels and strides; given, or fitted to patch and spacing
as nnU-Net does (Isensee et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from pipeline.networks.blocks import Padding
from pipeline.networks.contract import NetworkTask, Size, as_size
from pipeline.pyramid import SMALLEST_FEATURE_MAP, fitted_kernels, topology

# Types of options: what the builders of networks with levels take.
Count = Annotated[int, Field(ge=1)]
Voxels = tuple[Count, Count, Count]
Widths = Annotated[tuple[Count, ...], Field(min_length=2)]
Kernels = Annotated[tuple[Voxels, ...], Field(min_length=2)]
Strides = Annotated[tuple[Voxels, ...], Field(min_length=1)]
Convs = Count | Annotated[tuple[Count, ...], Field(min_length=2)]
LevelCount = Annotated[int, Field(ge=2)]

# Feature maps of the finest level where neither plan nor options say (Isensee et al. 2021).
DEFAULT_WIDTH = 32


@dataclass(frozen=True)
class Levels:
    """A U-Net's resolutions, the finest first, the bottleneck last.

    Attributes:
        widths: feature maps of each level.
        kernels: convolution kernel of each level, odd.
        strides: downsampling into each level but the first.
        convs: convolutions of each level, on the way down and again on the way up.
    """

    widths: tuple[int, ...]
    kernels: tuple[Size, ...]
    strides: tuple[Size, ...]
    convs: tuple[int, ...]

    def __post_init__(self) -> None:
        even = [kernel for kernel in self.kernels if any(k % 2 == 0 for k in kernel)]
        if even:
            raise ValueError(f"kernels: must be odd, so that a convolution stays centred, got {even[0]}")


def fitted_levels(
    task: NetworkTask,
    *,
    width: int | None,
    max_width: int,
    convs: int | tuple[int, ...],
    widths: tuple[int, ...] | None = None,
    levels: int | None = None,
    kernels: tuple[Size, ...] | None = None,
    strides: tuple[Size, ...] | None = None,
    padding: Padding = "same",
) -> Levels:
    """Return a U-Net's levels: what is given, where it is None what planning decided, else what fits patch and spacing.

    Raises:
        ValueError: two options imply different numbers of levels, one crosses the flat axis, or the patch is too small.
    """
    count = _agreed_count(levels, widths=widths, kernels=kernels, strides=strides, convs=convs)
    planned = task.planned if padding == "same" else None
    if planned and strides is None and count in (None, len(planned.kernels)):
        kernels, strides = kernels or planned.kernels, planned.strides
    if strides is None:
        patch = task.patch_size
        if padding == "valid":
            patch = as_size(_halvable(n, count) for n in patch)
        _, strides = topology(patch, task.spacing_mm, count, task.flat_axis)
    kernels = kernels or fitted_kernels(task.spacing_mm, strides, task.flat_axis)
    if task.flat_axis is not None and any(size[task.flat_axis] != 1 for size in (*kernels, *strides)):
        raise ValueError(
            f"kernels, strides: must be 1 along axis {task.flat_axis}, which this 2-D network leaves alone"
        )
    if widths is None:
        width = width or (task.planned.width if task.planned else DEFAULT_WIDTH)
        widths = tuple(min(width * 2**level, max_width) for level in range(len(kernels)))
    return Levels(widths, kernels, strides, convs if isinstance(convs, tuple) else (convs,) * len(kernels))


def _halvable(voxels: int, count: int | None) -> int:
    """Return a size that can be halved as often as `count` levels want, or as its length admits.

    A network of valid convolutions reads more than its patch and has the patch rounded up to what it yields: that the
    patch is odd, or too small for the levels asked for, does not matter.
    """
    halvings = max((voxels // SMALLEST_FEATURE_MAP).bit_length() - 1, 0) if count is None else count - 1
    return max(voxels >> halvings, SMALLEST_FEATURE_MAP) << halvings


def _agreed_count(
    levels: int | None,
    *,
    widths: tuple[int, ...] | None,
    kernels: tuple[Size, ...] | None,
    strides: tuple[Size, ...] | None,
    convs: int | tuple[int, ...],
) -> int | None:
    """Return the number of levels that all given options imply; None where none of them does."""
    implied = {
        "levels": levels,
        "widths": None if widths is None else len(widths),
        "kernels": None if kernels is None else len(kernels),
        "strides": None if strides is None else len(strides) + 1,
        "convs": len(convs) if isinstance(convs, tuple) else None,
    }
    given = {name: count for name, count in implied.items() if count is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"the options imply different numbers of levels: {given}; strides are one fewer than levels")
    return next(iter(given.values()), None)
