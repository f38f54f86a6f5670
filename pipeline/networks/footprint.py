"""What a forward pass, or a step of training, takes in memory: found without computing it, on no device at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.networks.contract import Network, Size


@dataclass(frozen=True)
class Footprint:
    """What one window takes in a network that computes in float32.

    Attributes:
        num_logits: channels of the logits.
        activation_bytes: most bytes that the window and what is computed of it take at once, with what the kernels of
            convolutions rearrange for themselves.
        weight_bytes: of the parameters and buffers.
    """

    num_logits: int
    activation_bytes: int
    weight_bytes: int


_KNOWN: WeakKeyDictionary[Network, dict[tuple[int, Size], Footprint]] = WeakKeyDictionary()


def footprint(network: Network, in_channels: int, size: Size) -> Footprint:
    """Return what a window takes in memory; the network stays as it is, on whatever device. Asked again, it is known.

    Args:
        network: in eval mode.
        in_channels: channels of the image.
        size: voxels of the network's input.

    Raises:
        ValueError: the network does not take inputs of that size.
    """
    known = _KNOWN.setdefault(network, {})
    if (in_channels, size) not in known:
        known[in_channels, size] = _found(network, torch.empty(1, in_channels, *size, device="meta"))
    return known[in_channels, size]


def _found(network: Network, image: Tensor) -> Footprint:
    """Run a network on tensors without values in place of its own."""
    own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    valueless = {name: torch.empty_like(tensor, device="meta") for name, tensor in own.items()}
    mode = LiveBytes(image, valueless.values())
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), mode:  # a compiled network would compile anew
        logits: Tensor = functional_call(network, valueless, (image,))
    return Footprint(logits.shape[1], mode.peak_bytes, sum(tensor.nbytes for tensor in own.values()))


@dataclass(frozen=True)
class StepFootprint:
    """What a step of training takes.

    Attributes:
        passes_bytes: most bytes that the batch, what is computed of it forwards and backwards, and the gradients take
            at once.
        kept_bytes: of weights, buffers, and their copies: an optimiser's moments, a running mean.
        weights_bytes: of weights and buffers alone.
    """

    passes_bytes: int
    kept_bytes: int
    weights_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All together."""
        return self.passes_bytes + self.kept_bytes


def step_footprint(
    objective: nn.Module, batch: tuple[Tensor, Any], *, copies: int, dtype: torch.dtype = torch.float32
) -> StepFootprint:
    """Return what a step of training takes in memory, whatever the device that will do it.

    Args:
        objective: gives the loss of a batch; in train mode, on the device "meta".
        batch: the image (N, C, *input) and its target, on "meta" too.
        copies: of the weights that an optimiser and a running mean keep: 2 for AdamW, 1 more with a mean.
        dtype: in which convolutions and products of matrices compute, as under autocast.

    Raises:
        ValueError: the network does not take images of that size.
    """
    own = [*objective.parameters(), *objective.buffers()]
    mode = LiveBytes(batch[0], own)
    with torch.compiler.set_stance("force_eager"), mode, _LowPrecision(dtype):
        objective(*batch).backward()
    trained = sum(p.nbytes for p in objective.parameters() if p.requires_grad)
    weights = sum(tensor.nbytes for tensor in own)
    return StepFootprint(mode.peak_bytes, weights + copies * trained, weights)


class _LowPrecision(TorchFunctionMode):
    """Does what autocast does, on a device that has none."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, on copies in low precision where it multiplies."""
        if func in _MULTIPLYING and self._dtype != torch.float32:
            args = [self._lowered(value) for value in args]
            kwargs = {name: self._lowered(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _lowered(self, value: Any) -> Any:
        """Return a float32 tensor in low precision, anything else as it is."""
        return value.to(self._dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


# What autocast does in low precision on a CPU and on a GPU alike.
_MULTIPLYING = {
    *(torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.einsum, Tensor.matmul, Tensor.__matmul__),
    *(nn.functional.linear, nn.functional.scaled_dot_product_attention),
}


_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors made within it that are still in use.

    Args:
        image: counted from the beginning.
        others: there anyway; neither they nor their views count.

    Attributes:
        peak_bytes: most bytes in use at once.
    """

    def __init__(self, image: Tensor, others: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._others = {tensor.untyped_storage()._cdata for tensor in others}
        self._live = WeakTensorKeyDictionary()
        self._live[image] = None
        self.peak_bytes = self._at_most = image.nbytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count anew."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._others:
                self._live[leaf] = None
                self._at_most += leaf.untyped_storage().nbytes()
        rearranged = 0
        if func.overloadpacket in _CONVOLUTIONS:  # what they take and give is copied to the layout of their kernels
            images = [args[0], *args[1:2]] if func.overloadpacket is _CONVOLUTIONS[1] else args[:1]
            rearranged = sum(leaf.nbytes for leaf in tree_leaves([images, result]) if isinstance(leaf, Tensor))
        if self._at_most + rearranged > self.peak_bytes:  # else there is no new peak, and counting takes long
            self._at_most = self._counted()
            self.peak_bytes = max(self.peak_bytes, self._at_most + rearranged)
        return result

    def _counted(self) -> int:
        """Return the bytes of all tensors that are still in use, each storage once."""
        storages = (tensor.untyped_storage() for tensor in self._live)
        return sum({s._cdata: s.nbytes() for s in storages}.values())
