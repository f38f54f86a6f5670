"""Contours: traced half way between pixel centres, filled by the even-odd rule, the one exactly undoing the other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from pipeline.geometry import FloatArray
from pipeline.volumes.dicom.annotations.rtstruct.filling import fill
from pipeline.volumes.dicom.annotations.rtstruct.tracing import trace


def drawn(*rows: str) -> NDArray[np.bool_]:
    return np.array([[letter == "#" for letter in row] for row in rows])


def area(polygon: FloatArray) -> float:
    """The shoelace formula; a keyhole's channel adds nothing, a hole's way round takes its area off."""
    x, y = polygon.T
    return float(abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2)


def crossings(polygons: list[FloatArray], column: float, row: float) -> int:
    """Count edges to the right of a point, one by one: the slow obvious rule."""
    count = 0
    for polygon in polygons:
        for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            if (y0 > row) != (y1 > row) and x0 + (row - y0) * (x1 - x0) / (y1 - y0) > column:
                count += 1
    return count


def test_one_pixel_is_a_diamond() -> None:
    (polygon,) = trace(drawn("...", ".#.", "..."))
    assert {tuple(point) for point in polygon.tolist()} == {(0.5, 1.0), (1.0, 0.5), (1.5, 1.0), (1.0, 1.5)}


def test_a_rectangle_has_its_corners_cut_and_no_point_too_many() -> None:
    (polygon,) = trace(np.ones((3, 5), dtype=bool))
    assert len(polygon) == 8
    assert area(polygon) == 3 * 5 - 4 / 8


def test_nothing_has_no_contour() -> None:
    assert trace(np.zeros((4, 4), dtype=bool)) == []
    assert not fill([], (4, 5)).any() and fill([], (4, 5)).shape == (4, 5)


def test_parts_are_contours_of_their_own_and_corners_do_not_join() -> None:
    assert len(trace(drawn("#..", "...", "..#"))) == 2
    assert len(trace(drawn("#.", ".#"))) == 2


def test_a_hole_is_reached_through_a_keyhole_along_a_row_of_the_structure() -> None:
    mask = drawn("#####", "#####", "##.##", "#####", "#####")
    (polygon,) = trace(mask)
    assert area(polygon) == 25 - 4 / 8 - (1 - 4 / 8)
    steps = np.roll(polygon, -1, axis=0) - polygon
    channel = [
        tuple(sorted([start[0], start[0] + step[0]]))
        for start, step in zip(polygon, steps, strict=True)
        if step[1] == 0
    ]
    assert channel.count((2.5, 4.5)) == 2  # There and back, over the pixels of columns 3 and 4.


def test_islands_in_holes_and_holes_beside_holes() -> None:
    mask = drawn("#########", "#.....#.#", "#.###.#.#", "#.#.#.###", "#.###.#.#", "#.....#.#", "#########")
    polygons = trace(mask)
    assert len(polygons) == 2
    np.testing.assert_array_equal(fill(polygons, mask.shape), mask)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_filling_undoes_tracing_and_so_does_the_union_of_the_contours(mask: NDArray[np.bool_]) -> None:
    polygons = trace(mask)
    np.testing.assert_array_equal(fill(polygons, mask.shape), mask)
    # Readers that unite the contours of a plane see the same: each hole is within its own contour.
    united = np.zeros_like(mask)
    for polygon in polygons:
        united |= fill([polygon], mask.shape)
    np.testing.assert_array_equal(united, mask)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.tuples(*[st.integers(-30, 110)] * 2), min_size=3, max_size=8), min_size=1, max_size=3))
def test_filling_is_the_even_odd_rule(corners: list[list[tuple[int, int]]]) -> None:
    """Corners at odd places, so that no centre lies on an edge; they cross themselves and reach beyond the plane."""
    rng = np.random.default_rng(0)
    polygons = [np.array(polygon) / 10 + rng.uniform(0.02, 0.03, (len(polygon), 2)) for polygon in corners]
    filled = fill(polygons, (7, 8))
    for row in range(7):
        for column in range(8):
            here = crossings(polygons, column, row)
            beside = [(0, 2e-3), (0, -2e-3), (2e-3, 0), (-2e-3, 0)]
            near = any(crossings(polygons, column + x, row + y) % 2 != here % 2 for x, y in beside)
            if not near:
                assert filled[row, column] == here % 2


def test_a_centre_on_a_contour_is_inside_on_every_side() -> None:
    """Contours through the centres of the outermost pixels, as some software draws them, lose no side."""
    through_centres = np.array([[1.0, 1.0], [4.0, 1.0], [4.0, 3.0], [1.0, 3.0]])
    mask = fill([through_centres], (5, 6))
    np.testing.assert_array_equal(mask, drawn("......", ".####.", ".####.", ".####.", "......"))
    rounded = through_centres + 4e-4 * np.array([[1, -1], [-1, 1], [-1, -1], [1, 1]])
    np.testing.assert_array_equal(fill([rounded], (5, 6)), mask)


def test_a_slanted_edge_through_centres() -> None:
    mask = fill([np.array([[0.0, 0.0], [3.0, 3.0], [0.0, 3.0]])], (4, 4))
    np.testing.assert_array_equal(mask, drawn("#...", "##..", "###.", "####"))


@pytest.mark.parametrize("hole_turns", [1, -1])
def test_a_hole_as_a_contour_of_its_own(hole_turns: int) -> None:
    outer = np.array([[0.5, 0.5], [5.5, 0.5], [5.5, 5.5], [0.5, 5.5]])
    hole = np.array([[2.5, 2.5], [3.5, 2.5], [3.5, 3.5], [2.5, 3.5]])[::hole_turns]
    mask = fill([outer, hole], (7, 7))
    assert mask.sum() == 24 and not mask[3, 3]
