"""The U-Net family: published sizes and parameter counts, valid tiles against the whole volume, features in place."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from network_variants import FLAT_TASK, TASK
from torch import Tensor, nn

from pipeline.networks import NetworkTask, build_network, check_options
from pipeline.networks.blocks import ResidualUnit, trim
from pipeline.networks.contract import Size, as_size, centre_crop
from pipeline.networks.topology import Levels
from pipeline.networks.unet import Design, UNet, simple_unet, unet
from pipeline.pyramid import topology

PLANE = NetworkTask(1, 2, patch_size=(388, 388, 1), spacing_mm=(1.0, 1.0, 1.0), flat_axis=2)
RONNEBERGER: dict[str, Any] = {
    "width": 64,
    "max_width": 1024,
    "levels": 5,
    "norm": "none",
    "activation": "relu",
    "downsampling": "max",
    "padding": "valid",
    "coarse_heads": False,
}


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def built(**options: Any) -> UNet:
    torch.manual_seed(0)
    return unet(TASK, **{"width": 4, "levels": 3, "norm": "none", **options})


def image_for(network: UNet, output: Size) -> Tensor:
    return torch.randn(1, 2, *network.input_size(output), generator=torch.Generator().manual_seed(1))


def test_the_simple_unet_in_a_plane_has_its_published_parameters() -> None:
    with torch.device("meta"):
        task = NetworkTask(3, 21, patch_size=(224, 224, 1), spacing_mm=(1.0, 1.0, 1.0), flat_axis=2)
        assert parameters(simple_unet(task)) == 7_698_645
        wide = simple_unet(task, widths=(64, 128, 512, 1024))
    assert [level.in_channels for level in wide.heads] == [64]
    assert parameters(wide) > 2 * 7_698_645


def test_ronnebergers_settings_give_his_sizes() -> None:
    with torch.device("meta"):
        network = unet(PLANE, **RONNEBERGER)
    assert network.input_size((388, 388, 1)) == (572, 572, 1)
    assert network.output_size((572, 572, 1)) == (388, 388, 1)
    assert network.margin == (92, 92, 0)
    # Summed from his figure 1, layer by layer.
    assert parameters(network) == 31_030_658


def test_ciceks_tile_gives_his_output() -> None:
    task = NetworkTask(1, 2, patch_size=(44, 44, 28), spacing_mm=(1.0, 1.0, 1.0))
    with torch.device("meta"):
        network = unet(task, **{**RONNEBERGER, "levels": 4})
        assert network(torch.zeros(1, 1, 132, 132, 116)).shape == (1, 2, 44, 44, 28)
    assert network.input_size((44, 44, 28)) == (132, 132, 116)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "valid"},
        {"padding": "valid", "upsampling": "cubic", "downsampling": "average"},
        {
            "padding": "valid",
            "strides": ((1, 2, 3),),
            "kernels": ((1, 3, 5), (3, 1, 3)),
            "convs": (1, 3),
            "levels": None,
        },
        {"padding": "same"},
    ],
)
@pytest.mark.parametrize("wanted", [(1, 1, 1), (7, 8, 9)])
def test_no_smaller_input_is_legal_and_enough(options: dict[str, Any], wanted: Size) -> None:
    with torch.device("meta"):
        network = built(**options)
        size = network.input_size(wanted)
        assert network(torch.zeros(1, 2, *size)).shape[2:] == network.output_size(size)
        for axis, less in product(range(3), range(1, 24)):
            smaller = as_size(n - less if a == axis else n for a, n in enumerate(size))
            if network.output_size(smaller)[axis] >= wanted[axis]:
                with pytest.raises(ValueError, match="legal sizes are"):
                    network(torch.zeros(1, 2, *smaller))


WAYS = [
    {"downsampling": "max", "upsampling": "transposed"},
    {"downsampling": "max", "upsampling": "max_unpool", "skips": "none"},
    {"downsampling": "max", "upsampling": "max_unpool", "skips": "sum"},
    {"downsampling": "average", "upsampling": "bed_of_nails"},
    {"downsampling": "average", "upsampling": "nearest", "skips": "none"},
    {"downsampling": "strided", "upsampling": "linear", "residual": True},
    {"downsampling": "strided", "upsampling": "cubic", "skips": "sum"},
    {"upsampling": "nearest_conv", "norm": "batch"},
    {"upsampling": "linear_conv", "norm": "batch", "residual": True},
    {"upsampling": "pixel_shuffle", "convs": (2, 1, 3)},
    {"upsampling": "linear", "strides": ((3, 2, 1), (2, 1, 2)), "kernels": ((3, 3, 1), (5, 3, 3), (3, 3, 3))},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_valid_tiles_equal_the_whole_volume_at_every_level(options: dict[str, Any]) -> None:
    network = built(padding="valid", **{"width": 2, **options})
    tile = network.input_size((1, 1, 1))
    whole = image_for(network, as_size(n + 1 for n in network.output_size(tile)))
    assert as_size(whole.shape[2:]) == as_size(t + s for t, s in zip(tile, network.stride, strict=True))
    with torch.no_grad():
        network(whole)  # gives batch norms other statistics than 0 and 1
        expected = network.eval().deep_supervision(whole)
        for corner in ((0, 0, 0), network.stride):
            got = network.deep_supervision(whole[(..., *(slice(c, c + t) for c, t in zip(corner, tile, strict=True)))])
            for ours, theirs in zip(got, expected, strict=True):
                part = (slice(c, c + n) for c, n in zip(corner, ours.shape[2:], strict=True))
                torch.testing.assert_close(ours, theirs[(..., *part)], atol=1e-4, rtol=1e-4)


def pass_through(network: nn.Module) -> None:
    """Make every convolution hand on the mean of its channels: what remains is pooling, upsampling and skips."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.zeros_(module.weight)
            x, y, z = (k // 2 for k in module.kernel_size)
            module.weight.data[:, :, x, y, z] = 1 / module.in_channels
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def test_skips_and_coarse_logits_of_valid_levels_lie_where_they_belong() -> None:
    # Levels of one convolution lose 1 voxel each: blocks of 2 begin at voxel 1, blocks of 4 at 1 + 2, blocks of 8 at 7.
    network = built(padding="valid", downsampling="average", upsampling="nearest", skips="sum", convs=1, levels=4)
    pass_through(network)
    image = image_for(network, (9, 7, 6)).abs()
    mean = image.mean(dim=1, keepdim=True)

    def blocks(voxels: int) -> Tensor:
        means = F.avg_pool3d(trim(mean, (voxels - 1,) * 3), voxels)
        repeated = F.interpolate(means, scale_factor=float(voxels))
        return centre_crop(repeated, network.output_size(as_size(image.shape[2:])))

    with torch.no_grad():
        logits = network.deep_supervision(image)
    expected = blocks(8)
    for finer, ours in zip((4, 2, 1), logits[::-1], strict=True):
        expected = expected + blocks(finer)
        torch.testing.assert_close(ours, expected.expand_as(ours))


def test_a_valid_residual_unit_adds_the_centre() -> None:
    unit = ResidualUnit(
        2, 3, convs=2, kernel=(3, 5, 1), stride=(1, 1, 1), norm="none", activation="relu", padding="valid"
    )
    pass_through(unit)
    image = torch.rand(1, 2, 9, 12, 4)
    expected = 2 * image[:, :, 2:-2, 4:-4].mean(dim=1, keepdim=True)
    with torch.no_grad():
        torch.testing.assert_close(unit(image), expected.expand(1, 3, 5, 4, 4))


def test_max_unpooling_in_the_network_uses_the_positions_of_its_pooling() -> None:
    network = built(padding="valid", downsampling="max", upsampling="max_unpool", skips="none", convs=1, levels=2)
    pass_through(network)
    image = image_for(network, (8, 8, 8)).abs()
    mean = image.mean(dim=1, keepdim=True)[:, :, 1:-1, 1:-1, 1:-1]
    pooled, indices = F.max_pool3d(mean, 2, return_indices=True)
    kept = torch.zeros_like(pooled)
    kept[:, :, 1:-1, 1:-1, 1:-1] = pooled[:, :, 1:-1, 1:-1, 1:-1]  # the bottleneck's convolution loses the rest
    with torch.no_grad():
        logits = network(image)
    expected = centre_crop(F.max_unpool3d(kept, indices, 2), logits.shape[2:])
    torch.testing.assert_close(logits, expected.expand_as(logits))


def test_no_skips_means_none() -> None:
    network = built(skips="none")
    bottleneck, skips = network.encode(image_for(network, (16, 16, 16)))
    with torch.no_grad():
        with_them = network.decode(bottleneck, skips)[-1]
        assert torch.equal(with_them, network.decode(bottleneck, [torch.zeros_like(s) for s in skips])[-1])
        network = built(skips="sum")
        with_them = network.decode(bottleneck, skips)[-1]
        assert not torch.equal(with_them, network.decode(bottleneck, [torch.zeros_like(s) for s in skips])[-1])


def test_a_wider_bottleneck_takes_what_another_pathway_adds() -> None:
    design = Design(
        levels=Levels((4, 8, 16), ((3, 3, 3),) * 3, ((2, 2, 2),) * 2, (1, 1, 1)),
        norm="none",
        activation="relu",
        dropout=0.0,
        residual=False,
        skips="concat",
        downsampling="max",
        upsampling="transposed",
        padding="same",
        coarse_heads=True,
    )
    network = UNet(2, 3, design, bottleneck_width=20)
    bottleneck, skips = network.encode(torch.randn(1, 2, 8, 8, 8))
    context = torch.randn(1, 4, *bottleneck.shape[2:])
    assert network.decode(torch.cat([bottleneck, context], dim=1), skips)[-1].shape == (1, 4, 8, 8, 8)


@pytest.mark.parametrize("options", [{}, {"padding": "valid", "upsampling": "linear_conv", "downsampling": "max"}])
def test_planes_of_the_flat_axis_stay_apart(options: dict[str, Any]) -> None:
    network = unet(FLAT_TASK, **{"width": 4, "levels": 3, "norm": "none", **options})
    image = torch.randn(1, 2, *network.input_size((16, 8, 3)))
    assert image.shape[4] == 3
    with torch.no_grad():
        torch.testing.assert_close(network(image)[..., 1:2], network(image[..., 1:2]))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (TASK, {"upsampling": "max_unpool", "downsampling": "average"}, "downsampling: max, got downsampling: average"),
        (TASK, {"upsampling": "max_unpool"}, "downsampling: max, got downsampling: strided"),
        (TASK, {"widths": (4, 8, 16), "levels": 2}, "'levels': 2, 'widths': 3"),
        (TASK, {"convs": (2, 2), "strides": ((2, 2, 2), (2, 2, 2))}, "'strides': 3, 'convs': 2"),
        (TASK, {"kernels": ((3, 3, 3), (2, 2, 2))}, r"must be odd.*got \(2, 2, 2\)"),
        (FLAT_TASK, {"strides": ((2, 2, 2),)}, "must be 1 along axis 2"),
        (FLAT_TASK, {"kernels": ((3, 3, 3), (3, 3, 3))}, "must be 1 along axis 2"),
    ],
)
def test_options_that_contradict_one_another_are_named(task: NetworkTask, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network("unet", options, task)


@pytest.mark.parametrize("option", ["widths", "kernels", "strides", "convs"])
def test_levels_of_which_there_are_none_are_refused(option: str) -> None:
    problems = dict(check_options("unet", {option: []}))
    assert any(key.startswith(f"options.{option}") and "at least" in text for key, text in problems.items())


def test_given_widths_kernels_and_convs_are_taken() -> None:
    network = unet(TASK, widths=(4, 8, 6), kernels=((1, 3, 3), (3, 3, 3), (5, 3, 3)), convs=(1, 2, 3))
    convs = [[m for m in level.modules() if isinstance(m, nn.Conv3d)] for level in network.encoder]
    assert [len(level) for level in convs] == [1, 2, 3]
    assert [level[-1].out_channels for level in convs] == [4, 8, 6]
    assert [level[-1].kernel_size for level in convs] == [(1, 3, 3), (3, 3, 3), (5, 3, 3)]


def test_kernels_fit_given_strides() -> None:
    task = NetworkTask(1, 2, patch_size=(16, 16, 16), spacing_mm=(1.0, 1.0, 4.0))
    network = unet(task, width=2, strides=((2, 2, 1), (2, 2, 2)))
    kernels = [next(m for m in level.modules() if isinstance(m, nn.Conv3d)).kernel_size for level in network.encoder]
    assert kernels == [(3, 3, 1), (3, 3, 3), (3, 3, 3)]


def test_the_topology_of_a_flat_axis_leaves_it_alone() -> None:
    # 6 mm across the planes of 1 mm: the flat axis neither is pooled nor delays the others.
    kernels, strides = topology((64, 48, 1), (1.0, 1.0, 6.0), None, flat_axis=2)
    assert kernels == ((3, 3, 1),) * 5
    assert strides == ((2, 2, 1),) * 3 + ((2, 1, 1),)


@pytest.mark.parametrize("patch", [(40, 56, 40), (41, 55, 63)])
def test_a_valid_unet_keeps_its_depth_when_the_patch_is_rounded_up(patch: Size) -> None:
    def of(patch: Size) -> UNet:
        with torch.device("meta"):
            return unet(NetworkTask(1, 2, patch, (1.0, 1.0, 1.0)), width=2, padding="valid")

    rounded = of(patch).output_size(of(patch).input_size(patch))
    assert rounded != patch
    assert of(patch).stride == (8, 8, 8)
    assert of(rounded).output_size(of(rounded).input_size(rounded)) == rounded


@pytest.mark.parametrize("options", [{}, {"downsampling": "max", "residual": True, "norm": "batch"}])
def test_an_autoencoders_encoder_begins_a_unet(options: dict[str, Any]) -> None:
    denoiser = NetworkTask(2, 2, TASK.patch_size, TASK.spacing_mm)
    trained = build_network("autoencoder", {"width": 4, **options}, denoiser)
    network = build_network("unet", {"width": 4, **options}, TASK)
    of_encoder = {key: value for key, value in trained.state_dict().items() if key.startswith("encoder.")}
    missing, unexpected = network.load_state_dict(of_encoder, strict=False)
    assert unexpected == []
    assert not any(key.startswith("encoder.") for key in missing)
    assert trained(torch.randn(2, 2, 16, 24, 16)).shape == (2, 2, 16, 24, 16)
