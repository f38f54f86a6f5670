"""Optimisers, and the course of the learning rate over a budget."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from pipeline.config import TrainingSection
from pipeline.networks.contract import Network

Schedule = Callable[[int, int], float]


def build_optimiser(network: Network, section: TrainingSection) -> torch.optim.Optimizer:
    """Build the optimiser; norms and biases are not decayed."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if section.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=section.learning_rate, fused=True)
    return torch.optim.SGD(groups, lr=section.learning_rate, momentum=0.99, nesterov=True, fused=True)


def cosine_schedule(peak: float, warmup_fraction: float) -> Schedule:
    """Return a linear rise to `peak`, then a half cosine to 0 at the last step (Loshchilov and Hutter 2017)."""
    return _with_warmup(peak, warmup_fraction, lambda progress: 0.5 * (1 + math.cos(math.pi * progress)))


def poly_schedule(peak: float, warmup_fraction: float) -> Schedule:
    """Return a linear rise to `peak`, then (1 - progress)^0.9, as nnU-Net and DeepLab do."""
    return _with_warmup(peak, warmup_fraction, lambda progress: (1 - progress) ** 0.9)


def constant_schedule(peak: float, warmup_fraction: float) -> Schedule:
    """Return a linear rise to `peak`, kept to the end."""
    return _with_warmup(peak, warmup_fraction, lambda progress: 1.0)


SCHEDULES: dict[str, Callable[[float, float], Schedule]] = {
    "cosine": cosine_schedule,
    "poly": poly_schedule,
    "constant": constant_schedule,
}


def _with_warmup(peak: float, warmup_fraction: float, course: Callable[[float], float]) -> Schedule:
    """Return a schedule that rises for a share of the budget and follows `course`, of progress 0..1, for the rest."""

    def rate(step: int, total_steps: int) -> float:
        warmup = round(warmup_fraction * total_steps)
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * course((step - warmup) / max(1, total_steps - warmup))

    return rate
