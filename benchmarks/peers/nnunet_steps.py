"""nnU-Net's training steps, so many when asked; benchmarks/training_throughput.py calls it.

    .peers/nnunet/bin/python benchmarks/peers/nnunet_steps.py FOLDER

Says batch, patch and parameters as JSON, then answers each line "ours N" or "bare N" on stdin with the seconds of N
steps: on batches of its own loaders and augmentation, or on one fixed batch.
"""

import json
import os
import sys
import time
from typing import Any

import torch
from nnunet_training import FOLDER, new_trainer, prepare

WARM_UP = 5


def seconds(trainer: Any, fixed: dict[str, Any] | None, steps: int) -> float:
    """Return what the steps take; a step of nnU-Net's reads its loss, and so ends with the device's work."""
    start = time.perf_counter()
    for _ in range(steps):
        trainer.train_step(next(trainer.dataloader_train) if fixed is None else fixed)
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    answers, sys.stdout = sys.stdout, sys.stderr  # what nnU-Net says is no answer
    prepare(json.loads((FOLDER / "cases.json").read_text()))
    trainer = new_trainer()
    trainer.on_train_start()
    fixed = next(trainer.dataloader_train)
    seconds(trainer, None, WARM_UP)
    configuration = trainer.configuration_manager
    parameters = sum(p.numel() for p in trainer.network.parameters())
    facts = {"batch": configuration.batch_size, "patch": configuration.patch_size, "parameters": parameters}
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        what, steps = line.split()
        print(seconds(trainer, fixed if what == "bare" else None, int(steps)), file=answers, flush=True)
    trainer.on_train_end()


if __name__ == "__main__":
    main()
