"""Where a number first stopped being finite: in the weights, a patch's image, a layer, the loss, a gradient or a step.

Batches and dropout are functions of their numbers: a bad step can be done once more, and taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

# In the order in which they come about.
Kind = Literal["weights", "image", "layer", "loss", "gradient", "step"]


@dataclass(frozen=True)
class Fault:
    """What was the first not to be finite.

    Attributes:
        kind: what it is.
        name: of the layer or parameter, as `named_modules` has it; "" where there is none to name.
        rows: samples of the batch in which it is not; empty where all are concerned, or none.
        place: of a layer: how many had given their output before it.
    """

    kind: Kind
    name: str = ""
    rows: tuple[int, ...] = ()
    place: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Which of several faults of a batch came about first."""
        return get_args(Kind).index(self.kind), self.place


def not_finite_among(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds an inf or NaN; None where there is none."""
    return next((name for name, tensor in tensors if not _finite(tensor)), None)


def faulty_weight(network: nn.Module) -> str | None:
    """Return the name of the first parameter or buffer that holds an inf or NaN; None where there is none."""
    return not_finite_among([*network.named_parameters(), *network.named_buffers()])


def inspect(network: nn.Module, image: Tensor, loss_of: Callable[[], Tensor], *, backward: bool) -> Fault | None:
    """Do a batch's forward and backward pass, and return what is the first in it not to be finite.

    Both passes are done to their ends whatever is found: processes that train together wait for one another in them.

    Args:
        network: its weights those from before the step; its gradients are left as they are.
        image: (N, C, *input) of the batch.
        loss_of: does the forward pass of this batch under the training's autocast and seed.
        backward: whether to look at the gradients too: they are no fault where a scaler leaves out what overflows.
    """
    with _watching_layers(network, len(image)) as found:
        loss = loss_of()
    name = _faulty_gradient(network, loss) if backward else None
    if rows := _faulty_rows(image, len(image)):
        return Fault("image", rows=rows)
    if found:
        return found[0]
    if not _finite(loss):
        return Fault("loss")
    return None if name is None else Fault("gradient", name)


def _faulty_gradient(network: nn.Module, loss: Tensor) -> str | None:
    """Return the parameter nearest to the loss whose gradient is not finite."""
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    pairs = [(name, gradient) for (name, _), gradient in zip(named, gradients, strict=True) if gradient is not None]
    return not_finite_among(reversed(pairs))


@contextmanager
def _watching_layers(network: nn.Module, samples: int) -> Iterator[list[Fault]]:
    """Yield a list in which the first layer whose output is not finite appears.

    What a module computes between its children is its own: these report before it does.
    """
    found: list[Fault] = []
    place = count()

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        before = next(place)
        if not found and not all(_finite(tensor) for tensor in _tensors(output)):
            rows = {row for tensor in _tensors(output) for row in _faulty_rows(tensor, samples)}
            found.append(Fault("layer", name or type(module).__name__, tuple(sorted(rows)), before))

    handles = [module.register_forward_hook(partial(look, name)) for name, module in network.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a module's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def _faulty_rows(tensor: Tensor, samples: int) -> tuple[int, ...]:
    """Return the samples that hold an inf or NaN; none where the first axis is not that of the samples."""
    if not tensor.ndim or len(tensor) != samples:
        return ()
    return tuple((~torch.isfinite(tensor.detach()).flatten(1).all(1)).nonzero()[:, 0].tolist())


def _finite(tensor: Tensor) -> bool:
    """Tell whether all numbers of a tensor are finite."""
    return bool(torch.isfinite(tensor.detach()).all())
