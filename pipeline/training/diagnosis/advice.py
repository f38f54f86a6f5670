"""From where the time went to what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.training.diagnosis.stopwatch import AUGMENTATION, CHECKPOINTS, LOGGING, VALIDATION, WAITING

# Largest shares of the time that a well-kept training spends on what is not learning.
LARGEST_SHARE = {WAITING: 0.2, AUGMENTATION: 0.3, VALIDATION: 0.3, CHECKPOINTS: 0.1, LOGGING: 0.1}
# Less than this is not worth a change.
WORTHWHILE_S = 30.0
# What validation is brought down to where it takes too much.
VALIDATION_AIM = 0.2


@dataclass(frozen=True)
class Circumstances:
    """What advice depends on besides the times.

    Attributes:
        on_disk: whether patches are read from disk, the prepared cases being too many for memory.
        workers: threads that read ahead; 0: the training itself reads.
        validation_every_epochs: as configured.
        steps_per_epoch: as configured.
    """

    on_disk: bool
    workers: int
    validation_every_epochs: int
    steps_per_epoch: int


def shares_of(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return each phase's share of the time, 0 where no time has passed."""
    total = sum(seconds.values())
    return {phase: spent / total if total else 0.0 for phase, spent in seconds.items()}


def spoken(seconds: Mapping[str, float]) -> str:
    """Return the time in all and the shares of the phases, the largest first; those below half a percent are left out.

    For instance "42.0 s: forward and backward 81 %, augmentation 12 %, validation 7 %".
    """
    shares = sorted(shares_of(seconds).items(), key=lambda item: -item[1])
    listed = ", ".join(f"{phase} {100 * share:.0f} %" for phase, share in shares if share >= 0.005)
    return f"{sum(seconds.values()):.1f} s: {listed}"


def advice(seconds: Mapping[str, float], now: Circumstances) -> dict[str, str]:
    """Return what to change where a phase takes more than its share, and long enough to care: phase -> one sentence.

    Args:
        seconds: time by phase; of whole cycles of validation, or its share is not what it will be.
        now: how the training is set up.
    """
    ways = {
        WAITING: _faster_reading(now),
        AUGMENTATION: "lower training.augmentation's elastic_probability and affine_probability, the dearest of it",
        VALIDATION: _rarer_validation(shares_of(seconds).get(VALIDATION, 0.0), now),
        CHECKPOINTS: f"raise training.steps_per_epoch (now {now.steps_per_epoch}): each epoch ends with a checkpoint",
        LOGGING: f"raise training.steps_per_epoch (now {now.steps_per_epoch}): each epoch is reported",
    }
    shares = shares_of(seconds)
    return {
        phase: f"{phase} takes {100 * shares[phase]:.0f} % of the time; {way}"
        for phase, way in ways.items()
        if shares.get(phase, 0.0) > LARGEST_SHARE[phase] and seconds[phase] > WORTHWHILE_S
    }


def _faster_reading(now: Circumstances) -> str:
    """Say how data come faster."""
    threads = f"raise training.workers (now {now.workers})"
    if now.on_disk:
        return (
            f"the prepared cases do not fit into memory: free memory for them, {threads} where the disk is slow, or "
            "keep the store on a faster one; they are decompressed one after another, whatever the threads"
        )
    return f"{threads}, or see whether other processes take the cores"


def _rarer_validation(share: float, now: Circumstances) -> str:
    """Say how rarely to validate for it to take no more than its aim."""
    # A share s costs s / (1 - s) of the rest; the rest stays as it is.
    every = now.validation_every_epochs
    if 0 < share < 1:
        every = math.ceil(every * (share / (1 - share)) / (VALIDATION_AIM / (1 - VALIDATION_AIM)))
    return f"set training.validation_every_epochs to {every} (now {now.validation_every_epochs})"
