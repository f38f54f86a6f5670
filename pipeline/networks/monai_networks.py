"""MONAI's own networks behind the pipeline's contract: one adapter, one short builder each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.networks.contract import Network, NetworkTask, Size, as_size, total_stride
from pipeline.networks.topology import Count
from pipeline.pyramid import topology

Counts = Annotated[tuple[Count, ...], Field(min_length=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class MonaiNetwork(Network):
    """A padded MONAI network: (N, C, *input) -> logits (N, K, *input).

    Args:
        network: takes (N, C, X, Y, Z), or (N, C, X, Y) where the task is flat; returns logits, or several of them.
        stride: per axis, the product of its pooling factors.
        flat_axis: the axis that is folded into the batch before the network and out of it behind.
    """

    def __init__(self, network: nn.Module, stride: Size, flat_axis: int | None) -> None:
        super().__init__()
        self.network = network
        self.stride = stride
        self.flat_axis = flat_axis

    def forward(self, image: Tensor) -> Tensor:
        """Map (N, C, X, Y, Z) to logits (N, K, X, Y, Z)."""
        return self._logits(image)[0]

    def input_size(self, output: Size) -> Size:
        """Return the output rounded up to a multiple of the stride, of two voxels at least at the coarsest level: the
        norm of a single one is nothing.
        """
        size = super().input_size(output)
        pooled = [axis for axis in range(3) if axis != self.flat_axis]
        if all(size[axis] == self.stride[axis] for axis in pooled):
            return as_size(2 * n if axis == pooled[0] else n for axis, n in enumerate(size))
        return size

    def _logits(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return all that the network returns, each (N, K, X, Y, Z), finest first."""
        if self.flat_axis is None:
            return self._several(image)
        dim = 2 + self.flat_axis
        planes = image.movedim(dim, 1)  # (N, planes, C, X, Y)
        several = self._several(planes.flatten(0, 1))
        return tuple(logits.reshape(*planes.shape[:2], *logits.shape[1:]).movedim(1, dim) for logits in several)

    def _several(self, image: Tensor) -> tuple[Tensor, ...]:
        """Run the network; one answer becomes a tuple of one."""
        answer = self.network(image)
        return (answer,) if isinstance(answer, Tensor) else tuple(answer)


class MonaiNetworkOfLevels(MonaiNetwork):
    """A MONAI network that gives logits of coarser levels too."""

    coarse_logits = True

    def deep_supervision(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the logits, then those of coarser levels."""
        return self._logits(image)


class NestedNetwork(MonaiNetworkOfLevels):
    """A nested U-Net: its answers are all of the input's size, the one that most levels took part in last."""

    def _several(self, image: Tensor) -> tuple[Tensor, ...]:
        """Run the network; the best answer goes first."""
        return super()._several(image)[::-1]


class FixedSizeNetwork(MonaiNetwork):
    """A MONAI network that takes inputs of one size only."""

    def __init__(self, network: nn.Module, size: Size, stride: Size, flat_axis: int | None) -> None:
        super().__init__(network, stride, flat_axis)
        self.size = size

    def input_size(self, output: Size) -> Size:
        """Return the one size.

        Raises:
            ValueError: `output` does not fit in it; a flat axis, whose planes stand alone, always does.
        """
        size = as_size(output[axis] if axis == self.flat_axis else self.size[axis] for axis in range(3))
        if any(have < want for have, want in zip(size, output, strict=True)):
            raise ValueError(
                f"the network was built for windows of {self.size} voxels and takes no other, got {output}"
            )
        return size


def dynunet(
    task: NetworkTask,
    *,
    width: Count = 32,
    max_width: Count = 320,
    levels: Annotated[int, Field(ge=3)] | None = None,
    norm: Literal["batch", "instance"] = "instance",
    residual: bool = False,
) -> Network:
    """Build MONAI's DynUNet, its re-implementation of nnU-Net's network, with strides and kernels fitted as for
    `unet`.

    Raises:
        ValueError: the patch cannot be halved as often as `levels` says, or twice.
    """
    from monai.networks.nets.dynunet import DynUNet

    kernels, strides = topology(task.patch_size, task.spacing_mm, levels, task.flat_axis)
    if len(kernels) < 3:
        raise ValueError(
            f"a patch of {task.patch_size} voxels holds {len(kernels)} levels, and DynUNet has three at least; take a "
            "larger preprocessing.patch_size"
        )
    in_plane = [_without(task.flat_axis, stride) for stride in strides]
    network = DynUNet(
        spatial_dims=_spatial_dims(task),
        in_channels=task.in_channels,
        out_channels=task.num_classes,
        kernel_size=[_without(task.flat_axis, kernel) for kernel in kernels],
        strides=[1, *in_plane],
        upsample_kernel_size=in_plane,
        filters=_doubled(width, len(kernels), max_width),
        norm_name=(norm, {"affine": True}),
        res_block=residual,
    )
    # Its levels are registered a second time, as `skip_layers`, which is what runs: weights would be saved twice.
    del network.input_block, network.downsamples, network.bottleneck, network.upsamples
    return MonaiNetwork(network, total_stride(strides), task.flat_axis)


def segresnet(
    task: NetworkTask,
    *,
    width: Annotated[int, Field(ge=8, multiple_of=8)] = 16,
    blocks_down: Counts = (1, 2, 2, 4),
    blocks_up: Counts = (1, 1, 1),
    dropout: Probability = 0.0,
) -> Network:
    """Build MONAI's SegResNet (Myronenko 2018) without its autoencoder branch.

    Raises:
        ValueError: blocks_up is not one shorter than blocks_down.
    """
    from monai.networks.nets.segresnet import SegResNet

    if len(blocks_up) != len(blocks_down) - 1:
        raise ValueError(
            f"blocks_up: needs {len(blocks_down) - 1} numbers, one fewer than blocks_down, got {blocks_up}"
        )
    network = SegResNet(
        spatial_dims=_spatial_dims(task),
        init_filters=width,
        in_channels=task.in_channels,
        out_channels=task.num_classes,
        blocks_down=blocks_down,
        blocks_up=blocks_up,
        dropout_prob=dropout or None,
    )
    return MonaiNetwork(network, task.cubic(2 ** len(blocks_up)), task.flat_axis)


def attention_unet(
    task: NetworkTask,
    *,
    width: Count = 32,
    max_width: Count = 320,
    levels: Annotated[int, Field(ge=2)] | None = None,
    dropout: Probability = 0.0,
) -> Network:
    """Build MONAI's Attention U-Net (Oktay et al. 2018), whose long skips are gated by the coarser level, with strides
    fitted as for `unet`.
    """
    from monai.networks.nets.attentionunet import AttentionUnet

    kernels, strides = topology(task.patch_size, task.spacing_mm, levels, task.flat_axis)
    network = AttentionUnet(
        spatial_dims=_spatial_dims(task),
        in_channels=task.in_channels,
        out_channels=task.num_classes,
        channels=_doubled(width, len(kernels), max_width),
        strides=[_without(task.flat_axis, stride) for stride in strides],
        dropout=dropout,
    )
    _drop_biases(network.model[:-1].modules())
    return MonaiNetwork(network, total_stride(strides), task.flat_axis)


def basic_unet_plus_plus(
    task: NetworkTask,
    *,
    width: Count = 32,
    norm: Literal["batch", "instance"] = "instance",
    dropout: Probability = 0.0,
) -> Network:
    """Build MONAI's U-Net++ (Zhou et al. 2018) of five levels, the levels joined by nested, dense skips."""
    from monai.networks.nets.basic_unetplusplus import BasicUNetPlusPlus

    network = BasicUNetPlusPlus(
        spatial_dims=_spatial_dims(task),
        in_channels=task.in_channels,
        out_channels=task.num_classes,
        features=(width, width, 2 * width, 4 * width, 8 * width, width),
        deep_supervision=True,
        norm=(norm, {"affine": True}),
        bias=False,
        dropout=dropout,
    )
    return NestedNetwork(network, task.cubic(16), task.flat_axis)


def mednext(
    task: NetworkTask,
    *,
    width: Count = 32,
    kernel: Literal[3, 5, 7] = 3,
    blocks: Counts = (2, 2, 2, 2),
    expansion: Counts = (2, 2, 2, 2),
    bottleneck_blocks: Count = 2,
    bottleneck_expansion: Count = 2,
) -> Network:
    """Build MONAI's MedNeXt (Roy et al. 2023): depthwise convolutions and expanded pointwise ones, by default in size
    S; B has expansion 2, 3, 4, 4 and 4 in the bottleneck.

    Raises:
        ValueError: blocks and expansion are not as long.
    """
    from monai.networks.nets.mednext import MedNeXt

    if len(blocks) != len(expansion):
        raise ValueError(f"expansion: needs {len(blocks)} numbers, as many as blocks, got {expansion}")
    network = MedNeXt(
        spatial_dims=_spatial_dims(task),
        init_filters=width,
        in_channels=task.in_channels,
        out_channels=task.num_classes,
        encoder_expansion_ratio=expansion,
        decoder_expansion_ratio=expansion[::-1],
        bottleneck_expansion_ratio=bottleneck_expansion,
        kernel_size=kernel,
        deep_supervision=True,
        use_residual_connection=True,
        blocks_down=blocks,
        blocks_bottleneck=bottleneck_blocks,
        blocks_up=blocks[::-1],
    )
    _drop_biases(module.conv1 for module in network.modules() if hasattr(module, "conv1"))
    return MonaiNetworkOfLevels(network, task.cubic(2 ** len(blocks)), task.flat_axis)


def unetr(
    task: NetworkTask,
    *,
    width: Count = 16,
    hidden: Count = 768,
    mlp: Count = 3072,
    heads: Count = 12,
    dropout: Probability = 0.0,
) -> Network:
    """Build MONAI's UNETR (Hatamizadeh et al. 2022): a vision transformer of twelve layers for an encoder.

    Its position embedding fixes the size of its input, here to the plan's patch.

    Raises:
        ValueError: hidden is no multiple of heads.
    """
    from monai.networks.nets.unetr import UNETR

    if hidden % heads:
        raise ValueError(f"hidden: needs a multiple of heads ({heads}), got {hidden}")
    stride = task.cubic(16)
    size = as_size(-(-n // s) * s for n, s in zip(task.patch_size, stride, strict=True))
    network = UNETR(
        in_channels=task.in_channels,
        out_channels=task.num_classes,
        img_size=_without(task.flat_axis, size),
        feature_size=width,
        hidden_size=hidden,
        mlp_dim=mlp,
        num_heads=heads,
        dropout_rate=dropout,
        spatial_dims=_spatial_dims(task),
    )
    for block in network.vit.blocks:
        # Of an attention to another sequence that UNETR has not: nothing reaches it.
        block.norm_cross_attn = nn.Identity()
    return FixedSizeNetwork(network, size, stride, task.flat_axis)


def swin_unetr(
    task: NetworkTask,
    *,
    width: Annotated[int, Field(ge=12, multiple_of=12)] = 24,
    depths: tuple[Count, Count, Count, Count] = (2, 2, 2, 2),
    heads: Count = 3,
    window: Count = 7,
    convolutions: bool = False,
    dropout: Probability = 0.0,
) -> Network:
    """Build MONAI's Swin UNETR (Hatamizadeh et al. 2022): attention within shifted windows for an encoder.

    Args:
        task: what it is built for.
        width: feature maps of the first level, doubled at each level.
        depths: transformer blocks of each stage; every second one shifts its windows.
        heads: of the first stage, doubled at each stage.
        window: voxels of an attention window along each axis.
        convolutions: a residual convolution before each stage (Swin UNETR V2, He et al. 2023).
        dropout: probability of zeroing a feature.

    Raises:
        ValueError: width is no multiple of heads.
    """
    from monai.networks.nets.swin_unetr import SwinUNETR

    if width % heads:
        raise ValueError(f"width: needs a multiple of heads ({heads}), got {width}")
    # MONAI reads numbers off a tensor while it builds; on device "meta", where only sizes are wanted, it has none.
    with torch.device("cpu"):
        network = SwinUNETR(
            in_channels=task.in_channels,
            out_channels=task.num_classes,
            depths=depths,
            num_heads=[heads * 2**stage for stage in range(4)],
            window_size=window,
            feature_size=width,
            drop_rate=dropout,
            spatial_dims=_spatial_dims(task),
            use_v2=convolutions,
        )
    return MonaiNetwork(network, task.cubic(32), task.flat_axis)


def _spatial_dims(task: NetworkTask) -> int:
    """Return 2 for a flat task, else 3."""
    return 3 if task.flat_axis is None else 2


def _without(flat_axis: int | None, size: Size) -> Sequence[int]:
    """Return a size without its flat axis."""
    return [n for axis, n in enumerate(size) if axis != flat_axis]


def _doubled(width: int, levels: int, largest: int) -> list[int]:
    """Return the feature maps of each level, doubled at each up to a bound."""
    return [min(width * 2**level, largest) for level in range(levels)]


def _drop_biases(modules: Iterable[nn.Module]) -> None:
    """Take the biases from convolutions that a norm follows: it subtracts the mean, and a bias with it."""
    for module in modules:
        if isinstance(module, nn.modules.conv._ConvNd):
            module.bias = None
