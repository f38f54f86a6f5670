"""What every network of the table promises, one function a promise; `test_networks.py` runs them over all variants."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from network_variants import FLAT_TASK, TASK
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from pipeline.inference.windows.streaming import Windowing, stream_logits
from pipeline.networks import Network, NetworkTask, build_network
from pipeline.networks.contract import Size, as_size

# Norms that see more than their own voxel, in eval too.
STATISTICS = (nn.InstanceNorm3d, nn.GroupNorm)


@dataclass(frozen=True)
class Case:
    """One variant of a network, built and run once for all the promises."""

    name: str
    options: dict[str, Any]

    def build(self, task: NetworkTask = TASK) -> Network:
        torch.manual_seed(0)
        return with_statistics(build_network(self.name, self.options, task)).eval()

    @cached_property
    def network(self) -> Network:
        return self.build()

    @cached_property
    def images(self) -> Tensor:
        return noise(self.network.input_size(TASK.patch_size), samples=2)

    @cached_property
    def logits(self) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.network(self.images)
        return logits


def with_statistics(network: Network) -> Network:
    """Give batch norms other statistics than 0 and 1, as if they had been trained."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return network


def noise(size: Size, samples: int = 1) -> Tensor:
    return torch.randn(samples, TASK.in_channels, *size, generator=torch.Generator().manual_seed(1))


def output_is_the_input_less_the_margins(case: Case) -> None:
    network = case.network
    assert case.logits.shape == (2, TASK.num_classes, *network.output_size(as_size(case.images.shape[2:])))
    wanted = (17, 9, 30)
    if is_refused(network, wanted):
        return
    size = network.input_size(wanted)
    output = network.output_size(size)
    assert output == tuple(n - 2 * m for n, m in zip(size, network.margin, strict=True))
    assert all(have >= want for have, want in zip(output, wanted, strict=True))
    assert network.input_size(output) == size
    with torch.no_grad():
        assert network(noise(size)).shape[2:] == output


def is_refused(network: Network, wanted: Size) -> bool:
    """Only a network of one size may refuse a window, and only one that does not fit in that."""
    try:
        network.input_size(wanted)
    except ValueError:
        only = network.input_size((1, 1, 1))
        assert only == network.input_size(TASK.patch_size)
        assert any(want > have for want, have in zip(wanted, network.output_size(only), strict=True))
        return True
    return False


def legal_sizes_are_a_stride_apart(case: Case) -> None:
    network = case.network
    size = network.input_size(TASK.patch_size)
    larger = as_size(n + 1 for n in network.output_size(size))
    if not is_refused(network, larger):
        assert network.input_size(larger) == tuple(n + s for n, s in zip(size, network.stride, strict=True))


def training_gives_the_same_shapes_and_a_gradient_to_every_parameter(case: Case) -> None:
    network = copy.deepcopy(case.network).train()
    first, *coarser = network.deep_supervision(case.images)
    assert first.shape == case.logits.shape
    assert bool(coarser) == network.coarse_logits
    torch.stack([logits.square().mean() for logits in (first, *coarser)]).sum().backward()
    still = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def other_samples_of_the_batch_do_not_matter(case: Case) -> None:
    with torch.no_grad():
        alone = case.network(case.images[1:])
    torch.testing.assert_close(case.logits[1:], alone, atol=1e-4, rtol=1e-4)


def weights_come_back_from_a_file(case: Case) -> None:
    torch.manual_seed(1)
    other = build_network(case.name, case.options, TASK).eval()
    with TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "weights.safetensors"
        save_model(case.network, str(path))
        assert not torch.equal(other(case.images), case.logits)
        load_model(other, path)
        assert torch.equal(other(case.images), case.logits)


def bf16_is_finite(case: Case) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.network(case.images[:1]).isfinite().all()


def deep_supervision_begins_with_the_logits(case: Case) -> None:
    with torch.no_grad():
        first, *coarser = case.network.deep_supervision(case.images)
    assert torch.equal(first, case.logits)
    sizes = [logits.shape[2] for logits in (first, *coarser)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(logits.shape[1] == TASK.num_classes for logits in coarser)


def planes_of_a_flat_axis_stand_alone(case: Case) -> None:
    try:
        network = case.build(FLAT_TASK)
    except ValueError as error:
        assert "2-D" in str(error)
        return
    assert network.margin[2] == 0
    assert network.stride[2] == 1
    x, y, planes = network.input_size((*FLAT_TASK.patch_size[:2], 3))
    assert planes == 3
    image = noise((x, y, planes))
    other = image.clone()
    other[..., 1] *= 3
    with torch.no_grad():
        logits, changed = network(image), network(other)
    assert logits.shape[2:] == network.output_size((x, y, planes))
    assert not torch.equal(changed[..., 1], logits[..., 1])
    if not any(isinstance(module, STATISTICS) for module in network.modules()):
        torch.testing.assert_close(changed[..., ::2], logits[..., ::2], atol=1e-5, rtol=1e-5)


def tiles_equal_the_whole_volume(case: Case) -> None:
    network = case.network
    if not any(network.margin) or any(isinstance(module, STATISTICS) for module in network.modules()):
        return
    window = network.output_size(network.input_size(network.stride))
    volume = as_size(n + s + 1 for n, s in zip(window, network.stride, strict=True))
    image = noise(volume)[0]
    # Zeros beyond the volume: the margin before it, behind it what makes the size legal; last axis first.
    axes = list(zip(volume, network.input_size(volume), network.margin, strict=True))[::-1]
    padding = [n for size, full, margin in axes for n in (margin, full - size - margin)]
    x, y, z = volume
    with torch.no_grad():
        whole = network(F.pad(image[None], padding))
    stream = stream_logits([network], image, Windowing(window), batch=1, dtype=torch.float32)
    tiled = torch.cat([planes.logits for planes in stream], dim=1).movedim(1, stream.axis + 1)
    assert stream.tiling.count > 1
    assert (tiled - whole[0, :, :x, :y, :z]).abs().max() < 1e-4


CHECKS = (
    output_is_the_input_less_the_margins,
    legal_sizes_are_a_stride_apart,
    training_gives_the_same_shapes_and_a_gradient_to_every_parameter,
    other_samples_of_the_batch_do_not_matter,
    weights_come_back_from_a_file,
    bf16_is_finite,
    deep_supervision_begins_with_the_logits,
    planes_of_a_flat_axis_stand_alone,
    tiles_equal_the_whole_volume,
)

__all__ = ["CHECKS", "Case", "noise", "with_statistics"]
