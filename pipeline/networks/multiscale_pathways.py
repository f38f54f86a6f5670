"""DeepMedic (Kamnitsas et al. 2017): pathways of valid convolutions side by side, at full resolution and on coarser
grids about the same centre, whose features are joined for each voxel.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import lcm
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.networks.contract import Network, NetworkTask, Size, as_size, centre_crop
from pipeline.networks.topology import Count

Norm = Literal["batch", "none"]
Activation = Literal["prelu", "relu"]
Factors = tuple[Count | tuple[Count, Count, Count], ...]
Maps = tuple[Count, ...]
Positions = tuple[Annotated[int, Field(ge=2)], ...]


@dataclass(frozen=True)
class Preset:
    """What an option that is None stands for.

    Attributes:
        factors: subsampling of each context pathway.
        feature_maps: of each layer of a pathway.
        hidden: feature maps of the layers between pathways and classifier.
        activation: behind every norm.
    """

    factors: Factors
    feature_maps: Maps
    hidden: Maps
    activation: Activation


# DeepMedic 0.8.4's model configuration; and as many layers, but for factor 5, at a twentieth of its multiply-adds.
PRESETS = {
    "published": Preset((3, 5), (30, 30, 40, 40, 40, 40, 50, 50), (250, 250), "prelu"),
    "small": Preset((3,), (8, 8, 8, 8, 16, 16, 16, 16), (32,), "relu"),
}


class Layer(nn.Sequential):
    """Norm, activation, dropout and a valid convolution, in DeepMedic's order; a pathway's first layer only convolves.

    (N, in_channels, X, Y, Z) -> (N, out_channels, X, Y, Z), less the kernel's reach.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Size,
        *,
        bias: bool,
        norm: Norm = "none",
        activation: Activation | None = None,
        dropout: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = [nn.BatchNorm3d(in_channels)] if norm == "batch" else []
        if activation == "prelu":
            # One slope a feature map, 0.01 at first, as DeepMedic has it.
            layers.append(nn.PReLU(in_channels, init=0.01))
        elif activation == "relu":
            layers.append(nn.ReLU())
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        convolution = nn.Conv3d(in_channels, out_channels, kernel, bias=bias)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        super().__init__(*layers, convolution)


class Pathway(nn.Module):
    """Valid convolutions, some with the features of two layers before added to theirs.

    (N, in_channels, X, Y, Z) -> (N, maps[-1], X, Y, Z), less a voxel a side for each layer where the kernel is 3.
    """

    def __init__(
        self,
        in_channels: int,
        maps: Maps,
        kernel: Size,
        *,
        residual_layers: Positions,
        norm: Norm,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.residual_layers = frozenset(residual_layers)
        # A norm, which begins the next layer, subtracts the mean, and a bias with it.
        bias = norm == "none"
        self.layers = nn.ModuleList([Layer(in_channels, maps[0], kernel, bias=bias)])
        for inputs, outputs in pairwise(maps):
            self.layers.append(Layer(inputs, outputs, kernel, bias=bias, norm=norm, activation=activation))

    def forward(self, image: Tensor) -> Tensor:
        """Return the features of the last layer."""
        before, features = image, image
        for number, layer in enumerate(self.layers, start=1):
            deeper = layer(features)
            if number in self.residual_layers:
                deeper = deeper + _shaped_like(deeper, before)
            before, features = features, deeper
        return features


class MultiscalePathways(Network):
    """A pathway on the image itself and one for each context factor, their features joined by hidden layers.

    A context pathway of factor f sees the means of blocks of f^3 voxels, and each of its features stands for all f^3
    voxels of its block. Blocks begin where the output begins, so a voxel's block depends on its place modulo f alone:
    windows a multiple of `stride`, the least common multiple of all factors, apart share their blocks.

    The margin is (layers + 1) * f of the largest factor, 45 as published: each layer takes one block a side, and the
    hidden layers' 3^3 kernel looks one voxel beyond the output and so into one block more. (A voxel central to its
    blocks sees less, 42 a side: fields of 17, 51 and 85 voxels. DeepMedic mirrors the features at the tile's border
    instead of that block, which makes the result depend on where tiles lie.) Any output is legal; `input_size` takes
    whole strides, since windows keep no more.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        kernel: of the pathways' convolutions and of the first hidden layer, 3 or 1 along each axis.
        factors: subsampling of each context pathway.
        maps: feature maps of each layer of a pathway.
        residual_layers: layers, counted from 1, to whose output the input of the layer before is added.
        hidden: feature maps of the layers between pathways and classifier.
        dropout: probability of zeroing an input of the second hidden layer and those behind it.
        norm, activation: of the input of every layer but the pathways' first.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        kernel: Size,
        factors: tuple[Size, ...],
        maps: Maps,
        residual_layers: Positions,
        hidden: Maps,
        dropout: float,
        norm: Norm,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.layers = len(maps)
        self.reach = as_size(n // 2 for n in kernel)
        self.factors = ((1, 1, 1), *factors)
        self.pathways = nn.ModuleList(
            Pathway(in_channels, maps, kernel, residual_layers=residual_layers, norm=norm, activation=activation)
            for _ in self.factors
        )
        self.head = nn.Sequential()
        for position, (inputs, outputs) in enumerate(pairwise((maps[-1] * len(self.factors), *hidden, num_classes))):
            shape, share = (kernel, 0.0) if position == 0 else ((1, 1, 1), dropout)
            bias = norm == "none" or position == len(hidden)
            self.head.append(Layer(inputs, outputs, shape, bias=bias, norm=norm, activation=activation, dropout=share))
        self.stride = as_size(lcm(*along) for along in zip(*self.factors, strict=True))
        largest = as_size(max(along) for along in zip(*self.factors, strict=True))
        self.margin = as_size((self.layers + 1) * r * f for r, f in zip(self.reach, largest, strict=True))

    def input_size(self, output: Size) -> Size:
        """Return the input of the smallest output of whole strides that holds `output` voxels."""
        return as_size(-(-n // s) * s + 2 * m for n, s, m in zip(output, self.stride, self.margin, strict=True))

    def forward(self, image: Tensor) -> Tensor:
        """Map (N, C, X, Y, Z) to logits (N, K, X, Y, Z), less the margins.

        Raises:
            ValueError: the image is no larger than the margins.
        """
        size = as_size(image.shape[2:])
        output = self.output_size(size)
        if min(output) < 1:
            raise ValueError(f"cannot take an image of {size} voxels: it loses {self.margin} on each side")
        features = [
            self._features(pathway, factor, image, output)
            for pathway, factor in zip(self.pathways, self.factors, strict=True)
        ]
        return self.head(torch.cat(features, dim=1))  # type: ignore[no-any-return]

    def _features(self, pathway: nn.Module, factor: Size, image: Tensor, output: Size) -> Tensor:
        """Return a pathway's features (N, C, X, Y, Z) for the output's voxels and those that the hidden layers see
        beyond it.
        """
        for axis, (f, n, reach, margin) in enumerate(zip(factor, output, self.reach, self.margin, strict=True), 2):
            # From the block before the output's first, with a block more for each layer, to the last that is seen.
            before = (self.layers + 1) * reach
            blocks = before + (n - 1 + reach) // f + 1 + self.layers * reach
            image = image.narrow(axis, margin - before * f, blocks * f)
        if factor == (1, 1, 1):
            return pathway(image)  # type: ignore[no-any-return]
        features = pathway(functional.avg_pool3d(image, factor))
        features = functional.interpolate(features, scale_factor=[float(f) for f in factor], mode="nearest")
        for axis, (f, n, reach) in enumerate(zip(factor, output, self.reach, strict=True), 2):
            features = features.narrow(axis, reach * (f - 1), n + 2 * reach)
        return features


def multiscale_pathways(
    task: NetworkTask,
    *,
    size: Literal["published", "small"] = "published",
    factors: Factors | None = None,
    feature_maps: Annotated[Maps, Field(min_length=2)] | None = None,
    residual_layers: Positions = (4, 6, 8),
    hidden: Maps | None = None,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    norm: Norm = "batch",
    activation: Activation | None = None,
) -> MultiscalePathways:
    """Build DeepMedic with 3^3 convolutions.

    Args:
        task: what it is built for.
        size: published, or small for two cores; what is None below is as it says.
        factors: subsampling of each context pathway, or three along its axes, such as [3, 3, 1] for thick planes; 3
            and 5 as published, none for the normal pathway alone.
        feature_maps: of each layer of a pathway; 30 30 40 40 40 40 50 50 as published.
        residual_layers: layers, counted from 1, to whose output the input of the layer before is added.
        hidden: feature maps of the layers between pathways and classifier; 250 250 as published.
        dropout: probability of zeroing an input of the second hidden layer and of the classifier.
        norm: batch or none.
        activation: prelu as published; relu in the small one, for PReLU takes two fifths of a step on a CPU.

    Raises:
        ValueError: there is no such layer for a residual link, or a factor crosses a 2-D network's flat axis.
    """
    preset = PRESETS[size]
    maps = preset.feature_maps if feature_maps is None else feature_maps
    if max(residual_layers, default=0) > len(maps):
        raise ValueError(
            f"residual_layers: a pathway has {len(maps)} layers, as many as feature_maps, got {list(residual_layers)}"
        )
    return MultiscalePathways(
        task.in_channels,
        task.num_classes,
        kernel=task.cubic(3),
        factors=_along_axes(task, preset.factors if factors is None else factors),
        maps=maps,
        residual_layers=residual_layers,
        hidden=preset.hidden if hidden is None else hidden,
        dropout=dropout,
        norm=norm,
        activation=activation or preset.activation,
    )


def _along_axes(task: NetworkTask, factors: Factors) -> tuple[Size, ...]:
    """Return each factor along three axes, 1 along a flat one."""
    sizes = tuple(task.cubic(f) if isinstance(f, int) else f for f in factors)
    if task.flat_axis is not None and any(size[task.flat_axis] != 1 for size in sizes):
        raise ValueError(f"factors: must be 1 along axis {task.flat_axis}, which this 2-D network leaves alone")
    return sizes


def _shaped_like(deeper: Tensor, features: Tensor) -> Tensor:
    """Return earlier features cropped centrally to deeper ones, with maps of zeros for those that are missing."""
    missing = deeper.shape[1] - features.shape[1]
    return functional.pad(centre_crop(features, deeper.shape[2:]), (0, 0, 0, 0, 0, 0, 0, missing))
