"""Weights from one network to another of other classes or channels: what stands for a class or channel that both have
is taken by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.networks.contract import Network, NetworkTask

Shape = tuple[int, ...]
Axes = tuple[int, ...] | None
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shared:
    """What two lists of names have in common.

    Attributes:
        there, here: names in each list.
        places: position there and here of each name that both have.
    """

    there: int
    here: int
    places: list[tuple[int, int]]

    @property
    def is_all(self) -> bool:
        """Whether both lists are the same."""
        return self.there == self.here and self.places == [(k, k) for k in range(self.there)]


def shared_names(there: Sequence[str], here: Sequence[str]) -> Shared:
    """Return what two lists of distinct names have in common, in the order of the second."""
    return Shared(len(there), len(here), [(there.index(name), k) for k, name in enumerate(here) if name in there])


def counting_axes(build: Callable[[NetworkTask], Network], task: NetworkTask) -> dict[str, tuple[Axes, Axes]]:
    """Return for each of a network's tensors the axes that count its classes, and those that count the channels.

    They are found by building it with one more of each, without values. None where an axis counts them together with
    something else, as a pixel shuffle's does: what is whose cannot be told there.

    Args:
        build: makes the network for a task.
        task: what the network is built for.

    Raises:
        ValueError: as the builder.
    """
    shapes, more_classes, more_channels = (
        _shapes(build, changed)
        for changed in (
            task,
            replace(task, num_classes=task.num_classes + 1),
            replace(task, in_channels=task.in_channels + 1),
        )
    )
    return {
        name: (
            _grown(task.num_classes, shape, more_classes[name]),
            _grown(task.in_channels, shape, more_channels[name]),
        )
        for name, shape in shapes.items()
    }


@dataclass
class Transfer:
    """What became of a transfer.

    Attributes:
        numbers: tensors of which something was taken -> how many numbers.
        copied: those taken as they are.
        in_part: those of which what both networks have a name for was taken -> shape there, shape here.
        other_shape: those that both have in shapes that do not fit, or of which it cannot be told what is for which of
            other classes or channels -> shape there, shape here.
    """

    numbers: dict[str, int] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    in_part: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    other_shape: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)


def transfer(
    there: Tensors,
    here: Tensors,
    axes: Mapping[str, tuple[Axes, Axes]],
    classes: Shared,
    channels: Shared,
) -> Transfer:
    """Copy what fits of one network's tensors into those of the same name of another, each in the memory that it has.

    Args:
        there: tensors to take from.
        here: tensors to fill.
        axes: of the tensors to fill, as `counting_axes` gives them.
        classes: what the networks' outputs have in common.
        channels: what their images have in common.
    """
    done = Transfer()
    for name in (name for name in here if name in there):
        source, target = there[name], here[name]
        counted = list(zip(axes[name], (classes, channels), strict=True))
        named = {axis: shared for own, shared in reversed(counted) for axis in own or ()}
        tangled = any(own is None and not shared.is_all for own, shared in counted)
        shapes = tuple(source.shape), tuple(target.shape)
        if tangled or not _fits(*shapes, named):
            done.other_shape[name] = shapes
        elif all(shared.is_all for shared in named.values()):
            target.copy_(source)
            done.copied.append(name)
            done.numbers[name] = target.numel()
        else:
            done.in_part[name] = shapes
            done.numbers[name] = _copy_entries(source, target, named)
    return done


def _shapes(build: Callable[[NetworkTask], Network], task: NetworkTask) -> dict[str, Shape]:
    """Return the shapes of a network's tensors; none of its weights is made."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build(task).state_dict().items()}


def _grown(count: int, shape: Shape, with_one_more: Shape) -> Axes:
    """Return the axes of `count` entries that have one more where there is one more to count; None where others change
    too.
    """
    grown = {axis: pair for axis, pair in enumerate(zip(shape, with_one_more, strict=True)) if pair[0] != pair[1]}
    return tuple(grown) if all(pair == (count, count + 1) for pair in grown.values()) else None


def _fits(there: Shape, here: Shape, named: Mapping[int, Shared]) -> bool:
    """Tell whether two tensors differ in nothing but axes of names, of which they share some."""
    if len(there) != len(here):
        return False
    wanted = {axis: (shared.there, shared.here) for axis, shared in named.items() if shared.places}
    if len(wanted) < len(named):
        return False
    return all(pair == wanted.get(axis, (pair[1], pair[1])) for axis, pair in enumerate(zip(there, here, strict=True)))


def _copy_entries(source: Tensor, target: Tensor, named: Mapping[int, Shared]) -> int:
    """Copy the entries of names that both have, and return how many numbers that was."""
    everything = [torch.arange(length).expand(2, -1) for length in target.shape]
    pairs = [torch.tensor(named[k].places).T if k in named else both for k, both in enumerate(everything)]
    there, here = (torch.meshgrid(*(pair[side] for pair in pairs), indexing="ij") for side in range(2))
    target[here] = source[there].to(target)
    return there[0].numel()
