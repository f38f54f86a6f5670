"""Building blocks that networks share: convolution, norm, activation; and residual units of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Literal

from torch import Tensor, nn

from pipeline.networks.contract import Size, as_size

Norm = Literal["batch", "instance", "group", "none"]
Activation = Literal["relu", "leaky_relu", "prelu", "silu"]
Padding = Literal["same", "valid"]

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm3d,
    "instance": lambda channels: nn.InstanceNorm3d(channels, affine=True),
    "group": lambda channels: nn.GroupNorm(gcd(8, channels), channels),
    "none": lambda channels: nn.Identity(),
}
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.01, inplace=True),
    "prelu": nn.PReLU,
    "silu": lambda: nn.SiLU(inplace=True),
}


class ConvBlock(nn.Sequential):
    """Convolution, norm, activation.

    (N, in_channels, X, Y, Z) -> (N, out_channels, X / stride, ...) with padding `same`; `valid` takes the kernel less
    the stride off each axis first, so that no feature depends on what lies beyond the image.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: Size,
        stride: Size,
        norm: Norm,
        activation: Activation | None,
        padding: Padding = "same",
    ) -> None:
        zeros = as_size(k // 2 if padding == "same" else 0 for k in kernel)
        # A norm subtracts the mean, and a bias with it.
        conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride, padding=zeros, bias=norm == "none")
        if norm == "none":
            # Nothing else keeps the features' variance from layer to layer (He et al. 2015; Ronneberger et al. 2015).
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers: list[nn.Module] = [conv, _NORMS[norm](out_channels)]
        if activation is not None:
            layers.append(_ACTIVATIONS[activation]())
        super().__init__(*layers)


class ResidualUnit(nn.Module):
    """Convolution blocks with a short skip around them (He et al. 2016); a 1^3 convolution where the shapes differ.

    (N, in_channels, X, Y, Z) -> (N, out_channels, X / stride, ...); with padding `valid`, of stride 1 only, the skip
    loses the voxels that the blocks lose. With `pooled_skip` a strided skip takes means, where a strided convolution of
    1^3 would leave voxels out (He et al. 2019's ResNet-D).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        convs: int,
        kernel: Size,
        stride: Size,
        norm: Norm,
        activation: Activation,
        padding: Padding = "same",
        pooled_skip: bool = False,
    ) -> None:
        super().__init__()
        activations = (*[activation] * (convs - 1), None)
        self.body = _blocks(
            in_channels, out_channels, activations, kernel=kernel, stride=stride, norm=norm, padding=padding
        )
        self.lost = lost_voxels(convs, kernel, padding)
        self.skip: nn.Module = nn.Identity()
        if pooled_skip and stride != (1, 1, 1):
            projection = _blocks(in_channels, out_channels, (None,), kernel=(1, 1, 1), stride=(1, 1, 1), norm=norm)
            self.skip = nn.Sequential(nn.AvgPool3d(stride), projection)
        elif in_channels != out_channels or stride != (1, 1, 1):
            self.skip = _blocks(in_channels, out_channels, (None,), kernel=(1, 1, 1), stride=stride, norm=norm)
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, features: Tensor) -> Tensor:
        """Add the blocks' features to their input, then activate."""
        return self.activation(self.body(features) + self.skip(trim(features, self.lost)))  # type: ignore[no-any-return]


def conv_stage(
    in_channels: int,
    out_channels: int,
    *,
    convs: int,
    kernel: Size,
    stride: Size,
    norm: Norm,
    activation: Activation,
    residual: bool,
    padding: Padding = "same",
) -> nn.Module:
    """Return the convolutions of one level, the first of them strided."""
    if residual:
        return ResidualUnit(
            in_channels,
            out_channels,
            convs=convs,
            kernel=kernel,
            stride=stride,
            norm=norm,
            activation=activation,
            padding=padding,
        )
    activations = (activation,) * convs
    return _blocks(in_channels, out_channels, activations, kernel=kernel, stride=stride, norm=norm, padding=padding)


def lost_voxels(convs: int, kernel: Size, padding: Padding) -> Size:
    """Return the voxels that convolutions of stride 1 take off each side of their input."""
    return as_size(convs * (k // 2) if padding == "valid" else 0 for k in kernel)


def trim(features: Tensor, border: Size) -> Tensor:
    """Return (N, C, X, Y, Z) without `border` voxels on each side of each axis, as a view."""
    for axis, voxels in enumerate(border, start=2):
        if voxels:
            features = features.narrow(axis, voxels, features.shape[axis] - 2 * voxels)
    return features


def _blocks(
    in_channels: int,
    out_channels: int,
    activations: Sequence[Activation | None],
    *,
    kernel: Size,
    stride: Size,
    norm: Norm,
    padding: Padding = "same",
) -> nn.Sequential:
    """Return a block for each activation, the first of them strided."""
    channels, strides = [in_channels], [stride]
    for _ in activations[1:]:
        channels.append(out_channels)
        strides.append((1, 1, 1))
    return nn.Sequential(
        *(
            ConvBlock(
                inputs, out_channels, kernel=kernel, stride=step, norm=norm, activation=activation, padding=padding
            )
            for inputs, step, activation in zip(channels, strides, activations, strict=True)
        )
    )
