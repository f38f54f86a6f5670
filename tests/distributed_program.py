"""What one of several processes does in test_distributed.py; alone it does the same for all patches."""

import json
import os
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import ConfigError, PipelineError, TrainingError
from pipeline.networks import NetworkTask, build_network
from pipeline.training.batch_norm import pool_batch_norms
from pipeline.training.distributed import (
    agree,
    averaged,
    first_awaited,
    from_first,
    gathered,
    gathered_texts,
    joined,
    pooled,
    synchronised,
    this_share,
)
from pipeline.training.loop import LoopSettings, train
from pipeline.training.losses import Objective, Target, build_loss
from pipeline.training.state import TrainState

PATCHES, STEPS = 4, 6

# How long a collective waits, and how long the first alone is busy.
WAIT_S, BUSY_S = 3.0, 4.0

# Trainings: how the network normalises, and how it is trained.
TRAININGS: dict[str, dict[str, object]] = {
    "instance": {"norm": "instance", "deep": True},
    "accumulated": {"norm": "instance", "deep": False, "accumulate": 2},
    "batch": {"norm": "batch", "deep": True},
    "pooled": {"norm": "batch", "deep": True, "pooled_norms": True},
}


class Losses:
    """Hooks that keep the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def validate(self, state: TrainState) -> dict[str, float]:
        return {"score": 0.0}

    def improved(self, state: TrainState, scores: dict[str, float]) -> None:
        pass

    def checkpoint(self, state: TrainState) -> None:
        pass

    def epoch_ended(self, state: TrainState, metrics: dict[str, float]) -> None:
        self.losses.append(metrics["train/loss"])

    def not_finite(self, state: TrainState, step: int) -> TrainingError:
        return TrainingError(f"step {step} is not finite")


def batches(number: int) -> tuple[Tensor, Target]:
    """Return this process's patches of a batch."""
    share = this_share()
    size = share.batch_size(PATCHES)
    first = share.part(number) * size
    patches = [torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(first + i)) for i in range(size)]
    # Patches of the second process are brighter: a batch norm's statistics are not alike everywhere.
    image = torch.stack([patch + (first + i) % PATCHES // 2 for i, patch in enumerate(patches)])
    # The second class is in one patch of four: sums over the own patches are other sums.
    present = torch.tensor([(first + i) % PATCHES == 0 for i in range(size)])[:, None, None, None]
    return image, Target((image[:, 0] > 0.3).long() + ((image[:, 0] > 1.2) & present))


def training(
    norm: str, *, deep: bool, accumulate: int = 1, pooled_norms: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Train a small network for some steps; return the losses and what it has learned."""
    torch.manual_seed(0)
    task = NetworkTask(1, 3, (16, 16, 16), (1.0, 1.0, 1.0))
    network = build_network("unet", {"width": 4, "levels": 3, "norm": norm}, task)
    if pooled_norms:
        pool_batch_norms(network)
    objective = Objective(network, build_loss("dice_ce", {}), deep_supervision=deep)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    state = TrainState.begin(objective, optimiser, torch.amp.GradScaler("cpu", enabled=False), ema=True)
    state.step_module, state.total_steps = synchronised(objective), STEPS
    hooks = Losses()
    train(state, batches, lambda step, total: 0.02, settings(accumulate), hooks)
    return hooks.losses, {name: tensor.clone() for name, tensor in network.state_dict().items()}


def settings(accumulate: int) -> LoopSettings:
    return LoopSettings(
        steps_per_epoch=1,
        validation_every_epochs=STEPS,
        early_stop_validations=None,
        checkpoint_s=1e9,
        gradient_clip=12.0,
        ema_decay=0.9,
        dtype=torch.float32,
        device=torch.device("cpu"),
        seed=0,
        accumulate=accumulate,
    )


def told() -> dict[str, object]:
    """Return what comes of every collective."""
    share = this_share()
    mine = torch.tensor([1.0, 2.0]) * (share.rank + 1)
    mine.requires_grad_()
    total = pooled(mine)
    ((share.rank + 1) * (total * torch.tensor([1.0, 10.0])).sum()).backward()
    assert mine.grad is not None
    rows = torch.tensor([[10.0 * index, float("nan")] for index in share.of(range(5))], dtype=torch.float64)
    return {
        "sum": total.tolist(),
        "gradient": mine.grad.tolist(),
        "rows": [str(row) for row in gathered(rows, 5).tolist()],
        "mean": averaged(mine.detach()).tolist(),
        "first": from_first(float(share.rank) + 0.1),
        "texts": gathered_texts("" if share.is_first else "größer"),
        "refused": [refused("plan", share.rank), refused("plan", 7)],
        "uneven": uneven(),
        "without values": list(pooled(torch.ones(3, device="meta")).shape),
    }


def refused(fact: str, value: object) -> str:
    """Return why the processes do not agree."""
    try:
        agree({"fold": 0, fact: value})
    except PipelineError as error:
        return str(error)
    return ""


def uneven() -> str:
    """Return why a batch cannot be divided."""
    try:
        this_share().batch_size(5)
    except ConfigError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """Do all of it as one of several processes; in the end the last one is gone, without a word."""
    with joined("cpu"):
        share = this_share()
        results: dict[str, object] = {"told": told()}
        for name, options in TRAININGS.items():
            losses, learned = training(**options)  # type: ignore[arg-type]
            results[name] = losses
            save_file(learned, folder / f"{name}_{share.rank}.safetensors")
        (folder / f"{share.rank}.json").write_text(json.dumps(results))
        agree({"done": True})
        if share.rank == share.processes - 1:
            os._exit(0)
        from_first(0.0)


def busy(folder: Path) -> None:
    """Have the first busy for longer than a collective waits; the others wait for it, and the second time do not."""
    rank, processes = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    (folder / f"ready_{rank}").touch()
    while len(list(folder.glob("ready_*"))) < processes:  # to import torch takes as long
        time.sleep(0.02)
    with joined("cpu", timedelta(seconds=WAIT_S)):
        for name, waiting in (("awaited", first_awaited()), ("not_awaited", nullcontext())):
            with waiting:
                if this_share().is_first:
                    time.sleep(BUSY_S)
            from_first(0.0)
            (folder / f"{name}_{rank}").touch()


if __name__ == "__main__":
    try:
        (busy if "busy" in sys.argv[2:] else main)(Path(sys.argv[1]))
    except PipelineError as lost:
        sys.exit(f"error: {lost}")
