"""U-Net in 3D (Ronneberger et al. 2015; Çiçek et al. 2016) with the topology that nnU-Net fits to patch and spacing
(Isensee et al. 2021).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.networks.blocks import Activation, Norm, conv_stage
from pipeline.networks.contract import Network, NetworkTask, Size, total_stride

# nnU-Net stops pooling an axis below this many voxels (experiment_planning, `UNet_featuremap_min_edge_length`).
SMALLEST_FEATURE_MAP = 4


class UNet(Network):
    """Encoder, bottleneck and decoder with long skips by concatenation.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        widths: feature maps of each level, finest first.
        kernels: convolution kernel of each level.
        strides: downsampling into each level but the first.
        convs: convolutions in each level.
        norm, activation: of every convolution.
        dropout: probability of zeroing a whole feature map of the bottleneck.
        residual: short skips around each level's convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        widths: tuple[int, ...],
        kernels: tuple[Size, ...],
        strides: tuple[Size, ...],
        convs: int,
        norm: Norm,
        activation: Activation,
        dropout: float,
        residual: bool,
    ) -> None:
        super().__init__()
        self.stride = total_stride(strides)

        def stage(inputs: int, level: int, stride: Size = (1, 1, 1)) -> nn.Module:
            return conv_stage(
                inputs,
                widths[level],
                convs=convs,
                kernel=kernels[level],
                stride=stride,
                norm=norm,
                activation=activation,
                residual=residual,
            )

        levels = range(len(widths))
        self.encoder = nn.ModuleList(
            stage(in_channels if k == 0 else widths[k - 1], k, (1, 1, 1) if k == 0 else strides[k - 1]) for k in levels
        )
        self.dropout = nn.Dropout3d(dropout)
        # The decoder's lists run as it does, from the coarsest level up.
        upwards = list(reversed(list(pairwise(levels))))
        self.upsampling = nn.ModuleList(
            nn.ConvTranspose3d(widths[coarse], widths[fine], strides[fine], stride=strides[fine])
            for fine, coarse in upwards
        )
        self.decoder = nn.ModuleList(stage(2 * widths[fine], fine) for fine, _ in upwards)
        self.heads = nn.ModuleList(nn.Conv3d(widths[fine], num_classes, 1) for fine, _ in upwards)

    def _decoded(self, image: Tensor) -> list[Tensor]:
        """Return the decoder's features of each level, coarsest first."""
        skips: list[Tensor] = []
        features = image
        for stage in self.encoder:
            features = stage(features)
            skips.append(features)
        features = self.dropout(skips.pop())
        decoded = []
        for upsample, stage in zip(self.upsampling, self.decoder, strict=True):
            features = stage(torch.cat([upsample(features), skips.pop()], dim=1))
            decoded.append(features)
        return decoded

    def forward(self, image: Tensor) -> Tensor:
        """Map (N, C, X, Y, Z) to logits (N, K, X, Y, Z); X, Y, Z must be multiples of the stride."""
        return self.heads[-1](self._decoded(image)[-1])  # type: ignore[no-any-return]

    def deep_supervision(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of every decoder level, finest first."""
        decoded = self._decoded(image)
        return tuple(head(features) for head, features in zip(self.heads, decoded, strict=True))[::-1]


def unet(
    task: NetworkTask,
    *,
    width: Annotated[int, Field(ge=1)] = 32,
    max_width: Annotated[int, Field(ge=1)] = 320,
    levels: Annotated[int, Field(ge=2)] | None = None,
    convs: Annotated[int, Field(ge=1)] = 2,
    norm: Norm = "instance",
    activation: Activation = "leaky_relu",
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    residual: bool = False,
) -> UNet:
    """Build a U-Net whose depth, strides and kernels fit the plan's patch and spacing.

    Args:
        task: what it is built for.
        width: feature maps of the first level, doubled at each level.
        max_width: bound of the doubling.
        levels: resolutions, the bottleneck included; None: as many as the patch admits.
        convs: convolutions in each level.
        norm: batch (cheaper; wants a batch of 4 or more), instance or none.
        activation: relu, leaky_relu, prelu or silu.
        dropout: probability of zeroing a whole feature map of the bottleneck.
        residual: short skips around each level's convolutions.
    """
    kernels, strides = topology(task.patch_size, task.spacing_mm, levels)
    widths = tuple(min(width * 2**level, max_width) for level in range(len(kernels)))
    return UNet(
        task.in_channels,
        task.num_classes,
        widths=widths,
        kernels=kernels,
        strides=strides,
        convs=convs,
        norm=norm,
        activation=activation,
        dropout=dropout,
        residual=residual,
    )


def topology(
    patch_size: Size, spacing_mm: tuple[float, float, float], levels: int | None
) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
    """Return the kernel of each level and the stride into each level but the first.

    An axis is halved while its voxels are at most twice as long as the shortest of those that can still be halved, so
    that a thick axis waits until the others have become as coarse, and while the feature map keeps 4 voxels; it is
    convolved with a kernel of 3 as soon as its voxels are at most twice as long as the shortest, else of 1 (Isensee et
    al. 2021, supplementary note 2).

    Raises:
        ValueError: the patch cannot be halved as often as `levels` says.
    """
    size, spacing = list(patch_size), list(spacing_mm)
    kernels: list[Size] = []
    strides: list[Size] = []
    while True:
        kernels.append(_size(3 if mm <= 2 * min(spacing) else 1 for mm in spacing))
        able = [n % 2 == 0 and n // 2 >= SMALLEST_FEATURE_MAP for n in size]
        if len(kernels) == levels or not any(able):
            break
        finest = min(mm for mm, can in zip(spacing, able, strict=True) if can)
        stride = _size(2 if can and mm <= 2 * finest else 1 for can, mm in zip(able, spacing, strict=True))
        strides.append(stride)
        size = [n // s for n, s in zip(size, stride, strict=True)]
        spacing = [mm * s for mm, s in zip(spacing, stride, strict=True)]
    if (levels is not None and len(kernels) < levels) or not strides:
        raise ValueError(
            f"a patch of {patch_size} voxels at {spacing_mm} mm can be halved {len(strides)} times, so it holds "
            f"{len(kernels)} levels, got levels: {levels or 2}; take fewer levels or a larger preprocessing.patch_size"
        )
    return tuple(kernels), tuple(strides)


def _size(values: Iterable[int]) -> Size:
    """Return three numbers as a size."""
    x, y, z = values
    return x, y, z
