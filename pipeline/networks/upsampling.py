"""Ways up from a coarse level to a fine one, by any whole factor along each axis: one option of every decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import floor, prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.networks.contract import Size, as_size

UpsamplingMode = Literal[
    "nearest",
    "linear",
    "cubic",
    "bed_of_nails",
    "max_unpool",
    "transposed",
    "nearest_conv",
    "linear_conv",
    "pixel_shuffle",
]


def upsampling(mode: UpsamplingMode, in_channels: int, out_channels: int, factor: Size) -> nn.Module:
    """Build a layer (N, in_channels, X, Y, Z) -> (N, out_channels, X * factor[0], Y * factor[1], Z * factor[2]).

    Modes without weights of their own change the number of channels first, by a 1^3 convolution where it differs: there
    are fewest voxels. The kernel of the others is 3 along the axes that grow and 1 along the rest, so that planes of a
    flat axis stay apart.

    Args:
        mode: one of
            nearest: each voxel repeated; the transpose of average pooling, with which it pairs.
            linear, cubic: interpolation; voxel corners are kept (`align_corners=False`).
            bed_of_nails: each voxel at the first place of its block, zeros elsewhere; pairs with average pooling too.
            max_unpool: each voxel where the encoder's max pooling found the largest, zeros elsewhere; its `forward`
                takes those positions (see `positions_of_largest`).
            transposed: a transposed convolution whose kernel is its stride, so that no two of its blocks overlap.
            nearest_conv, linear_conv: a convolution after repeating or interpolating.
            pixel_shuffle: a convolution to a channel for each voxel of the block (Shi et al. 2016).
        in_channels: channels of the coarse features.
        out_channels: channels of the fine features.
        factor: voxels for each one along each axis; 1 leaves an axis alone.
    """
    match mode:
        case "transposed":
            return nn.ConvTranspose3d(in_channels, out_channels, factor, stride=factor)
        case "pixel_shuffle":
            return PixelShuffle(in_channels, out_channels, factor)
        case "max_unpool":
            return MaxUnpool(in_channels, out_channels, factor)
        case "nearest_conv" | "linear_conv":
            enlarge = _ENLARGEMENTS["nearest" if mode == "nearest_conv" else "linear"]
            return nn.Sequential(Enlarged(enlarge, factor), _convolution(in_channels, out_channels, factor))
        case _:
            return nn.Sequential(_channels_to(in_channels, out_channels), Enlarged(_ENLARGEMENTS[mode], factor))


def border(mode: UpsamplingMode, factor: Size) -> Size:
    """Return the outermost voxels, on each side of a mode's output, that depend on what lies beyond its input.

    Networks of valid convolutions trim them; inside, a tile's features equal those of the whole volume.
    """
    return as_size(_BORDERS[mode](f) if f > 1 else 0 for f in factor)


# Linear: output i lies at input (i + 1/2) / f - 1/2, before the first voxel's centre up to f/2. Cubic: and wants one
# voxel more. A kernel of 3 sees one voxel beyond: of the output, or before a shuffle of the input.
_BORDERS: dict[UpsamplingMode, Callable[[int], int]] = {
    "nearest": lambda f: 0,
    "linear": lambda f: f // 2,
    "cubic": lambda f: 3 * f // 2,
    "bed_of_nails": lambda f: 0,
    "max_unpool": lambda f: 0,
    "transposed": lambda f: 0,
    "nearest_conv": lambda f: 1,
    "linear_conv": lambda f: f // 2 + 1,
    "pixel_shuffle": lambda f: f,
}


class Enlarged(nn.Module):
    """A function (features, factor) -> larger features, as a layer without weights."""

    def __init__(self, enlarge: Callable[[Tensor, Size], Tensor], factor: Size) -> None:
        super().__init__()
        self.enlarge = enlarge
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, C, X, Y, Z) to (N, C, X * fx, Y * fy, Z * fz)."""
        return self.enlarge(features, self.factor)


class PixelShuffle(nn.Module):
    """A convolution to one channel for each voxel of a block, then the channels laid out as that block (Shi et al.
    2016); it begins as a nearest upsampling (ICNR, Aitken et al. 2017), so without a chessboard.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: Size) -> None:
        super().__init__()
        voxels = prod(factor)
        self.factor = factor
        self.conv = _convolution(in_channels, out_channels * voxels, factor)
        with torch.no_grad():
            self.conv.weight.copy_(self.conv.weight[::voxels].repeat_interleave(voxels, dim=0))
            if self.conv.bias is not None:
                self.conv.bias.copy_(self.conv.bias[::voxels].repeat_interleave(voxels))

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, in_channels, X, Y, Z) to (N, out_channels, X * fx, Y * fy, Z * fz)."""
        shuffled: Tensor = self.conv(features)
        n, channels, x, y, z = shuffled.shape
        voxels = prod(self.factor)
        return from_blocks(shuffled.reshape(n, channels // voxels, voxels, x, y, z), self.factor)


class MaxUnpool(nn.Module):
    """Each voxel goes back to where the encoder's max pooling found the largest of its block; zeros elsewhere (Zeiler
    and Fergus 2014; Noh et al. 2015).
    """

    def __init__(self, in_channels: int, out_channels: int, factor: Size) -> None:
        super().__init__()
        self.factor = factor
        self.channels = _channels_to(in_channels, out_channels)

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Map (N, in_channels, X, Y, Z) to (N, out_channels, X * fx, Y * fy, Z * fz).

        Args:
            features: of the coarse level.
            positions: (N, out_channels, X, Y, Z), from `positions_of_largest` of the encoder's fine level.
        """
        features = self.channels(features)[:, :, None]  # (N, C, 1, X, Y, Z)
        blocks = features.new_zeros(*positions.shape[:2], prod(self.factor), *positions.shape[2:])
        return from_blocks(blocks.scatter(2, positions[:, :, None], features), self.factor)


def positions_of_largest(features: Tensor, factor: Size) -> Tensor:
    """Return which voxel of each block max pooling takes: (N, C, X, Y, Z) -> (N, C, X / fx, Y / fy, Z / fz) int64.

    A position counts the block's voxels, the last axis fastest, so it stays true when the map of positions is cropped;
    torch's own indices count the whole volume's.
    """
    return into_blocks(features, factor).argmax(dim=2)


def into_blocks(features: Tensor, factor: Size) -> Tensor:
    """Return (N, C, X, Y, Z) as (N, C, P, X / fx, Y / fy, Z / fz): the P = fx * fy * fz voxels of each block."""
    n, c, x, y, z = features.shape
    fx, fy, fz = factor
    split = features.reshape(n, c, x // fx, fx, y // fy, fy, z // fz, fz)
    return split.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(2, 4)


def from_blocks(blocks: Tensor, factor: Size) -> Tensor:
    """Return (N, C, P, X, Y, Z) laid out as (N, C, X * fx, Y * fy, Z * fz); the inverse of `into_blocks`."""
    n, c, _, x, y, z = blocks.shape
    fx, fy, fz = factor
    split = blocks.reshape(n, c, fx, fy, fz, x, y, z)
    return split.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, c, x * fx, y * fy, z * fz)


def linear_transposed(channels: int, factor: Size) -> nn.ConvTranspose3d:
    """Build a transposed convolution that begins as linear interpolation of each channel by itself (Long et al. 2015).

    Kernel 2f - f % 2, stride f, no bias: (N, channels, X, Y, Z) -> (N, channels, X * fx, Y * fy, Z * fz). Beyond the
    border the features count as zero, so the outermost f // 2 voxels begin darker.
    """
    profiles = [_triangle(f) for f in factor]
    kernel = torch.einsum("x,y,z->xyz", *profiles)
    size = as_size(kernel.shape)
    padding = as_size((k - f) // 2 for k, f in zip(size, factor, strict=True))
    layer = nn.ConvTranspose3d(channels, channels, size, stride=factor, padding=padding, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[range(channels), range(channels)] = kernel
    return layer


def _triangle(factor: int) -> Tensor:
    """Return the weights with which linear interpolation spreads a voxel along one axis."""
    length = 2 * factor - factor % 2
    return 1 - (torch.arange(length) - (length - 1) / 2).abs() / factor


def _channels_to(in_channels: int, out_channels: int) -> nn.Module:
    """Return a 1^3 convolution, or nothing where the channels are as wanted."""
    return nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)


def _convolution(in_channels: int, out_channels: int, factor: Size) -> nn.Conv3d:
    """Return a convolution with a kernel of 3 along each axis that grows and of 1 along the others."""
    kernel = as_size(3 if f > 1 else 1 for f in factor)
    return nn.Conv3d(in_channels, out_channels, kernel, padding=as_size(k // 2 for k in kernel))


def _interpolated(features: Tensor, factor: Size, mode: str) -> Tensor:
    """Interpolate by torch's own `mode`."""
    return F.interpolate(features, scale_factor=[float(f) for f in factor], mode=mode)


def _bed_of_nails(features: Tensor, factor: Size) -> Tensor:
    """Place each voxel first in a block of zeros."""
    return from_blocks(F.pad(features[:, :, None], (0, 0, 0, 0, 0, 0, 0, prod(factor) - 1)), factor)


def _cubic(features: Tensor, factor: Size) -> Tensor:
    """Interpolate along one axis after the other: torch has no cubic interpolation in 3D."""
    for axis, f in enumerate(factor, start=2):
        if f > 1:
            features = _cubic_along(features, axis, f)
    return features


def _cubic_along(features: Tensor, axis: int, factor: int) -> Tensor:
    """Interpolate one axis: each of the places between voxels has its own four weights, the same at every voxel."""
    length = features.shape[axis]
    first, last = features.narrow(axis, 0, 1), features.narrow(axis, length - 1, 1)
    padded = torch.cat([first, first, features, last, last], dim=axis)
    places = []
    for place in range(factor):
        position = (place + 0.5) / factor - 0.5
        start = floor(position) + 1  # of the first of four voxels, in `padded`
        weights = _keys(position - floor(position))
        four = [w * padded.narrow(axis, start + k, length) for k, w in enumerate(weights)]
        places.append(four[0] + four[1] + four[2] + four[3])
    return torch.stack(places, dim=axis + 1).flatten(axis, axis + 1)


def _keys(t: float, a: float = -0.75) -> list[float]:
    """Return the weights of the voxels at -1, 0, 1, 2 for a point at t in [0, 1) (Keys 1981), with torch's `a`."""

    def near(d: float) -> float:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: float) -> float:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return [far(1 + t), near(t), near(1 - t), far(2 - t)]


_ENLARGEMENTS: dict[str, Callable[[Tensor, Size], Tensor]] = {
    "nearest": partial(_interpolated, mode="nearest"),
    "linear": partial(_interpolated, mode="trilinear"),
    "cubic": _cubic,
    "bed_of_nails": _bed_of_nails,
}
