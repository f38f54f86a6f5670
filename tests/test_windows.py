"""Windows against a slow, obvious reference: all logits of the volume summed, and a map of the weights."""

import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_plan
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from pipeline.config import InferenceSection, Output
from pipeline.errors import ResourceError
from pipeline.inference.planes import LogitPlanes, ahead
from pipeline.inference.windows.ring import CERTAIN
from pipeline.inference.windows.streaming import stream_logits
from pipeline.inference.windows.tiling import Windowing
from pipeline.networks import Network, NetworkTask, build_network
from pipeline.volumes.body import BLOCK, Body, block_counts

CLASSES = 3


class ValidNetwork(Network):
    """Valid convolutions about one level of pooling: it loses three voxels a side and pools by two."""

    margin = (3, 3, 3)
    stride = (2, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv3d(1, 4, 3)
        self.after = nn.Conv3d(4, CLASSES, 3)

    def forward(self, image: Tensor) -> Tensor:
        pooled = functional.max_pool3d(self.before(image), 2)
        return functional.interpolate(self.after(pooled), scale_factor=2)


class PlanarNetwork(Network):
    """Valid along z only."""

    margin = (0, 0, 2)

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(1, CLASSES, 5, padding=(2, 2, 0))

    def forward(self, image: Tensor) -> Tensor:
        return self.convolution(image)


def make_network(channels: int = 1) -> Network:
    torch.manual_seed(0)
    task = NetworkTask(in_channels=channels, num_classes=CLASSES, patch_size=(8, 8, 8), spacing_mm=(1.0, 1.0, 1.0))
    return build_network("unet", {"width": 4, "levels": 2}, task).eval()


def make_image(*shape: int, channels: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(channels, *shape)).astype(np.float32))


def collect(network: Network, image: Tensor, windowing: Windowing, batch: int = 2) -> Tensor:
    """Put a stream's planes together to (K, X, Y, Z), each plane once and in order."""
    stream = stream_logits([network], image, windowing, batch=batch, dtype=torch.float32)
    planes = list(stream)
    assert [p.start for p in planes] == np.cumsum([0] + [p.logits.shape[1] for p in planes])[:-1].tolist()
    assert stream.axis == int(np.argmax(image.shape[1:]))
    return torch.cat([p.logits for p in planes], dim=1).movedim(1, stream.axis + 1)


def gaussian(window: int) -> np.ndarray:
    return np.exp(-0.5 * ((np.arange(window) - (window - 1) / 2) / (window / 8)) ** 2)


def starts_of(length: int, window: int, overlap: float) -> list[int]:
    """Even distances of at most (1 - overlap) of a window, ends included."""
    step = max(1, int(window * (1 - overlap)))
    count = int(np.ceil((length - window) / step)) + 1
    return [round(x) for x in np.linspace(0, length - window, count)]


@torch.no_grad()
def reference(network: Network, image: Tensor, windowing: Windowing) -> Tensor:
    """Pad, run each window by itself, sum all in float64, divide by the map of the weights, cut the padding off."""
    window = windowing.window
    missing = [max(0, w - n) for w, n in zip(window, image.shape[1:], strict=True)]
    pads = [(m // 2, m - m // 2) for m in missing]
    padded = functional.pad(image, [p for pair in reversed(pads) for p in pair])
    shape = padded.shape[1:]
    total = torch.zeros((CLASSES, *shape), dtype=torch.float64)
    count = torch.zeros(shape, dtype=torch.float64)
    if windowing.blending == "gaussian":
        a, b, c = (gaussian(w) for w in window)
        weight = torch.from_numpy(np.einsum("i,j,k->ijk", a, b, c))
    else:
        weight = torch.ones(window, dtype=torch.float64)
    for at in itertools.product(*(starts_of(n, w, windowing.overlap) for n, w in zip(shape, window, strict=True))):
        box = tuple(slice(s, s + w) for s, w in zip(at, window, strict=True))
        for flip in windowing.flips:
            axes = [axis + 1 for axis in flip]
            logits = network(padded[:, *box].flip(axes)[None])[0].flip(axes).double()
            if windowing.left_right_axis in flip:
                for left, right in windowing.paired_classes:
                    logits[[left, right]] = logits[[right, left]]
            total[:, *box] += logits * weight
            count[box] += weight
    inside = tuple(slice(p, p + n) for (p, _), n in zip(pads, image.shape[1:], strict=True))
    return (total / count)[:, *inside].float()


@pytest.mark.parametrize(
    ("shape", "windowing"),
    [
        ((21, 13, 10), Windowing((8, 8, 8))),
        ((13, 10, 21), Windowing((8, 8, 8), overlap=0.25, blending="constant")),
        ((9, 17, 8), Windowing((8, 8, 8), overlap=0.0)),
        ((5, 20, 3), Windowing((8, 8, 8))),
        ((3, 1, 2), Windowing((8, 8, 8))),
        ((70, 8, 8), Windowing((64, 8, 8), overlap=0.9)),
        ((8, 11, 12), Windowing((8, 8, 8), flips=((), (0,), (1, 2), (0, 1, 2)), paired_classes=((1, 2),))),
        ((8, 11, 12), Windowing((8, 8, 8), flips=((1,),), paired_classes=((1, 2),), left_right_axis=1)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_stream_equals_the_whole_sum(shape: tuple[int, int, int], windowing: Windowing) -> None:
    network, image = make_network(), make_image(*shape)
    torch.testing.assert_close(
        collect(network, image, windowing), reference(network, image, windowing), atol=1e-5, rtol=1e-4
    )


def test_a_plane_is_not_flipped_across_itself() -> None:
    plan = make_plan(patch_size=(1, 16, 8), label_pairs=(("left", "right"),))
    windowing = Windowing.of(plan, InferenceSection(flip_axes=("x", "y")))
    assert (windowing.flips, windowing.left_right_axis) == (((), (1,)), 0)


def test_swapped_pairs_and_flips_change_the_result() -> None:
    network, image = make_network(), make_image(8, 11, 12)
    plain, flipped, swapped = (
        collect(network, image, Windowing((8, 8, 8), flips=flips, paired_classes=pairs))
        for flips, pairs in [(((),), ()), (((), (0,)), ()), (((), (0,)), ((1, 2),))]
    )
    assert (plain - flipped).abs().max() > 1e-3
    assert (flipped - swapped)[1:].abs().max() > 1e-3
    torch.testing.assert_close(flipped[0], swapped[0])


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_batch_does_not_matter(batch: int) -> None:
    network, image = make_network(2), make_image(20, 12, 9, channels=2)
    windowing = Windowing((8, 8, 8), flips=((), (2,)))
    torch.testing.assert_close(collect(network, image, windowing, batch), collect(network, image, windowing, 2))


@pytest.mark.parametrize(
    ("shape", "window"), [((21, 12, 11), (8, 8, 6)), ((5, 6, 30), (7, 7, 7)), ((2, 1, 3), (8, 8, 8))]
)
def test_tiles_of_a_network_with_margin_equal_one_pass(
    shape: tuple[int, int, int], window: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    network, image = ValidNetwork().eval(), make_image(*shape)
    ends = [n % 2 + 3 for n in reversed(shape)]
    with torch.no_grad():
        whole = network(functional.pad(image, [p for end in ends for p in (3, end)])[None])[0]
    torch.testing.assert_close(
        collect(network, image, Windowing(window)), whole[:, : shape[0], : shape[1], : shape[2]], atol=1e-6, rtol=1e-5
    )


def test_margin_along_one_axis_only() -> None:
    torch.manual_seed(0)
    network, image = PlanarNetwork().eval(), make_image(6, 7, 20)
    with torch.no_grad():
        whole = network(functional.pad(image, (2, 2))[None])[0]
    # One window spans x and y, so that there is nothing to blend.
    torch.testing.assert_close(collect(network, image, Windowing((6, 7, 4))), whole, atol=1e-6, rtol=1e-5)


def test_flipped_tiles_of_a_network_with_margin_equal_flipped_passes() -> None:
    torch.manual_seed(0)
    network, image = PlanarNetwork().eval(), make_image(6, 7, 19)
    flips = ((), (2,), (0, 2))
    with torch.no_grad():
        passes = [
            network(functional.pad(image.flip(axes), (2, 2))[None])[0].flip(axes)
            for axes in ([axis + 1 for axis in flip] for flip in flips)
        ]
    whole = torch.stack(passes).mean(0)
    assert not torch.allclose(whole, passes[0], atol=1e-2)
    torch.testing.assert_close(collect(network, image, Windowing((6, 7, 4), flips=flips)), whole, atol=1e-6, rtol=1e-5)


def test_window_smaller_than_the_stride_is_refused() -> None:
    network = ValidNetwork()
    network.stride = (16, 16, 16)
    network.input_size = lambda output: tuple(n + 6 for n in output)  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ValueError, match="does not hold the network's stride of 16"):
        stream_logits([network], make_image(20, 20, 20), Windowing((8, 8, 8)), batch=1, dtype=torch.float32)


def test_network_that_breaks_its_contract_is_refused() -> None:
    network = ValidNetwork()
    network.margin = (2, 2, 2)
    with pytest.raises(ValueError, match="the network makes"):
        list(stream_logits([network], make_image(20, 20, 20), Windowing((8, 8, 8)), batch=1, dtype=torch.float32))


def test_planes_made_ahead_are_the_same_and_so_are_their_errors() -> None:
    stream = stream_logits([make_network()], make_image(40, 8, 8), Windowing((8, 8, 8)), batch=1, dtype=torch.float32)
    threads = []

    def failing() -> Iterator[LogitPlanes]:
        for planes in stream:
            threads.append(threading.current_thread().name)
            yield planes
        raise ResourceError("no memory")

    made = []
    with pytest.raises(ResourceError, match="no memory"):
        made.extend(ahead(failing()))
    assert set(threads) == {"windows_0"}
    expected = list(stream)
    assert len(expected) > 3
    assert [planes.start for planes in made] == [planes.start for planes in expected]
    assert all(torch.equal(own.logits, other.logits) for own, other in zip(made, expected, strict=True))


def test_consumer_between_planes_is_not_in_inference_mode() -> None:
    for planes in stream_logits(
        [make_network()], make_image(24, 8, 8), Windowing((8, 8, 8)), batch=1, dtype=torch.float32
    ):
        assert not torch.is_inference_mode_enabled()
        assert not planes.logits.is_inference()


@pytest.mark.parametrize("arguments", [{"overlap": 1.0}, {"overlap": -0.1}, {"flips": ()}])
def test_impossible_windowing_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Windowing((8, 8, 8), **arguments)  # type: ignore[arg-type]


class HungryNetwork(Network):
    """Runs out of memory at more than two windows, as a CUDA device does: by its own error."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_network()
        self.stride = self.inner.stride
        self.seen: list[int] = []

    def forward(self, image: Tensor) -> Tensor:
        if not image.is_meta:
            self.seen.append(len(image))
        if len(image) > 2:
            raise torch.cuda.OutOfMemoryError("no memory for so many windows")
        return self.inner(image)


def test_batch_is_halved_when_the_device_runs_out_of_memory(caplog: pytest.LogCaptureFixture) -> None:
    network, image, windowing = HungryNetwork().eval(), make_image(20, 20, 16), Windowing((8, 8, 8))
    with caplog.at_level(logging.WARNING):
        logits = collect(network, image, windowing, batch=8)
    torch.testing.assert_close(logits, collect(network.inner, image, windowing, batch=8), atol=1e-6, rtol=1e-5)
    assert network.seen[:3] == [8, 4, 2]
    assert max(network.seen[3:]) == 2
    assert "out of memory" in caplog.text


class Watched(Network):
    """Counts, whenever it is asked for logits, how many of its earlier ones are still in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, CLASSES, 1)
        self.made: list[StorageWeakRef] = []
        self.kept: list[int] = []

    def forward(self, image: Tensor) -> Tensor:
        self.kept.append(sum(not made.expired() for made in self.made))
        logits: Tensor = self.layer(image)
        if not image.is_meta:
            self.made.append(StorageWeakRef(logits.untyped_storage()))
        return logits


def test_no_logits_are_kept_while_the_next_are_made() -> None:
    network = Watched()
    streamed([network, network], make_image(20, 20, 16), Windowing((8, 8, 8)), batch=2)
    assert len(network.made) > 10
    assert set(network.kept) == {0}


class TooLarge(Network):
    """Finds no memory for any window."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        if not image.is_meta:
            raise torch.cuda.OutOfMemoryError("no memory")
        return self.layer(image)


def test_case_that_cannot_fit_is_told_from_a_bug() -> None:
    with pytest.raises(ResourceError, match=r"no memory for a single window of \(8, 8, 8\)"):
        collect(TooLarge(), make_image(9, 8, 8), Windowing((8, 8, 8)), batch=4)


def ensemble() -> list[Network]:
    networks = [make_network() for _ in range(3)]
    for number, network in enumerate(networks):
        torch.manual_seed(number)
        for weights in network.parameters():
            nn.init.normal_(weights, std=0.2)
    return networks


def streamed(networks: Sequence[Network], image: Tensor, windowing: Windowing, **options: Any) -> tuple[Tensor, Any]:
    """Return the logits (K, X, Y, Z) of a stream, and the stream."""
    stream = stream_logits(networks, image, windowing, **{"batch": 2, "dtype": torch.float32} | options)
    return torch.cat([p.logits for p in stream], dim=1).movedim(1, stream.axis + 1), stream


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_ensemble_is_the_mean_of_its_networks(batch: int) -> None:
    networks, image = ensemble(), make_image(20, 12, 9)
    windowing = Windowing((8, 8, 8), flips=((), (0,)), paired_classes=((1, 2),))
    logits, stream = streamed(networks, image, windowing, batch=batch)
    expected = torch.stack([reference(network, image, windowing) for network in networks]).mean(0)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert stream.agreement is not None
    assert len(stream.agreement.dice) == CLASSES


def test_agreement_is_that_of_the_label_maps_where_windows_do_not_overlap() -> None:
    networks, image, windowing = ensemble(), make_image(24, 8, 16), Windowing((8, 8, 8), overlap=0.0)
    _, stream = streamed(networks, image, windowing)
    labels = [streamed([network], image, windowing)[0].argmax(0) for network in networks]
    for number, found in enumerate(stream.agreement.dice):
        own = [label == number for label in labels]
        pairs = [(2 * (a & b).sum() / (a.sum() + b.sum())).item() for a, b in itertools.combinations(own, 2)]
        assert 0 < found < 1
        assert found == pytest.approx(sum(pairs) / 3)
    assert streamed(networks[:1], image, windowing)[1].agreement is None


def test_ensemble_of_different_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="they must agree"):
        streamed([make_network(), ValidNetwork()], make_image(9, 9, 9), Windowing((8, 8, 8)))


def make_body(shape: tuple[int, int, int], *boxes: tuple[slice, ...]) -> tuple[Body, Tensor]:
    """Return the blocks that touch the boxes, and the voxels of these blocks."""
    occupied = np.zeros(block_counts(shape), np.bool_)
    for box in boxes:
        occupied[box] = True
    x, y, z = shape
    voxels = occupied.repeat(BLOCK, 0).repeat(BLOCK, 1).repeat(BLOCK, 2)[:x, :y, :z]
    return Body(occupied), torch.from_numpy(voxels.copy())


FLIPPED = Windowing((8, 8, 8), flips=((), (0,), (1, 2)), paired_classes=((1, 2),))


@pytest.mark.parametrize(
    ("networks", "shape", "windowing"),
    [
        ([make_network()], (40, 13, 10), Windowing((8, 8, 8))),
        ([make_network()], (13, 10, 41), Windowing((8, 8, 8), overlap=0.7, blending="constant")),
        ([make_network()], (40, 13, 10), FLIPPED),
        (ensemble(), (40, 13, 10), FLIPPED),
        ([ValidNetwork().eval()], (40, 13, 10), Windowing((8, 8, 8))),
        ([PlanarNetwork().eval()], (6, 17, 40), Windowing((6, 7, 4))),
    ],
    ids=["softmax", "constant", "flips", "ensemble", "margin", "margin along one axis"],
)
@pytest.mark.parametrize("output", ["softmax", "regions"])
def test_within_the_body_skipping_changes_no_bit(
    networks: list[Network], shape: tuple[int, int, int], windowing: Windowing, output: Output
) -> None:
    image = make_image(*shape)
    body, inside = make_body(shape, np.s_[1, 1, 1:2], np.s_[-1, 0, -1:])
    # One at a time: torch's kernels round differently in batches of different sizes, and skipping changes those.
    whole, every = streamed(networks, image, windowing, output=output, batch=1)
    part, some = streamed(networks, image, windowing, output=output, batch=1, body=body)
    assert (every.run, every.skipped) == (every.tiling.count, 0)
    assert (some.run + some.skipped, some.skipped > 0) == (some.tiling.count, True)
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(part[:, inside], whole[:, inside])
    assert not torch.equal(part, whole)
    assert torch.isfinite(part).all()
    empty = [-CERTAIN] * CLASSES if output == "regions" else [0.0, *[-CERTAIN] * (CLASSES - 1)]
    assert (part == torch.tensor(empty)[:, None, None, None]).all(0).any()


def test_volume_without_body_runs_no_window() -> None:
    image = make_image(20, 9, 8)
    body, _ = make_body((20, 9, 8))
    logits, stream = streamed(ensemble(), image, Windowing((8, 8, 8)), body=body)
    assert (stream.run, stream.skipped) == (0, stream.tiling.count)
    assert logits.argmax(0).max() == 0
    assert stream.agreement.dice == (1.0, None, None)


def test_volume_smaller_than_a_window_is_skipped_only_without_body() -> None:
    image = make_image(5, 3, 2)
    full, _ = make_body((5, 3, 2), np.s_[1, 0, 0])
    logits, stream = streamed([make_network()], image, Windowing((8, 8, 8)), body=full)
    assert (stream.run, stream.skipped) == (1, 0)
    assert torch.equal(logits, streamed([make_network()], image, Windowing((8, 8, 8)))[0])


def test_ring_on_disk_changes_no_bit(tmp_path: Path) -> None:
    image = make_image(40, 13, 10)
    body, _ = make_body((40, 13, 10), np.s_[1:4, 1, 1:2])
    in_memory, on_disk = (
        streamed(ensemble(), image, FLIPPED, body=body, ring_folder=folder)[0] for folder in (None, tmp_path)
    )
    assert torch.equal(in_memory, on_disk)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu() -> None:
    network, image, windowing = make_network(), make_image(30, 20, 9), Windowing((8, 8, 8), flips=((), (0,)))
    expected = collect(network, image, windowing)
    torch.testing.assert_close(collect(network.cuda(), image, windowing, batch=8), expected, atol=1e-3, rtol=1e-3)
