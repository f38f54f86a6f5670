"""Several processes that train one network together: which of them this is, and what they tell one another.

They are launched by `torchrun`, or by whoever else sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. All
of them hold the same TrainState at every step, but for the seconds by their own clocks, and the first alone writes.

Every function here that talks to the others is a collective: all processes call it, in the same order, or all wait. In
one process each of them returns what it was given.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import ConfigError, TrainingError
from pipeline.hardware import pick_device
from pipeline.records import digest_of

Item = TypeVar("Item")

# How long a process waits for the others: longer than the first alone is busy within a training, with a picture or a
# checkpoint; and at its end, where the first alone calibrates on all validation cases and hands the model to tracking.
# One that dies is noticed at once, by its launcher and by its closed connections; this is for one that hangs.
TIMEOUT, PATIENCE = timedelta(hours=1), timedelta(days=7)

# How gloo says that a process is gone, in errors that have no type of their own.
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "timed out", "Connection refused")


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

    def part(self, batch: int) -> int:
        """Return the number of this process's part of a batch, of all parts of all batches: what its draws are keyed
        by.
        """
        return batch * self.processes + self.rank

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's share of the items: one in so many, so that the shares are alike."""
        return items[self.rank :: self.processes]

    def batch_size(self, all_patches: int) -> int:
        """Return the patches of a batch that are this process's.

        Raises:
            ConfigError: the batch cannot be divided evenly.
        """
        if all_patches % self.processes:
            fitting = [n for n in range(1, all_patches + 1) if all_patches % n == 0]
            raise ConfigError(
                f"training.batch_size: {all_patches} patches cannot be divided evenly among {self.processes} "
                f"processes; they are counted over all of them. Start {' or '.join(map(str, fitting))}, or set a "
                f"multiple of {self.processes}"
            )
        return all_patches // self.processes


ALONE = Share()


def is_launched() -> bool:
    """Tell whether a launcher started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def this_share() -> Share:
    """Return which process this is; the only one outside a process group."""
    if not dist.is_initialized():
        return ALONE
    return Share(dist.get_rank(), dist.get_world_size())


@contextmanager
def joined(device: str, timeout: timedelta = TIMEOUT) -> Iterator[torch.device]:
    """Join the processes that were launched together, and yield this one's device; without a launcher it is alone.

    Each takes the GPU of its number on its node, and they talk by NCCL; on CPUs they talk by gloo.

    Args:
        device: auto, cpu or cuda; cuda:N where the process is alone.
        timeout: how long a process waits for the others.

    Raises:
        ConfigError: the device is not there, or is one for all.
        TrainingError: another process was lost.
    """
    if not is_launched():
        yield pick_device(device)
        return
    chosen = _device_of_this(device)
    ended_well = False
    try:
        with _lost_peers_named():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timeout)
            yield chosen
            _sum(torch.zeros(1))  # others may still be busy: one that leaves before would look lost
        ended_well = True
    finally:
        # After an error the others may be in a collective, and NCCL would wait for them.
        if ended_well or chosen.type == "cpu":
            _leave()


@contextmanager
def first_awaited() -> Iterator[None]:
    """Let the others wait at the end for the first, who alone may be busy for longer than a collective waits.

    They wait in a group of their own, with more patience than in the one that they train in, and without their GPUs.
    Where the first fails they learn of it at once, by its closed connections.
    """
    if this_share().processes == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)  # within which they connect
    try:
        yield
        dist.monitored_barrier(group, timeout=PATIENCE)
    finally:
        dist.destroy_process_group(group)


def _leave() -> None:
    """Leave the group: its threads must not outlive the interpreter, and what is wrapped to train holds it."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def _device_of_this(name: str) -> torch.device:
    """Return the device of this process: the CPU, or the GPU of its number on its node."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name}: each process takes the GPU of its number; use auto, cuda or cpu")
    chosen = pick_device(name)
    if chosen.type == "cuda":
        chosen = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(chosen)
    return chosen


@contextmanager
def _lost_peers_named() -> Iterator[None]:
    """Say in a line what it means when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in _LOST):
            raise
        raise TrainingError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: another one has ended, hangs, or cannot be "
            "reached; what it said is the reason. Then go on with --resume"
        ) from error


def agree(facts: Mapping[str, Any]) -> None:
    """See that all processes hold the same facts: the same keys everywhere, values that JSON knows.

    Raises:
        TrainingError: they do not; names which, and the processes that differ from the first.
    """
    share = this_share()
    digests = [int(digest_of(value)[:15], 16) for value in facts.values()]
    table = torch.zeros(share.processes, len(digests), dtype=torch.int64)
    table[share.rank] = torch.tensor(digests)
    table = _sum(table)
    differs = table != table[0]  # (process, fact)
    if differs.any():
        names = [name for name, other in zip(facts, differs.any(dim=0).tolist(), strict=True) if other]
        ranks = [str(rank) for rank, other in enumerate(differs.any(dim=1).tolist()) if other]
        raise TrainingError(
            f"process {share.rank} of {share.processes}: not all have the same {', '.join(names)}: process "
            f"{', '.join(ranks)} differs from process 0; start all with one command, on one version of medseg, "
            "configuration, plan and manifest"
        )


def from_first(value: float) -> float:
    """Return the first process's value: what a clock or a file system says is decided by one."""
    return float(_sum(torch.tensor(value if this_share().is_first else 0.0, dtype=torch.float64)))


def gathered(rows: Tensor, total: int) -> Tensor:
    """Return the rows (n, K) of all processes' shares, as `Share.of` dealt them out, in their order: (total, K).

    Numbers that are no number stay so, and the result is the same in all processes, bit for bit.
    """
    share = this_share()
    table = torch.zeros(total, *rows.shape[1:], dtype=rows.dtype)
    table[share.rank :: share.processes] = rows
    return _sum(table)


def gathered_texts(text: str) -> list[str]:
    """Return what each process says, as far as it fits into 4,000 bytes."""
    share, said = this_share(), list(text.encode()[:4000])
    table = torch.zeros(share.processes, 4000, dtype=torch.uint8)
    table[share.rank, : len(said)] = torch.tensor(said, dtype=torch.uint8)
    return [bytes(row[row > 0].tolist()).decode(errors="ignore") for row in _sum(table)]


def averaged(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes; it carries no gradient."""
    processes = this_share().processes
    return tensor if processes == 1 else _sum(tensor.detach()) / processes


def average_buffers(network: nn.Module) -> None:
    """Give every process the mean of the running statistics, which its own patches have moved."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if this_share().processes == 1 or not buffers:
        return
    together = averaged(torch.cat([buffer.flatten() for buffer in buffers]))
    means = torch.split(together, [buffer.numel() for buffer in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean.view_as(buffer))


def synchronised(objective: nn.Module) -> nn.Module:
    """Return what a step calls in an objective's place, so that its gradients are the mean over all processes.

    The parameters become those of the first process.
    """
    if this_share().processes == 1:
        return objective
    # Unused parameters are looked for: the coarse heads of a network without deep supervision are some. And only so
    # does DDP keep its buckets as they were at first; rebuilt ones, which a resumed run begins without, add up in
    # another order where there are more than two processes. Torch warns once where it has found none.
    return DistributedDataParallel(objective, find_unused_parameters=True)


def unsynchronised(module: nn.Module) -> AbstractContextManager[None]:
    """Let a module's gradients pile up without talking to others, for all but the last batch of a step."""
    if isinstance(module, DistributedDataParallel):
        return cast("AbstractContextManager[None]", module.no_sync())
    return nullcontext()


def pooled(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, differentiably; the tensor itself where there is one process.

    A loss that is a function of such sums has the value of one process with all the patches. The gradient reaches each
    process's own summand from the losses of all: the mean of the processes' gradients, which data-parallel training
    takes, is then the gradient of the mean of their losses, exactly. All processes must come by here alike: whether a
    loss pools may not depend on what a batch holds. A tensor without values, of a step that is only measured, stays.
    """
    if this_share().processes == 1 or tensor.is_meta:
        return tensor
    total: Tensor = _SumOverProcesses.apply(tensor)  # type: ignore[no-untyped-call]
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
    """Return the sum over processes where the tensor was; NCCL adds on the GPU alone."""
    if this_share().processes == 1:
        return tensor
    on_gpu = dist.get_backend() == "nccl"
    total = torch.empty_like(tensor, device="cuda" if on_gpu else tensor.device, memory_format=torch.contiguous_format)
    total.copy_(tensor.detach())
    dist.all_reduce(total)
    return total.to(tensor.device)
