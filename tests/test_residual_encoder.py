"""The residual encoder U-Net: as published, and its units worked out by hand."""

import pytest
import torch
from torch import nn

from pipeline.data.plan import NetworkPlan
from pipeline.networks import NetworkTask, build_network
from pipeline.networks.blocks import ResidualUnit

LARGE = NetworkTask(1, 2, patch_size=(128, 128, 128), spacing_mm=(1.0, 1.0, 1.0))


def units_of(network: nn.Module) -> list[int]:
    """The residual units of each level on the way down."""
    levels = network.encoder  # type: ignore[union-attr]
    return [sum(isinstance(module, ResidualUnit) for module in level) for level in levels]  # type: ignore[union-attr]


def test_its_default_is_the_published_one() -> None:
    with torch.device("meta"):
        network = build_network("residual_encoder_unet", {}, LARGE)
    assert units_of(network) == [1, 3, 4, 6, 6, 6]
    assert [stage[0].out_channels for stage in (level[0] for level in network.decoder)] == [320, 256, 128, 64, 32]
    assert all(len(level) == 1 for level in network.decoder)
    # nnU-Net Revisited gives 102 million parameters for ResEnc L on a patch of six levels.
    assert 102e6 < sum(p.numel() for p in network.parameters()) < 103e6


def test_deeper_levels_have_as_many_units_as_the_last() -> None:
    task = NetworkTask(1, 2, patch_size=(256, 32, 32), spacing_mm=(1.0, 1.0, 1.0))
    with torch.device("meta"):
        assert units_of(build_network("residual_encoder_unet", {"width": 2}, task)) == [1, 3, 4, 6, 6, 6, 6]


def test_units_are_given_for_each_level() -> None:
    with pytest.raises(ValueError, match="different numbers of levels"):
        build_network("residual_encoder_unet", {"blocks": [1, 1], "widths": [2, 2, 2]}, LARGE)
    with pytest.raises(ValueError, match="blocks: 2 numbers for 3 levels"):
        build_network("residual_encoder_unet", {"blocks": [1, 1], "levels": 3}, LARGE)
    with torch.device("meta"):
        assert units_of(build_network("residual_encoder_unet", {"width": 2, "blocks": [2, 1]}, LARGE)) == [2, 1]


def test_a_strided_skip_leaves_no_voxel_out() -> None:
    unit = ResidualUnit(
        *(1, 2), convs=2, kernel=(3, 3, 3), stride=(2, 2, 1), norm="none", activation="relu", pooled_skip=True
    )
    for weights in unit.body.parameters():
        nn.init.zeros_(weights)
    projection = unit.skip[1][0][0]
    nn.init.ones_(projection.weight)
    nn.init.zeros_(projection.bias)
    image = torch.rand(1, 1, 4, 4, 3)
    means = image.reshape(1, 1, 2, 2, 2, 2, 3).mean((3, 5))
    torch.testing.assert_close(unit(image), means.expand(1, 2, 2, 2, 3))


def test_it_takes_the_plans_topology_and_its_options_win() -> None:
    planned = NetworkPlan(width=2, kernels=((1, 3, 3), (3, 3, 3)), strides=((1, 2, 2),), norm="batch")
    task = NetworkTask(1, 2, (16, 16, 16), (1.0, 1.0, 1.0), planned=planned)
    network = build_network("residual_encoder_unet", {"blocks": [1, 1]}, task)
    assert network.stride == (1, 2, 2)
    assert any(isinstance(module, nn.BatchNorm3d) for module in network.modules())
    other = build_network("residual_encoder_unet", {"norm": "instance", "levels": 3}, task)
    assert other.stride == (4, 4, 4)
    assert not any(isinstance(module, nn.BatchNorm3d) for module in other.modules())
