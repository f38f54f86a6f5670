"""What benchmarks share: a process of its own for each party, its peak memory, and a network handed to the peers."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.networks import Network
from pipeline.stages.fold.task import CHECKPOINT

PEERS = Path(__file__).parent / "peers"
MEDSEG = (sys.executable, "-m", "pipeline")


def medseg(*arguments: object) -> None:
    """Run a command of medseg's; what it says is shown.

    Raises:
        SystemExit: it failed.
    """
    if code := subprocess.run([str(part) for part in (*MEDSEG, *arguments)], check=False).returncode:
        raise SystemExit(f"medseg {' '.join(map(str, arguments))}: exit code {code}")


def train_or_go_on(options: Sequence[object], run: Path, fold: int) -> None:
    """Train a fold, from its checkpoint where it has one; one that is finished is left as it is."""
    resume = ["--resume"] if (run / CHECKPOINT).exists() else []
    medseg("train", *options, "--fold", fold, *resume)


@dataclass(frozen=True)
class Finished:
    """What a process left: its output, its wall time, and its peak resident memory, libraries included."""

    output: str
    seconds: float
    peak_mb: float

    @property
    def answer(self) -> dict[str, Any]:
        """The JSON of its last line."""
        return json.loads(self.output.splitlines()[-1])


def memory_mb(field: str, process: int | str = "self") -> float:
    """Return a process' VmHWM, its peak of resident memory, or VmRSS, what is resident now; 0 once it has ended."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def run_apart(command: Sequence[object]) -> Finished:
    """Run a command; VmHWM is its own, whereas getrusage's peak begins with that of the parent.

    Raises:
        SystemExit: it failed.
    """
    start, peak_mb = time.perf_counter(), 0.0
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    while True:
        try:
            output, _ = process.communicate(timeout=0.05)
            break
        except subprocess.TimeoutExpired:
            peak_mb = max(peak_mb, memory_mb("VmHWM", process.pid))
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{output[-2000:]}\n{' '.join(map(str, command))}: exit code {process.returncode}")
    return Finished(output, seconds, peak_mb)


def export_unet(network: Network, folder: Path) -> None:
    """Write a `unet` for peers/plain_unet.py to load, and what it makes of noise, to prove that it is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: values.contiguous() for name, values in network.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    (folder / "network.json").write_text(json.dumps({"strides": network.strides}))
    channels = weights["encoder.0.0.0.weight"].shape[1]
    probe = torch.randn(1, channels, *network.input_size((32, 32, 32)))
    with torch.inference_mode():
        save_file({"image": probe, "logits": network.eval()(probe)}, folder / "probe.safetensors")
