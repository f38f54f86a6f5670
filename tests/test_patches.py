"""Patches: each voxel knows where it comes from, so that every patch can be checked against its volume."""

from collections import Counter

import numpy as np
import pytest
import torch

from pipeline.training.sampling.cases import CaseOnDisk, HeldCase, Size
from pipeline.training.sampling.patches import PatchSampler


def coded_case(shape: Size, number: int, foreground: tuple[int, int, int] | None = None) -> HeldCase:
    """A case whose voxel (x, y, z) holds 1 + x + 16 y + 256 z, exact in float16; its second channel its number."""
    x, y, z = np.indices(shape)
    image = np.stack([1 + x + 16 * y + 256 * z, np.full(shape, number + 1)]).astype(np.float16)
    label = np.zeros(shape, np.uint8)
    voxels = {}
    if foreground is not None:
        label[foreground] = 2
        voxels = {2: np.array([foreground], np.int32)}
    return HeldCase(image, label, voxels)


def sampler(cases: list[HeldCase], patch: Size = (4, 4, 4), **changes: object) -> PatchSampler:
    settings: dict[str, object] = {"read_size": patch, "foreground_fraction": 0.0, "seed": 0, **changes}
    return PatchSampler(cases, patch_size=patch, **settings)  # type: ignore[arg-type]


def start_of(image: torch.Tensor) -> tuple[int, int, int]:
    code = int(image[0, 0, 0, 0]) - 1
    return code % 16, code // 16 % 16, code // 256


def test_every_case_is_seen_once_before_any_is_seen_twice() -> None:
    drawn = sampler([coded_case((6, 6, 6), n) for n in range(5)])
    for epoch in range(3):
        seen = Counter(int(drawn.patch(5 * epoch + i)[0][1].max()) for i in range(5))
        assert seen == Counter({n + 1: 1 for n in range(5)})


def test_the_order_of_cases_changes_from_epoch_to_epoch_and_with_the_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        drawn = sampler([coded_case((6, 6, 6), n) for n in range(8)], seed=seed)
        return [int(drawn.patch(8 * epoch + i)[0][1].max()) for i in range(8)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_a_patch_is_the_volume_at_its_place() -> None:
    case = coded_case((7, 6, 5), 0, foreground=(3, 3, 3))
    drawn = sampler([case])
    starts = set()
    for index in range(300):
        image, label = drawn.patch(index)
        x, y, z = start_of(image)
        starts.add((x, y, z))
        box = (slice(x, x + 4), slice(y, y + 4), slice(z, z + 4))
        assert np.array_equal(image[0].numpy(), case.image[0][box].astype(np.float32))
        assert np.array_equal(label.numpy(), case.label[box])
    # Every start is possible, and none beyond: 4 x 3 x 2.
    assert starts == {(x, y, z) for x in range(4) for y in range(3) for z in range(2)}


def test_foreground_patches_hold_the_voxel_in_their_middle() -> None:
    case = coded_case((12, 12, 7), 0, foreground=(6, 5, 3))
    drawn = sampler([case], foreground_fraction=1.0)
    for index in range(10):
        image, label = drawn.patch(index)
        assert label[2, 2, 2] == 2
        assert start_of(image) == (4, 3, 1)


def test_a_share_of_the_patches_is_centred_on_foreground() -> None:
    drawn = sampler([coded_case((12, 12, 7), 0, foreground=(6, 5, 3))], foreground_fraction=0.25)
    centred = sum(int(drawn.patch(index)[1][2, 2, 2]) == 2 for index in range(800))
    # Binomial(800, 1/4), and by chance now and then a random one: 200 +- 5 standard deviations of 12.
    assert 140 < centred < 262


def test_foreground_at_the_border_keeps_the_patch_inside() -> None:
    drawn = sampler([coded_case((8, 8, 7), 0, foreground=(0, 7, 6))], foreground_fraction=1.0)
    image, label = drawn.patch(0)
    assert start_of(image) == (0, 4, 3)
    assert label[0, 3, 3] == 2


def test_a_volume_smaller_than_the_patch_lies_in_its_middle_among_zeros() -> None:
    case = coded_case((2, 6, 6), 0)
    image, _ = sampler([case]).patch(0)
    assert (image[:, 0] == 0).all()
    assert (image[:, 3] == 0).all()
    assert (image[:, 1:3] > 0).all()


def test_the_rim_lies_around_the_patch() -> None:
    case = coded_case((4, 6, 6), 0)
    image, label = sampler([case], read_size=(8, 4, 4)).patch(0)
    assert image.shape == (2, 8, 4, 4)
    assert label.shape == (8, 4, 4)
    assert (image[:, :2] == 0).all()
    assert (image[:, 6:] == 0).all()
    assert (image[:, 2:6] > 0).all()
    # Also beyond a volume that holds nothing but a class, the label is background.
    full = HeldCase(case.image, np.full((4, 6, 6), 2, np.uint8), {})
    _, label = sampler([full], read_size=(8, 4, 4)).patch(0)
    assert (label[2:6] == 2).all()
    assert not label[:2].any()
    assert not label[6:].any()


def test_patches_are_read_as_many_at_once_as_wanted() -> None:
    drawn = sampler([coded_case((6, 6, 6), n) for n in range(3)])
    images, labels, annotated = drawn.read(range(8, 12))
    assert annotated is None
    for i in range(4):
        image, label = drawn.patch(8 + i)
        assert torch.equal(images[i], image)
        assert torch.equal(labels[i], label)


@pytest.mark.parametrize("patch", [(4, 4, 4), (9, 4, 4)])
def test_reads_from_disk_and_memory_are_one(patch: Size, tmp_path_factory: pytest.TempPathFactory) -> None:
    from pipeline.data.store import CaseStore, PreparedCase
    from pipeline.geometry import Geometry

    case = coded_case((7, 6, 5), 0, foreground=(3, 3, 3))
    grid = Geometry((7, 6, 5), np.eye(4))
    store = CaseStore(tmp_path_factory.mktemp("store"))
    voxels = dict(case.class_voxels)
    store.write("a", PreparedCase(case.image, case.label, case.label, grid, grid, voxels, ("t1", "t2")), "key")
    for index in range(5):
        images = [
            sampler([source], patch, foreground_fraction=0.5).patch(index)
            for source in (case, CaseOnDisk(store.open("a"), "a", None))
        ]  # type: ignore[list-item]
        assert torch.equal(images[0][0], images[1][0])
        assert torch.equal(images[0][1], images[1][1])


def classes_drawn(weights: dict[int, float] | None, count: int = 600) -> Counter[int]:
    """How often each class lies in the middle of a patch: class 1 fills half the volume, 2 a layer, 3 one voxel."""
    label = np.zeros((16, 12, 12), np.uint8)
    label[:8], label[10], label[13, 6, 6] = 1, 2, 3
    image = np.zeros((1, *label.shape), np.float16)
    # Voxels far enough from the border: there a patch lies around what it was drawn for.
    voxels = {k: np.argwhere(label == k).astype(np.int32) for k in (1, 2, 3)}
    voxels = {k: v[((v >= 2) & (v <= np.array(label.shape) - 2)).all(1)] for k, v in voxels.items()}
    case = HeldCase(image, label, voxels)
    drawn = sampler([case], foreground_fraction=1.0, class_weights=weights)
    return Counter(int(drawn.patch(index)[1][2, 2, 2]) for index in range(count))


def test_without_weights_every_class_of_a_case_is_drawn_as_often() -> None:
    drawn = classes_drawn(None)
    assert set(drawn) == {1, 2, 3}
    # Binomial(600, 1/3): 200 +- 5 standard deviations of 11.5.
    assert all(142 < count < 258 for count in drawn.values())


def test_classes_are_drawn_by_their_weights() -> None:
    drawn = classes_drawn({3: 4.0, 2: 0.0})
    assert set(drawn) == {1, 3}
    # Binomial(600, 4/5): 480 +- 5 standard deviations of 9.8.
    assert 431 < drawn[3] < 529


def test_a_case_none_of_whose_classes_is_wanted_is_still_seen() -> None:
    case = coded_case((12, 12, 7), 0, foreground=(6, 5, 3))
    unwanted = sampler([case], foreground_fraction=1.0, class_weights={2: 0.0})
    empty = sampler([coded_case((12, 12, 7), 0)], foreground_fraction=1.0)
    assert len({start_of(unwanted.patch(index)[0]) for index in range(20)}) > 5
    assert all(torch.equal(unwanted.patch(index)[0], empty.patch(index)[0]) for index in range(20))


def test_the_number_of_cases_does_not_shift_what_is_drawn_within_one() -> None:
    case = coded_case((12, 12, 7), 0, foreground=(6, 5, 3))
    alone, among = sampler([case]), sampler([case] * 7)
    assert all(torch.equal(alone.patch(index)[0], among.patch(index)[0]) for index in range(20))
