"""`medseg train` by several processes: real launchers, on the loopback interface."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from phantom_experiments import preprocessed, task_of
from safetensors.numpy import load_file

from pipeline.config import Config
from pipeline.config_loading import dump_config, load_config

pytestmark = pytest.mark.slow

SETTINGS = (
    "preprocessing.patch_size=[16, 16, 16]",
    "preprocessing.batch_size=4",
    "network.options={width: 4, levels: 3, norm: instance}",
    "training.budget.steps=20",
    "training.steps_per_epoch=1",
    "training.validation_every_epochs=5",
    "training.deep_supervision=true",
    "training.precision=fp32",
    "training.ema_decay=0.9",
    "training.optimiser=sgd",
    "training.optimiser_options.momentum=0.9",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of an experiment on preprocessed phantoms."""
    folder = tmp_path_factory.mktemp("processes")
    prepared: Config = preprocessed(folder, SETTINGS, cases=6, folds=3)
    path = folder / "experiment.yaml"
    path.write_text(dump_config(prepared.changed(workspace=folder / "work")))
    return path


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """The run folder of two processes that nobody has disturbed."""
    train(config, "whole")
    return run_folder(config, "whole")


def command(config: Path, name: str, *more: str) -> list[str]:
    return ["-m", "pipeline", "train", str(config), "--device", "cpu", "--set", f"name={name}", *more]


def torchrun(processes: int, *, nodes: int = 1, port: int = 0) -> list[str]:
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    return ["-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={processes}", *meeting]


def start(*arguments: str, **environment: object) -> subprocess.Popen[str]:
    """Start Python in a session of its own; it talks to others on the loopback interface."""
    interface = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, **interface, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in environment.items()}},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str]:
    """Return the exit code and what was said."""
    try:
        said = process.communicate(timeout=seconds)[1]
    finally:
        if process.poll() is None:
            kill_all(process)
    return process.returncode, said


def kill_all(launcher: subprocess.Popen[str]) -> None:
    """Kill a launcher and what it has started, each of which has a session of its own."""
    every = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    for process in every:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(every[1:], timeout=60)
    launcher.communicate()


def train(config: Path, name: str, *more: str, processes: int = 2) -> None:
    launcher = torchrun(processes) if processes > 1 else []
    code, said = ended(start(*launcher, *command(config, name, *more)))
    assert code == 0, said


def run_folder(config: Path, name: str) -> Path:
    return config.parent / "work" / "runs" / name / "fold_0"


def metrics(folder: Path, name: str) -> list[float]:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    logged = [event for event in events if event["kind"] == "metrics"]
    return [event["values"][name] for event in sorted(logged, key=lambda e: e["step"]) if name in event["values"]]


def weights(folder: Path, model: str = "last") -> dict[str, np.ndarray]:
    return load_file(folder / "models" / model / "weights.safetensors")


def same(first: Path, second: Path) -> bool:
    """Tell whether two runs have the same weights, bit for bit."""
    pairs = [(weights(first, model), weights(second, model)) for model in ("best", "last")]
    return all(a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a) for a, b in pairs)


def wait_for(folder: Path, sign: str, process: subprocess.Popen[str]) -> None:
    """Wait until a run has logged something and has a checkpoint."""
    until = time.monotonic() + 120
    while not ((folder / "checkpoint.safetensors").exists() and sign in (folder / "events.jsonl").read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)


def rank_one(launcher: subprocess.Popen[str]) -> psutil.Process:
    """Return the second process of a launcher."""
    workers = [child for child in psutil.Process(launcher.pid).children() if "train" in child.cmdline()]
    (second,) = [worker for worker in workers if worker.environ()["RANK"] == "1"]
    return second


def test_two_processes_train_as_one_does(config: Path, whole: Path) -> None:
    train(config, "one", processes=1)
    one = run_folder(config, "one")
    losses = metrics(one, "train/loss")
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert metrics(whole, "train/loss") == pytest.approx(losses, abs=1e-5)
    assert metrics(whole, "val/score") == pytest.approx(metrics(one, "val/score"), abs=1e-4)
    ours, theirs = weights(whole), weights(one)
    assert all(np.allclose(ours[key], theirs[key], atol=1e-4) for key in theirs)


def test_batch_norms_of_few_patches_are_those_of_one_process(config: Path) -> None:
    pooled = ("--set", "network.options.norm=batch", "--set", "training.budget.steps=10")
    train(config, "normed", *pooled)
    train(config, "normed_alone", *pooled, processes=1)
    together, alone = (metrics(run_folder(config, name), "train/loss") for name in ("normed", "normed_alone"))
    assert together == pytest.approx(alone, abs=1e-3)


def test_killed_and_resumed_is_undisturbed(config: Path, whole: Path) -> None:
    folder = run_folder(config, "killed")
    launcher = start(*torchrun(2), *command(config, "killed"))
    wait_for(folder, '"step": 3', launcher)
    rank_one(launcher).kill()
    code, said = ended(launcher, 120)  # the launcher ends the other one, or that one notices
    assert code != 0, said
    launcher = start(*torchrun(2), *command(config, "killed", "--resume"))
    wait_for(folder, '"step": 12', launcher)
    kill_all(launcher)
    assert not (folder / "models" / "last").exists()
    train(config, "killed", "--resume")
    assert same(folder, whole)


def test_resumed_by_one_process_it_ends_as_well(config: Path, whole: Path) -> None:
    folder = run_folder(config, "fewer")
    launcher = start(*torchrun(2), *command(config, "fewer"))
    wait_for(folder, '"step": 6', launcher)
    kill_all(launcher)
    train(config, "fewer", "--resume", processes=1)
    assert not same(folder, whole)
    ours, theirs = weights(folder), weights(whole)
    assert all(np.allclose(ours[key], theirs[key], atol=1e-4) for key in theirs)


def test_two_nodes_train_as_one_does(config: Path, whole: Path) -> None:
    port = free_port()
    nodes = [start(*torchrun(1, nodes=2, port=port), *command(config, "nodes")) for _ in range(2)]
    for code, said in [ended(node) for node in nodes]:
        assert code == 0, said
    assert same(run_folder(config, "nodes"), whole)


def test_the_command_launches_itself_and_minutes_are_one_clocks(config: Path) -> None:
    minutes = ["--set", "training.budget={minutes: 0.4}", "--set", "training.steps_per_epoch=20"]
    code, said = ended(start(*command(config, "minutes", "--processes", "2", *minutes)))
    assert code == 0, said
    assert said.count("steps fit into 0.4 minutes") == 1  # the first process alone speaks
    assert "step_module" not in said
    assert (run_folder(config, "minutes") / "models" / "last" / "model.yaml").exists()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def started_apart(config: Path, name: str, *more: str, both: Sequence[str] = ()) -> list[tuple[int, str]]:
    """Start two processes without a launcher, the second with more of its own; return how they have ended."""
    group = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        start(*command(config, name, *both, *own), RANK=rank, LOCAL_RANK=rank, **group)
        for rank, own in enumerate(((), more))
    ]
    return [ended(process, 120) for process in processes]


def test_processes_with_different_configurations_refuse_to_train(config: Path) -> None:
    for rank, (code, said) in enumerate(started_apart(config, "other", "--set", "training.learning_rate=1")):
        assert code == 2, said
        assert f"error: process {rank} of 2: not all have the same configuration: process 1 differs" in said
    assert not run_folder(config, "other").exists()


def test_where_one_fails_the_other_ends_with_a_line(config: Path, tmp_path: Path) -> None:
    (first, said), (second, reason) = started_apart(config, "lost", "--workspace", str(tmp_path / "elsewhere"))
    assert (first, second) == (2, 2)
    assert "is not preprocessed so; run `medseg preprocess`" in reason
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: process 0 of 2: another one has ended")


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_poisoned_case_of_any_process_is_named_by_all(config: Path, norm: str) -> None:
    """With norms that pool their statistics a process that ended its pass early would leave the other waiting."""
    task = task_of(load_config(config))
    case = task.training_cases[-1].id
    sound, key = task.store.read(case), task.store.key_of(case)
    assert key is not None
    image = sound.image.copy()
    image[:] = np.inf
    task.store.write(case, replace(sound, image=image), key)
    try:
        ends = started_apart(config, f"poisoned_{norm}", both=("--set", f"network.options.norm={norm}"))
    finally:
        task.store.write(case, sound, key)
    for code, said in ends:
        assert code == 2, said
        assert f"the image of case {case} holds inf or NaN" in said


def test_a_batch_that_cannot_be_divided_is_refused_before_anything_is_written(config: Path) -> None:
    odd = ["--set", "training.batch_size=3"]
    for code, said in started_apart(config, "odd", *odd):
        assert code == 2, said
    code, said = ended(start(*torchrun(2), *command(config, "odd", *odd)))
    assert code != 0
    assert "3 patches cannot be divided evenly among 2 processes" in said
    assert not run_folder(config, "odd").exists()
