"""A U-Net whose bottleneck also sees a context pathway: the same place on a coarser grid and in a wider field, as
DeepMedic (Kamnitsas et al. 2017) adds pathways to plain convolutions.
"""

from __future__ import annotations

from math import gcd
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.networks.blocks import Activation, conv_stage, lost_voxels, trim
from pipeline.networks.contract import NetworkTask, Size, as_size
from pipeline.networks.topology import Convs, Count, LevelCount, fitted_levels
from pipeline.networks.unet import Design, Downsampling, UNet
from pipeline.networks.upsampling import UpsamplingMode


class MultiscaleUNet(UNet):
    """A U-Net of valid convolutions on the middle of its input, and a context pathway on all of it.

    The context pathway sees the means of blocks, each a few of the bottleneck's voxels wide, through valid
    convolutions; its features are repeated on the bottleneck's voxels and joined to theirs. A legal input makes the
    bottleneck whole blocks, so blocks begin where it begins, always at the same place relative to the output, and
    windows a multiple of `stride`, the size of a block, apart share them: tiles equal the whole volume.

    The margin is the U-Net's own and what the context pathway sees beyond it.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        design: of the U-Net; its padding is valid.
        context_factor: size of a block in voxels of the bottleneck.
        context_convs: convolutions of the context pathway.
        context_width: its feature maps.

    Raises:
        ValueError: the context pathway sees no farther than the U-Net.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        design: Design,
        *,
        context_factor: Size,
        context_convs: int,
        context_width: int,
    ) -> None:
        width, kernel = design.levels.widths[-1], design.levels.kernels[-1]
        super().__init__(in_channels, num_classes, design, bottleneck_width=width + context_width)
        self.context = conv_stage(
            in_channels,
            context_width,
            convs=context_convs,
            kernel=kernel,
            stride=(1, 1, 1),
            norm=design.norm,
            activation=design.activation,
            residual=False,
            padding="valid",
        )
        self.context_factor = context_factor
        self.stride = as_size(s * f for s, f in zip(self.stride, context_factor, strict=True))
        # On each side of the bottleneck: the voxels that the context's convolutions take, and those that the encoder's
        # do, in voxels of the image.
        taken = [n * s for n, s in zip(lost_voxels(context_convs, kernel, "valid"), self.stride, strict=True)]
        own = [n // 2 for n in self._lost_in_encoder]
        self.beyond = as_size(_beyond(t - n, s) for t, n, s in zip(taken, own, self.stride, strict=True))
        self.unseen = as_size(b + n - t for b, n, t in zip(self.beyond, own, taken, strict=True))
        if self.beyond == (0, 0, 0):
            raise ValueError(
                f"context_convs {context_convs}: the context pathway sees {max(taken)} voxels beyond the bottleneck, "
                f"the U-Net itself {max(own)}; take more of them, a larger context_factor, or fewer levels"
            )
        self.margin = as_size(m + b for m, b in zip(self.margin, self.beyond, strict=True))
        self._lost_in_encoder = as_size(n + 2 * b for n, b in zip(self._lost_in_encoder, self.beyond, strict=True))

    def encode(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the features of bottleneck and context, and those of the levels above, finest first.

        Raises:
            ValueError: the image's size is none that `input_size` returns.
        """
        self._refuse_illegal(image)
        *skips, bottleneck = self.encoder(trim(image, self.beyond))
        blocks = functional.avg_pool3d(trim(image, self.unseen), self.stride)
        scale = [float(f) for f in self.context_factor]
        context = functional.interpolate(self.context(blocks), scale_factor=scale, mode="nearest")
        return torch.cat([self.dropout(bottleneck), context], dim=1), skips


def _beyond(missing: int, stride: int) -> int:
    """Return the least margin of `missing` voxels on each side whose sum is a multiple of the stride."""
    step = stride // gcd(stride, 2)
    return max(0, -(-missing // step) * step)


def multiscale_unet(
    task: NetworkTask,
    *,
    width: Count | None = None,
    max_width: Count = 320,
    levels: LevelCount = 3,
    convs: Convs = 2,
    norm: Literal["batch", "none"] = "batch",
    activation: Activation = "leaky_relu",
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    residual: bool = False,
    downsampling: Downsampling = "strided",
    upsampling: UpsamplingMode = "transposed",
    context_factor: Count = 2,
    context_convs: Count = 3,
    context_width: Count | None = None,
) -> MultiscaleUNet:
    """Build a U-Net of valid convolutions with a context pathway into its bottleneck.

    There is no padded form: its context would end where the patch does. With three levels and the defaults the
    bottleneck alone sees 32 voxels, with its context 56.

    Args:
        task: what it is built for.
        width: feature maps of the first level, doubled at each level; None: the plan's, else 32.
        max_width: bound of the doubling.
        levels: resolutions of the U-Net, the bottleneck included; each doubles the margin, near enough.
        convs: convolutions in each level, or in every one.
        norm: batch or none; others would tell tiles from the whole volume.
        activation: relu, leaky_relu, prelu or silu.
        dropout: probability of zeroing a whole feature map of the bottleneck; the context's are kept.
        residual: short skips around each level's convolutions.
        downsampling: max, average, or strided convolutions.
        upsampling: the way back; see `pipeline.networks.upsampling`.
        context_factor: how much coarser than the bottleneck the context's grid is.
        context_convs: 3^3 convolutions of the context pathway.
        context_width: its feature maps; None: as many as the bottleneck's.

    Raises:
        ValueError: the context pathway sees no farther than the U-Net, or the options contradict one another.
    """
    fitted = fitted_levels(
        task,
        width=width,
        max_width=max_width,
        convs=convs,
        levels=levels,
        padding="valid",
    )
    design = Design(
        levels=fitted,
        norm=norm,
        activation=activation,
        dropout=dropout,
        residual=residual,
        downsampling=downsampling,
        upsampling=upsampling,
        padding="valid",
    )
    return MultiscaleUNet(
        task.in_channels,
        task.num_classes,
        design,
        context_factor=task.cubic(context_factor),
        context_convs=context_convs,
        context_width=context_width or fitted.widths[-1],
    )
