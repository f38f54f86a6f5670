"""What planning decided of a U-Net reaches the networks that ask, and their own options win."""

from pathlib import Path

import pytest
import torch
from tiny_models import make_plan
from torch import nn

from pipeline.config import NetworkSection
from pipeline.data.plan import NetworkPlan, Plan, read_plan, write_plan
from pipeline.networks import Network
from pipeline.networks.fitting import fitted_plan, network_for
from pipeline.pyramid import topology

PLANNED = NetworkPlan(width=6, kernels=((3, 3, 1), (3, 3, 3)), strides=((2, 2, 1),), norm="batch")


def planned(**changes: object) -> Plan:
    values = {"patch_size": (16, 16, 16), "spacing_mm": (1.0, 1.0, 1.0), "batch_size": 4, "network": PLANNED}
    return make_plan(**{**values, **changes})


def built(plan: Plan, name: str = "unet", dims: int = 3, **options: object) -> Network:
    with torch.device("meta"):
        return network_for(plan, NetworkSection(name=name, spatial_dims=dims, options=options))  # type: ignore[arg-type]


def norms(network: Network) -> set[type[nn.Module]]:
    return {type(module) for module in network.modules() if "Norm" in type(module).__name__}


@pytest.mark.parametrize("name", ["unet", "autoencoder", "residual_encoder_unet"])
def test_the_plan_decides_width_levels_and_norm(name: str) -> None:
    network = built(planned(), name)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
    assert network.stride == (2, 2, 1)
    assert convolutions[0].out_channels == 6
    assert convolutions[0].kernel_size == (3, 3, 1)
    assert norms(network) == {nn.BatchNorm3d}


def test_the_options_win() -> None:
    network = built(planned(), width=4, norm="instance", levels=3)
    assert network.stride == (4, 4, 4)
    assert norms(network) == {nn.InstanceNorm3d}
    assert next(network.parameters()).shape[0] == 4
    assert built(planned(), kernels=[[1, 1, 1], [1, 1, 1]]).stride == (2, 2, 1)


def test_a_plan_without_it_gives_the_network_of_before() -> None:
    network = built(planned(network=None))
    assert network.stride == (4, 4, 4)
    assert norms(network) == {nn.InstanceNorm3d}
    assert next(network.parameters()).shape[0] == 32


def test_an_older_plan_keeps_its_digest_and_its_file() -> None:
    assert "network" not in planned(network=None).model_dump()
    assert planned(network=None).digest() != planned().digest()
    assert planned(network=None).preprocessing_digest() == planned().preprocessing_digest()


def test_it_survives_its_file(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.yaml", planned())
    assert read_plan(tmp_path / "plan.yaml") == planned()


def test_levels_must_agree() -> None:
    with pytest.raises(ValueError, match="2 kernels and 2 strides"):
        PLANNED.changed(strides=((2, 2, 2), (2, 2, 2)))


def test_another_batch_has_another_norm_and_says_so() -> None:
    section = NetworkSection()
    assert fitted_plan(planned(), section, 4) == planned()
    fitted = fitted_plan(planned(), section, 2)
    assert (fitted.batch_size, fitted.network) == (2, PLANNED.changed(norm="instance"))
    assert "instance norm for batches of 2" in fitted.reasons["network"]
    old = planned(network=None)
    assert fitted_plan(old, section, 2) == old


@pytest.mark.parametrize(("voxels", "rounded"), [(90, 96), (96, 96), (97, 112), (100, 112)])
@pytest.mark.parametrize("name", ["unet", "dynunet", "residual_encoder_unet"])
def test_a_patch_that_was_said_is_rounded_up_and_loses_no_level(name: str, voxels: int, rounded: int) -> None:
    plan = planned(patch_size=(voxels,) * 3, network=None)
    fitted = fitted_plan(plan, NetworkSection(name=name))
    assert fitted.patch_size == (rounded,) * 3
    assert built(fitted, name).stride == (16, 16, 16)


def test_a_2d_network_of_planes_that_were_said_has_levels_in_the_plane() -> None:
    kernels, strides = topology((16, 16, 1), (1.0, 1.0, 1.0))
    of_volume = PLANNED.changed(kernels=kernels, strides=strides)
    assert any(kernel[2] > 1 for kernel in kernels)
    plan = planned(patch_size=(16, 16, 1), network=of_volume)
    fitted = fitted_plan(plan, NetworkSection(spatial_dims=2))
    assert (fitted.patch_size, fitted.batch_size) == (plan.patch_size, plan.batch_size)
    assert built(fitted, dims=2).stride == (4, 4, 1)


def test_a_2d_network_has_levels_of_its_own() -> None:
    plan = planned(spacing_mm=(1.0, 1.0, 3.0))
    section = NetworkSection(spatial_dims=2)
    fitted = fitted_plan(plan, section)
    assert fitted.patch_size == (16, 16, 1)
    assert fitted_plan(fitted, section) == fitted
    network = built(fitted, dims=2)
    assert network.stride == (4, 4, 1)
    assert network(torch.empty(1, len(plan.channels), 16, 16, 1, device="meta")).shape[2:] == (16, 16, 1)
