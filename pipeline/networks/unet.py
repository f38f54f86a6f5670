"""U-Net in 3D (Ronneberger et al. 2015; Çiçek et al. 2016); valid convolutions, other ways down and up, sums for skips
or none at all are options of one network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.networks.blocks import Activation, ConvBlock, Norm, Padding, ResidualUnit, conv_stage, lost_voxels, trim
from pipeline.networks.contract import Network, NetworkTask, Size, as_size, centre_crop, total_stride
from pipeline.networks.topology import Convs, Count, Kernels, LevelCount, Levels, Strides, Widths, fitted_levels
from pipeline.networks.upsampling import MaxUnpool, UpsamplingMode, border, positions_of_largest, upsampling

Downsampling = Literal["max", "average", "strided"]
NormChoice = Norm | Literal["auto"]
Skips = Literal["concat", "sum", "none"]


@dataclass(frozen=True)
class Design:
    """All that makes one U-Net differ from another; `unet` says what each means.

    Attributes:
        encoder_units: residual units of two convolutions in each level on the way down, in place of the level's
            convolutions; None: the way down is as the way up.
    """

    levels: Levels
    norm: Norm
    activation: Activation
    dropout: float = 0.0
    residual: bool = False
    skips: Skips = "concat"
    downsampling: Downsampling = "strided"
    upsampling: UpsamplingMode = "transposed"
    padding: Padding = "same"
    coarse_heads: bool = True
    encoder_units: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.upsampling == "max_unpool" and self.downsampling != "max":
            raise ValueError(
                "upsampling: max_unpool puts features back where max pooling found the largest, so it needs "
                f"downsampling: max, got downsampling: {self.downsampling}"
            )

    def stage(self, inputs: int, level: int, stride: Size = (1, 1, 1)) -> nn.Module:
        """Return the convolutions of a level, from `inputs` channels to the level's width."""
        return conv_stage(
            inputs,
            self.levels.widths[level],
            convs=self.levels.convs[level],
            kernel=self.levels.kernels[level],
            stride=stride,
            norm=self.norm,
            activation=self.activation,
            residual=self.residual,
            padding=self.padding,
        )

    def encoder_stage(self, inputs: int, level: int, stride: Size = (1, 1, 1)) -> nn.Module:
        """Return a level of the way down: its convolutions, or its residual units, the finest behind a convolution."""
        if self.encoder_units is None:
            return self.stage(inputs, level, stride)
        width, kernel = self.levels.widths[level], self.levels.kernels[level]
        layers: list[nn.Module] = []
        if level == 0:
            norm, activation = self.norm, self.activation
            layers.append(ConvBlock(inputs, width, kernel=kernel, stride=stride, norm=norm, activation=activation))
            inputs = width
        for _ in range(self.encoder_units[level]):
            layers.append(self._residual_unit(inputs, width, kernel, stride))
            inputs, stride = width, (1, 1, 1)
        return nn.Sequential(*layers)

    def _residual_unit(self, inputs: int, width: int, kernel: Size, stride: Size) -> ResidualUnit:
        """Return two convolutions and the skip around them."""
        return ResidualUnit(
            inputs,
            width,
            convs=2,
            kernel=kernel,
            stride=stride,
            norm=self.norm,
            activation=self.activation,
            pooled_skip=True,
        )

    def lost(self, level: int) -> Size:
        """Return the voxels that a level's convolutions take off each side."""
        return lost_voxels(self.levels.convs[level], self.levels.kernels[level], self.padding)

    def border(self, level: int) -> Size:
        """Return the voxels to trim off each side after upsampling to a level."""
        return border(self.upsampling, self.levels.strides[level]) if self.padding == "valid" else (0, 0, 0)


class Encoder(nn.ModuleList):
    """The way down: an image (N, C, X, Y, Z) -> the features of every level, finest first."""

    def __init__(self, in_channels: int, design: Design) -> None:
        inputs = (in_channels, *design.levels.widths)
        super().__init__(self._level(design, k, inputs[k]) for k in range(len(design.levels.widths)))

    @staticmethod
    def _level(design: Design, k: int, inputs: int) -> nn.Module:
        """Return downsampling and convolutions of level k."""
        if k == 0:
            return design.encoder_stage(inputs, k)
        stride = design.levels.strides[k - 1]
        if design.downsampling == "strided" and design.padding == "same":
            return design.encoder_stage(inputs, k, stride)
        return nn.Sequential(_pooling(design, inputs, stride), design.encoder_stage(inputs, k))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Run all levels, and keep what each yields."""
        features = [image]
        for level in self:
            features.append(level(features[-1]))
        return features[1:]


class UNet(Network):
    """Encoder, bottleneck and decoder: logits are a 1^3 convolution of `decode(*encode(image))[-1]`.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        design: everything else.
        bottleneck_width: channels that `decode` takes; None: those that `encode` gives.
    """

    def __init__(
        self, in_channels: int, num_classes: int, design: Design, *, bottleneck_width: int | None = None
    ) -> None:
        super().__init__()
        widths, self.strides = design.levels.widths, design.levels.strides
        self.skips = design.skips
        self.stride = total_stride(self.strides)
        self.margin, self._lost_in_encoder = _losses(design)
        # The decoder's lists run as it does, from the coarsest level up.
        upwards = range(len(widths) - 1)[::-1]
        inputs = (bottleneck_width or widths[-1], *widths[-2:0:-1])
        joined = 2 if design.skips == "concat" else 1
        self._borders = [design.border(k) for k in upwards]
        self.encoder = Encoder(in_channels, design)
        self.dropout = nn.Dropout3d(design.dropout)
        self.upsampling = nn.ModuleList(
            upsampling(design.upsampling, coarse, widths[k], self.strides[k])
            for coarse, k in zip(inputs, upwards, strict=True)
        )
        self.decoder = nn.ModuleList(design.stage(joined * widths[k], k) for k in upwards)
        self.heads = nn.ModuleList(
            nn.Conv3d(widths[k], num_classes, 1) for k in upwards if k == 0 or design.coarse_heads
        )
        self.coarse_logits = len(self.heads) > 1

    def input_size(self, output: Size) -> Size:
        """Return the smallest legal input: what the encoder loses, and a multiple of the stride."""
        return as_size(
            lost - (lost - n - 2 * m) // s * s
            for n, m, s, lost in zip(output, self.margin, self.stride, self._lost_in_encoder, strict=True)
        )

    def encode(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the bottleneck's features and those of the levels above it, finest first.

        Raises:
            ValueError: the image's size is none that `input_size` returns; a level would be pooled off its centre.
        """
        self._refuse_illegal(image)
        *skips, bottleneck = self.encoder(image)
        return self.dropout(bottleneck), skips

    def _refuse_illegal(self, image: Tensor) -> None:
        """Raise where a level would be pooled off its centre."""
        size = as_size(image.shape[2:])
        if any((n - lost) % s for n, s, lost in zip(size, self.stride, self._lost_in_encoder, strict=True)):
            raise ValueError(
                f"cannot take an image of {size} voxels; legal sizes are {self._lost_in_encoder} and a multiple of "
                f"{self.stride}, such as {self.input_size(self.output_size(size))}"
            )

    def decode(self, bottleneck: Tensor, skips: Sequence[Tensor]) -> list[Tensor]:
        """Return the decoder's features of each level, coarsest first.

        Args:
            bottleneck: (N, bottleneck_width, X, Y, Z).
            skips: the encoder's features, as `encode` gives them.
        """
        features, decoded = bottleneck, []
        for enlarge, stage, beyond, skip in zip(
            self.upsampling, self.decoder, self._borders, reversed(skips), strict=True
        ):
            features = stage(self._joined(trim(_enlarged(enlarge, features, skip), beyond), skip))
            decoded.append(features)
        return decoded

    def _joined(self, features: Tensor, skip: Tensor) -> Tensor:
        """Join the decoder's features with the encoder's at the same place."""
        if self.skips == "none":
            return features
        # Both sides lose as much, and legal inputs are pooled without a rest: the difference is even.
        skip = centre_crop(skip, features.shape[2:])
        return torch.cat([features, skip], dim=1) if self.skips == "concat" else features + skip

    def forward(self, image: Tensor) -> Tensor:
        """Map (N, C, *input) to logits (N, K, *output)."""
        return self.heads[-1](self.decode(*self.encode(image))[-1])  # type: ignore[no-any-return]

    def deep_supervision(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of every decoder level, finest first.

        Coarse voxels of a network with a margin reach beyond the output, by fractions of a voxel; their logits are
        repeated on the output's voxels, and cut where the output ends.
        """
        decoded = self.decode(*self.encode(image))
        logits = [head(features) for head, features in zip(self.heads, decoded[-len(self.heads) :], strict=True)][::-1]
        if self.margin == (0, 0, 0):
            return tuple(logits)
        for k in range(1, len(logits)):
            scale = [float(s) for s in total_stride(self.strides[:k])]
            logits[k] = centre_crop(F.interpolate(logits[k], scale_factor=scale), logits[0].shape[2:])
        return tuple(logits)


def _pooling(design: Design, channels: int, stride: Size) -> nn.Module:
    """Return the layer between two levels.

    A 3^3 convolution of stride 2 is off the centre of an even size; where sizes are exact, the strided convolution has
    its stride for a kernel.
    """
    match design.downsampling:
        case "max":
            return nn.MaxPool3d(stride)
        case "average":
            return nn.AvgPool3d(stride)
        case "strided":
            norm, activation = design.norm, design.activation
            return ConvBlock(
                channels, channels, kernel=stride, stride=stride, norm=norm, activation=activation, padding="valid"
            )


def _enlarged(layer: nn.Module, features: Tensor, skip: Tensor) -> Tensor:
    """Upsample; max unpooling looks up the positions in the features that were pooled."""
    if not isinstance(layer, MaxUnpool):
        return layer(features)  # type: ignore[no-any-return]
    size = (n * f for n, f in zip(features.shape[2:], layer.factor, strict=True))
    return layer(features, positions_of_largest(centre_crop(skip, size), layer.factor))  # type: ignore[no-any-return]


def _losses(design: Design) -> tuple[Size, Size]:
    """Return the network's margin, and the voxels of the input, both sides together, that the encoder loses.

    From the bottleneck up: what is lost at a level counts for `stride` voxels at the next finer one.
    """
    fine_levels = range(len(design.levels.strides))[::-1]
    margin = encoder = design.lost(len(fine_levels))
    for k in fine_levels:
        lost, beyond, stride = design.lost(k), design.border(k), design.levels.strides[k]
        margin = as_size(s * m + b + 2 * n for s, m, b, n in zip(stride, margin, beyond, lost, strict=True))
        encoder = as_size(s * m + n for s, m, n in zip(stride, encoder, lost, strict=True))
    return margin, as_size(2 * m for m in encoder)


def chosen_norm(norm: NormChoice, task: NetworkTask) -> Norm:
    """Return a norm; auto is the plan's, or instance norm where no plan says."""
    if norm != "auto":
        return norm
    return task.planned.norm if task.planned else "instance"


def unet(
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
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    residual: bool = False,
    skips: Skips = "concat",
    downsampling: Downsampling = "strided",
    upsampling: UpsamplingMode = "transposed",
    padding: Padding = "same",
    coarse_heads: bool = True,
) -> UNet:
    """Build a U-Net whose depth, strides and kernels fit the plan's patch and spacing.

    Args:
        task: what it is built for.
        width: feature maps of the first level, doubled at each level; None: the plan's, else 32.
        max_width: bound of the doubling.
        widths: feature maps of every level, in place of both.
        levels: resolutions, the bottleneck included; None: the plan's, else as many as the patch admits.
        kernels: of every level, in place of the plan's or of what fits the spacing.
        strides: into every level but the first, in place of the plan's or of what fits patch and spacing.
        convs: convolutions in each level, or in every one.
        norm: batch (cheaper; wants a batch of 4 or more), instance, group or none; auto: the plan's, else instance.
        activation: relu, leaky_relu, prelu or silu.
        dropout: probability of zeroing a whole feature map of the bottleneck.
        residual: short skips around each level's convolutions.
        skips: long skips by concat or sum; none: an encoder and a decoder.
        downsampling: max, average, or strided convolutions.
        upsampling: the way back; see `pipeline.networks.upsampling`. max_unpool needs downsampling: max; bed_of_nails
            and nearest are the counterparts of average; transposed and pixel_shuffle, of strided.
        padding: same, or valid: no zeros at the border, so that tiles equal the whole volume (norm: batch or none).
        coarse_heads: logits at the coarser levels too, for deep supervision.

    Raises:
        ValueError: the options contradict one another, or the patch cannot be halved as often as they say.
    """
    fitted = fitted_levels(
        task,
        width=width,
        max_width=max_width,
        widths=widths,
        levels=levels,
        kernels=kernels,
        strides=strides,
        convs=convs,
        padding=padding,
    )
    design = Design(
        levels=fitted,
        norm=chosen_norm(norm, task),
        activation=activation,
        dropout=dropout,
        residual=residual,
        skips=skips,
        downsampling=downsampling,
        upsampling=upsampling,
        padding=padding,
        coarse_heads=coarse_heads,
    )
    return UNet(task.in_channels, task.num_classes, design)


def simple_unet(
    task: NetworkTask,
    *,
    widths: Widths = (64, 128, 256, 512),
    padding: Padding = "same",
) -> UNet:
    """Build the plain U-Net: two 3^3 convolutions with ReLU in each level, max pooling, 2^3 transposed convolutions.

    Args:
        task: what it is built for; neither patch nor spacing changes the network.
        widths: feature maps of each level.
        padding: same or valid.
    """
    return unet(
        task,
        widths=widths,
        kernels=(task.cubic(3),) * len(widths),
        strides=(task.cubic(2),) * (len(widths) - 1),
        norm="none",
        activation="relu",
        downsampling="max",
        padding=padding,
        coarse_heads=False,
    )
