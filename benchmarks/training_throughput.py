"""Patches a second in training, medseg over nnU-Net, and over the bare network: the same network, patch and batch.

    python benchmarks/training_throughput.py --out OUT [--peer-python .peers/nnunet/bin/python]
        [--device cuda] [--rounds 5]

The network is the one that nnU-Net plans for the hippocampus, a PlainConvUNet 32-64-128-256 with instance norm and deep
supervision, on patches of 40x56x40; each party reads, augments and steps in its own way and its own precision. Rounds
alternate on one machine; the peer has the allocator's settings that medseg gives itself. Bare are forward, loss,
backward and optimiser of medseg's network on one fixed batch, as in training.py. Wanted: 1.5 times nnU-Net's patches on
two cores and 3 times on a GPU, there with at least 0.95 of the bare network's. On a GPU its utilisation during medseg's
rounds is stated (nvidia-ml-py).
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpu import utilisation
from peer_training import ALLOCATOR, write_cases
from side_by_side import PEERS, medseg
from training import bare

from pipeline.config_loading import load_config
from pipeline.data.manifest import load_manifest
from pipeline.hardware import keep_freed_memory
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.train import fold_tasks
from pipeline.training.loop import train_step

ROOT = Path(__file__).resolve().parents[1]
PATCH, BATCH = [40, 56, 40], 7  # nnU-Net's plan for the 200 cases
SETTINGS = (
    "network={name: unet, options: {width: 32, norm: instance}}",
    "training.deep_supervision=true",
    f"preprocessing.patch_size={PATCH}",
)
WARM_UP = 5


class Ours:
    """medseg's training steps: augmented batches, or one fixed batch."""

    def __init__(self, task: FoldTask, steps: int) -> None:
        self.task, self.state = task, task.new_state()
        self.batches = task.batches(self.state.network)
        self.bare_steps = bare(task, steps)

    def training(self, steps: int) -> float:
        """Return the seconds of so many steps, to the end of the device's work."""

        def train() -> None:
            for _ in range(steps):
                train_step(self.state, self.batches, 1e-3, self.task.settings)

        return self._seconds(train)

    def bare(self) -> float:
        """Return the seconds of a round's steps on one batch."""
        return self._seconds(self.bare_steps)

    def _seconds(self, run: Callable[[], None]) -> float:
        """Time a call."""
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.task.device.type == "cuda":
            torch.cuda.synchronize(self.task.device)


class Peer:
    """nnU-Net's training steps, in a process of its own environment."""

    def __init__(self, python: Path, folder: Path, batch: int) -> None:
        command = [str(python.absolute()), str(PEERS / "nnunet_steps.py"), str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(command, env={**os.environ, **ALLOCATOR}, **pipes)
        self.facts = json.loads(self.process.stdout.readline())
        if (self.facts["patch"], self.facts["batch"]) != (PATCH, batch):
            raise SystemExit(f"nnU-Net has planned {self.facts}: not what is compared here, {PATCH} and {batch}")

    def training(self, steps: int) -> float:
        """Return the seconds of so many steps."""
        self.process.stdin.write(f"ours {steps}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self) -> None:
        """Let it end by itself."""
        self.process.communicate()


def prepared_task(config: Path, out: Path, device: str, batch: int) -> FoldTask:
    """Preprocess where it is not done yet, and return the first fold's training."""
    settings = [*SETTINGS, f"training.batch_size={batch}"]
    changes = [part for setting in settings for part in ("--set", setting)]
    medseg("preprocess", config, "--workspace", out / "medseg", *changes)
    (task,) = fold_tasks(load_config(config, settings).changed(workspace=out / "medseg"), "0", device)
    return task


def say(name: str, seconds: list[float], patches: int) -> None:
    """Print a party's patches a second."""
    print(f"{name:8} {patches / statistics.median(seconds):8.1f} patches/s")


def ratio(name: str, ours: list[float], others: list[float]) -> None:
    """Print how many times the others' patches are ours, from pairs of neighbouring rounds."""
    found = sorted(other / own for own, other in zip(ours, others, strict=True))
    print(f"medseg / {name}: median {statistics.median(found):.3f}, from {found[0]:.3f} to {found[-1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "hippocampus_unet.yaml")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    chosen = parser.parse_args()
    keep_freed_memory()
    task = prepared_task(chosen.config, chosen.out, chosen.device, chosen.batch)
    folder = chosen.out.resolve() / "fold_0"
    write_cases(load_manifest(task.config.data.manifest), 0, folder)
    ours = Ours(task, chosen.steps)
    peer = Peer(chosen.peer_python, folder, chosen.batch) if chosen.peer_python else None
    ours.training(WARM_UP)
    ours.bare()
    seconds: dict[str, list[float]] = {"medseg": [], "bare": [], "nnU-Net": []}
    used: list[int] = []
    for _ in range(chosen.rounds):
        with utilisation(task.device) as found:
            seconds["medseg"].append(ours.training(chosen.steps))
        used += found
        seconds["bare"].append(ours.bare())
        if peer:
            seconds["nnU-Net"].append(peer.training(chosen.steps))
    parameters = sum(p.numel() for p in ours.state.network.parameters())
    threads = torch.get_num_threads()
    print(f"{task.device}, {threads} threads, {task.settings.dtype}, batch {chosen.batch}, {parameters} parameters")
    for name, own in seconds.items():
        if own:
            say(name, own, chosen.steps * chosen.batch)
            if name != "medseg":
                ratio(name, seconds["medseg"], own)
    if used:
        print(f"GPU utilisation in medseg's rounds: {statistics.mean(used):.0f} %")
    if peer:
        print(f"nnU-Net's network: {peer.facts['parameters']} parameters")
        peer.end()


if __name__ == "__main__":
    main()
