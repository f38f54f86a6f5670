"""MONAI's own networks behind the pipeline's contract: one adapter, one short builder each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.networks.contract import Network, NetworkTask, Size, total_stride
from pipeline.networks.topology import topology

Width = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class MonaiNetwork(Network):
    """A padded MONAI network: (N, C, *input) -> logits (N, K, *input)."""

    def __init__(self, network: nn.Module, stride: Size) -> None:
        super().__init__()
        self.network = network
        self.stride = stride

    def forward(self, image: Tensor) -> Tensor:
        """Map (N, C, X, Y, Z) to logits (N, K, X, Y, Z)."""
        return self.network(image)  # type: ignore[no-any-return]


def dynunet(
    task: NetworkTask,
    *,
    width: Width = 32,
    max_width: Width = 320,
    levels: Annotated[int, Field(ge=3)] | None = None,
    norm: Literal["batch", "instance"] = "instance",
    residual: bool = False,
) -> Network:
    """Build MONAI's DynUNet, its re-implementation of nnU-Net's network, with strides and kernels fitted as for
    `unet`.
    """
    from monai.networks.nets.dynunet import DynUNet

    kernels, strides = topology(task.patch_size, task.spacing_mm, levels)
    network = DynUNet(
        spatial_dims=3,
        in_channels=task.in_channels,
        out_channels=task.num_classes,
        kernel_size=kernels,
        strides=((1, 1, 1), *strides),
        upsample_kernel_size=strides,
        filters=[min(width * 2**level, max_width) for level in range(len(kernels))],
        norm_name=(norm, {"affine": True}),
        res_block=residual,
    )
    return MonaiNetwork(network, total_stride(strides))


def segresnet(
    task: NetworkTask,
    *,
    width: Width = 16,
    blocks_down: tuple[int, ...] = (1, 2, 2, 4),
    blocks_up: tuple[int, ...] = (1, 1, 1),
    dropout: Probability = 0.0,
) -> Network:
    """Build MONAI's SegResNet (Myronenko 2018) without its autoencoder branch."""
    from monai.networks.nets.segresnet import SegResNet

    network = SegResNet(
        spatial_dims=3,
        init_filters=width,
        in_channels=task.in_channels,
        out_channels=task.num_classes,
        blocks_down=blocks_down,
        blocks_up=blocks_up,
        dropout_prob=dropout or None,
    )
    halved = 2 ** (len(blocks_down) - 1)
    return MonaiNetwork(network, (halved, halved, halved))
