"""Several processes that train one network together: which of them this is, and what they tell one another.

Every function here that talks to the others is a collective: all processes call it, in the same order, or all wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Which process this is, of those that train together.

    Attributes:
        rank: its number, from 0; the first alone writes.
        processes: how many there are.
    """

    rank: int = 0
    processes: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0


def this_share() -> Share:
    """Return which process this is; the only one outside a process group."""
    if not dist.is_initialized():
        return Share()
    return Share(dist.get_rank(), dist.get_world_size())


def pooled(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, differentiably; the tensor itself where there is one process.

    A loss that is a function of such sums has the value of one process with all the patches. The gradient reaches each
    process's own summand from the losses of all: the mean of the processes' gradients, which data-parallel training
    takes, is then the gradient of the mean of their losses, exactly. All processes must come by here alike: whether a
    loss pools may not depend on what a batch holds.
    """
    if this_share().processes == 1:
        return tensor
    total: Tensor = _SumOverProcesses.apply(tensor)
    return total


class _SumOverProcesses(torch.autograd.Function):
    """The sum over processes; its adjoint is the sum over the gradients that the processes' losses send back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Add the processes' tensors."""
        return _sum(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Add the processes' gradients."""
        return _sum(gradients[0])


def _sum(tensor: Tensor) -> Tensor:
    """Return the sum over processes, the tensor untouched."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
