"""What the machine can do, read from files like Linux' own; compiling held against what it is compiled from."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from pipeline.free_memory import _left_in_groups, available_bytes, resident_bytes
from pipeline.hardware import (
    compiled,
    compiled_to_train,
    is_out_of_memory,
    place_to_predict,
    threads_per_worker,
)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_every_control_group_around_the_process_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    write(own, "0::/job/step\n")
    write(tmp_path / "groups/job/memory.max", "5000")
    write(tmp_path / "groups/job/memory.current", "4000")
    write(tmp_path / "groups/job/memory.stat", "anon 3300\ninactive_file 700\nactive_file 1\n")
    write(tmp_path / "groups/job/step/memory.max", "max")
    write(tmp_path / "groups/job/step/memory.current", "100")
    write(tmp_path / "groups/job/step/memory.stat", "inactive_file 0\n")
    assert list(_left_in_groups(tmp_path / "groups", own)) == [1700]


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    own = tmp_path / "own"
    write(own, "9:cpu,cpuacct:/other\n4:memory:/job\n0::/\n")
    write(tmp_path / "groups/memory/job/memory.limit_in_bytes", "900")
    write(tmp_path / "groups/memory/job/memory.usage_in_bytes", "300")
    write(tmp_path / "groups/memory/job/memory.stat", "total_inactive_file 50\n")
    assert list(_left_in_groups(tmp_path / "groups", own)) == [650]


def test_no_control_groups_no_limit(tmp_path: Path) -> None:
    assert list(_left_in_groups(tmp_path, tmp_path / "missing")) == []
    assert 0 < available_bytes() <= psutil.virtual_memory().total
    assert 10 * 2**20 < resident_bytes() < psutil.virtual_memory().total


def test_workers_share_the_cores() -> None:
    cores = threads_per_worker(1)
    assert cores >= 1
    assert threads_per_worker(2) == max(1, cores // 2)
    assert threads_per_worker(10_000) == 1


@pytest.mark.parametrize(("norm", "is_channels_last"), [(nn.BatchNorm3d, True), (nn.InstanceNorm3d, False)])
def test_a_network_predicts_channels_last_unless_an_instance_norm_takes_that_back(
    norm: type[nn.Module], is_channels_last: bool
) -> None:
    network = nn.Sequential(nn.Conv3d(2, 3, 3), norm(3)).eval()
    image = torch.randn(1, 2, 5, 6, 7)
    before = network(image)
    place_to_predict(network, torch.device("cpu"))
    weight = next(network.parameters())
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) == is_channels_last
    torch.testing.assert_close(network(image), before)


def test_running_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**52)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    for words in ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory"):
        assert is_out_of_memory(RuntimeError(words))
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not is_out_of_memory(other.value)


class Different(nn.Module):
    """Gives other numbers once it is compiled."""

    def forward(self, image: Tensor) -> Tensor:
        return image + 1 if torch.compiler.is_compiling() else image


class Refusing(nn.Module):
    """Cannot be compiled."""

    def forward(self, image: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise ValueError("not in here")
        return image


@pytest.mark.parametrize(("network", "why"), [(Different(), "logits differ"), (Refusing(), "without compiling")])
def test_a_compiled_network_that_does_not_hold_up_is_given_up(
    network: nn.Module, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert compiled(network, torch.zeros(1, 1, 8, 8, 8), torch.float32, backend="eager") is network
    assert why in caplog.text
    assert len(caplog.records) == 1


class Objective(nn.Module):
    """A norm that counts batches, dropout, and a loss, which may be another one once it is compiled."""

    def __init__(self, compiled_adds: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.Dropout3d(0.5))
        self.compiled_adds = compiled_adds

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        loss = (self.layers(image) - target).square().mean()
        return loss + self.compiled_adds if torch.compiler.is_compiling() else loss  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("compiled_adds", "backend", "why"),
    [(0.0, "eager", ""), (1.0, "eager", "the loss of a batch is"), (0.0, "none", "training without compiling")],
)
def test_a_compiled_objective_holds_up_or_is_given_up_and_nothing_is_counted(
    compiled_adds: float, backend: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    objective = Objective(compiled_adds).eval()
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    batch = (torch.randn(2, 1, 4, 4, 4), torch.ones(2, 2, 4, 4, 4))
    with caplog.at_level(logging.WARNING):
        called = compiled_to_train(objective, batch, torch.float32, backend)
    assert (called is objective) == bool(why)
    assert why in caplog.text
    assert len(caplog.records) == bool(why)
    assert not objective.training
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in objective.state_dict().items())
    called(*batch).backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


THIN = """
import torch
from torch import nn
from pipeline.hardware import autocast
torch.manual_seed(0)
cases = [(3, 1, (2, 4, 4)), (3, 1, (2, 2, 2)), (3, 2, (4, 2, 2)), (5, 1, (3, 4, 4)), (3, 1, (8, 4, 4))]
for kernel, stride, shape in cases:
    convolution = nn.Conv3d(16, 16, kernel, stride, kernel // 2)
    image = torch.randn(2, 16, *shape)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        convolution.zero_grad()
        with autocast(torch.device("cpu"), dtype):
            logits = convolution(image)
        torch.manual_seed(1)
        logits.backward(torch.randn_like(logits, dtype=torch.float32).to(logits.dtype))
        gradients.append(convolution.weight.grad.clone())
    print(((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item())
"""


def test_gradients_of_thin_volumes_hold_nothing_that_lay_in_memory() -> None:
    # glibc fills what it hands out with large numbers: a gradient that is not written would show them.
    environment = {**os.environ, "MALLOC_PERTURB_": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run([sys.executable, "-c", THIN], env=environment, capture_output=True, text=True, check=True)
    errors = [float(line) for line in answer.stdout.split()]
    assert len(errors) == 5
    assert max(errors) < 0.02
