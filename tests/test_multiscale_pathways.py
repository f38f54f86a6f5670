"""DeepMedic's pathways: fields by gradient, dense segments against patches, tiles against the whole volume."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from network_contract import noise, with_statistics
from network_variants import FLAT_TASK, TASK
from torch import Tensor, nn
from torch.nn import functional

from pipeline.networks import NetworkTask, build_network
from pipeline.networks.multiscale_pathways import MultiscalePathways, Pathway

NARROW: dict[str, Any] = {"feature_maps": [4, 4, 4, 4, 6, 6, 6, 6], "hidden": [8, 8]}
SMALL_FIELD: dict[str, Any] = {"feature_maps": [4, 6], "residual_layers": [2], "hidden": [8]}


def build(task: NetworkTask = TASK, **options: Any) -> MultiscalePathways:
    """Build a network whose batch norms do something."""
    torch.manual_seed(0)
    network = with_statistics(build_network("multiscale_pathways", options, task)).eval()
    assert isinstance(network, MultiscalePathways)
    return network


def seen(network: nn.Module, image: Tensor, voxel: int) -> tuple[int, int]:
    """Return the first and last voxel along the first axis on which an output voxel in the middle of the others
    depends.
    """
    image = image.clone().requires_grad_()
    output = network(image)
    y, z = (n // 2 for n in output.shape[3:])
    output[0, :, voxel, y, z].sum().backward()
    assert image.grad is not None
    touched = image.grad[0].abs().sum((0, 2, 3)).nonzero()
    return int(touched.min()), int(touched.max())


def test_published_configuration() -> None:
    network = build()
    shapes = [tuple(m.weight.shape[:3]) for m in network.modules() if isinstance(m, nn.Conv3d)]
    maps = (30, 30, 40, 40, 40, 40, 50, 50)
    pathway = [(after, before, 3) for before, after in zip((2, *maps), maps, strict=False)]
    assert shapes == [*pathway * 3, (250, 150, 3), (250, 250, 1), (3, 250, 1)]
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert network.factors == ((1, 1, 1), (3, 3, 3), (5, 5, 5))
    assert network.margin == (45, 45, 45)
    assert network.stride == (15, 15, 15)
    assert network.input_size((40, 56, 45)) == (135, 150, 135)


@pytest.mark.parametrize(("factor", "field"), [(1, 17), (3, 51), (5, 85)])
def test_field_of_a_pathway(factor: int, field: int) -> None:
    pathway = Pathway(1, (2,) * 8, (3, 3, 3), residual_layers=(4, 6, 8), norm="none", activation="prelu")
    first, last = seen(lambda image: pathway(functional.avg_pool3d(image, factor)), noise((field, 85, 85))[:, :1], 0)  # type: ignore[arg-type]
    assert (first, last) == (0, field - 1)


def test_the_margin_is_what_an_output_sees() -> None:
    network = build(**NARROW)
    image = noise((105, 105, 105))
    # Voxel 7 is central to its blocks of 3 and of 5; its neighbours, which the hidden 3^3 kernel sees, share them.
    assert seen(network, image, 7) == (45 + 7 - 42, 45 + 7 + 42)
    assert seen(network, image, 0) == (0, 45 + 4 + 40)
    assert seen(network, image, 14) == (45 + 10 - 40, 104)


def test_residual_link_adds_the_cropped_input_of_the_layer_before() -> None:
    pathway = Pathway(1, (2, 3, 4, 5), (3, 3, 3), residual_layers=(4,), norm="none", activation="relu")
    image = noise((9, 10, 11))[:, :1]
    second = pathway.layers[1](pathway.layers[0](image))
    fourth = pathway.layers[3](pathway.layers[2](second))
    expected = torch.cat([fourth[:, :3] + second[:, :, 2:-2, 2:-2, 2:-2], fourth[:, 3:]], dim=1)
    torch.testing.assert_close(pathway(image), expected)


def patch_wise(network: MultiscalePathways, image: Tensor, voxel: tuple[int, int, int]) -> Tensor:
    """Return the logits (K,) of one voxel by DeepMedic's patches: each pathway's patch has it in its centre."""
    features = []
    for pathway, (factor, _, _) in zip(network.pathways, network.factors, strict=True):
        # The hidden layers see 3^3 voxels, which lie in one block of a context pathway.
        radius = (17 * factor) // 2 + (factor == 1)
        patch = image[:, :, *(slice(v - radius, v + radius + 1) for v in voxel)]
        features.append(pathway(functional.avg_pool3d(patch, factor)).expand(-1, -1, 3, 3, 3))
    return network.head(torch.cat(features, dim=1))[0, :, 0, 0, 0]  # type: ignore[no-any-return]


def test_dense_segment_equals_patches_at_the_voxels_central_to_every_block() -> None:
    network = build(**NARROW)
    image = noise(network.input_size((15, 30, 15)))
    with torch.no_grad():
        dense = network(image)[0]
        for y in (7, 22):
            torch.testing.assert_close(
                dense[:, 7, y, 7], patch_wise(network, image, (52, 45 + y, 52)), atol=1e-5, rtol=1e-4
            )
        beside = dense[:, 7, 8, 7] - patch_wise(network, image, (52, 53, 52))
    assert beside.abs().max() > 1e-3


def test_planes_of_a_flat_task_stay_apart() -> None:
    network = build(FLAT_TASK, **NARROW)
    assert (network.margin, network.stride) == ((45, 45, 0), (15, 15, 1))
    image = noise(network.input_size((15, 15, 3)))
    with torch.no_grad():
        logits = network(image)
        torch.testing.assert_close(logits[..., 1:2], network(image[..., 1:2]), atol=1e-5, rtol=1e-4)
    assert logits.shape == (1, 3, 15, 15, 3)


def test_any_output_is_legal() -> None:
    network = build(**SMALL_FIELD)
    assert network.margin == (15, 15, 15)
    image = noise((31, 38, 46))
    with torch.no_grad():
        logits = network(image)
        first = network(image[:, :, :, :37])
    assert logits.shape == (1, 3, 1, 8, 16)
    torch.testing.assert_close(first, logits[:, :, :, :7], atol=1e-5, rtol=1e-4)


def test_whole_strides_whatever_the_factors() -> None:
    # A margin of 3 * 7 a side is no multiple of 3 * 5 * 7 voxels, and the output must be.
    network = build(**SMALL_FIELD, factors=[3, 5, 7])
    assert network.output_size(network.input_size((100, 105, 106))) == (105, 105, 210)


def test_small_is_small() -> None:
    published, small = build(replace(TASK, in_channels=1)), build(replace(TASK, in_channels=1), size="small")
    weights = [sum(p.numel() for p in network.parameters()) for network in (published, small)]
    assert weights[1] < weights[0] / 20
    assert (small.margin, small.stride) == ((27, 27, 27), (3, 3, 3))


def test_a_factor_for_each_axis() -> None:
    network = build(**SMALL_FIELD, factors=[[3, 3, 1], [5, 5, 2]])
    assert (network.margin, network.stride) == ((15, 15, 6), (15, 15, 2))
    with pytest.raises(ValueError, match="must be 1 along axis 2"):
        build(FLAT_TASK, factors=[[3, 3, 3]])


def test_an_image_that_the_margins_eat_is_refused() -> None:
    network = build(**SMALL_FIELD)
    with pytest.raises(ValueError, match=r"an image of \(31, 30, 31\) voxels: it loses \(15, 15, 15\)"):
        network(noise((31, 30, 31)))


def test_residual_link_to_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="a pathway has 4 layers"):
        build(feature_maps=[4, 4, 4, 4])
