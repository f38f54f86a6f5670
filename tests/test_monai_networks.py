"""MONAI's networks: what is MONAI's stays MONAI's, and what the adapter does about the rest."""

import pytest
import torch
from network_variants import FLAT_TASK, TASK, VARIANTS

from pipeline.hardware import place
from pipeline.networks import NetworkTask, build_network, check_options
from pipeline.networks.monai_networks import MonaiNetwork

MONAI = ["dynunet", "segresnet", "attention_unet", "basic_unet_plus_plus", "mednext", "unetr", "swin_unetr"]


def build(name: str, task: NetworkTask = TASK) -> MonaiNetwork:
    torch.manual_seed(0)
    network = build_network(name, VARIANTS[name][0], task).eval()
    assert isinstance(network, MonaiNetwork)
    return network


@pytest.mark.parametrize("name", MONAI)
def test_logits_are_monais(name: str) -> None:
    network = build(name)
    image = torch.randn(1, 2, *network.input_size(TASK.patch_size))
    with torch.no_grad():
        theirs = network.network(image)
        theirs = theirs[-1] if isinstance(theirs, list) else theirs
        assert torch.equal(network(image), theirs)


@pytest.mark.parametrize("name", MONAI)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flat_axis_gives_each_plane_what_monais_2d_network_makes_of_it(name: str, axis: int) -> None:
    patch = [32, 32, 32]
    patch[axis] = 1
    network = build(name, NetworkTask(2, 3, (patch[0], patch[1], patch[2]), (1.0, 1.0, 1.0), flat_axis=axis))
    patch[axis] = 3
    size = network.input_size((patch[0], patch[1], patch[2]))
    assert size[axis] == 3
    image = torch.randn(2, 2, *size)
    with torch.no_grad():
        logits = network(image)
        theirs = network.network(image.select(axis + 2, 1))
        theirs = theirs[-1] if isinstance(theirs, list) else theirs
    assert logits.shape == (2, 3, *size)
    torch.testing.assert_close(logits.select(axis + 2, 1), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MONAI)
def test_a_2d_network_is_made_ready_for_training(name: str) -> None:
    place(build(name, FLAT_TASK), torch.device("cpu"))
    kernels = [p for p in build(name).parameters() if p.ndim == 5]
    network = build(name)
    place(network, torch.device("cpu"))
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in network.parameters() if p.ndim == 5)


def test_a_single_voxel_at_the_coarsest_level_is_doubled() -> None:
    network = build("swin_unetr")
    assert network.stride == (32, 32, 32)
    assert network.input_size((1, 1, 1)) == (64, 32, 32)
    assert network.input_size((32, 32, 33)) == (32, 32, 64)
    flat = build("swin_unetr", FLAT_TASK)
    assert flat.input_size((20, 20, 5)) == (64, 32, 5)


def test_unetr_takes_the_patch_it_was_built_for_and_no_other() -> None:
    network = build("unetr")
    assert network.input_size(TASK.patch_size) == network.input_size((1, 1, 1)) == (16, 32, 16)
    with pytest.raises(ValueError, match=r"built for windows of \(16, 32, 16\) voxels and takes no other"):
        network.input_size((17, 1, 1))


def test_a_weight_is_saved_once() -> None:
    network = build("dynunet")
    assert len(network.state_dict()) == len(list(network.parameters())) + len(list(network.buffers()))


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("segresnet", {"blocks_up": [1]}, "blocks_up: needs 3 numbers"),
        ("mednext", {"blocks": [1, 1]}, "expansion: needs 2 numbers"),
        ("swin_unetr", {"width": 12, "heads": 5}, r"width: needs a multiple of heads \(5\)"),
        ("unetr", {"hidden": 30, "heads": 4}, r"hidden: needs a multiple of heads \(4\), got 30"),
    ],
)
def test_options_that_contradict_one_another_are_refused(name: str, options: dict[str, object], problem: str) -> None:
    assert check_options(name, options) == []
    with pytest.raises(ValueError, match=problem):
        build_network(name, options, TASK)


def test_a_patch_too_small_for_dynunet_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a patch of \(8, 8, 8\) voxels holds 2 levels, and DynUNet has three"):
        build_network("dynunet", {}, NetworkTask(1, 2, (8, 8, 8), (1.0, 1.0, 1.0)))


def test_options_are_typed() -> None:
    assert [key for key, _ in check_options("swin_unetr", {"width": 20, "depths": [2, 2]})] == [
        "options.width",
        "options.depths.2",
        "options.depths.3",
    ]
    assert "3, 5 or 7" in check_options("mednext", {"kernel": 4})[0][1]


@pytest.mark.parametrize("name", ["basic_unet_plus_plus", "mednext"])
def test_deep_supervision_is_monais(name: str) -> None:
    network = build(name).train()
    image = torch.randn(2, 2, *network.input_size(TASK.patch_size))
    several = network.deep_supervision(image)
    assert len(several) == len(network.network(image)) > 1
