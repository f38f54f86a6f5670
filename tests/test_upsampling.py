"""Ways up: by hand, by the matrix of the convolution they transpose, and against torch where torch has them."""

from itertools import product
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.networks.contract import Size
from pipeline.networks.upsampling import (
    MaxUnpool,
    PixelShuffle,
    UpsamplingMode,
    border,
    from_blocks,
    into_blocks,
    linear_transposed,
    positions_of_largest,
    upsampling,
)

MODES: tuple[UpsamplingMode, ...] = get_args(UpsamplingMode)
PLAIN = [mode for mode in MODES if mode != "max_unpool"]


def along_x(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1, 1, 1)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("mode", "factor", "expected"),
    [
        ("nearest", 2, [1, 1, 3, 3]),
        ("nearest", 3, [1, 1, 1, 3, 3, 3]),
        ("bed_of_nails", 2, [1, 0, 3, 0]),
        ("bed_of_nails", 3, [1, 0, 0, 3, 0, 0]),
        ("linear", 2, [1, 1.5, 2.5, 3]),
        ("linear", 3, [1, 1, 5 / 3, 7 / 3, 3, 3]),
    ],
)
def test_worked_out_by_hand(mode: UpsamplingMode, factor: int, expected: list[float]) -> None:
    larger = upsampling(mode, 1, 1, (factor, 1, 1))(along_x(1, 3))
    torch.testing.assert_close(larger, along_x(*expected))


def test_cubic_spreads_a_voxel_by_keys_weights() -> None:
    # Keys' kernel with a = -0.75 at distances 1.75, 1.25, 0.75 and 0.25 of the voxel.
    side = [-0.03515625, -0.10546875, 0.26171875, 0.87890625]
    larger = upsampling("cubic", 1, 1, (2, 1, 1))(along_x(0, 0, 0, 1, 0, 0, 0))
    torch.testing.assert_close(larger, along_x(0, 0, 0, *side, *side[::-1], 0, 0, 0))


@pytest.mark.parametrize("factor", [(2, 2), (3, 1), (4, 5)])
def test_cubic_is_torchs_bicubic_in_a_plane(factor: tuple[int, int]) -> None:
    plane = random(2, 3, 5, 4)
    expected = F.interpolate(plane, scale_factor=(float(factor[0]), float(factor[1])), mode="bicubic")
    torch.testing.assert_close(upsampling("cubic", 3, 3, (*factor, 1))(plane[..., None])[..., 0], expected)


def test_bed_of_nails_puts_a_voxel_first_in_its_block() -> None:
    features = random(1, 1, 2, 2, 2)
    larger = upsampling("bed_of_nails", 1, 1, (2, 1, 3))(features)
    assert torch.equal(larger[:, :, ::2, :, ::3], features)
    assert larger.count_nonzero() == features.numel()


def convolution_matrix(kernel: Tensor, size: tuple[int, ...], stride: int) -> Tensor:
    """The valid convolution of `size` voxels as a matrix: a row for each output, a column for each input."""
    outputs = [(n - k) // stride + 1 for n, k in zip(size, kernel.shape, strict=True)]
    matrix = torch.zeros(*outputs, *size)
    for place in product(*map(range, outputs)):
        for offset in product(*map(range, kernel.shape)):
            matrix[(*place, *(stride * p + o for p, o in zip(place, offset, strict=True)))] = kernel[offset]
    return matrix.flatten(len(outputs)).flatten(0, len(outputs) - 1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("size", "kernel"), [((9,), (3,)), ((5, 7, 5), (3, 3, 3))])
def test_a_transposed_convolution_multiplies_by_the_transposed_matrix(
    size: tuple[int, ...], kernel: tuple[int, ...], stride: int
) -> None:
    weight = random(*kernel)
    matrix = convolution_matrix(weight, size, stride)
    conv, transposed = (F.conv1d, F.conv_transpose1d) if len(size) == 1 else (F.conv3d, F.conv_transpose3d)
    image = random(1, 1, *size)
    features = conv(image, weight[None, None], stride=stride)
    torch.testing.assert_close(features.flatten(), matrix @ image.flatten())
    back = transposed(features, weight[None, None], stride=stride)
    torch.testing.assert_close(back.flatten(), matrix.T @ features.flatten())


def test_the_transposed_layer_multiplies_by_the_transposed_matrix() -> None:
    layer = upsampling("transposed", 1, 1, (2, 2, 2))
    features = random(1, 1, 2, 3, 2)
    matrix = convolution_matrix(layer.weight[0, 0], (4, 6, 4), 2)
    torch.testing.assert_close(layer(features).flatten(), matrix.T @ features.flatten() + layer.bias)


def test_a_transposed_convolution_of_stride_2_convolves_the_bed_of_nails() -> None:
    features, weight = random(1, 1, 3, 4, 2), random(1, 1, 3, 3, 3)
    nails = upsampling("bed_of_nails", 1, 1, (2, 2, 2))(features)[:, :, :-1, :-1, :-1]
    expected = F.conv_transpose3d(features, weight, stride=2)
    torch.testing.assert_close(F.conv3d(nails, weight.flip(2, 3, 4), padding=2), expected)


def test_max_unpooling_restores_the_remembered_positions() -> None:
    image = torch.tensor([[1.0, 9.0, 2.0, 3.0], [4.0, 5.0, 8.0, 6.0]]).reshape(1, 1, 2, 4, 1)
    pooled = F.max_pool3d(image, (2, 2, 1))
    restored = MaxUnpool(1, 1, (2, 2, 1))(pooled, positions_of_largest(image, (2, 2, 1)))
    assert restored[0, 0, :, :, 0].tolist() == [[0, 9, 0, 0], [0, 0, 8, 0]]


@pytest.mark.parametrize("factor", [(2, 2, 2), (3, 1, 2)])
def test_max_unpooling_is_torchs(factor: Size) -> None:
    image = random(2, 3, 6, 4, 4)
    pooled, indices = F.max_pool3d(image, factor, return_indices=True)
    restored = MaxUnpool(3, 3, factor)(pooled, positions_of_largest(image, factor))
    assert torch.equal(restored, F.max_unpool3d(pooled, indices, factor))


def test_blocks_come_apart_and_together() -> None:
    image = random(2, 3, 6, 4, 5)
    blocks = into_blocks(image, (3, 2, 1))
    assert blocks.shape == (2, 3, 6, 2, 2, 5)
    assert torch.equal(blocks[:, :, 3, 1, 0, 2], image[:, :, 4, 1, 2])
    assert torch.equal(from_blocks(blocks, (3, 2, 1)), image)


def test_pixel_shuffle_is_torchs_in_a_plane() -> None:
    layer = PixelShuffle(3, 2, (2, 2, 1))
    torch.nn.init.normal_(layer.conv.weight, generator=torch.Generator().manual_seed(0))
    features = random(1, 3, 4, 5, 1)
    torch.testing.assert_close(layer(features)[..., 0], F.pixel_shuffle(layer.conv(features)[..., 0], 2))


def test_pixel_shuffle_begins_without_a_chessboard() -> None:
    larger = PixelShuffle(3, 2, (2, 1, 3))(random(1, 3, 4, 5, 2))
    assert larger.std() > 0.1
    blocks = into_blocks(larger, (2, 1, 3))
    torch.testing.assert_close(blocks, blocks[:, :, :1].expand_as(blocks))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [(2, 2, 2), (1, 2, 3), (1, 1, 1)])
def test_every_mode_gives_its_size_and_channels(mode: UpsamplingMode, factor: Size) -> None:
    layer = upsampling(mode, 3, 2, factor)
    positions = [torch.zeros(1, 2, 4, 3, 5, dtype=torch.int64)] if mode == "max_unpool" else []
    assert layer(random(1, 3, 4, 3, 5), *positions).shape == (1, 2, 4 * factor[0], 3 * factor[1], 5 * factor[2])


@pytest.mark.parametrize("mode", PLAIN)
def test_planes_of_an_axis_that_does_not_grow_stay_apart(mode: UpsamplingMode) -> None:
    layer = upsampling(mode, 2, 2, (2, 2, 1))
    features = random(1, 2, 4, 4, 3)
    torch.testing.assert_close(layer(features)[..., 1:2], layer(features[..., 1:2]))


@pytest.mark.parametrize("mode", PLAIN)
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_the_border_is_what_depends_on_more_than_the_input_and_no_more(mode: UpsamplingMode, factor: int) -> None:
    layer = upsampling(mode, 2, 2, (factor, 1, 1))
    features = random(1, 2, 12, 1, 1)
    lost = border(mode, (factor, 1, 1))[0]
    whole, part = layer(features)[:, :, 3 * factor : -3 * factor], layer(features[:, :, 3:-3])
    for side in (lambda t: t, lambda t: t.flip(2)):
        differs = ~torch.isclose(side(whole), side(part), atol=1e-6).all(dim=1).flatten()
        assert not differs[lost : 3 * factor].any()
        assert lost == 0 or differs[lost - 1]


@pytest.mark.parametrize("factor", [(2, 2, 2), (3, 1, 4)])
def test_a_transposed_convolution_begins_as_linear_interpolation(factor: Size) -> None:
    features = random(1, 2, 6, 6, 6)
    layer = linear_transposed(2, factor)
    assert layer.kernel_size == tuple(2 * f - f % 2 for f in factor)
    expected = F.interpolate(features, scale_factor=[float(f) for f in factor], mode="trilinear")
    inside = (..., *(slice(f // 2, 6 * f - f // 2) for f in factor))
    torch.testing.assert_close(layer(features)[inside], expected[inside])
    assert layer(features).shape == expected.shape
