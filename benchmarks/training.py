"""Training steps per second beside the bare network's, in interleaved pairs on one machine.

Ours: patches, augmentation, the step, the running mean, and the run's log. Bare: forward, loss, backward and optimiser
of the same network on one fixed batch. Validation, checkpoints and start-up are apart. Wanted: at least 0.92.

    python benchmarks/training.py configs/hippocampus_unet.yaml [--pairs 9] [--steps 10] [--device cuda]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.config_loading import load_config
from pipeline.hardware import autocast, keep_freed_memory
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.train import fold_tasks
from pipeline.tracking import RunLog
from pipeline.training.loop import train_step


def ours(task: FoldTask, steps: int, folder: Path) -> Callable[[], None]:
    state = task.new_state()
    batches = task.batches(state.network)
    tracked = RunLog.create(folder, uri=None, workspace=folder, experiment="benchmark", name="benchmark")

    def run() -> None:
        for _ in range(steps):
            train_step(state, batches, 1e-3, task.settings)
        tracked.metrics({"train/loss": state.sums.loss.item() / steps}, state.step)
        state.sums.begin_epoch()

    return run


def bare(task: FoldTask, steps: int) -> Callable[[], None]:
    state = task.new_state()
    batches = task.batches(state.network)
    image, target = batches(0)
    batches.close()

    def run() -> None:
        state.objective.train()
        for _ in range(steps):
            state.optimiser.zero_grad(set_to_none=True)
            with autocast(task.device, task.dtype):
                loss = state.objective(image, target)
            state.scaler.scale(loss).backward()
            state.scaler.step(state.optimiser)
            state.scaler.update()
        loss.item()

    return run


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="auto")
    chosen = parser.parse_args()
    keep_freed_memory()
    (task,) = fold_tasks(load_config(chosen.config, chosen.overrides), "0", chosen.device)
    with tempfile.TemporaryDirectory() as folder:
        runs = ours(task, chosen.steps, Path(folder)), bare(task, chosen.steps)
        for run in runs:
            run()
        pairs = [tuple(seconds(run) / chosen.steps for run in runs) for _ in range(chosen.pairs)]
    ratios = sorted(plain / full for full, plain in pairs)
    threads, median = torch.get_num_threads(), statistics.median(ratios)
    print(f"{task.device}, {threads} threads, {task.dtype}, batch {task.batch_size} of {task.plan.patch_size}")
    print(f"ours  {1 / statistics.median(full for full, _ in pairs):.2f} steps/s")
    print(f"bare  {1 / statistics.median(plain for _, plain in pairs):.2f} steps/s")
    print(f"ours / bare: median {median:.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}; wanted: 0.92")


if __name__ == "__main__":
    main()
