"""The ring on disk and in memory, and an ensemble's agreement, worked out by hand."""

import itertools
from pathlib import Path

import pytest
import torch

from pipeline.confidence.measuring import doubtful_voxels
from pipeline.confidence.reliability import TEMPERATURES
from pipeline.config import Output
from pipeline.errors import ResourceError
from pipeline.inference.windows.agreement import AgreementCount, agreement_bytes
from pipeline.inference.windows.ring import CERTAIN, LEAST_SHARE, Ring, planes_at_once, runs, zeros_on_disk
from pipeline.inference.windows.tiling import Tiling, Windowing, tile_volume
from pipeline.networks.footprint import LiveBytes
from pipeline.networks.outputs import classes_of

CPU = torch.device("cpu")
WINDOW = (4, 4, 4)


def tiling_of(shape: tuple[int, int, int], windowing: Windowing) -> Tiling:
    return tile_volume(shape, windowing.window, (0, 0, 0), (1, 1, 1), windowing)


def filled(ring: Ring, tiling: Tiling, skipped: tuple[tuple[int, int, int], ...] = ()) -> torch.Tensor:
    """Add windows of numbers, all but the skipped, and return the planes put together, along the first axis."""
    planes = []
    for slab in tiling.slabs:
        planes += list(ring.finish(slab))
        for start in tiling.starts(slab):
            if start in skipped:
                ring.skip(start)
            else:
                torch.manual_seed(hash(start))
                ring.add(start, (), torch.randn(2, *WINDOW))
    planes += list(ring.finish(tiling.shape[tiling.axis]))
    return torch.cat([p.logits for p in planes], 1)


def test_ring_on_disk_gives_the_same_bits_and_leaves_no_file(tmp_path: Path) -> None:
    windowing = Windowing(WINDOW)
    tiling = tiling_of((21, 5, 6), windowing)
    on_disk = Ring(tiling, windowing, 1, 2, "softmax", CPU, tmp_path)
    assert list(tmp_path.iterdir()) == []  # not even now: it has no name, so that a SIGKILL cannot leave it behind
    expected = filled(Ring(tiling, windowing, 1, 2, "softmax", CPU), tiling)
    assert torch.equal(filled(on_disk, tiling), expected)


@pytest.mark.parametrize(
    ("channels", "longest", "expected"),
    [
        ([0, 1, 2, 3, 4], 1, [(0, 1, 0), (1, 2, 1), (2, 3, 2), (3, 4, 3), (4, 5, 4)]),
        ([0, 1, 2, 3, 4], 2, [(0, 2, 0), (2, 4, 2), (4, 5, 4)]),
        ([0, 2, 1, 3, 4], 9, [(0, 1, 0), (1, 2, 2), (2, 3, 1), (3, 5, 3)]),
        ([0, 3, 4, 1, 2], 9, [(0, 1, 0), (1, 3, 3), (3, 5, 1)]),
    ],
)
def test_classes_are_added_in_runs_of_neighbours(
    channels: list[int], longest: int, expected: list[tuple[int, int, int]]
) -> None:
    found = list(runs(channels, longest))
    assert [(classes.start, classes.stop, taken.start) for classes, taken in found] == expected
    assert all(classes.stop - classes.start == taken.stop - taken.start for classes, taken in found)


def test_several_classes_at_once_as_on_a_gpu_are_summed_as_one_by_one() -> None:
    windowing = Windowing(WINDOW, flips=((), (0,)), paired_classes=((1, 2), (4, 5)))
    tiling = tiling_of((9, 5, 6), windowing)
    one_by_one, together = (Ring(tiling, windowing, 2, 7, "softmax", CPU) for _ in range(2))
    together._classes_at_once = 3
    for start, flip in itertools.product(tiling.starts(0), windowing.flips):
        logits = torch.randn(7, *WINDOW)
        for ring in (one_by_one, together):
            ring.add(start, flip, logits)
    first, second = (torch.cat([p.logits for p in ring.finish(4)], 1) for ring in (one_by_one, together))
    assert torch.equal(first, second)
    assert first.abs().min() > 0


def test_logits_in_the_layout_of_channels_last_are_summed_as_others() -> None:
    windowing = Windowing(WINDOW, flips=((), (0,)), paired_classes=((1, 2),))
    tiling = tiling_of((4, 4, 4), windowing)
    logits = torch.randn(2, 5, *WINDOW)
    sums = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        ring = Ring(tiling, windowing, 2, 5, "softmax", CPU)
        for own, flip in zip(logits.contiguous(memory_format=layout), windowing.flips, strict=True):
            ring.add((0, 0, 0), flip, own)
        sums += [planes.logits for planes in ring.finish(4)]
    assert torch.equal(*sums)


def test_ring_that_no_disk_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"no room for 4194304\.0 GB of unfinished planes"):
        zeros_on_disk((2**20, 2**10, 2**20), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("output", "expected"), [("softmax", [0.0, -CERTAIN]), ("regions", [-CERTAIN, -CERTAIN])])
def test_where_no_window_is_run_there_is_certain_background(output: Output, expected: list[float]) -> None:
    windowing = Windowing(WINDOW, overlap=0.0)
    tiling = tiling_of((8, 4, 4), windowing)
    planes = filled(Ring(tiling, windowing, 1, 2, output, CPU), tiling, skipped=((4, 0, 0),))
    for temperature in TEMPERATURES:
        assert doubtful_voxels(planes[:, 4:].flatten(1), temperature, output).numel() == 0
    torch.testing.assert_close(planes[:, 4:], torch.tensor(expected)[:, None, None, None].expand(2, 4, 4, 4))
    assert torch.equal(planes[:, :4], filled(Ring(tiling, windowing, 1, 2, "softmax", CPU), tiling)[:, :4])


def test_voxels_without_a_skipped_window_keep_their_bits_and_others_their_mean() -> None:
    windowing = Windowing(WINDOW, blending="constant")
    tiling = tiling_of((8, 4, 4), windowing)  # windows at 0, 2, 4
    whole, part = (filled(Ring(tiling, windowing, 1, 2, "softmax", CPU), tiling, s) for s in ((), ((0, 0, 0),)))
    assert torch.equal(whole[:, 4:], part[:, 4:])
    assert part[0, :2].abs().max() == 0  # only the skipped window holds these planes
    torch.manual_seed(hash((2, 0, 0)))
    torch.testing.assert_close(part[:, 2:4], torch.randn(2, *WINDOW)[:, :2])


def test_a_corner_of_a_window_alone_does_not_count() -> None:
    windowing = Windowing((16, 1, 1))
    tiling = tile_volume((24, 1, 1), (16, 1, 1), (0, 0, 0), (1, 1, 1), windowing)  # at 0 and 8
    ring = Ring(tiling, windowing, 1, 1, "regions", CPU)
    ring.skip((0, 0, 0))
    planes = list(ring.finish(8))
    ring.add((8, 0, 0), (), torch.ones(1, 16, 1, 1))
    logits = torch.cat([some.logits for some in (*planes, *ring.finish(24))], 1)
    share = tiling.axes[0].weights[0] / tiling.axes[0].total[8]
    assert share < LEAST_SHARE
    assert logits[0, 8].item() == -CERTAIN
    assert logits[0, 16:].flatten().tolist() == [1.0] * 8


def test_few_planes_leave_together_where_they_are_large() -> None:
    windowing = Windowing(WINDOW)
    assert planes_at_once(tiling_of((50, 40, 40), windowing), 3) == 16
    assert planes_at_once(tiling_of((500, 400, 400), windowing), 118) == 1
    assert planes_at_once(tiling_of((500, 400, 400), windowing), 10) == 2


@pytest.mark.parametrize(("shape", "window"), [((21, 13, 4), (8, 4, 4)), ((3, 9, 2), (4, 4, 4))])
def test_nearest_windows_make_up_the_volume_once(shape: tuple[int, int, int], window: tuple[int, int, int]) -> None:
    tiling = tiling_of(shape, Windowing(window, overlap=0.6))
    seen = torch.zeros(shape)
    for start in itertools.chain.from_iterable(tiling.starts(slab) for slab in tiling.slabs):
        part = tiling.nearest(start)
        box = tuple(slice(own.start + at, own.stop + at) for own, at in zip(part, start, strict=True))
        seen[box] += 1
        centre = [at + (w - 1) / 2 for at, w in zip(start, window, strict=True)]
        for axis, (bounds, own) in enumerate(zip(box, centre, strict=True)):
            for voxel in range(bounds.start, bounds.stop):
                others = [at + (window[axis] - 1) / 2 for at in tiling.axes[axis].starts]
                assert abs(voxel - own) == min(abs(voxel - other) for other in others)
    assert seen.unique().tolist() == [1.0]


def logits_of(labels: list[int], classes: int) -> torch.Tensor:
    """Return logits (K, n, 1, 1) whose largest are those labels'."""
    return torch.nn.functional.one_hot(torch.tensor(labels), classes).T.float()[:, :, None, None]


def test_agreement_of_three_networks_by_hand() -> None:
    windowing = Windowing((4, 1, 1), overlap=0.0)
    tiling = tile_volume((8, 1, 1), (4, 1, 1), (0, 0, 0), (1, 1, 1), windowing)
    count = AgreementCount(tiling, windowing, 3, 4, "softmax")
    for labels in ([0, 1, 1, 2], [0, 1, 2, 2], [0, 0, 0, 0]):
        count.add((0, 0, 0), (), logits_of(labels, 4))
    count.skip((4, 0, 0))
    # Background: sizes 5, 5 and 8 share 5, 5, 5. Class 1: sizes 2, 1, 0 share 1, 0, 0. Class 2: sizes 1, 2, 0.
    expected = [(10 / 10 + 10 / 13 + 10 / 13) / 3, (2 / 3 + 0 + 0) / 3, (2 / 3 + 0 + 0) / 3, None]
    for value, wanted in zip(count.result().dice, expected, strict=True):
        assert value == (None if wanted is None else pytest.approx(wanted))


def test_flips_of_a_window_are_averaged_before_a_network_is_asked() -> None:
    windowing = Windowing((2, 1, 1), flips=((), (0,)))
    tiling = tile_volume((2, 1, 1), (2, 1, 1), (0, 0, 0), (1, 1, 1), windowing)
    count = AgreementCount(tiling, windowing, 2, 2, "softmax")
    # Flipped back, the second says the opposite, but less loudly.
    count.add((0, 0, 0), (), 3 * logits_of([1, 0], 2))
    count.add((0, 0, 0), (0,), logits_of([1, 0], 2))
    count.add((0, 0, 0), (), logits_of([1, 0], 2))
    count.add((0, 0, 0), (0,), logits_of([0, 1], 2))
    assert count.result().dice == (1.0, 1.0)


@pytest.mark.parametrize("output", ["softmax", "regions"])
def test_an_agreement_takes_no_more_memory_than_is_planned(output: Output) -> None:
    windowing = Windowing((8, 8, 8), overlap=0.75, flips=((), (0,)))
    tiling = tiling_of((20, 20, 20), windowing)
    count = AgreementCount(tiling, windowing, 2, 6, output)
    logits = torch.randn(6, 8, 8, 8)
    with LiveBytes(logits, []) as mode:
        for _, start, flip in itertools.product(range(2), tiling.starts(0), windowing.flips):
            count.add(start, flip, logits)
    assert mode.peak_bytes - logits.nbytes <= agreement_bytes(tiling, 2, 6)


def test_classes_of_regions_are_the_last_above_zero() -> None:
    logits = torch.tensor([[1.0, 1.0, -1.0, 0.0], [-2.0, 0.5, -1.0, 0.0]])[:, :, None, None]
    assert classes_of(logits, "regions").flatten().tolist() == [1, 2, 0, 0]
    assert classes_of(logits, "softmax").flatten().tolist() == [0, 0, 0, 0]
