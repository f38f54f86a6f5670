"""Building blocks that networks share: convolution, norm, activation; and residual units of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Convolution blocks with a short skip around them (He et al. 2016); a 1^3 convolution where the shapes differ.

    (N, in_channels, X, Y, Z) -> (N, out_channels, X / stride, ...).
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
        activations = (*[activation] * (convs - 1), None)
        self.body = _blocks(in_channels, out_channels, activations, kernel=kernel, stride=stride, norm=norm)
        self.skip: nn.Module = nn.Identity()
        if in_channels != out_channels or stride != (1, 1, 1):
            self.skip = _blocks(in_channels, out_channels, (None,), kernel=(1, 1, 1), stride=stride, norm=norm)
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, features: Tensor) -> Tensor:
        """Add the blocks' features to their input, then activate."""
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
    return _blocks(in_channels, out_channels, (activation,) * convs, kernel=kernel, stride=stride, norm=norm)


def _blocks(
    in_channels: int,
    out_channels: int,
    activations: Sequence[Activation | None],
    *,
    kernel: Size,
    stride: Size,
    norm: Norm,
) -> nn.Sequential:
    """Return a block for each activation, the first of them strided."""
    channels, strides = [in_channels], [stride]
    for _ in activations[1:]:
        channels.append(out_channels)
        strides.append((1, 1, 1))
    return nn.Sequential(
        *(
            ConvBlock(inputs, out_channels, kernel=kernel, stride=step, norm=norm, activation=activation)
            for inputs, step, activation in zip(channels, strides, activations, strict=True)
        )
    )
