"""Activation checkpointing (Chen et al. 2016): blocks of a network keep only what goes into them, and compute the rest
again when the gradient comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from pipeline.networks.patch_classifier import PatchClassifier

# A block holds no more layers with kernels than this: a residual unit with its skip, or a decoder's stage. Larger ones
# would hold as much again while they are computed anew, smaller ones keep more.
MOST_KERNELS = 4

Context = Callable[[], AbstractContextManager[None]]


def recompute_activations(network: nn.Module, context: Context) -> None:
    """Let every block of a network's layers forget what it computed, where gradients are wanted.

    The gradients stay the same: dropout draws the same numbers again, and a batch norm counts a batch once.

    Args:
        network: changed in place; its tensors keep their names.
        context: in which it runs forwards, such as autocast: entered again for what is computed again.
    """
    if isinstance(network, PatchClassifier):
        network.forward = _made_and_recomputed(network, context)  # type: ignore[method-assign]
        return
    for block in _blocks(network):
        block.forward = _recomputed(block, context)


def _made_and_recomputed(network: PatchClassifier, context: Context) -> Callable[..., Any]:
    """Return a patch classifier's forward, whose blocks are made anew each time, with blocks that forget."""

    def run(image: Tensor) -> Tensor:
        dense = network.to_dense()
        recompute_activations(dense, context)
        return dense(image)  # type: ignore[no-any-return]

    return run


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest modules of few layers, each layer in at most one."""
    for child in module.children():
        is_list = isinstance(child, nn.ModuleList | nn.ModuleDict)  # those may be gone through and never called
        if is_list or _kernels(child) > MOST_KERNELS:
            yield from _blocks(child)
        elif _kernels(child) and next(child.children(), None) is not None:  # a layer by itself keeps its input only
            yield child


def _kernels(module: nn.Module) -> int:
    """Return how many layers with kernels a module holds."""
    return sum(isinstance(layer, _ConvNd | nn.Linear) for layer in module.modules())


def _recomputed(block: nn.Module, context: Context) -> Callable[..., Any]:
    """Return a block's forward that keeps only its arguments."""
    forward = block.forward
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _again(context, norms)

    def run(*features: Any, **by_name: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*features, **by_name)
        return checkpoint(forward, *features, use_reentrant=False, context_fn=contexts, **by_name)

    return run


@contextmanager
def _again(context: Context, norms: list[_BatchNorm]) -> Iterator[None]:
    """Compute again what has been counted already: the running statistics of batch norms stay as they are."""
    with ExitStack() as stack:
        stack.enter_context(context())
        for norm in norms:
            for name, idle in (("momentum", 0.0), ("num_batches_tracked", None)):
                stack.callback(setattr, norm, name, getattr(norm, name))
                setattr(norm, name, idle)
        yield
