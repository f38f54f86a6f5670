"""Connected components: by hand, and against a slow flood fill."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.volumes.components import Components, Connectivity

Mask = NDArray[np.bool_]


def flooded(mask: Mask, connectivity: Connectivity) -> list[set[tuple[int, ...]]]:
    """Components as sets of voxels, the largest first, equal ones by their first voxel."""
    steps = [step for step in itertools.product((-1, 0, 1), repeat=3) if any(step)]
    steps = [step for step in steps if sum(map(abs, step)) <= {6: 1, 18: 2, 26: 3}[connectivity]]
    left, found = {tuple(map(int, voxel)) for voxel in np.argwhere(mask)}, []
    while left:
        component, ahead = set[tuple[int, ...]](), [min(left)]
        left.remove(ahead[0])
        while ahead:
            voxel = ahead.pop()
            component.add(voxel)
            near = {tuple(a + b for a, b in zip(voxel, step, strict=True)) for step in steps} & left
            left -= near
            ahead += near
        found.append(component)
    return sorted(found, key=lambda component: (-len(component), min(component)))


@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_components_are_those_of_a_flood_fill(connectivity: Connectivity) -> None:
    mask = np.random.default_rng(0).random((11, 9, 10)) < 0.16
    expected = flooded(mask, connectivity)
    found = Components.of(mask, connectivity)
    assert found.voxels.tolist() == [len(component) for component in expected]
    for number, component in enumerate(expected, start=1):
        assert {tuple(map(int, voxel)) for voxel in np.argwhere(found.numbers == number)} == component
        assert found.centres[number - 1] == pytest.approx(np.mean([*component], axis=0))
    assert np.array_equal(found.numbers > 0, mask)


def test_a_face_an_edge_and_a_corner_touch_by_connectivity() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 0, 0] = mask[2, 1, 0] = mask[3, 2, 1] = True  # by a face, an edge, a corner
    assert [Components.of(mask, n).voxels.tolist() for n in (6, 18, 26)] == [[2, 1, 1], [3, 1], [4]]


def test_small_components_are_left_out_and_the_rest_numbered_anew() -> None:
    mask = np.zeros((8, 1, 1), bool)
    mask[[0, 2, 3, 5, 6, 7]] = True
    found = Components.of(mask, smallest_voxels=2)
    assert found.numbers.ravel().tolist() == [0, 0, 2, 2, 0, 1, 1, 1]
    assert found.centres.tolist() == [[6, 0, 0], [2.5, 0, 0]]
    # 0.3 mm3 of voxels of 0.1 mm3 are three voxels, though the quotient is a little more.
    assert Components.of(mask, smallest_voxels=0.3 / 0.1 * (1 + 1e-12)).voxels.tolist() == [3]


@pytest.mark.parametrize("shape", [(0, 0, 0), (3, 2, 1)])
def test_an_empty_mask_has_none(shape: tuple[int, int, int]) -> None:
    found = Components.of(np.zeros(shape, bool))
    assert found.voxels.shape == (0,)
    assert found.centres.shape == (0, 3)
    assert not found.numbers.any()
