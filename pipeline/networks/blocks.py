"""Building blocks that networks share: convolution, norm, activation; and residual units of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from pipeline.networks.contract import Size

Norm = Literal["batch", "instance", "none"]
Activation = Literal["relu", "leaky_relu", "prelu", "silu"]

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm3d,
    "instance": lambda channels: nn.InstanceNorm3d(channels, affine=True),
    "none": lambda channels: nn.Identity(),
}
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.01, inplace=True),
    "prelu": nn.PReLU,
    "silu": lambda: nn.SiLU(inplace=True),
}


class ConvBlock(nn.Sequential):
    """Convolution, norm, activation, with padding that keeps the size at stride 1.

    (N, in_channels, X, Y, Z) -> (N, out_channels, X / stride, ...).
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
    ) -> None:
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        # A norm subtracts the mean, and a bias with it.
        layers: list[nn.Module] = [
            nn.Conv3d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=norm == "none"),
            _NORMS[norm](out_channels),
        ]
        if activation is not None:
            layers.append(_ACTIVATIONS[activation]())
        super().__init__(*layers)


class ResidualUnit(nn.Module):
    """Convolution blocks with a short skip around them (He et al. 2016); the skip is a 1^3 convolution where shapes
    differ.
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
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(
                ConvBlock(
                    in_channels if i == 0 else out_channels,
                    out_channels,
                    kernel=kernel,
                    stride=stride if i == 0 else (1, 1, 1),
                    norm=norm,
                    activation=activation if i < convs - 1 else None,
                )
                for i in range(convs)
            )
        )
        same = in_channels == out_channels and stride == (1, 1, 1)
        self.skip: nn.Module = (
            nn.Identity()
            if same
            else ConvBlock(in_channels, out_channels, kernel=(1, 1, 1), stride=stride, norm=norm, activation=None)
        )
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, in_channels, X, Y, Z) to (N, out_channels, X / stride, ...)."""
        return self.activation(self.body(features) + self.skip(features))  # type: ignore[no-any-return]


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
) -> nn.Module:
    """Return the convolutions of one level, the first of them strided."""
    if residual:
        return ResidualUnit(
            in_channels, out_channels, convs=convs, kernel=kernel, stride=stride, norm=norm, activation=activation
        )
    blocks = (
        ConvBlock(
            in_channels if i == 0 else out_channels,
            out_channels,
            kernel=kernel,
            stride=stride if i == 0 else (1, 1, 1),
            norm=norm,
            activation=activation,
        )
        for i in range(convs)
    )
    return nn.Sequential(*blocks)
