"""TrainState: all that a resumed training needs, and the only mutable type of the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.networks.contract import Network
from pipeline.training.losses import Objective


@dataclass
class TrainState:
    """All that a resumed run needs, and the only mutable type of the package.

    Attributes:
        objective: the network with its loss.
        optimiser: over the network's parameters.
        scaler: of fp16 gradients; disabled otherwise.
        average: running mean of the network's floating-point state, in its order; None without EMA.
        step: steps done.
        total_steps: steps in all; the schedule ends there.
        best_score: best validation score so far.
        best_step: its step.
        stale_validations: validations since then.
        loss_sum: sum of the losses of the epoch so far, on the device: reading it every step would make the device
            wait.
    """

    objective: Objective
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: list[Tensor] | None
    step: int
    total_steps: int
    best_score: float
    best_step: int
    stale_validations: int
    loss_sum: Tensor

    @property
    def network(self) -> Network:
        """The network in training."""
        return self.objective.network


def averaged_tensors(network: Network) -> list[Tensor]:
    """Return the tensors that the running mean follows: parameters and floating-point buffers, each once."""
    tensors = [*network.parameters(), *network.buffers()]
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]


@contextmanager
def averaged_weights(state: TrainState) -> Iterator[None]:
    """Give the network its running mean of weights for a while; without EMA it keeps its own."""
    if state.average is None:
        yield
        return
    own = averaged_tensors(state.network)
    kept = [tensor.clone() for tensor in own]
    torch._foreach_copy_(own, state.average)
    try:
        yield
    finally:
        torch._foreach_copy_(own, kept)


def update_average(average: list[Tensor], current: list[Tensor], decay: float, step: int) -> None:
    """Move the running mean towards the weights; early on it follows faster, so that random weights are soon
    forgotten.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, current, weight)
