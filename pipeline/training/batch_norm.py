"""Batch norm over the patches of all processes: where the configuration asks for it, or one process has too few."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.data.plan import SMALLEST_NORM_BATCH
from pipeline.training.distributed import Share, pooled, this_share


def pools_statistics(share: Share, batch_size: int, *, asked: bool) -> bool:
    """Tell whether batch norms see the patches of all processes: where it is asked for, or one has too few by itself.

    The network is then the same whatever the number of processes, and a resumed training may have another.

    Args:
        share: of this process.
        batch_size: patches of a batch, over all processes.
        asked: whether the configuration wants it.

    Raises:
        ConfigError: the batch cannot be divided evenly.
    """
    return share.processes > 1 and (asked or share.batch_size(batch_size) < SMALLEST_NORM_BATCH)


def pool_batch_norms(network: nn.Module) -> None:
    """Let a network's batch norms see the patches of all processes; parameters, buffers and their names stay."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d | nn.BatchNorm3d):
                setattr(parent, name, PooledBatchNorm.like(child))


class PooledBatchNorm(_BatchNorm):
    """Batch norm (Ioffe and Szegedy 2015) whose mean and variance are those of all processes' patches.

    Torch's own SyncBatchNorm does so on GPUs alone; this one is a few sums on any device.
    """

    @classmethod
    def like(cls, norm: _BatchNorm) -> PooledBatchNorm:
        """Return a norm with the parameters and running statistics of another, the very tensors."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
        new.train(norm.training)
        for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
            setattr(new, name, tensor)
        return new

    def forward(self, image: Tensor) -> Tensor:
        """Return (N, C, X, Y, Z), or (N, C, X, Y), normalised; every process has as many patches."""
        if not self.training:
            return super().forward(image)
        values = image.float()
        count = image.numel() // self.num_features * this_share().processes
        mean = _pooled_sum(values) / count
        centred = values - mean
        variance = _pooled_sum(centred.square()) / count
        self._follow(mean.detach().flatten(), variance.detach().flatten() * count / max(1, count - 1))
        scale = torch.rsqrt(variance + self.eps)
        if not self.affine:
            return (centred * scale).to(image.dtype)
        weight, bias = (tensor.view_as(mean) for tensor in (self.weight, self.bias))
        return (centred * (scale * weight) + bias).to(image.dtype)

    def _check_input_dim(self, image: Tensor) -> None:
        """Take planes and volumes alike."""

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, where they are kept, as torch does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(variance, rate)


def _pooled_sum(values: Tensor) -> Tensor:
    """Return the sum of each channel over the patches of all processes, (1, C, 1, ...)."""
    return pooled(values.sum([axis for axis in range(values.ndim) if axis != 1], keepdim=True))
