"""The contract between a network and all that trains, tiles and saves it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from pipeline.data.plan import NetworkPlan
from pipeline.pyramid import Size as Size
from pipeline.pyramid import as_size as as_size

# What a network has in common with one that was trained for another task: in every U-Net and autoencoder the names of
# its tensors begin so.
ENCODER = "encoder."


@dataclass(frozen=True)
class NetworkTask:
    """What a network is built for.

    Attributes:
        in_channels: channels of the image.
        num_classes: channels of the logits, background included.
        patch_size: voxels of a training patch's output, for networks that fit their depth to it.
        spacing_mm: voxel size of the plan's grid, for networks that pool less along a thick axis.
        flat_axis: the axis that a 2-D network leaves alone: kernels, strides and margins are 1, 1 and 0 along it, and
            each of its planes is seen by itself; None for a 3-D network.
        planned: what planning decided of a U-Net; None where a network is built for no plan, or for one made before
            planning decided that.
    """

    in_channels: int
    num_classes: int
    patch_size: Size
    spacing_mm: tuple[float, float, float]
    flat_axis: int | None = None
    planned: NetworkPlan | None = None

    def cubic(self, voxels: int, along_flat_axis: int = 1) -> Size:
        """Return a kernel or stride of as many voxels on each axis, a 2-D network's flat one excepted."""
        x, y, z = (along_flat_axis if axis == self.flat_axis else voxels for axis in range(3))
        return x, y, z


class Network(nn.Module):
    """A network as the pipeline knows it: (N, C, *input) -> logits (N, K, *output), the same in train() and eval().

    Attributes:
        margin: voxels lost on each side of each axis; 0 for padded convolutions.
        stride: per axis, the least common multiple of pooling and subsampling factors.
        coarse_logits: whether `deep_supervision` gives logits of coarser levels too.
    """

    margin: Size = (0, 0, 0)
    stride: Size = (1, 1, 1)
    coarse_logits: bool = False

    def input_size(self, output: Size) -> Size:
        """Return the smallest legal input that yields at least `output` voxels.

        Here: the output and both margins, rounded up to a multiple of the stride. A network that takes inputs of one
        size only (a transformer's position embedding fixes it, to the task's patch) returns that for every output that
        fits in it.

        Raises:
            ValueError: the network takes inputs of one size only, which does not yield as much.
        """
        x, y, z = (-(-(n + 2 * m) // s) * s for n, m, s in zip(output, self.margin, self.stride, strict=True))
        return x, y, z

    def output_size(self, image: Size) -> Size:
        """Return the voxels that a legal input of `image` voxels yields: all but the margins."""
        x, y, z = (n - 2 * m for n, m in zip(image, self.margin, strict=True))
        return x, y, z

    def deep_supervision(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the logits, then those of coarser decoder levels, finest first; a network without them returns its
        logits alone.

        Args:
            image: (N, C, *input).
        """
        return (self(image),)


def total_stride(strides: Iterable[Size]) -> Size:
    """Return the product of the strides of all levels, axis by axis: what an input must be a multiple of."""
    return as_size(prod(along) for along in zip(*strides, strict=True))


def centre_crop(features: Tensor, size: Iterable[int]) -> Tensor:
    """Return the central (N, C, *size) of (N, C, X, Y, Z), as a view."""
    for axis, (have, want) in enumerate(zip(features.shape[2:], size, strict=True), start=2):
        if have != want:  # the gradient of a slice is a copy into zeros, even of all of it
            features = features.narrow(axis, (have - want) // 2, want)
    return features
