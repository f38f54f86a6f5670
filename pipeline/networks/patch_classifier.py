"""The patch classifier: convolutions, then fully connected layers, decide the class of a patch's central voxel (Cireşan
et al. 2012). The same weights, applied as dilated convolutions, decide every voxel of a volume in one pass.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.networks.blocks import ConvBlock
from pipeline.networks.contract import Network, NetworkTask, Size, as_size
from pipeline.networks.topology import Count

KERNEL = 3
# Pooling windows of 3 that step by 2 overlap (Krizhevsky et al. 2012) and, unlike windows of 2, keep the field odd:
# only then has a patch a central voxel.
POOL, POOL_STEP = 3, 2


class PatchClassifier(Network):
    """Decides the central voxel of a patch; as a network, every voxel that has its whole field inside the image.

    Training needs no patches of one voxel: a patch's logits are those of the classifier at all its voxels at once, and
    the gradient of their mean loss is the mean of the gradients patch by patch.

    Args:
        features: valid convolutions, pooling, and what acts on each voxel by itself (a norm, an activation).
        connected: fully connected layers and activations.
        seen: voxels of the features that the first fully connected layer sees.

    Attributes:
        field: voxels of a patch, odd along each axis.
    """

    def __init__(self, features: nn.Sequential, connected: nn.Sequential, seen: Size) -> None:
        super().__init__()
        self.features = features
        self.connected = connected
        self.seen = seen
        self.field = _field(features, seen)
        self.margin = as_size(n // 2 for n in self.field)

    def classify(self, patches: Tensor) -> Tensor:
        """Return the logits (N, K) of the central voxels of patches (N, C, *field)."""
        return self.connected(self.features(patches).flatten(1))  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> Tensor:
        """Map (N, C, *input) to logits (N, K, *output): those of `classify` at every voxel."""
        return self.to_dense()(image)  # type: ignore[no-any-return]

    def to_dense(self) -> nn.Sequential:
        """Return the classifier as a convolutional network (N, C, *input) -> (N, K, *output), which shares its weights.

        A fully connected layer becomes a convolution as large as what it sees (Sermanet et al. 2014). Pooling steps by
        one voxel, so that no position is left out, and what comes after it reads voxels as far apart as the steps would
        have been (Li et al. 2014). Each convolution stands in a block with what follows it.
        """
        dilation, seen = (1, 1, 1), self.seen
        blocks: list[nn.Sequential] = []
        for layer in (*self.features, *self.connected):
            if isinstance(layer, nn.Conv3d | nn.Linear) or not blocks:
                blocks.append(nn.Sequential())
            if isinstance(layer, nn.MaxPool3d):
                kernel, step = _size(layer.kernel_size), _size(layer.stride)
                blocks[-1].append(nn.MaxPool3d(kernel, stride=1, dilation=dilation))
                dilation = as_size(apart * n for apart, n in zip(dilation, step, strict=True))
            elif isinstance(layer, nn.Conv3d):
                blocks[-1].append(DilatedConvolution(layer, _size(layer.kernel_size), dilation))
            elif isinstance(layer, nn.Linear):
                blocks[-1].append(DilatedConvolution(layer, seen, dilation))
                seen = (1, 1, 1)
            else:
                blocks[-1].append(layer)
        return nn.Sequential(*blocks)


class DilatedConvolution(nn.Module):
    """A convolution or a fully connected layer as a dilated convolution; its weights stay the layer's own.

    (N, in_channels, X, Y, Z) -> (N, out_channels, X - (kernel - 1) * dilation, ...).
    """

    def __init__(self, layer: nn.Conv3d | nn.Linear, kernel: Size, dilation: Size) -> None:
        super().__init__()
        self.layer = layer
        self.kernel = kernel
        self.dilation = dilation

    def forward(self, features: Tensor) -> Tensor:
        """Convolve with the layer's weights, those of a fully connected one in the order in which `flatten` reads."""
        weight = self.layer.weight.view(len(self.layer.weight), -1, *self.kernel)  # (out, in, *kernel)
        return F.conv3d(features, weight, self.layer.bias, dilation=self.dilation)


def patch_classifier(
    task: NetworkTask,
    *,
    widths: Annotated[tuple[Count, ...], Field(min_length=1)] = (16, 32),
    convs: Count = 2,
    pooling: bool = True,
    seen: Literal[1, 3, 5, 7] = 3,
    hidden: tuple[Count, ...] = (64,),
    norm: Literal["batch", "none"] = "batch",
) -> PatchClassifier:
    """Build a patch classifier; its field is 27 voxels a side by default.

    Args:
        task: what it is built for.
        widths: feature maps of the convolutions in each stage.
        convs: valid 3^3 convolutions in each stage.
        pooling: max pooling after each stage, over 3^3 voxels in steps of 2.
        seen: voxels a side of the feature map that the first fully connected layer sees.
        hidden: widths of the fully connected layers before the last.
        norm: batch or none, after each convolution.
    """
    features: list[nn.Module] = []
    channels = task.in_channels
    for width in widths:
        for _ in range(convs):
            features += ConvBlock(
                channels,
                width,
                kernel=task.cubic(KERNEL),
                stride=(1, 1, 1),
                norm=norm,
                activation="relu",
                padding="valid",
            )
            channels = width
        if pooling:
            features.append(nn.MaxPool3d(task.cubic(POOL), task.cubic(POOL_STEP)))
    size = task.cubic(seen)
    inputs = [channels * prod(size), *hidden]
    connected: list[nn.Module] = []
    for have, want in pairwise(inputs):
        connected += [nn.Linear(have, want), nn.ReLU(inplace=True)]
    connected.append(nn.Linear(inputs[-1], task.num_classes))
    return PatchClassifier(nn.Sequential(*features), nn.Sequential(*connected), size)


def _field(features: nn.Sequential, seen: Size) -> Size:
    """Return the voxels of an image of which valid features make just those seen."""
    field = seen
    for layer in reversed(features):
        if isinstance(layer, nn.Conv3d | nn.MaxPool3d):
            kernel, step = _size(layer.kernel_size), _size(layer.stride)
            field = as_size((n - 1) * s + k for n, s, k in zip(field, step, kernel, strict=True))
    return field


def _size(value: int | tuple[int, ...]) -> Size:
    """Return what torch takes for a size as a size."""
    return (value, value, value) if isinstance(value, int) else as_size(value)
