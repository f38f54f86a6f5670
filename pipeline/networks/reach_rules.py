"""How each of torch's operations hands on the reach of its operands: the rules behind `reach.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Six bounds: along each axis of the image the first voxel that an element depends on, and minus the last. Each is a
# whole-number tensor on the CPU that broadcasts to the shape of what it tells of.
Reach = tuple[Tensor, ...]

aten = torch.ops.aten

# A bound above every voxel: of an element that depends on none, such as padding.
NOTHING = 2**30


@dataclass(frozen=True)
class Call:
    """One operation and one of its results.

    Attributes:
        function: the operation.
        args: what it was called with.
        reaches: of each tensor among them, in order; None where it does not depend on the image.
        output: the result.
        number: which of several results.
    """

    function: Any
    args: Sequence[Any]
    reaches: Sequence[Reach | None]
    output: Tensor
    number: int

    @property
    def image(self) -> Tensor:
        """The first operand."""
        operand: Tensor = self.args[0]
        return operand

    def option(self, place: int, default: Any) -> Any:
        """Return an argument, or its default where it was not given."""
        return self.args[place] if len(self.args) > place else default

    def union(self) -> Reach:
        """Return what any of the operands, broadcast together, depends on."""
        return union(self.reaches)


Rule = Callable[[Call], Reach]


def union(reaches: Sequence[Reach | None]) -> Reach:
    """Return what any of several, broadcast together, depends on."""
    known = [reach for reach in reaches if reach is not None]
    bounds = known[0]
    for other in known[1:]:
        bounds = tuple(torch.minimum(a, b) for a, b in zip(bounds, other, strict=True))
    return bounds


def _over(bounds: Reach, dims: Sequence[int], keep: bool = True) -> Reach:
    """Return what all elements along some dimensions together depend on."""
    return tuple(bound.amin(list(dims), keepdim=keep) if dims else bound for bound in bounds)


def rule_of(function: Any) -> Rule | None:
    """Return the rule of an operation, None where there is none: then say `of_all`."""
    if function.overloadpacket in _RULES:
        return _RULES[function.overloadpacket]
    return _elementwise if torch.Tag.pointwise in function.tags else None


def of_all(call: Call) -> Reach:
    """Every element depends on all that goes in."""
    known = [reach for reach in call.reaches if reach is not None]
    smallest = [torch.stack([reach[i].amin() for reach in known]).amin() for i in range(6)]
    return tuple(bound.view([1] * call.output.ndim) for bound in smallest)


def _elementwise(call: Call) -> Reach:
    """Each element depends on those in its place."""
    return call.union()


def _first(call: Call) -> Reach:
    """Each element depends on the first operand's in its place."""
    return union(call.reaches[:1])


def _moved(call: Call) -> Reach:
    """Elements are put elsewhere, or left out: do the same to the bounds."""
    answers = [call.function(bound.expand(call.image.shape), *call.args[1:]) for bound in call.union()]
    return tuple(answer if isinstance(answer, Tensor) else answer[call.number] for answer in answers)


def _regrouped(call: Call) -> Reach:
    """Dimensions are split and merged: spread a bound over those that are, and no others."""
    groups = list(_groups(call.image.shape, call.output.shape))
    return tuple(_regrouped_bound(bound, call.image.shape, call.output.shape, groups) for bound in call.union())


def _regrouped_bound(
    bound: Tensor, before: Sequence[int], after: Sequence[int], groups: Sequence[tuple[range, range]]
) -> Tensor:
    """Return one bound in another shape."""
    spread: list[int] = []
    shape: list[int] = []
    for old, new in groups:
        varies = any(bound.shape[dim] > 1 for dim in old)
        spread += [before[dim] if varies else 1 for dim in old]
        shape += [after[dim] if varies else 1 for dim in new]
    return bound.expand(spread).reshape(shape)


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Yield the smallest runs of dimensions of one shape that hold as many elements as a run of the other."""
    old = new = 0
    while old < len(before) or new < len(after):
        first, other = old, new
        have, old = (before[old], old + 1) if old < len(before) else (1, old)
        want, new = (after[new], new + 1) if new < len(after) else (1, new)
        while have != want:
            if have < want:
                have, old = have * before[old], old + 1
            else:
                want, new = want * after[new], new + 1
        yield range(first, old), range(other, new)


def _joined(call: Call) -> Reach:
    """Concatenation: one bound after another along a dimension."""
    parts, dim = call.args[0], call.option(1, 0)
    reaches = [reach or _nothing(part.ndim) for part, reach in zip(parts, call.reaches, strict=True)]
    return tuple(
        _joined_bounds(bounds, [part.shape[dim] for part in parts], dim) for bounds in zip(*reaches, strict=True)
    )


def _joined_bounds(bounds: Sequence[Tensor], sizes: Sequence[int], dim: int) -> Tensor:
    """Join one bound of each part; along the other dimensions they broadcast."""
    shape = torch.broadcast_shapes(*(bound.narrow(dim, 0, 1).shape for bound in bounds))  # type: ignore[no-untyped-call]
    return torch.cat(
        [
            bound.expand([size if d == dim % len(shape) else n for d, n in enumerate(shape)])
            for bound, size in zip(bounds, sizes, strict=True)
        ],
        dim,
    )


def _stacked(call: Call) -> Reach:
    """Concatenation along a new dimension."""
    dim = call.option(1, 0) % call.output.ndim
    parts = [part.unsqueeze(dim) for part in call.args[0]]
    reaches = [reach and tuple(bound.unsqueeze(dim) for bound in reach) for reach in call.reaches]
    return _joined(replace(call, args=(parts, dim), reaches=reaches))


def _nothing(ndim: int) -> Reach:
    """Return the reach of what does not depend on the image."""
    return (torch.full([1] * ndim, NOTHING),) * 6


def _padded(call: Call) -> Reach:
    """Padding by a constant depends on nothing; beside a dimension along which all elements have one reach, on that."""
    padding = call.args[1]
    bounds = []
    for bound in call.union():
        varies = [size > 1 for size in reversed(bound.shape) for _ in range(2)]
        bounds.append(F.pad(bound, [n * own for n, own in zip(padding, varies, strict=False)], value=NOTHING))
    return tuple(bounds)


def _padded_by_border(call: Call) -> Reach:
    """Padding repeats the outermost elements."""
    bounds = call.union()
    for number in range(len(call.args[1]) // 2):
        dim, before = call.image.ndim - 1 - number, call.args[1][2 * number]
        size = call.image.shape[dim]
        taps = (torch.arange(call.output.shape[dim]) - before).clamp(0, size - 1)
        bounds = _windowed(bounds, dim, size, taps[:, None])
    return bounds


def _rolled(call: Call) -> Reach:
    """What leaves at one end comes in at the other."""
    return tuple(torch.roll(bound, call.args[1], call.args[2]) for bound in call.union())


def _reduced(call: Call) -> Reach:
    """A sum, mean or largest over some dimensions."""
    ndim, dims = call.image.ndim, call.option(1, None)
    dims = [dims] if isinstance(dims, int) else dims or range(ndim)
    return _over(call.union(), dims, keep=call.output.ndim == ndim)


def _softmaxed(call: Call) -> Reach:
    """Each element depends on all along one dimension."""
    return _over(call.union(), [call.args[1]])


def _layer_normed(call: Call) -> Reach:
    """Each element depends on all along the last dimensions."""
    return _over(_first(call), range(-len(call.args[1]), 0))


def _scattered(call: Call) -> Reach:
    """An element may have been put anywhere along one dimension."""
    return _over(call.union(), [call.args[1]])


def _multiplied(call: Call) -> Reach:
    """A product of matrices, along rows of the first and columns of the second; of two that both depend on the image,
    which is attention, everything depends on all.
    """
    left, right = call.reaches[-2:]
    if left is not None and right is not None:
        return of_all(call)
    return _over(left, [-1]) if left else _over(right, [-2]) if right else union(call.reaches)


def _convolved(call: Call) -> Reach:
    """A convolution, or a transposed one."""
    image, weight, _, stride, padding, dilation, transposed, _, groups = call.args[:9]
    bounds = _first(call)
    if not groups == image.shape[1] == call.output.shape[1]:
        bounds = _over(bounds, [1])
    for axis in range(image.ndim - 2):
        dim, numbers = axis + 2, (stride[axis], padding[axis], dilation[axis])
        at = _taps_back if transposed else _taps
        bounds = _windowed(bounds, dim, image.shape[dim], at(call.output.shape[dim], weight.shape[dim], *numbers))
    return bounds


def _taps(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """Return (size, kernel): the input at which each output looks."""
    return torch.arange(size)[:, None] * stride - padding + torch.arange(kernel) * dilation


def _taps_back(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """Return (size, kernel): the input from which each output of a transposed convolution gets something, or -1."""
    positions = torch.arange(size)[:, None] + padding - torch.arange(kernel) * dilation
    return torch.where(positions % stride == 0, positions.div(stride, rounding_mode="floor"), -1)


def _windowed(bounds: Reach, dim: int, size: int, taps: Tensor) -> Reach:
    """Return bounds after each output along a dimension of `size` voxels has looked at some; outside there is none."""
    outside = (taps < 0) | (taps >= size)
    answers = []
    for bound in bounds:
        if bound.shape[dim] > 1:
            taken = bound.movedim(dim, -1)[..., taps.clamp(0, size - 1)]
            bound = taken.masked_fill(outside, NOTHING).amin(-1).movedim(-1, dim)
        answers.append(bound)
    return tuple(answers)


def _pooled(call: Call) -> Reach:
    """Max or average pooling."""
    kernel = call.args[1]
    dilation = call.option(4, [1]) if call.function.overloadpacket in MAX_POOLINGS else [1]
    options = (kernel, call.option(2, None) or kernel, call.option(3, [0]), dilation)
    bounds = call.union()
    for axis, dim in enumerate(range(2, call.output.ndim)):
        numbers = [values[axis % len(values)] for values in options]
        bounds = _windowed(bounds, dim, call.image.shape[dim], _taps(call.output.shape[dim], *numbers))
    return bounds


def _pooled_to_size(call: Call) -> Reach:
    """Average pooling to a size that was asked for."""
    bounds = call.union()
    for dim in range(2, call.output.ndim):
        size, wanted = call.image.shape[dim], call.output.shape[dim]
        first = torch.arange(wanted) * size // wanted
        stop = -(-(torch.arange(wanted) + 1) * size // wanted)
        taps = first[:, None] + torch.arange(int((stop - first).max()))
        bounds = _windowed(bounds, dim, size, torch.where(taps < stop[:, None], taps, -1))
    return bounds


def _repeated(call: Call) -> Reach:
    """Interpolation by the nearest voxel."""
    bounds = call.union()
    for dim in range(2, call.output.ndim):
        size, wanted = call.image.shape[dim], call.output.shape[dim]
        bounds = _windowed(bounds, dim, size, (torch.arange(wanted) * size // wanted)[:, None])
    return bounds


def _interpolated(call: Call) -> Reach:
    """Linear interpolation: of two voxels, or of the one that is met exactly."""
    bounds = call.union()
    for dim in range(2, call.output.ndim):
        size, wanted, corners = call.image.shape[dim], call.output.shape[dim], bool(call.args[2])
        places = torch.arange(wanted, dtype=torch.float64)
        if corners:
            places = places * (size - 1) / max(wanted - 1, 1)
        else:
            places = ((places + 0.5) * size / wanted - 0.5).clamp(0, size - 1)
        taps = torch.stack([(places + 1e-9).floor(), (places - 1e-9).ceil()], dim=1).long()
        bounds = _windowed(bounds, dim, size, taps)
    return bounds


def _of_source(call: Call) -> Reach:
    """Each element is overwritten by the second operand's in its place."""
    return union(call.reaches[1:])


NORMS = (aten.native_batch_norm, aten.native_group_norm)
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)
CONSTANTS = (aten.new_zeros, aten.new_ones, aten.new_empty, aten.zeros_like, aten.ones_like, aten.empty_like)
MAX_POOLINGS = (aten.max_pool2d_with_indices, aten.max_pool3d_with_indices)
AVERAGE_POOLINGS = (aten.avg_pool2d, aten.avg_pool3d)

_RULES: dict[Any, Rule] = {
    operation: rule
    for rule, operations in {
        _first: (aten.clone, aten._to_copy, aten.alias, aten.detach, aten.lift_fresh, aten._prelu_kernel, *NORMS),
        _regrouped: (aten.view, aten._unsafe_view, aten._reshape_alias, aten._reshape_copy),
        _moved: (
            *(aten.permute, aten.transpose, aten.t, aten.slice, aten.select, aten.unsqueeze, aten.squeeze),
            *(aten.expand, aten.split, aten.split_with_sizes, aten.unbind, aten.flip, aten.index_select),
        ),
        _joined: (aten.cat,),
        _stacked: (aten.stack,),
        _padded: (aten.constant_pad_nd,),
        _padded_by_border: (aten.replication_pad2d, aten.replication_pad3d),
        _rolled: (aten.roll,),
        _reduced: (aten.mean, aten.sum, aten.amax, aten.amin, aten.argmax),
        _softmaxed: (aten._softmax, aten._log_softmax),
        _layer_normed: (aten.native_layer_norm,),
        _scattered: (aten.scatter,),
        _of_source: (aten.copy_,),
        _multiplied: PRODUCTS,
        _convolved: (aten.convolution,),
        _pooled: (*MAX_POOLINGS, *AVERAGE_POOLINGS),
        _pooled_to_size: (aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d),
        _repeated: (aten.upsample_nearest2d, aten.upsample_nearest3d),
        _interpolated: (aten.upsample_bilinear2d, aten.upsample_trilinear3d),
    }.items()
    for operation in operations
}
