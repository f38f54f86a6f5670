"""A network in figures, without computing anything: layers of each level, parameters, multiply-adds, receptive field,
legal sizes and the memory of its activations.

The network runs on torch's "meta" device, where tensors have a shape and no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import flop_registry

from pipeline.networks.contract import Network, NetworkTask, Size, as_size
from pipeline.networks.reach import ReachMode
from pipeline.networks.reach_rules import AVERAGE_POOLINGS, MAX_POOLINGS, NOTHING, PRODUCTS, Reach, aten

# Voxels along each axis of the input on which the receptive field is looked for: more than a field of any use.
FIELD_SEARCH = 1024
# Planes of a flat axis there: enough to see that they stand alone.
FLAT_SEARCH = 3

# Along each axis the fewest and the most voxels that an output voxel sees; None: all that there are.
Field = tuple[tuple[int, int] | None, ...]

_UPSAMPLINGS = {
    aten.upsample_nearest2d: "nearest upsampling",
    aten.upsample_nearest3d: "nearest upsampling",
    aten.upsample_bilinear2d: "linear upsampling",
    aten.upsample_trilinear3d: "linear upsampling",
}


@dataclass(frozen=True)
class Layer:
    """A convolution, pooling, interpolation or product of matrices.

    Attributes:
        kind: what it is, with its kernel.
        grid: voxels of its output; empty where there is no grid, as of tokens.
        channels: of its output.
        parameters: of its own.
        multiply_adds: for one window.
    """

    kind: str
    grid: tuple[int, ...]
    channels: int
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Description:
    """What a network is.

    Attributes:
        parameters: numbers that are learned.
        multiply_adds: of convolutions and products of matrices, for one window.
        field_voxels: along each axis the voxels that an output voxel depends on through convolutions, fewest and most
            over its places in the stride's block; None where it is the whole window.
        field_mm: the most of them in mm.
        sees_statistics: norms take their statistics over the whole window, besides.
        margin: voxels lost on each side.
        stride: legal inputs are a stride apart.
        input_size: voxels that are read for a window of the patch.
        output_size: voxels that it yields of them.
        smallest_input: the smallest legal input; `one_size` where it is the only one.
        inference_bytes: most bytes that activations of one window take at once, in float32.
        training_bytes: activations of one patch that are kept for the gradient, in float32.
        layers: in the order in which they run.
        scales: the resolutions, finest first: voxels of the input for one of the level's; None: tokens, the last.
        levels: the numbers in `layers` of each resolution's.
        unknown: operations that count as depending on everything, for want of a rule.
    """

    parameters: int
    multiply_adds: int
    field_voxels: Field
    field_mm: tuple[float | None, ...]
    sees_statistics: bool
    margin: Size
    stride: Size
    input_size: Size
    output_size: Size
    smallest_input: Size
    one_size: bool
    inference_bytes: int
    training_bytes: int
    layers: tuple[Layer, ...]
    scales: tuple[Size | None, ...]
    levels: tuple[tuple[int, ...], ...]
    unknown: tuple[str, ...]


def describe(network: Network, task: NetworkTask) -> Description:
    """Describe a network; it is moved to the device "meta" and loses its weights.

    Args:
        network: built for `task`.
        task: says the patch and the spacing.

    Raises:
        ValueError: the network does not take the task's patch.
    """
    network.to("meta").eval()
    size = network.input_size(task.patch_size)
    mode, layers, _ = _run(network, _image(task, size))
    if mode.has_attention:
        field: Field = tuple((1, 1) if axis == task.flat_axis else None for axis in range(3))
        scales = [_scale_of_grid(layer.grid, size, task.flat_axis) for layer in layers]
    else:
        field, scales = _field_and_scales(network, task)
    order = sorted(set(scales), key=lambda scale: prod(scale) if scale else inf)
    smallest, only = _smallest_input(network, task, size)
    return Description(
        parameters=sum(p.numel() for p in network.parameters()),
        multiply_adds=sum(layer.multiply_adds for layer in layers),
        field_voxels=field,
        field_mm=tuple(seen and seen[1] * mm for seen, mm in zip(field, task.spacing_mm, strict=True)),
        sees_statistics=mode.sees_statistics,
        margin=network.margin,
        stride=network.stride,
        input_size=size,
        output_size=network.output_size(size),
        smallest_input=smallest,
        one_size=only,
        inference_bytes=mode.peak_bytes,
        training_bytes=_kept_bytes(network, _image(task, size)),
        layers=tuple(layers),
        scales=tuple(order),
        levels=tuple(tuple(i for i, own in enumerate(scales) if own == scale) for scale in order),
        unknown=tuple(sorted(mode.unknown)),
    )


def _image(task: NetworkTask, size: Size) -> Tensor:
    """Return an image without values."""
    return torch.empty(1, task.in_channels, *size, device="meta")


def _run(network: Network, image: Tensor) -> tuple[ReachMode, list[Layer], list[Reach]]:
    """Run the network; return what was seen, its layers, and the reach of each layer's output, the network's last."""
    layers: list[Layer] = []
    reaches: list[Reach] = []

    def listen(function: Any, args: Sequence[Any], output: Tensor, reach: Reach) -> None:
        layer = _layer(function.overloadpacket, args, output)
        if layer is not None:
            layers.append(layer)
            reaches.append(reach)

    mode = ReachMode(image, listen)
    with torch.no_grad(), mode:
        logits = network(image)
    reaches.append(mode.of(logits) or ())
    return mode, layers, reaches


def _layer(operation: Any, args: Sequence[Any], output: Tensor) -> Layer | None:
    """Return the layer that an operation is, None where it is no layer."""
    weights: list[Tensor | None] = []
    if operation is aten.convolution:
        weights = [args[1], args[2]]
        kind = f"{'transposed ' * args[6]}{'grouped ' * (args[8] > 1)}convolution {_by(args[1].shape[2:])}"
    elif operation in (*MAX_POOLINGS, *AVERAGE_POOLINGS):
        kind = f"{'max' if operation in MAX_POOLINGS else 'average'} pooling {_by(args[1])}"
    elif operation in _UPSAMPLINGS:
        kind = _UPSAMPLINGS[operation]
    elif operation in PRODUCTS:
        weights = {aten.addmm: [args[0], args[-1]], aten.mm: [args[-1]]}.get(operation, [])
        kind = "linear" if weights else "attention product"
    else:
        return None
    count = flop_registry.get(operation)
    return Layer(
        kind=kind,
        grid=() if operation in PRODUCTS else tuple(output.shape[2:]),
        channels=output.shape[-1 if operation in PRODUCTS else 1],
        parameters=sum(weight.numel() for weight in weights if weight is not None),
        multiply_adds=count(*args, out_val=output) // 2 if count else 0,
    )


def _by(numbers: Sequence[int]) -> str:
    """Return sizes as people write them: 3x3x1."""
    return "x".join(map(str, numbers))


def _field_and_scales(network: Network, task: NetworkTask) -> tuple[Field, list[Size | None]]:
    """Return the receptive field along each axis, and the scale of each layer: the distance of its voxels in the
    input's. Both are read from a run on an input so large that its border is far.
    """
    size = network.input_size(as_size(FLAT_SEARCH if axis == task.flat_axis else FIELD_SEARCH for axis in range(3)))
    _, _, reaches = _run(network, _image(task, size))
    field = tuple(_field_along(axis, reaches[-1], size[axis], network.stride[axis]) for axis in range(3))
    return field, [as_size(_scale_along(axis, reach) for axis in range(3)) for reach in reaches[:-1]]


def _field_along(axis: int, reach: Reach, size: int, stride: int) -> tuple[int, int] | None:
    """Return the fewest and most voxels that the output voxels of a stride's block in the middle see, None: all."""
    first, last = _seen_along(axis, reach)
    middle = slice(len(first) // 2, len(first) // 2 + stride)
    first, last = first[middle], last[middle]
    if first.min() <= 0 and last.max() >= size - 1:
        return None
    seen = last - first + 1
    return int(seen.min()), int(seen.max())


def _scale_along(axis: int, reach: Reach) -> int:
    """Return the distance of a layer's voxels in the input's, on average over its middle half."""
    first, _ = _seen_along(axis, reach)
    places = (first < NOTHING).nonzero()[:, 0]
    low, high = places[len(places) // 4], places[3 * len(places) // 4]
    return round(int(first[high] - first[low]) / int(high - low)) if high > low else 1


def _seen_along(axis: int, reach: Reach) -> tuple[Tensor, Tensor]:
    """Return the first and the last voxel of the input that each place along an axis sees, (n,) each."""
    first, last = torch.broadcast_tensors(reach[2 * axis], -reach[2 * axis + 1])  # type: ignore[no-untyped-call]
    along = max(range(first.ndim), key=lambda dim: first.shape[dim])
    others = [dim for dim in range(first.ndim) if dim != along]
    return first.amin(others), last.amax(others)


def _scale_of_grid(grid: tuple[int, ...], image: Size, flat_axis: int | None) -> Size | None:
    """Return the scale of a padded network's layer by its size alone, None of tokens."""
    if not grid:
        return None
    sizes = iter(grid)
    lies_flat = len(grid) == 2
    return as_size(
        1 if lies_flat and axis == flat_axis else round(size / next(sizes)) for axis, size in enumerate(image)
    )


def _smallest_input(network: Network, task: NetworkTask, size: Size) -> tuple[Size, bool]:
    """Return the smallest legal input, and whether it is the only one.

    Some norms need two voxels where a network pools most, so the smallest is the first that it runs on.
    """
    output: Size = (1, 1, 1)
    while (smallest := network.input_size(output)) != size:
        try:
            with torch.no_grad():
                network(_image(task, smallest))
            break
        except ValueError:
            output = as_size(n + (axis != task.flat_axis) for axis, n in enumerate(network.output_size(smallest)))
    try:
        network.input_size(as_size(n + 1 for n in network.output_size(size)))
    except ValueError:
        return smallest, True
    return smallest, False


def _kept_bytes(network: Network, image: Tensor) -> int:
    """Return the bytes of the tensors that a training step keeps for the gradient, weights excepted."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    network.train()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(image)
    network.eval()
    del logits
    return sum(size for storage, size in kept.items() if storage not in weights)
