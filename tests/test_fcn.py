"""Scores of an FCN worked out by hand: what is added, what is enlarged and how, what a stride of 1 sees."""

import pytest
import torch
from network_variants import FLAT_TASK, TASK
from torch import Tensor, nn
from torch.nn import functional

from pipeline.networks import NetworkTask, build_network, check_options
from pipeline.networks.fcn import FCN, fcn, simple_fcn


def random_image(*shape: int) -> Tensor:
    return torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(0))


def build(**options: object) -> FCN:
    torch.manual_seed(0)
    return fcn(TASK, **{"width": 4, "max_width": 8, **options}).eval()  # type: ignore[arg-type]


def count(network: nn.Module) -> int:
    return sum(weights.numel() for weights in network.parameters())


def test_simple_fcn_in_2d_has_its_113877_parameters() -> None:
    task = NetworkTask(3, 21, patch_size=(64, 64, 1), spacing_mm=(1.0, 1.0, 1.0), flat_axis=2)
    assert count(simple_fcn(task)) == 113_877


@pytest.mark.parametrize(("stride", "skips"), [(32, 0), (16, 1), (8, 2), (4, 3)])
def test_stride_says_how_many_skips(stride: int, skips: int) -> None:
    network = build(stride=stride)
    assert network.stride == (32, 32, 32)
    assert len(network.skips) == skips
    with torch.no_grad():
        logits, *coarser = network.deep_supervision(random_image(64, 32, 32))
    assert logits.shape == (1, 3, 64, 32, 32)
    assert [scores.shape[2] for scores in coarser] == [64 // s for s in (4, 8, 16, 32) if s >= stride]


def test_the_papers_widths() -> None:
    with torch.device("meta"):
        network = fcn(TASK, width=64, max_width=512, head_width=4096, head_kernel=7, norm="none", dropout=0.5)
    kernels = [layer for layer in network.modules() if isinstance(layer, nn.Conv3d)]
    assert [layer.out_channels for layer in kernels[1:10:2]] == [64, 128, 256, 512, 512]
    assert [(layer.out_channels, layer.kernel_size[0]) for layer in kernels[10:13]] == [(4096, 7), (4096, 1), (3, 1)]


def test_skips_are_added() -> None:
    network = build(stages=3, stride=4)
    image = random_image(8, 16, 8)
    with torch.no_grad():
        fine = network.encoder[1](network.encoder[0](image))
        coarse = network.head(network.encoder[2](fine))
        expected = network.enlargements[0](coarse) + network.skips[0](fine)
        _, fused, deepest = network.deep_supervision(image)
        assert torch.equal(deepest, coarse)
        torch.testing.assert_close(fused, expected)
        assert (fused - network.enlargements[0](coarse)).abs().max() > 1e-3


def test_scores_by_hand() -> None:
    network = build(stages=3, stride=4, upsampling="nearest")
    with torch.no_grad():
        for scores, biases in ((network.head[-1], [5.0, 0.0, -1.0]), (network.skips[0], [2.0, 1.0, 1.0])):  # type: ignore[index]
            scores.weight.zero_()
            scores.bias.copy_(torch.tensor(biases))
        logits = network(random_image(8, 8, 8))
    assert logits.amin((0, 2, 3, 4)).tolist() == logits.amax((0, 2, 3, 4)).tolist() == [7.0, 1.0, 0.0]


@pytest.mark.parametrize("task", [TASK, FLAT_TASK])
def test_upsampling_begins_as_linear_interpolation_away_from_the_border(task: NetworkTask) -> None:
    torch.manual_seed(0)
    network = fcn(task, width=4, stages=3, stride=4).eval()
    image = random_image(32, 24, 40 if task.flat_axis is None else 3)
    with torch.no_grad():
        logits, fused, coarse = network.deep_supervision(image)
        expected = functional.interpolate(fused, logits.shape[2:], mode="trilinear")
        inside = (slice(None), slice(None), slice(2, -2), slice(2, -2), slice(2, -2) if task is TASK else slice(None))
        torch.testing.assert_close(logits[inside], expected[inside], atol=1e-5, rtol=1e-5)
        assert expected[inside].std() > 1e-3
    doubled = network.enlargements[0](coarse)
    expected = functional.interpolate(coarse, doubled.shape[2:], mode="trilinear")
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1), slice(1, -1) if task is TASK else slice(None))
    torch.testing.assert_close(doubled[inside], expected[inside], atol=1e-5, rtol=1e-5)


def test_a_stride_of_one_keeps_the_size_and_sees_little() -> None:
    network = build(stages=2, convs=2, stride=1, norm="none").double()
    assert network.stride == (1, 1, 1)
    assert not any(isinstance(layer, nn.MaxPool3d) for layer in network.modules())
    assert {layer.out_channels for layer in network.encoder.modules() if isinstance(layer, nn.Conv3d)} == {4}
    image = random_image(17, 15, 13).double().requires_grad_()
    logits = network(image)
    assert logits.shape == (1, 3, 17, 15, 13)
    assert len(network.deep_supervision(image)) == 1
    logits[0, :, 8, 7, 6].sum().backward()
    assert image.grad is not None
    touched = image.grad[0].abs().sum(0).nonzero()
    # Five kernels of 3, that of the head among them: 11 voxels.
    assert (touched.amin(0).tolist(), touched.amax(0).tolist()) == ([3, 2, 1], [13, 12, 11])


def test_every_upsampling_makes_the_images_size() -> None:
    for mode in ("nearest", "linear", "cubic", "transposed", "nearest_conv", "linear_conv", "pixel_shuffle"):
        network = build(stages=3, stride=8, upsampling=mode)
        with torch.no_grad():
            assert network(random_image(8, 16, 8)).shape == (1, 3, 8, 16, 8)


def test_too_few_stages_and_upsampling_with_holes_are_refused() -> None:
    with pytest.raises(ValueError, match="stride: 16 needs 4 stages, got stages: 3"):
        build_network("fcn", {"stages": 3, "stride": 16}, TASK)
    for mode in ("max_unpool", "bed_of_nails"):
        ((key, message),) = check_options("fcn", {"upsampling": mode})
        assert key == "options.upsampling"
        assert "transposed" in message
