"""What a network sees, costs and keeps: by hand for small ones, by gradient for every network of the table."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from network_variants import ALL, FLAT_TASK, TASK, VARIANTS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.networks import Network, NetworkTask, build_network
from pipeline.networks.contract import Size, as_size
from pipeline.networks.description import describe
from pipeline.networks.reach import ReachMode

ONE_CHANNEL = NetworkTask(1, 2, patch_size=(16, 16, 16), spacing_mm=(1.0, 1.0, 3.0))


class Layers(Network):
    """Layers in a row."""

    def __init__(self, *layers: nn.Module, stride: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.stride = (stride, stride, stride)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.layers(image)
        return logits


class Calls(Network):
    """A function of the image."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, image: Tensor) -> Tensor:
        return self.function(image)


def field(network: Network) -> tuple[tuple[int, int] | None, ...]:
    return describe(network, ONE_CHANNEL).field_voxels


def test_fields_worked_out_by_hand() -> None:
    def conv(kernel: int, **options: Any) -> nn.Module:
        return nn.Conv3d(1, 1, kernel, **options)

    assert field(Layers(conv(3, padding=1), conv(3, padding=1))) == ((5, 5),) * 3
    assert field(Layers(conv(3, padding=2, dilation=2))) == ((5, 5),) * 3
    # Along X a kernel of 5, along Y of 3, along Z of 1.
    assert field(Layers(nn.Conv3d(1, 1, (5, 3, 1), padding=(2, 1, 0)))) == ((5, 5), (3, 3), (1, 1))
    # Of 3 voxels one is left out of four; two of them after the pooling: 2 + 2 * 2 voxels of the input, and back.
    assert field(Layers(nn.MaxPool3d(2), conv(3, padding=1), nn.Upsample(scale_factor=2), stride=2)) == ((6, 6),) * 3
    # A kernel of 2 at a stride of 2 gives each voxel to one block; of 3, every second voxel is of two blocks.
    down, padded = nn.AvgPool3d(2), {"stride": 2, "padding": 1, "output_padding": 1}
    assert field(Layers(down, nn.ConvTranspose3d(1, 1, 2, stride=2), stride=2)) == ((2, 2),) * 3
    assert field(Layers(down, nn.ConvTranspose3d(1, 1, 3, **padded), stride=2)) == ((2, 4),) * 3
    # Linear upsampling by 2 is of two voxels, by 3 the middle one is met exactly.
    linear = {"mode": "trilinear", "align_corners": False}
    assert field(Layers(nn.AvgPool3d(2), nn.Upsample(scale_factor=2, **linear), stride=2)) == ((4, 4),) * 3
    assert field(Layers(nn.AvgPool3d(3), nn.Upsample(scale_factor=3, **linear), stride=3)) == ((3, 6),) * 3


def test_what_is_not_known_counts_as_seeing_everything_and_is_named() -> None:
    description = describe(Calls(lambda image: image.cumsum(dim=2)), ONE_CHANNEL)
    assert description.field_voxels == (None, None, None)
    assert description.unknown == ("aten.cumsum",)


def test_what_is_written_into_a_part_is_not_lost() -> None:
    def shifted(image: Tensor) -> Tensor:
        moved = torch.zeros_like(image)
        moved[:, :, 4:] = image[:, :, :-4]
        return moved

    # Where in the whole it was written is not followed: each voxel counts as seeing all of it, all but the last four.
    assert field(Calls(shifted)) == ((1020, 1020), None, None)
    # The same by operations that are followed: each voxel sees the one four before it.
    assert field(Calls(lambda image: F.pad(image, (0, 0, 0, 0, 4, 0))[:, :, :-4] + image)) == ((5, 5), (1, 1), (1, 1))


def test_millimetres_are_voxels_times_spacing() -> None:
    assert describe(Layers(nn.Conv3d(1, 1, 3, padding=1)), ONE_CHANNEL).field_mm == (3.0, 3.0, 9.0)


def test_costs_of_two_convolutions_worked_out_by_hand() -> None:
    network = Layers(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv3d(4, 2, 1))
    description = describe(network, ONE_CHANNEL)
    voxels = 16**3
    assert description.parameters == (27 + 1) * 4 + (4 + 1) * 2
    assert description.multiply_adds == voxels * (27 * 4 + 4 * 2)
    # Kept for the gradient: the image and the activated features. At once: those and the logits.
    assert description.training_bytes == voxels * (1 + 4) * 4
    assert description.inference_bytes == voxels * (1 + 4 + 2) * 4
    assert [layer.kind for layer in description.layers] == ["convolution 3x3x3", "convolution 1x1x1"]
    assert [layer.parameters for layer in description.layers] == [112, 10]
    assert description.levels == ((0, 1),)


def test_levels_are_told_apart_by_resolution() -> None:
    options = {"width": 4, "levels": 3, "padding": "valid"}
    description = describe(build_network("unet", options, TASK), TASK)
    assert description.scales == ((1, 1, 1), (2, 2, 2), (4, 4, 4))
    kinds = [{description.layers[i].kind for i in level} for level in description.levels]
    assert all("convolution 3x3x3" in kind for kind in kinds)
    assert sum(map(len, description.levels)) == len(description.layers)


@pytest.mark.parametrize("name", ["unet", "mednext", "swin_unetr", "multiscale_pathways"])
def test_multiply_adds_are_half_of_torchs_own_count(name: str) -> None:
    network = build_network(name, VARIANTS[name][0], TASK)
    image = torch.zeros(1, 2, *network.input_size(TASK.patch_size))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(image)
    assert 2 * describe(network, TASK).multiply_adds == counter.get_total_flops()


def test_legal_sizes() -> None:
    padded = describe(build_network("unet", {"width": 4, "norm": "none"}, TASK), TASK)
    assert padded.smallest_input == padded.stride
    assert not padded.one_size
    fixed = describe(build_network("unetr", VARIANTS["unetr"][0], TASK), TASK)
    assert fixed.smallest_input == fixed.input_size == (16, 32, 16)
    assert fixed.one_size
    assert fixed.field_voxels == (None, None, None)
    # A norm of one voxel is nothing, and the network says so: the smallest is the first that runs.
    swin = describe(build_network("swin_unetr", VARIANTS["swin_unetr"][0], TASK), TASK)
    assert swin.smallest_input == (64, 32, 32)


@pytest.mark.parametrize(("name", "options"), ALL, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("task", [TASK, FLAT_TASK], ids=["3-D", "2-D"])
def test_reach_is_where_the_gradient_is(
    name: str, options: dict[str, Any], task: NetworkTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        network = all_positive(build_network(name, options, task))
    except ValueError as error:
        assert "2-D" in str(error)
        return
    size = network.input_size((16, 1, 3 if task.flat_axis == 2 else 1)) if name != "unetr" else network.size
    image = torch.rand(1, 2, *size, dtype=torch.float64, requires_grad=True)
    with torch.no_grad(), ReachMode(image) as mode:
        reach = mode.of(network(image))
    monkeypatch.setattr(F, "max_pool3d", mean_pool)
    monkeypatch.setattr(F, "max_pool2d", mean_pool)
    logits = network(image)
    assert mode.unknown == set()
    assert reach is not None
    # Attention counts as seeing everything; a voxel that is unpooled, or stands among nails, as filling its block.
    exact = not mode.has_attention and options.get("upsampling") not in ("max_unpool", "bed_of_nails")
    for place in places(network, as_size(logits.shape[2:])):
        (gradient,) = torch.autograd.grad(logits[(0, slice(None), *place)].sum(), image, retain_graph=True)
        for axis in range(3):
            seen = gradient[0].abs().sum([0, *(d for d in (1, 2, 3) if d != axis + 1)]).nonzero()[:, 0]
            first, last = (
                bound.broadcast_to(logits.shape)[(0, slice(None), *place)] for bound in reach[2 * axis : 2 * axis + 2]
            )
            low, high = int(first.min()), -int(last.min())
            if exact:
                assert (int(seen.min()), int(seen.max())) == (low, high)
            else:
                assert low <= int(seen.min()) <= int(seen.max()) <= high


def places(network: Network, size: Size) -> list[Size]:
    """Return two output voxels in the middle, at different places of a stride's block."""
    centre = as_size(n // 2 for n in size)
    return [centre, as_size(min(c + 1, n - 1) for c, n in zip(centre, size, strict=True))]


def all_positive(network: Network) -> Network:
    """Give a network weights of one sign, so that no two ways cancel, and take the norms' statistics out."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.instancenorm._InstanceNorm | nn.GroupNorm):
                setattr(module, name, nn.Identity())
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.uniform_(0.5, 1.0)
            if weight.ndim > 1:
                weight.div_(weight[0].numel())
    return network.double().eval()


def mean_pool(
    features: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """Average where a network pools the largest: then every voxel of a block has a gradient."""
    dims = features.ndim - 2
    kernel = (kernel_size,) * dims if isinstance(kernel_size, int) else tuple(kernel_size)
    weight = features.new_ones(features.shape[1], 1, *kernel)
    convolve = F.conv3d if dims == 3 else F.conv2d
    groups = features.shape[1]
    return convolve(features, weight, None, stride or kernel, padding, dilation, groups) / weight[0].numel()
