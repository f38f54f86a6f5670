"""Weights between networks of other classes and channels: entry by entry, by name, in every network of the table."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from network_variants import ALL, TASK
from torch import Tensor

from pipeline.networks import Network, NetworkTask, build_network
from pipeline.networks.transfer import Shared, Transfer, counting_axes, shared_names, transfer


def axes_of(name: str, options: dict[str, Any], task: NetworkTask = TASK) -> dict[str, Any]:
    return counting_axes(lambda built_for: build_network(name, options, built_for), task)


def test_names_in_common_by_hand() -> None:
    shared = shared_names(["background", "liver", "tumour"], ["background", "spleen", "liver"])
    assert shared == Shared(3, 3, [(0, 0), (1, 2)])
    assert not shared.is_all
    assert shared_names(["a", "b"], ["a", "b"]).is_all
    assert not shared_names(["a", "b"], ["b", "a"]).is_all
    assert not shared_names(["a", "b"], ["a"]).is_all


def test_axes_of_a_unet_by_hand() -> None:
    axes = axes_of("unet", {"width": 4, "levels": 2})
    counting = {name: pair for name, pair in axes.items() if pair != ((), ())}
    assert counting == {
        "encoder.0.0.0.weight": ((), (1,)),
        "heads.0.weight": ((0,), ()),
        "heads.0.bias": ((0,), ()),
    }


@pytest.mark.parametrize(("name", "options"), ALL, ids=[name for name, _ in ALL])
def test_every_network_says_where_its_classes_and_channels_are(name: str, options: dict[str, Any]) -> None:
    axes = axes_of(name, options)
    assert any(classes for classes, _ in axes.values())
    assert any(channels for _, channels in axes.values())


def test_entries_go_by_name_on_several_axes_at_once() -> None:
    there, here = torch.arange(24.0).reshape(3, 2, 4), torch.full((2, 2, 3), -1.0)
    # Classes a, b, c -> c, d on the first axis; channels p, q, r, s -> s, t, q on the last.
    done = transfer(
        {"w": there},
        {"w": here},
        {"w": ((0,), (2,))},
        shared_names(list("abc"), list("cd")),
        shared_names(list("pqrs"), list("stq")),
    )
    assert torch.equal(here[0, :, 0], there[2, :, 3])
    assert torch.equal(here[0, :, 2], there[2, :, 1])
    assert bool((here[1] == -1).all())
    assert bool((here[0, :, 1] == -1).all())
    assert done == Transfer(numbers={"w": 4}, in_part={"w": ((3, 2, 4), (2, 2, 3))})


def test_the_same_size_with_other_names_is_no_copy() -> None:
    there, here = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    swapped = shared_names(["background", "left", "right"], ["background", "right", "left"])
    transfer({"b": there}, {"b": here}, {"b": ((0,), ())}, swapped, shared_names([], []))
    assert here.tolist() == [1.0, 3.0, 2.0]


def test_what_does_not_fit_is_left_as_it_is() -> None:
    here = torch.zeros(2, 3)
    none = shared_names(["a"], ["b", "c"])
    for source, classes in ((torch.ones(1, 4), none), (torch.ones(1, 3), none), (torch.ones(1), none)):
        done = transfer({"w": source, "x": source}, {"w": here, "y": here}, {"w": ((0,), ())}, classes, none)
        assert done == Transfer(other_shape={"w": (tuple(source.shape), (2, 3))})
    assert not here.any()


def test_where_classes_are_counted_together_with_something_else_only_the_same_ones_are_taken() -> None:
    options = {"width": 4, "stages": 3, "stride": 4, "upsampling": "pixel_shuffle"}
    source, target = (build_network("fcn", options, TASK).state_dict() for _ in range(2))
    before = {name: tensor.clone() for name, tensor in target.items()}
    axes, channels = axes_of("fcn", options), shared_names(["T1", "T2"], ["T1", "T2"])
    names = ["background", "left", "right"]
    swapped = shared_names(names, ["background", "right", "left"])
    done = transfer(source, target, axes, swapped, channels)
    shuffled = [name for name in target if name.startswith(("enlargements", "last"))]
    assert len(shuffled) == 4
    assert sorted(done.other_shape) == sorted(shuffled)
    assert all(torch.equal(target[name], before[name]) for name in shuffled)
    done = transfer(source, target, axes, shared_names(names, names), channels)
    assert done.copied == list(target)
    assert all(torch.equal(target[name], source[name]) for name in target)


def test_channels_that_are_counted_together_with_something_else_are_taken_only_where_they_are_the_same() -> None:
    here, classes = torch.zeros(4), shared_names(["a"], ["a"])
    for names, taken in ((["q", "p"], 0.0), (["p", "q"], 1.0)):
        done = transfer({"w": torch.ones(4)}, {"w": here}, {"w": ((), None)}, classes, shared_names(["p", "q"], names))
        assert done.copied == (["w"] if taken else [])
        assert here.tolist() == [taken] * 4


def bright_and_dark(network: Network, classes: list[str], number: int) -> Tensor:
    """Return the cross-entropy of telling blobs brighter and darker than their surroundings."""
    size = network.input_size(TASK.patch_size)
    noise = torch.randn(2, 1, 4, 6, 4, generator=torch.Generator().manual_seed(number))
    blobs = F.interpolate(noise, size, mode="trilinear")
    target = torch.zeros(2, *size, dtype=torch.long)
    for name, found in (("bright", blobs[:, 0] > 0.4), ("dark", blobs[:, 0] < -0.4)):
        if name in classes:
            target[found] = classes.index(name)
    return F.cross_entropy(network(blobs), target)


def trained(network: Network, classes: list[str], steps: int) -> float:
    """Train, and return the loss on patches that were not seen."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for number in range(steps):
        optimiser.zero_grad()
        bright_and_dark(network, classes, number).backward()
        optimiser.step()
    with torch.no_grad():
        return sum(float(bright_and_dark(network, classes, 1000 + k)) for k in range(4)) / 4


def test_a_training_with_fewer_classes_starts_faster_than_from_random_weights() -> None:
    def built(classes: list[str], seed: int) -> Network:
        torch.manual_seed(seed)
        task = replace(TASK, in_channels=1, num_classes=len(classes))
        return build_network("unet", {"width": 4, "levels": 2}, task)

    three, two = ["background", "bright", "dark"], ["background", "dark"]
    source = built(three, 0)
    trained(source, three, 40)
    random, begun = built(two, 1), built(two, 1)
    axes = axes_of("unet", {"width": 4, "levels": 2}, replace(TASK, in_channels=1, num_classes=2))
    one = shared_names(["MR"], ["MR"])
    done = transfer(source.state_dict(), begun.state_dict(), axes, shared_names(three, two), one)
    assert sorted(done.in_part) == ["heads.0.bias", "heads.0.weight"]
    assert not done.other_shape
    # Before its first step it knows more than the other after five.
    assert trained(begun, two, 0) < trained(random, two, 5)
