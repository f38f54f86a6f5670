"""The U-Net with a context pathway: its field by gradient, where its context lies, tiles against the whole volume."""

from typing import Any

import pytest
import torch
from network_contract import noise, with_statistics
from network_variants import FLAT_TASK, TASK
from torch import nn

from pipeline.networks import NetworkTask, build_network
from pipeline.networks.multiscale_unet import MultiscaleUNet

SHALLOW: dict[str, Any] = {"width": 4, "levels": 2, "convs": 1}


def build(task: NetworkTask = TASK, **options: Any) -> MultiscaleUNet:
    """Build a network whose batch norms do something."""
    torch.manual_seed(0)
    network = with_statistics(build_network("multiscale_unet", options, task)).eval()
    assert isinstance(network, MultiscaleUNet)
    return network


def seen(network: MultiscaleUNet) -> list[tuple[int, int]]:
    """Return the first voxel and the last, counted from the end, on which any logit of a smallest input depends."""
    image = noise(network.input_size((1, 1, 1))).requires_grad_()
    network(image).square().sum().backward()
    assert image.grad is not None
    touched = image.grad[0].abs().sum(0)
    extents = [touched.sum([other for other in range(3) if other != axis]).nonzero() for axis in range(3)]
    return [(int(at.min()), n - 1 - int(at.max())) for at, n in zip(extents, touched.shape, strict=True)]


def test_sizes_of_the_default() -> None:
    # The U-Net of three levels, two convolutions each, loses 2 + 4 + 8 on the way down, 14, and 4 + 2 on the way up.
    # Three convolutions on blocks of 2 * 4 take 24 beyond the bottleneck, 10 more than 14, rounded up to half a block.
    network = build(width=4)
    assert network.stride == (8, 8, 8)
    assert network.beyond == (12, 12, 12)
    assert network.margin == (32, 32, 32)
    # The bottleneck of an output of n voxels stands for n + 12: 56 and 72 are whole blocks of 8.
    assert network.output_size(network.input_size((40, 44, 57))) == (44, 44, 60)


def test_the_context_widens_the_field() -> None:
    network = build(width=4, activation="silu")
    assert seen(network) == [(2, 2)] * 3
    for module in network.context.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.zeros_(module.weight)
    assert seen(network) == [(12, 12)] * 3


def test_context_lies_where_the_bottleneck_does() -> None:
    network = build(**SHALLOW, norm="none", activation="relu", context_width=2)
    for module in network.context.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.dirac_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    size = network.input_size((20, 1, 1))
    ramp = torch.arange(size[0]).float()[:, None, None].expand(1, 2, *size)
    with torch.no_grad():
        bottleneck, _ = network.encode(ramp)
    context = bottleneck[0, -1, :, 0, 0]
    # Before the bottleneck the encoder loses one voxel and one of two; each of its voxels stands for two of the image.
    first = network.beyond[0] + 3
    voxels = torch.arange(first, size[0] - first).float()
    # Two voxels of the bottleneck share a block of four.
    torch.testing.assert_close(context, voxels.view(-1, 4).mean(1).repeat_interleave(2))


def test_planes_of_a_flat_task_stay_apart() -> None:
    network = build(FLAT_TASK, width=4)
    assert (network.margin, network.stride) == ((32, 32, 0), (8, 8, 1))
    image = noise(network.input_size((1, 1, 3)))
    with torch.no_grad():
        logits = network(image)
        torch.testing.assert_close(logits[..., 1:2], network(image[..., 1:2]), atol=1e-5, rtol=1e-4)


def test_an_image_of_another_size_is_refused() -> None:
    network = build(**SHALLOW)
    x, y, z = network.input_size((8, 8, 8))
    with pytest.raises(ValueError, match=rf"an image of \({x}, {y + 1}, {z}\) voxels.*such as \({x}, {y + 4}, {z}\)"):
        network(noise((x, y + 1, z)))


def test_context_no_wider_than_the_unet_is_refused() -> None:
    with pytest.raises(ValueError, match="sees 8 voxels beyond the bottleneck, the U-Net itself 14"):
        build(width=4, context_convs=1)
