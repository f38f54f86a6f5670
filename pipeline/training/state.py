"""TrainState: all that a resumed training needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.networks.contract import Network
from pipeline.training.losses import Objective


@dataclass(frozen=True)
class EpochSums:
    """What the steps of an epoch add up to, on the device: reading it at every step would make the device wait.

    Attributes:
        loss: sum of the losses.
        gradient_norm: sum of the norms of the gradients before clipping, as far as they are finite.
        norms: how many those are.
        bad_step: the first step, counted from 0, whose loss or gradient was not finite; -1: none. It outlives epochs.
    """

    loss: Tensor
    gradient_norm: Tensor
    norms: Tensor
    bad_step: Tensor

    @classmethod
    def on(cls, device: torch.device) -> EpochSums:
        """Return the sums before the first step."""
        loss, norm, norms = torch.zeros(3, device=device).unbind()
        return cls(loss, norm, norms, torch.full((), -1, device=device))

    def add(self, loss: Tensor, norm: Tensor, step: int, *, may_overflow: bool) -> None:
        """Add a step; nothing waits for the device.

        Args:
            loss: scalar, of the step.
            norm: scalar, of its gradient.
            step: its number, from 0.
            may_overflow: a gradient that is not finite is no failure: the scaler leaves such a step out.
        """
        finite = norm.isfinite()
        self.loss.add_(loss)
        self.gradient_norm.add_(torch.where(finite, norm, 0))
        self.norms.add_(finite)
        good = loss.isfinite() if may_overflow else loss.isfinite() & finite
        self.bad_step.copy_(torch.where(good | (self.bad_step >= 0), self.bad_step, step))

    def begin_epoch(self) -> None:
        """Set the sums to zero."""
        for tensor in (self.loss, self.gradient_norm, self.norms):
            tensor.zero_()


@dataclass
class TrainState:
    """All that a resumed run needs; changed in place, step by step.

    Attributes:
        objective: the network with its loss.
        step_module: what a step calls: the objective, or what is wrapped around it to compile or to distribute it.
        optimiser: over the network's parameters.
        scaler: of fp16 gradients; disabled otherwise.
        followed: the network's tensors that a running mean follows; listed once, for that takes a while.
        average: the running mean of those; None without EMA.
        step: steps done.
        total_steps: steps in all; the schedule ends there.
        recounts: step -> steps in all from there on, wherever a budget in minutes was counted anew.
        spent_s: seconds of training so far, start-up included, pauses before it was resumed left out.
        best_score: best validation score so far.
        best_step: its step.
        stale_validations: validations since the score last rose.
        sums: of the losses and gradients of the epoch so far.
    """

    objective: Objective
    step_module: nn.Module
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    followed: list[Tensor]
    average: list[Tensor] | None
    step: int
    total_steps: int
    recounts: dict[int, int]
    spent_s: float
    best_score: float
    best_step: int
    stale_validations: int
    sums: EpochSums

    @classmethod
    def begin(
        cls, objective: Objective, optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler, *, ema: bool
    ) -> TrainState:
        """Return the state before the first step, of a network that is on its device; with `ema` its running mean
        begins where the weights do.
        """
        followed = averaged_tensors(objective.network)
        return cls(
            objective=objective,
            step_module=objective,
            optimiser=optimiser,
            scaler=scaler,
            followed=followed,
            average=[tensor.clone() for tensor in followed] if ema else None,
            step=0,
            total_steps=0,
            recounts={},
            spent_s=0.0,
            best_score=-math.inf,
            best_step=0,
            stale_validations=0,
            sums=EpochSums.on(followed[0].device),
        )

    def set_total_steps(self, total_steps: int) -> None:
        """Set the steps in all from here on, and remember where they became others."""
        if total_steps != self.total_steps:
            self.total_steps = total_steps
            self.recounts[self.step] = total_steps

    @property
    def network(self) -> Network:
        """The network in training."""
        return self.objective.network


def averaged_tensors(network: Network) -> list[Tensor]:
    """Return the tensors that the running mean follows: parameters and floating-point buffers, each once.

    The statistics of a batch norm are followed as its weights are: those of the last step would belong to other
    weights than the mean's.
    """
    tensors = [*network.parameters(), *network.buffers()]
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]


@contextmanager
def averaged_weights(state: TrainState) -> Iterator[None]:
    """Give the network its running mean of weights for a while; without EMA it keeps its own."""
    if state.average is None:
        yield
        return
    kept = [tensor.clone() for tensor in state.followed]
    torch._foreach_copy_(state.followed, state.average)
    try:
        yield
    finally:
        torch._foreach_copy_(state.followed, kept)


def update_average(average: list[Tensor], current: list[Tensor], decay: float, step: int) -> None:
    """Move the running mean towards the weights, all of them by one call; early on it follows faster, so that random
    weights are soon forgotten.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, current, weight)
