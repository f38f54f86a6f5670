"""A U-Net whose encoder is a residual network, and whose decoder is slight (Isensee et al. 2024, nnU-Net Revisited)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.networks.blocks import Activation
from pipeline.networks.contract import NetworkTask
from pipeline.networks.topology import Count, Kernels, LevelCount, Strides, Widths, fitted_levels
from pipeline.networks.unet import Design, NormChoice, UNet, chosen_norm
from pipeline.networks.upsampling import UpsamplingMode

# Residual units of each level, the finest first; deeper levels have as many as the last (ResEnc M, L and XL alike).
UNITS = (1, 3, 4, 6, 6, 6)

Blocks = Annotated[tuple[Count, ...], Field(min_length=2)]


def residual_encoder_unet(
    task: NetworkTask,
    *,
    width: Count | None = None,
    max_width: Count = 320,
    widths: Widths | None = None,
    levels: LevelCount | None = None,
    kernels: Kernels | None = None,
    strides: Strides | None = None,
    blocks: Blocks | None = None,
    decoder_convs: Count = 1,
    norm: NormChoice = "auto",
    activation: Activation = "leaky_relu",
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    upsampling: UpsamplingMode = "transposed",
    coarse_heads: bool = True,
) -> UNet:
    """Build a U-Net with a residual encoder, in the manner of nnU-Net Revisited's ResEnc (Isensee et al. 2024).

    Behind one convolution each level of the encoder has residual units of two convolutions, the first of them strided;
    a strided skip takes means. M, L and XL are one network: with more memory planning gives it larger patches. Its
    parts are the U-Net's, and its options mean what they mean there.

    Args:
        task: what it is built for.
        width: feature maps of the first level, doubled at each level; None: the plan's, else 32.
        max_width: bound of the doubling.
        widths: feature maps of every level, in place of both.
        levels: resolutions, the bottleneck included; None: the plan's, else as many as the patch admits.
        kernels: of every level.
        strides: into every level but the first.
        blocks: residual units of every level of the encoder; None: 1, 3, 4 and 6 from there on.
        decoder_convs: convolutions in each level of the decoder.
        norm: batch, instance, group or none; auto: the plan's, else instance.
        activation: relu, leaky_relu, prelu or silu.
        dropout: probability of zeroing a whole feature map of the bottleneck.
        upsampling: the way back; see `pipeline.networks.upsampling`. max_unpool is not to be had.
        coarse_heads: logits at the coarser levels too, for deep supervision.

    Raises:
        ValueError: the options contradict one another, or the patch cannot be halved as often as they say.
    """
    fitted = fitted_levels(
        task,
        width=width,
        max_width=max_width,
        convs=decoder_convs,
        widths=widths,
        levels=levels or (len(blocks) if blocks else None),
        kernels=kernels,
        strides=strides,
    )
    count = len(fitted.widths)
    units = blocks or (*UNITS, *[UNITS[-1]] * count)[:count]
    if len(units) != count:
        raise ValueError(f"blocks: {len(units)} numbers for {count} levels; give one for each level of the encoder")
    design = Design(
        levels=fitted,
        norm=chosen_norm(norm, task),
        activation=activation,
        dropout=dropout,
        upsampling=upsampling,
        coarse_heads=coarse_heads,
        encoder_units=units,
    )
    return UNet(task.in_channels, task.num_classes, design)
