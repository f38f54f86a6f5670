"""Fully convolutional networks in 3D (Long, Shelhamer and Darrell 2015): class scores at several depths of an encoder
of small kernels (Simonyan and Zisserman 2015), enlarged and added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.networks.blocks import Norm, conv_stage
from pipeline.networks.contract import Network, NetworkTask, Size, as_size
from pipeline.networks.topology import Count
from pipeline.networks.upsampling import linear_transposed
from pipeline.networks.upsampling import upsampling as plain_upsampling

# No convolution follows that could fill the holes which bed of nails and max unpooling leave.
Upsampling = Literal["nearest", "linear", "cubic", "transposed", "nearest_conv", "linear_conv", "pixel_shuffle"]


class FCN(Network):
    """The scores of the deepest features are enlarged and added to those of finer ones, step by step up to the image.

    Args:
        encoder: stages, each of which ends in pooling.
        head: the deepest features to scores.
        skips: features of the last stage but one, the one before, ... to scores.
        enlargements: scores to the size of each skip's.
        last: scores of the finest skip to the size of the image.
        stride: voxels that the encoder makes one of.
    """

    def __init__(
        self,
        encoder: Sequence[nn.Module],
        head: nn.Module,
        skips: Sequence[nn.Module],
        enlargements: Sequence[nn.Module],
        last: nn.Module,
        stride: Size,
    ) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(encoder)
        self.head = head
        self.skips = nn.ModuleList(skips)
        self.enlargements = nn.ModuleList(enlargements)
        self.last = last
        self.stride = stride
        self.coarse_logits = not isinstance(last, nn.Identity)

    def _scores(self, image: Tensor) -> list[Tensor]:
        """Return the scores that each skip leaves, coarsest first."""
        features = [image]
        for stage in self.encoder:
            features.append(stage(features[-1]))
        scores = [self.head(features.pop())]
        for enlarge, skip in zip(self.enlargements, self.skips, strict=True):
            scores.append(enlarge(scores[-1]) + skip(features.pop()))
        return scores

    def forward(self, image: Tensor) -> Tensor:
        """Map (N, C, X, Y, Z) to logits (N, K, X, Y, Z); X, Y, Z must be multiples of the stride."""
        return self.last(self._scores(image)[-1])  # type: ignore[no-any-return]

    def deep_supervision(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the logits, then the scores before they are enlarged, finest first."""
        scores = self._scores(image)
        return (self.last(scores[-1]), *(reversed(scores) if self.coarse_logits else ()))


def fcn(
    task: NetworkTask,
    *,
    stride: Literal[32, 16, 8, 4, 1] = 8,
    stages: Count = 5,
    width: Count = 16,
    max_width: Count = 256,
    convs: Count = 2,
    head_width: Count | None = None,
    head_kernel: Literal[1, 3, 5, 7] = 3,
    norm: Norm = "batch",
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    upsampling: Upsampling = "transposed",
) -> FCN:
    """Build an FCN-32, -16, -8, -4, or one of equal size throughout.

    The paper's own has `width: 64, max_width: 512, head_width: 4096, head_kernel: 7, norm: none, dropout: 0.5`.

    Args:
        task: what it is built for.
        stride: voxels between the finest scores; with five stages 32 takes no skip, 16, 8 and 4 take one to three. 1
            pools nowhere, so that the width stays as it is and the receptive field small.
        stages: of the encoder, each pooled by 2; three or four suit small volumes.
        width: feature maps of the first stage, doubled at each stage.
        max_width: bound of the doubling.
        convs: 3^3 convolutions in each stage.
        head_width: feature maps of the two convolutions after the last stage (fc6 and fc7); None: as many as it has.
        head_kernel: voxels a side of the first of them.
        norm: of the encoder's convolutions; batch, instance, group or none.
        dropout: probability of zeroing a whole feature map of the head.
        upsampling: transposed is a learned convolution that begins as linear interpolation. bed_of_nails and
            max_unpool are not taken: no convolution follows that would fill the holes they leave.

    Raises:
        ValueError: so few stages never come to the stride.
    """
    if stride > 2**stages:
        raise ValueError(f"stride: {stride} needs {stride.bit_length() - 1} stages, got stages: {stages}")
    step = task.cubic(1 if stride == 1 else 2)
    widths = [width if stride == 1 else min(width * 2**k, max_width) for k in range(stages)]
    finest = stages - 1 if stride == 1 else stride.bit_length() - 2  # stage k, from 0, ends at a stride of 2^(k + 1)
    skipped = range(stages - 2, finest - 1, -1)
    return FCN(
        _encoder(task, widths, step, convs=convs, norm=norm),
        _head(task, widths[-1], head_width or widths[-1], task.cubic(head_kernel), dropout),
        [nn.Conv3d(widths[k], task.num_classes, 1) for k in skipped],
        [_enlargement(upsampling, task.num_classes, step) for _ in skipped],
        nn.Identity() if stride == 1 else _enlargement(upsampling, task.num_classes, task.cubic(stride)),
        task.cubic(1 if stride == 1 else 2**stages),
    )


def _encoder(task: NetworkTask, widths: Sequence[int], step: Size, *, convs: int, norm: Norm) -> list[nn.Module]:
    """Return stages of convolutions, each with max pooling by `step`."""
    stages: list[nn.Module] = []
    channels = task.in_channels
    for width in widths:
        block = conv_stage(
            channels,
            width,
            convs=convs,
            kernel=task.cubic(3),
            stride=(1, 1, 1),
            norm=norm,
            activation="relu",
            residual=False,
        )
        stages.append(block if step == (1, 1, 1) else nn.Sequential(block, nn.MaxPool3d(step)))
        channels = width
    return stages


def _head(task: NetworkTask, channels: int, width: int, kernel: Size, dropout: float) -> nn.Sequential:
    """Return what VGG's fully connected layers become, and the scores; no norm, for one voxel may be all there is."""
    return nn.Sequential(
        nn.Conv3d(channels, width, kernel, padding=as_size(k // 2 for k in kernel)),
        nn.ReLU(inplace=True),
        nn.Dropout3d(dropout),
        nn.Conv3d(width, width, 1),
        nn.ReLU(inplace=True),
        nn.Dropout3d(dropout),
        nn.Conv3d(width, task.num_classes, 1),
    )


def _enlargement(mode: Upsampling, num_classes: int, factor: Size) -> nn.Module:
    """Return a layer that enlarges scores."""
    if mode == "transposed":
        return linear_transposed(num_classes, factor)
    return plain_upsampling(mode, num_classes, num_classes, factor)


class SimpleFCN(Network):
    """Two stages of convolution, ReLU and max pooling, and two transposed convolutions back; no skips."""

    def __init__(self, task: NetworkTask, width: int) -> None:
        super().__init__()
        kernel, padding, step = task.cubic(3), task.cubic(1, 0), task.cubic(2)
        self.stride = task.cubic(4)
        self.layers = nn.Sequential(
            nn.Conv3d(task.in_channels, width, kernel, padding=padding),
            nn.ReLU(inplace=True),
            nn.MaxPool3d(step),
            nn.Conv3d(width, 2 * width, kernel, padding=padding),
            nn.ReLU(inplace=True),
            nn.MaxPool3d(step),
            nn.ConvTranspose3d(2 * width, width, step, stride=step),
            nn.ReLU(inplace=True),
            nn.ConvTranspose3d(width, task.num_classes, step, stride=step),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Map (N, C, X, Y, Z) to logits (N, K, X, Y, Z); X, Y, Z must be multiples of the stride."""
        return self.layers(image)  # type: ignore[no-any-return]


def simple_fcn(task: NetworkTask, *, width: Count = 64) -> SimpleFCN:
    """Build the smallest FCN worth the name: two stages down, two transposed convolutions up.

    Args:
        task: what it is built for.
        width: feature maps of the first stage; the second has twice as many, the way up as many.
    """
    return SimpleFCN(task, width)
