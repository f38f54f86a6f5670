"""Several processes that train together: they learn what one would, and say what is wrong. They talk by gloo on the
loopback interface.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_program import STEPS, TRAININGS, told, training
from safetensors.torch import load_file
from torch import nn

from pipeline.training.batch_norm import PooledBatchNorm, pool_batch_norms, pools_statistics
from pipeline.training.distributed import Share

PROGRAM = Path(__file__).with_name("distributed_program.py")
PROCESSES = 2


def started(folder: Path, rank: int, port: int, *what: str) -> subprocess.Popen[str]:
    """Start one of the processes, as a launcher would."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1"}
    environment = {**launched, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), *what],
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        stderr=subprocess.PIPE,
        text=True,
    )


def said_by_all(folder: Path, *what: str) -> list[str]:
    """Run the processes, and return what each has said at its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [started(folder, rank, port, *what) for rank in range(PROCESSES)]
    try:
        return [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What two processes have written, and what each has said at its end."""
    folder = tmp_path_factory.mktemp("together")
    said = said_by_all(folder)
    assert (folder / "0.json").exists(), said
    return folder, said


def result(ended: tuple[Path, list[str]], rank: int, name: str) -> Any:
    return json.loads((ended[0] / f"{rank}.json").read_text())[name]


def learned(ended: tuple[Path, list[str]], rank: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(ended[0] / f"{name}_{rank}.safetensors")


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    """The same trainings in one process, on one thread: a sum over threads has an order of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: training(**options) for name, options in TRAININGS.items()}  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["instance", "accumulated", "pooled"])
def test_two_processes_have_the_losses_and_weights_of_one(ended: Any, alone: Any, name: str) -> None:
    losses, weights = alone[name]
    assert losses[-1] < losses[0] - 0.05
    assert len(losses) == STEPS
    assert result(ended, 0, name) == pytest.approx(losses, abs=1e-5)
    for key, tensor in learned(ended, 0, name).items():
        torch.testing.assert_close(tensor, weights[key], rtol=1e-3, atol=1e-5)


def test_batch_norm_of_each_process_alone_is_another_training(ended: Any, alone: Any) -> None:
    losses, _ = alone["batch"]
    assert max(abs(a - b) for a, b in zip(result(ended, 0, "batch"), losses, strict=True)) > 0.01


@pytest.mark.parametrize("name", TRAININGS)
def test_all_processes_hold_the_same_network(ended: Any, name: str) -> None:
    first, second = (learned(ended, rank, name) for rank in range(PROCESSES))
    assert result(ended, 0, name) == result(ended, 1, name)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_what_processes_tell_one_another(ended: Any, rank: int) -> None:
    got = result(ended, rank, "told")
    assert got["sum"] == [3.0, 6.0]
    # Losses of 1 and 2 times the sum: each summand's gradient is that of both.
    assert got["gradient"] == [3.0, 30.0]
    assert got["rows"] == [str([10.0 * index, float("nan")]) for index in range(5)]
    assert got["mean"] == [1.5, 3.0]
    assert got["first"] == 0.1
    assert got["texts"] == ["", "größer"]


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_processes_that_differ_say_in_what(ended: Any, rank: int) -> None:
    differ, agreed = result(ended, rank, "told")["refused"]
    assert differ.startswith(f"process {rank} of 2: not all have the same plan: process 1 differs from process 0")
    assert agreed == ""


def test_a_batch_that_cannot_be_divided_is_refused(ended: Any) -> None:
    uneven = result(ended, 0, "told")["uneven"]
    assert "5 patches cannot be divided evenly among 2 processes" in uneven
    assert "multiple of 2" in uneven


def test_a_process_that_is_gone_is_no_riddle_to_the_others(ended: Any) -> None:
    (said,) = ended[1][:-1]
    assert said.splitlines()[-1].startswith("error: process 0 of 2: another one has ended, hangs, or cannot be reached")


@pytest.mark.slow
def test_the_first_may_be_busy_at_the_end_for_longer_than_a_collective_waits(tmp_path: Path) -> None:
    said = said_by_all(tmp_path, "busy")
    assert sorted(path.name for path in tmp_path.glob("awaited_*")) == ["awaited_0", "awaited_1"], said
    # Where nobody waits for it the others take it for lost.
    assert not list(tmp_path.glob("not_awaited_*"))
    assert said[1].splitlines()[-1].startswith("error: process 1 of 2: another one has ended, hangs, or cannot be")


def test_alone_every_collective_gives_back_what_it_was_given() -> None:
    got = told()
    assert got["sum"] == [1.0, 2.0]
    assert got["gradient"] == [1.0, 10.0]
    assert got["mean"] == [1.0, 2.0]
    assert got["first"] == 0.1
    assert got["texts"] == [""]
    assert got["refused"] == ["", ""]
    assert got["uneven"] == ""


def test_a_tensor_without_values_is_nobodys_to_add(ended: Any) -> None:
    assert [result(ended, rank, "told")["without values"] for rank in range(PROCESSES)] == [[3], [3]]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("kind", "size"), [(nn.BatchNorm3d, (4, 5, 6)), (nn.BatchNorm2d, (4, 5))])
def test_a_pooled_batch_norm_alone_is_torchs_batch_norm(
    kind: Callable[..., nn.Module], size: tuple[int, ...], momentum: float | None, affine: bool
) -> None:
    def new() -> nn.Sequential:
        return nn.Sequential(kind(3, momentum=momentum, affine=affine))

    image, other = torch.randn(2, 2, 3, *size, generator=torch.Generator().manual_seed(0)).unbind()
    ours, theirs = new(), new()
    before = list(ours.parameters())
    pool_batch_norms(ours)
    assert all(a is b for a, b in zip(before, ours.parameters(), strict=True))
    assert isinstance(ours[0], PooledBatchNorm)
    for seen in (image, 2 * other + 1):
        gradients = []
        for network in (ours, theirs):
            given = seen.clone().requires_grad_()
            network(given).pow(3).sum().backward()
            gradients.append(given.grad)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    for mine, torchs in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert mine[0] == torchs[0]
        torch.testing.assert_close(mine[1], torchs[1])
    torch.testing.assert_close(ours.eval()(image), theirs.eval()(image))


@pytest.mark.parametrize(("processes", "batch", "asked"), [(2, 4, False), (4, 8, False), (2, 8, True)])
def test_batch_norms_are_pooled_where_one_process_has_too_few(processes: int, batch: int, *, asked: bool) -> None:
    assert pools_statistics(Share(0, processes), batch, asked=asked)
    assert not pools_statistics(Share(), batch, asked=True)
    assert not pools_statistics(Share(0, processes), 4 * processes, asked=False)
