"""Two processes that train together against one: steps per second at the same batch of each.

A gloo process on a CPU has one thread, so that two of them have twice the cores of one. What is lost is the price of
adding up gradients and sums, and of waiting for the slower one. Alternating rounds; the median of their ratios.

    python benchmarks/two_processes.py
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time

import torch

from pipeline.hardware import keep_freed_memory, pick_dtype, place
from pipeline.networks import NetworkTask, build_network
from pipeline.training.distributed import joined, synchronised, this_share
from pipeline.training.loop import LoopSettings, train_step
from pipeline.training.losses import Objective, Target, build_loss
from pipeline.training.state import TrainState

PATCH, WARMUP = (40, 56, 40), 3
LOOPBACK = "127.0.0.1"


def measure(steps: int, batch: int) -> float:
    """Return the steps per second of this process, or of all that train together."""
    torch.set_num_threads(1)
    keep_freed_memory()
    with joined("cpu") as device:
        network = build_network("unet", {"width": 16, "norm": "instance"}, NetworkTask(1, 3, PATCH, (1.0, 1.0, 1.0)))
        place(network, device)
        objective = Objective(network, build_loss("dice_ce", {}), deep_supervision=True)
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
        state = TrainState.begin(objective, optimiser, torch.amp.GradScaler("cpu", enabled=False), ema=False)
        state.step_module = synchronised(objective)
        made = torch.Generator().manual_seed(this_share().rank)
        image = torch.randn(batch, 1, *network.input_size(PATCH), generator=made)
        target = Target(torch.randint(0, 3, (batch, *PATCH), generator=made))
        settings = LoopSettings(
            steps_per_epoch=steps,
            validation_every_epochs=1,
            early_stop_validations=None,
            checkpoint_s=1e9,
            gradient_clip=12.0,
            ema_decay=None,
            dtype=pick_dtype("auto", device),
            device=device,
            seed=0,
        )
        for step in range(WARMUP + steps):
            if step == WARMUP:
                start = time.perf_counter()
            train_step(state, lambda number: (image, target), 1e-3, settings)
        return steps / (time.perf_counter() - start)


def run(processes: int, steps: int, batch: int) -> float:
    """Return the steps per second of so many processes."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    group: dict[str, object] = {"WORLD_SIZE": processes, "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
    group |= {"OMP_NUM_THREADS": 1, "TORCH_CPP_LOG_LEVEL": "ERROR"}  # the latter as `medseg` sets it
    if sys.platform == "linux":
        group["GLOO_SOCKET_IFNAME"] = "lo"
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", "--steps", str(steps), "--batch", str(batch)],
            env=os.environ | {name: str(value) for name, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        sys.exit("a process failed; see above")
    return min(float(text.split()[-1]) for text in said)


def main() -> None:
    """Measure one and two processes in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2, help="patches of each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(measure(options.steps, options.batch))
        return
    rates = [
        (run(1, options.steps, options.batch), run(2, options.steps, options.batch)) for _ in range(options.rounds)
    ]
    for one, two in rates:
        print(f"one process {one:.3f} steps/s, two {two:.3f} steps/s of twice the batch")
    efficiency = statistics.median(two / one for one, two in rates)
    print(f"patches per second, two processes over one: {2 * efficiency:.2f}; scaling efficiency {efficiency:.2f}")


if __name__ == "__main__":
    main()
