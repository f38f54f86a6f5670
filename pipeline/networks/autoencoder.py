"""A denoising autoencoder (Vincent et al. 2008) whose encoder is a U-Net's, to begin one from unlabelled volumes."""

from __future__ import annotations

from pipeline.networks.blocks import Activation, Padding
from pipeline.networks.contract import NetworkTask
from pipeline.networks.topology import Convs, Count, Kernels, LevelCount, Strides, Widths
from pipeline.networks.unet import Downsampling, NormChoice, UNet, unet
from pipeline.networks.upsampling import UpsamplingMode


def autoencoder(
    task: NetworkTask,
    *,
    width: Count | None = None,
    max_width: Count = 320,
    widths: Widths | None = None,
    levels: LevelCount | None = None,
    kernels: Kernels | None = None,
    strides: Strides | None = None,
    convs: Convs = 2,
    norm: NormChoice = "auto",
    activation: Activation = "leaky_relu",
    residual: bool = False,
    downsampling: Downsampling = "strided",
    upsampling: UpsamplingMode = "transposed",
    padding: Padding = "same",
) -> UNet:
    """Build a U-Net's encoder and decoder without the skips; it reconstructs the task's `num_classes` channels.

    Its options mean what they mean for `unet`, and its weights `encoder.*` fit a `unet` of the same options and
    channels.

    Args:
        task: what it is built for.
        width: feature maps of the first level; None: the plan's, else 32.
        max_width: bound of the doubling.
        widths: feature maps of every level.
        levels: resolutions, the bottleneck included.
        kernels: of every level.
        strides: into every level but the first.
        convs: convolutions in each level.
        norm: batch, instance, group or none; auto: the plan's, else instance.
        activation: relu, leaky_relu, prelu or silu.
        residual: short skips.
        downsampling: max, average or strided.
        upsampling: any; max_unpool hands over where the encoder found the largest values, a skip of a kind.
        padding: same or valid.

    Raises:
        ValueError: as for `unet`.
    """
    return unet(
        task,
        width=width,
        max_width=max_width,
        widths=widths,
        levels=levels,
        kernels=kernels,
        strides=strides,
        convs=convs,
        norm=norm,
        activation=activation,
        residual=residual,
        skips="none",
        downsampling=downsampling,
        upsampling=upsampling,
        padding=padding,
        coarse_heads=False,
    )
