"""Which voxels of its input a network's output depends on, found without computing one.

The network runs on tensors without values (torch's "meta" device), and every operation hands on the reach of its
operands. What the statistics of a norm see is left out, and said; an operation that nothing is known of counts as
depending on all that goes into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.networks.reach_rules import CONSTANTS, NORMS, PRODUCTS, Call, Reach, aten, of_all, rule_of

# Told of each operation that depends on the image: the operation, its arguments, its first result, that one's reach.
Listener = Callable[[Any, Sequence[Any], Tensor, Reach], None]


class ReachMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands on the reach of tensors through every operation within it.

    Args:
        image: (N, C, X, Y, Z), each of whose voxels depends on itself.
        listener: told of each operation that depends on it.

    Attributes:
        sees_statistics: whether a norm took statistics over space, which see the whole window.
        has_attention: whether two matrices that both depend on the image were multiplied.
        unknown: operations without a rule.
        peak_bytes: most bytes that tensors that depend on the image, itself included, took at once.
    """

    def __init__(self, image: Tensor, listener: Listener | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sees_statistics = False
        self.has_attention = False
        self.unknown: set[str] = set()
        self.peak_bytes = 0
        self._listener = listener
        self._reaches = WeakTensorKeyDictionary()
        self._reaches[image] = _of_itself(image)

    def of(self, tensor: Tensor) -> Reach | None:
        """Return a tensor's reach, None where it does not depend on the image."""
        found: Reach | None = self._reaches.get(tensor)  # type: ignore[no-untyped-call]
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and note the reach of what it returns."""
        result = func(*args, **(kwargs or {}))
        reaches = [self.of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(reach is not None for reach in reaches):
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self._note(func, args, reaches, outputs)
            self.peak_bytes = max(self.peak_bytes, self._live_bytes())
            reach = self.of(outputs[0])
            if self._listener is not None and reach is not None:
                self._listener(func, args, outputs[0], reach)
        return result

    def _note(self, func: Any, args: Sequence[Any], reaches: Sequence[Reach | None], outputs: list[Tensor]) -> None:
        """Note the reach of an operation's results, and what else it tells of the network."""
        operation = func.overloadpacket
        if operation in CONSTANTS:
            return
        if operation in NORMS:
            self.sees_statistics |= operation is not aten.native_batch_norm or bool(args[5])
            del outputs[1:]  # the statistics themselves
        if operation in PRODUCTS:
            self.has_attention |= all(reach is not None for reach in reaches[-2:])
        rule = rule_of(func)
        if rule is None:
            self.unknown.add(str(operation))
        for number, output in enumerate(outputs):
            call = Call(func, args, reaches, output, number)
            self._reaches[output] = tuple(_narrowed(bound) for bound in (rule or of_all)(call))
            if operation is aten.copy_ and output._base is not None:
                # Written into a part and read from the whole: where it lies there is not followed.
                self._reaches[output._base] = of_all(call)

    def _live_bytes(self) -> int:
        """Return the bytes of all tensors that depend on the image and are still in use."""
        storages = [tensor.untyped_storage() for tensor in self._reaches]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _of_itself(image: Tensor) -> Reach:
    """Return the reach of (N, C, X, Y, Z): each voxel depends on itself."""
    bounds = []
    for dim in (2, 3, 4):
        index = torch.arange(image.shape[dim]).view([-1 if d == dim else 1 for d in range(5)])
        bounds += [index, -index]
    return tuple(bounds)


def _narrowed(bound: Tensor) -> Tensor:
    """Return a bound with one element along each dimension along which it is constant."""
    # What was expanded is known to be, and costs a comparison of everything once it meets what was not.
    for dim, step in enumerate(bound.stride()):
        if step == 0:
            bound = bound.narrow(dim, 0, 1)
    for dim, size in enumerate(bound.shape):
        if size > 1 and bool((bound == (first := bound.narrow(dim, 0, 1))).all()):
            bound = first
    return bound
