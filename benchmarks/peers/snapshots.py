"""What both peers' trainings share: a budget in minutes turned into steps, and weights kept at given times of it."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

# Steps that are not counted, for the first wait for the workers' start; and how long the others are measured at least.
FIRST_STEPS, PROBE_S = 5, 60.0


def steps_within(minutes: float, network: nn.Module, optimiser: torch.optim.Optimizer, step: Callable[[], None]) -> int:
    """Return how many steps fill the minutes; what the steps that measure it changed is undone."""
    begun = copy.deepcopy((network.state_dict(), optimiser.state_dict()))
    for _ in range(FIRST_STEPS):
        step()
    start, done = time.monotonic(), 0
    while time.monotonic() - start < PROBE_S:
        step()
        done += 1
    seconds = (time.monotonic() - start) / done
    network.load_state_dict(begun[0])
    optimiser.load_state_dict(begun[1])
    return max(1, int(60 * minutes / seconds))


class Snapshots:
    """Weights kept evenly through the training; the time that keeping takes is not counted.

    Args:
        folder: where they go.
        steps: of the whole training.
        count: how many to keep, the last at the end.
    """

    def __init__(self, folder: Path, steps: int, count: int) -> None:
        self.folder = folder
        self.due = [max(1, round(steps * (number + 1) / count)) for number in range(count)]
        self.kept: list[tuple[float, int, Path]] = []
        self.steps = 0
        self.start = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def stepped(self, network: nn.Module) -> None:
        """Count a step, and keep the weights where it is time."""
        self.steps += 1
        if self.steps in self.due:
            now = time.monotonic()
            path = self.folder / f"{self.steps}.pt"
            torch.save(network.state_dict(), path)
            self.kept.append(((now - self.start) / 60, self.steps, path))
            self.start += time.monotonic() - now

    def write(self, predict: Callable[[Path, Path], None]) -> None:
        """Have each snapshot predict into a folder of its own, and write minutes, steps and folder of each."""
        found = []
        for minutes, steps, weights in self.kept:
            out = self.folder / f"predicted_{steps}"
            out.mkdir(exist_ok=True)
            predict(weights, out)
            weights.unlink()
            found.append({"minutes": minutes, "steps": steps, "folder": str(out)})
        (self.folder / "snapshots.json").write_text(json.dumps(found, indent=1))
