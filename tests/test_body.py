"""Body: the coarse blocks hold all that the fine rule calls body, holes and neighbours included, and leave air out."""

import itertools

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import ndimage

from pipeline.geometry import Geometry
from pipeline.preparation.body import AIR_HU, body_of, is_body
from pipeline.volumes.body import BLOCK, Body
from pipeline.volumes.volume import Volume

ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(["RL", "AP", "SI"]) for letters in itertools.product(*axes)
]


def image_of(mask: np.ndarray, spacing: tuple[float, float, float], modality: str) -> Volume:
    """An image whose body is the mask, on a grid that does not start at zero."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [3.0, -7.0, 0.5]
    air, tissue = (-1000.0, 40.0) if modality == "CT" else (0.0, -3.0)
    return Volume(np.where(mask, tissue, air).astype(np.float32)[None], Geometry(mask.shape, affine))


def touched(image: Volume, modality: str, target: Geometry) -> np.ndarray:
    """The fine rule, voxel by voxel: is any of the eight native corners about it, weight or not, body or in a hole?"""
    body = ndimage.binary_fill_holes(is_body(image.array[0], modality))
    result = np.zeros(target.shape, bool)
    last = np.array(image.geometry.shape) - 1
    for voxel in np.ndindex(target.shape):
        index = image.geometry.to_index(target.to_mm(np.array(voxel)))
        if (index < -0.5).any() or (index > last + 0.5).any():
            continue
        index = np.where(abs(index - np.rint(index)) < 1e-6, np.rint(index), index)
        corners = itertools.product(*zip(np.floor(index), np.ceil(index), strict=True))
        result[voxel] = any(body[tuple(np.clip(corner, 0, last).astype(int))] for corner in corners)
    return result


def blocks_of(fine: np.ndarray) -> np.ndarray:
    """The blocks that hold a true voxel."""
    padded = np.pad(fine, [(0, -n % BLOCK) for n in fine.shape])
    x, y, z = (n // BLOCK for n in padded.shape)
    return padded.reshape(x, BLOCK, y, BLOCK, z, BLOCK).any(axis=(1, 3, 5))


@settings(max_examples=60, deadline=None)
@given(
    mask=arrays.arrays(bool, st.tuples(*[st.integers(1, 13)] * 3), elements=st.sampled_from([False] * 7 + [True])),
    spacing=st.tuples(*[st.sampled_from([0.4, 1.0, 1.3, 3.0, 5.0])] * 3),
    onto=st.tuples(*[st.sampled_from([0.7, 1.0, 1.5, 4.0])] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
    modality=st.sampled_from(["CT", "MR"]),
)
def test_no_body_voxel_and_no_neighbour_of_one_is_left_out(
    mask: np.ndarray,
    spacing: tuple[float, float, float],
    onto: tuple[float, float, float],
    orientation: str,
    modality: str,
) -> None:
    image = image_of(mask, spacing, modality)
    target = image.geometry.reoriented(orientation).respaced(onto)
    if np.prod(target.shape) > 4000:
        target = target.cropped((0, 0, 0), tuple(min(n, 16) for n in target.shape))
    body = body_of({"x": image}, {"x": modality}, target)
    assert body is not None
    fine = touched(image, modality, target)
    near = ndimage.binary_dilation(fine, np.ones((3, 3, 3)))
    assert not (blocks_of(near) & ~body.occupied).any()


def test_air_is_left_out_and_the_margin_is_one_block() -> None:
    mask = np.zeros((64, 48, 40), bool)
    mask[20:24, 20:24, 20:24] = True
    body = body_of({"x": image_of(mask, (1, 1, 1), "CT")}, {"x": "CT"}, image_of(mask, (1, 1, 1), "CT").geometry)
    assert body is not None
    expected = np.zeros((16, 12, 10), bool)
    # Block 5, its neighbours because interpolation reaches over the block's edge, and one block about them.
    expected[3:8, 3:8, 3:8] = True
    np.testing.assert_array_equal(body.occupied, expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("first", [0, 40], ids=["whole", "cut_through_the_hole"])
def test_a_hole_is_filled_even_where_the_scan_ends_in_it(axis: int, first: int) -> None:
    mask = np.zeros((80, 80, 80), bool)
    mask[16:64, 16:64, 16:64] = True
    mask[24:56, 24:56, 24:56] = False
    image = image_of(mask.take(range(first, 80), axis), (1, 1, 1), "MR")
    middle = np.full(3, 40)
    middle[axis] -= first
    assert image.array[0][tuple(middle)] == 0
    body = body_of({"x": image}, {"x": "MR"}, image.geometry)
    assert body is not None
    assert body.any_in(tuple(middle), tuple(middle + 1))
    assert not body.any_in((0, 0, 0), (4, 4, 4))


def test_channels_add_up_each_by_its_own_rule() -> None:
    first, second = np.zeros((2, 40, 40, 40), bool)
    first[4, 4, 4] = second[35, 35, 35] = True
    images = {"ct": image_of(first, (1, 1, 1), "CT"), "pet": image_of(second, (1, 1, 1), "PET")}
    body = body_of(images, {"ct": "CT", "pet": "PET"}, images["ct"].geometry)
    assert body is not None
    assert body.any_in((4, 4, 4), (5, 5, 5))
    assert body.any_in((35, 35, 35), (36, 36, 36))
    assert not body.any_in((16, 16, 16), (24, 24, 24))
    # Taken as no CT, air at -1000 is body everywhere.
    everywhere = body_of(images, {"ct": "MR", "pet": "PET"}, images["ct"].geometry)
    assert everywhere is not None
    assert everywhere.occupied.all()


def test_outside_a_channels_box_there_is_nothing() -> None:
    image = image_of(np.ones((16, 16, 16), bool), (1, 1, 1), "MR")
    wide = image.geometry.cropped((-32, 0, 0), (48, 16, 16))
    body = body_of({"x": image}, {"x": "MR"}, wide)
    assert body is not None
    np.testing.assert_array_equal(np.flatnonzero(body.occupied.any(axis=(1, 2))), np.arange(6, 14))


def test_a_grid_that_is_not_parallel_says_nothing() -> None:
    image = image_of(np.zeros((8, 8, 8), bool), (1, 1, 1), "MR")
    turn = np.eye(4)
    turn[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    assert body_of({"x": image}, {"x": "MR"}, Geometry((8, 8, 8), turn @ image.geometry.affine)) is None


def test_air_by_modality() -> None:
    voxels = np.array([[[-1000.0, AIR_HU, AIR_HU + 1, 0.0]]])
    np.testing.assert_array_equal(is_body(voxels, "CT").ravel(), [False, False, True, True])
    np.testing.assert_array_equal(is_body(voxels, "MR").ravel(), [True, True, True, False])


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        ((4, 8, 0), (8, 12, 1), True),
        ((7, 11, 3), (8, 12, 4), True),
        ((0, 0, 0), (4, 40, 40), False),
        ((8, 0, 0), (40, 40, 40), False),
        ((-100, -100, -100), (5, 9, 100), True),
        ((-100, -100, -100), (0, 100, 100), False),
        ((40, 40, 40), (80, 80, 80), False),
        ((5, 9, 1), (5, 12, 4), False),
    ],
)
def test_a_box_is_asked_for_body(start: tuple[int, int, int], stop: tuple[int, int, int], expected: bool) -> None:
    occupied = np.zeros((10, 10, 10), bool)
    occupied[1, 2, 0] = True
    assert Body(occupied).any_in(start, stop) is expected
