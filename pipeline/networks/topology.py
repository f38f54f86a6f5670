"""The levels of networks that pool: how many, and with which kernels and strides; given, or fitted to patch and spacing
as nnU-Net does (Isensee et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Annotated

from pydantic import Field

from pipeline.networks.blocks import Padding
from pipeline.networks.contract import NetworkTask, Size, as_size

# Types of options: what the builders of networks with levels take.
Count = Annotated[int, Field(ge=1)]
Voxels = tuple[Count, Count, Count]
Widths = Annotated[tuple[Count, ...], Field(min_length=2)]
Kernels = Annotated[tuple[Voxels, ...], Field(min_length=2)]
Strides = Annotated[tuple[Voxels, ...], Field(min_length=1)]
Convs = Count | Annotated[tuple[Count, ...], Field(min_length=2)]
LevelCount = Annotated[int, Field(ge=2)]

# nnU-Net stops pooling an axis below this many voxels (experiment_planning, `UNet_featuremap_min_edge_length`).
SMALLEST_FEATURE_MAP = 4


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
    width: int,
    max_width: int,
    widths: tuple[int, ...] | None,
    levels: int | None,
    kernels: tuple[Size, ...] | None,
    strides: tuple[Size, ...] | None,
    convs: int | tuple[int, ...],
    padding: Padding,
) -> Levels:
    """Return a U-Net's levels: what is given, and what fits the plan's patch and spacing where it is None.

    Raises:
        ValueError: two options imply different numbers of levels, one crosses the flat axis, or the patch is too small.
    """
    count = _agreed_count(levels, widths=widths, kernels=kernels, strides=strides, convs=convs)
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


def topology(
    patch_size: Size, spacing_mm: tuple[float, float, float], levels: int | None, flat_axis: int | None = None
) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
    """Return the kernel of each level and the stride into each level but the first.

    An axis is halved while its voxels are at most twice as long as the shortest of those that can still be halved, so
    that a thick axis waits until the others have become as coarse, and while the feature map keeps 4 voxels (Isensee et
    al. 2021, supplementary note 2). Kernels are those of `fitted_kernels`. A 2-D network's flat axis has strides and
    kernels of 1.

    Raises:
        ValueError: the patch cannot be halved as often as `levels` says.
    """
    size, spacing = list(patch_size), list(spacing_mm)
    strides: list[Size] = []
    while len(strides) + 1 != levels:
        able = [n % 2 == 0 and n // 2 >= SMALLEST_FEATURE_MAP and axis != flat_axis for axis, n in enumerate(size)]
        if not any(able):
            break
        finest = min(mm for mm, can in zip(spacing, able, strict=True) if can)
        stride = as_size(2 if can and mm <= 2 * finest else 1 for can, mm in zip(able, spacing, strict=True))
        strides.append(stride)
        size = [n // s for n, s in zip(size, stride, strict=True)]
        spacing = [mm * s for mm, s in zip(spacing, stride, strict=True)]
    if (levels is not None and len(strides) + 1 < levels) or not strides:
        raise ValueError(
            f"a patch of {patch_size} voxels at {spacing_mm} mm can be halved {len(strides)} times, so it holds "
            f"{len(strides) + 1} levels, got levels: {levels or 2}; take fewer levels or a larger "
            "preprocessing.patch_size"
        )
    return fitted_kernels(spacing_mm, strides, flat_axis), tuple(strides)


def fitted_kernels(
    spacing_mm: tuple[float, float, float], strides: Sequence[Size], flat_axis: int | None = None
) -> tuple[Size, ...]:
    """Return the kernel of each level: 1 along an axis until its voxels are at most twice as long as the shortest, 3
    from there on, as nnU-Net has it; the flat axis counts as endlessly thick.

    An axis that is halved has 3 too: a strided convolution with a kernel of 1 would leave voxels out.
    """
    spacing = [inf if axis == flat_axis else mm for axis, mm in enumerate(spacing_mm)]
    kernels = [(1, 1, 1)]
    for stride in ((1, 1, 1), *strides):
        spacing = [mm * s for mm, s in zip(spacing, stride, strict=True)]
        kernels.append(
            as_size(
                3 if before == 3 or s > 1 or mm <= 2 * min(spacing) else 1
                for before, s, mm in zip(kernels[-1], stride, spacing, strict=True)
            )
        )
    return tuple(kernels[1:])
