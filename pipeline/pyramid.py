"""The resolutions that a patch admits, as nnU-Net halves it (Isensee et al. 2021): arithmetic that planning and the
networks share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, inf

Size = tuple[int, int, int]
Spacing = tuple[float, float, float]

# nnU-Net stops pooling an axis below this many voxels (experiment_planning, `UNet_featuremap_min_edge_length`).
SMALLEST_FEATURE_MAP = 4


def as_size(values: Iterable[int]) -> Size:
    """Return three numbers, one for each axis, as a size."""
    x, y, z = values
    return x, y, z


def topology(
    patch_size: Size, spacing_mm: Spacing, levels: int | None = None, flat_axis: int | None = None
) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
    """Return the kernel of each level and the stride into each level but the first.

    An axis is halved while its voxels are at most twice as long as the shortest of those that can still be halved, so
    that a thick axis waits until the others have become as coarse, and while the feature map keeps 4 voxels (Isensee et
    al. 2021, supplementary note 2). An odd size counts as the next even one, to which a network's patch is rounded up.
    Kernels are those of `fitted_kernels`. A 2-D network's flat axis has strides and kernels of 1.

    Raises:
        ValueError: the patch cannot be halved as often as `levels` says.
    """
    size, spacing = list(patch_size), list(spacing_mm)
    strides: list[Size] = []
    while len(strides) + 1 != levels:
        able = [n // 2 >= SMALLEST_FEATURE_MAP and axis != flat_axis for axis, n in enumerate(size)]
        if not any(able):
            break
        finest = min(mm for mm, can in zip(spacing, able, strict=True) if can)
        stride = as_size(2 if can and mm <= 2 * finest else 1 for can, mm in zip(able, spacing, strict=True))
        strides.append(stride)
        size = [ceil(n / s) for n, s in zip(size, stride, strict=True)]
        spacing = [mm * s for mm, s in zip(spacing, stride, strict=True)]
    if (levels is not None and len(strides) + 1 < levels) or not strides:
        raise ValueError(
            f"a patch of {patch_size} voxels at {spacing_mm} mm can be halved {len(strides)} times, so it holds "
            f"{len(strides) + 1} levels, got levels: {levels or 2}; take fewer levels or a larger "
            "preprocessing.patch_size"
        )
    return fitted_kernels(spacing_mm, strides, flat_axis), tuple(strides)


def fitted_kernels(spacing_mm: Spacing, strides: Sequence[Size], flat_axis: int | None = None) -> tuple[Size, ...]:
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
