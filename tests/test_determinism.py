"""training.deterministic: one hash of the weights, whoever reads the batches and whatever kills the training."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from phantom_experiments import changed, preprocessed
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.config import Config
from pipeline.config_loading import dump_config, load_config
from pipeline.errors import ConfigError, TrainingError
from pipeline.hardware import deterministic
from pipeline.model import WEIGHTS, weights_sha256
from pipeline.stages import train
from pipeline.stages.fold.determinism import refuse_nondeterministic
from pipeline.stages.workspace import Workspace

SETTINGS = (
    "preprocessing.patch_size=[16, 16, 16]",
    "network.options={width: 4, levels: 2}",
    "training.budget.steps=4",
    "training.steps_per_epoch=1",
    "training.batch_size=2",
    "training.validation_every_epochs=2",
    "training.deterministic=true",
    "training.sampling_weights={left: 2}",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return preprocessed(tmp_path_factory.mktemp("deterministic"), SETTINGS, cases=6, folds=3)


def weights_of(folder: Path) -> str:
    return weights_sha256(folder / "models" / "last" / WEIGHTS)


def tags_of(folder: Path) -> dict[str, str]:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return {name: value for event in events if event["kind"] == "tags" for name, value in event["values"].items()}


@pytest.mark.slow
def test_threads_that_read_ahead_change_no_bit_and_the_seed_changes_them(prepared: Config) -> None:
    hashes = []
    for workers in (0, 4):
        config = changed(prepared.changed(name=f"workers{workers}"), "training", workers=workers)
        (folder,) = train.run(config, device="cpu")
        hashes.append(weights_of(folder))
        assert tags_of(folder)["medseg.weights_sha256.last"] == hashes[-1]
        assert tags_of(folder)["medseg.weights_sha256.best"] == weights_sha256(folder / "models" / "best" / WEIGHTS)
        assert tags_of(folder)["medseg.arithmetic.number_of_threads"] == str(torch.get_num_threads())
    assert len(set(hashes)) == 1
    (other,) = train.run(prepared.changed(name="seed", seed=prepared.seed + 1), device="cpu")
    assert weights_of(other) != hashes[0]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_another_number_of_threads_does_not_go_on(prepared: Config) -> None:
    config, threads = prepared.changed(name="threads"), torch.get_num_threads()
    (folder,) = train.run(config, device="cpu")
    (folder / "models" / "last" / "model.yaml").unlink()  # as if killed before its end
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(TrainingError, match="a run with another number of threads; put back"):
            train.run(config, resume=True, device="cpu")
        train.run(changed(config.changed(name="free"), "training", deterministic=False), device="cpu")
    finally:
        torch.set_num_threads(threads)
    train.run(config, resume=True, device="cpu")
    assert (folder / "models" / "last" / "model.yaml").exists()


class Scattered(nn.Module):
    """A layer whose operator has no deterministic implementation, on any device."""

    def forward(self, image: Tensor) -> Tensor:
        return image.clone().put_(torch.zeros(1, dtype=torch.long, device=image.device), image.new_zeros(1))


class Enlarged(nn.Module):
    """A layer whose gradient is added up in any order on a GPU."""

    def forward(self, image: Tensor) -> Tensor:
        return interpolate(interpolate(image, scale_factor=2.0, mode="trilinear"), scale_factor=0.5, mode="trilinear")


def refusal_with(layer: nn.Module, config: Config, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return how a training is refused whose network begins with another layer."""
    (task,) = train.fold_tasks(config, "0", device)
    new_state = type(task).new_state

    def with_layer(self: object) -> object:
        state = new_state(task)
        first = next(module for module in state.network.modules() if isinstance(module, nn.Conv3d))
        name = next(name for name, module in state.network.named_modules() if module is first)
        state.network.set_submodule(name, nn.Sequential(first, layer))
        return state

    monkeypatch.setattr(type(task), "new_state", with_layer)
    batches = task.batches(new_state(task).network)
    with deterministic(True), pytest.raises(TrainingError) as refused:
        refuse_nondeterministic(task, batches)
    batches.close()
    return str(refused.value)


def test_an_operator_without_a_fixed_order_is_named_with_its_layer(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal_with(Scattered(), prepared, "cpu", monkeypatch)
    assert said.startswith("training.deterministic: put_ has no deterministic implementation on cpu (reached: ")
    assert "1, Scattered)" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_operator_of_a_gradient_is_named(prepared: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal_with(Enlarged(), prepared, "cuda", monkeypatch)
    assert re.search(r"upsample_trilinear3d_backward\w* has no deterministic implementation on cuda", said)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_network_of_deterministic_operators_has_one_hash_on_a_gpu(prepared: Config) -> None:
    hashes = {weights_of(train.run(prepared.changed(name=f"gpu{n}"), device="cuda")[0]) for n in range(2)}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.budget={minutes: 1}", "how many steps fit into minutes is the machine's"),
        ("training.compile=true", "cannot answer for what compile makes of operators"),
    ],
)
def test_what_the_clock_decides_is_refused(prepared: Config, override: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(dump_config(prepared))
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "a.yaml", [override])


def trained(config: Path, name: str, *arguments: str, threads: int = 1) -> subprocess.Popen[bytes]:
    """Start a training in a process of its own, on so many threads."""
    command = [sys.executable, "-m", "pipeline", "-q", "train", str(config), "--set", f"name={name}", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([*command, *arguments], env=environment, cwd=Path(__file__).parents[1])


@pytest.mark.slow
def test_processes_with_1_2_or_4_workers_and_one_that_was_killed_have_one_hash(
    prepared: Config, tmp_path: Path
) -> None:
    config = tmp_path / "a.yaml"
    # Long enough to be killed between two checkpoints.
    config.write_text(dump_config(changed(prepared, "training", budget={"steps": 60}, steps_per_epoch=5)))
    runs = Workspace(prepared.workspace)

    def hash_with(workers: int, threads: int) -> str:
        name = f"w{workers}t{threads}"
        assert trained(config, name, "--set", f"training.workers={workers}", threads=threads).wait() == 0
        return weights_of(runs.run(name, 0))

    assert hash_with(1, 2) == hash_with(4, 2)
    hashes: dict[int | str, str] = {workers: hash_with(workers, 1) for workers in (1, 2, 4)}
    killed, folder = trained(config, "killed"), runs.run("killed", 0)
    end = time.monotonic() + 120
    while not (folder / "events.jsonl").exists() or '"train/loss"' not in (folder / "events.jsonl").read_text():
        assert time.monotonic() < end and killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (folder / "models" / "last").exists()
    assert trained(config, "killed", "--resume").wait() == 0
    hashes["killed"] = weights_of(folder)
    assert len(set(hashes.values())) == 1, hashes
