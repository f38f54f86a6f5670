"""Geometry by millimetres: a voxel's centre stays where it is, whatever is done to the grid around it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from numpy.typing import NDArray

from pipeline.errors import GeometryError
from pipeline.geometry import Geometry

ORIENTATIONS = [
    "".join(code) for pairs in itertools.permutations(("RL", "AP", "SI")) for code in itertools.product(*pairs)
]
# Centres of the structures that stand in `labelled`, as voxel indices of a 5x6x7 grid.
STRUCTURES = {1: (0, 0, 0), 2: (4, 1, 2), 3: (1, 5, 3), 4: (2, 3, 6), 5: (4, 5, 6)}


def rotation(degrees: tuple[float, float, float]) -> NDArray[np.float64]:
    """Return the product of the rotations about x, y and z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        one, two = [k for k in range(3) if k != axis]
        about = np.eye(3)
        about[one, one] = about[two, two] = np.cos(angle)
        about[one, two], about[two, one] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ about
    return matrix


def geometry(
    shape: tuple[int, int, int] = (5, 6, 7),
    spacing: tuple[float, float, float] = (0.7, 1.1, 4.0),
    degrees: tuple[float, float, float] = (0, 0, 0),
    origin: tuple[float, float, float] = (-30.0, 12.5, 700.0),
) -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees) * spacing
    affine[:3, 3] = origin
    return Geometry(shape, affine)


def labelled() -> NDArray[np.int64]:
    array = np.zeros((5, 6, 7), np.int64)
    for value, index in STRUCTURES.items():
        array[index] = value
    return array


def centres_mm(array: NDArray[np.int64], grid: Geometry) -> NDArray[np.float64]:
    return np.stack([grid.to_mm(np.argwhere(array == value).mean(axis=0)) for value in STRUCTURES])


def outer_corners_mm(grid: Geometry) -> NDArray[np.float64]:
    return grid.to_mm(np.array(list(itertools.product(*((-0.5, n - 0.5) for n in grid.shape)))))


@st.composite
def geometries(draw: DrawFn) -> Geometry:
    shape = draw(st.tuples(*[st.integers(1, 40)] * 3))
    spacing = draw(st.tuples(*[st.floats(0.1, 12.0)] * 3))
    degrees = draw(st.tuples(*[st.floats(-180, 180)] * 3))
    origin = draw(st.tuples(*[st.floats(-900, 900)] * 3))
    grid = geometry(shape, spacing, degrees, origin)
    mirror = np.diag([*draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3)), 1.0])
    return Geometry(shape, grid.affine @ mirror)


def test_a_grid_worked_out_by_hand() -> None:
    # Columns are the voxel axes: i runs to the left by 2 mm, j to the head by 5, k to the front by 1: left-handed.
    affine = np.array([[-2, 0, 0, 90], [0, 0, 1, -120], [0, 5, 0, 30], [0, 0, 0, 1.0]])
    grid = Geometry((10, 4, 20), affine)
    assert grid.orientation == "LSA"
    assert grid.spacing_mm == (2.0, 5.0, 1.0)
    assert grid.voxel_volume_ml == pytest.approx(0.01)
    assert grid.shear == 0
    assert str(grid) == "10x4x20 at 2.00x5.00x1.00 mm, LSA"
    np.testing.assert_array_equal(grid.to_mm(np.array([[0, 0, 0], [1, 2, 3]])), [[90, -120, 30], [88, -117, 40]])
    np.testing.assert_allclose(grid.to_index(np.array([88, -117, 40])), [1, 2, 3])
    turned = grid.reoriented("RAS")
    assert turned.shape == (10, 20, 4)
    # Voxel (0, 0, 0) is now what (9, 0, 0) was: 90 - 2 * 9.
    np.testing.assert_array_equal(turned.affine, [[2, 0, 0, 72], [0, 1, 0, -120], [0, 0, 5, 30], [0, 0, 0, 1]])


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("target", ORIENTATIONS)
def test_structures_stay_in_place_from_each_orientation_to_each(target: str) -> None:
    oblique, array = geometry(degrees=(12, -20, 31)), labelled()
    expected = centres_mm(array, oblique)
    for start in ORIENTATIONS:
        begun = oblique.reoriented(start)
        first = rearranged(array, oblique, start)
        turned = begun.reoriented(target)
        second = rearranged(first, begun, target)
        assert turned.orientation == target
        assert turned.shape == second.shape
        np.testing.assert_allclose(centres_mm(second, turned), expected, atol=1e-9)


def rearranged(array: NDArray[np.int64], grid: Geometry, orientation: str) -> NDArray[np.int64]:
    """Permute and flip voxels as `axes_for` says."""
    axes = grid.axes_for(orientation)
    flipped = [axis for axis, (_, sign) in enumerate(axes) if sign < 0]
    return np.flip(array.transpose([old for old, _ in axes]), flipped)


@settings(deadline=None)
@given(grid=geometries(), code=st.sampled_from(ORIENTATIONS))
def test_reorienting_keeps_the_voxels_and_returns(grid: Geometry, code: str) -> None:
    turned = grid.reoriented(code)
    assert turned.orientation == code
    assert sorted(turned.shape) == sorted(grid.shape)
    assert turned.voxel_volume_ml == pytest.approx(grid.voxel_volume_ml)
    rows = [np.array(sorted(np.round(g.corners_mm, 6).tolist())) for g in (turned, grid)]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)
    back = turned.reoriented(grid.orientation)
    assert back.displacement_voxels(grid) < 1e-6


@settings(deadline=None)
@given(grid=geometries(), spacing=st.tuples(*[st.floats(0.2, 15.0)] * 3))
def test_respacing_keeps_the_outer_corners(grid: Geometry, spacing: tuple[float, float, float]) -> None:
    fine = grid.respaced(spacing)
    np.testing.assert_allclose(outer_corners_mm(fine), outer_corners_mm(grid), atol=1e-6)
    extent = np.array(grid.shape) * grid.spacing_mm
    np.testing.assert_allclose(np.array(fine.shape) * fine.spacing_mm, extent, rtol=1e-9)
    # The nearest whole number of voxels, at least one.
    assert (np.abs(np.array(fine.shape) - np.maximum(extent / spacing, 1)) <= 0.5 + 1e-9).all()


def test_respacing_worked_out_by_hand() -> None:
    # 10 voxels of 1 mm from -0.5 to 9.5 mm become 4 of 2.5 mm: centres at 0.75, 3.25, ...
    coarse = Geometry((10, 10, 1), np.eye(4)).respaced((2.6, 1.0, 30.0))
    assert coarse.shape == (4, 10, 1)
    assert coarse.spacing_mm == (2.5, 1.0, 1.0)
    np.testing.assert_allclose(coarse.to_mm(np.array([[0, 0, 0], [3, 9, 0]])), [[0.75, 0, 0], [8.25, 9, 0]])
    assert coarse.respaced((2.5, 1.0, 1.0)) == coarse
    with pytest.raises(ValueError, match="above 0 mm"):
        coarse.respaced((1.0, 0.0, 1.0))


@settings(deadline=None)
@given(grid=geometries(), point=st.tuples(*[st.floats(-50, 50)] * 3))
def test_millimetres_and_indices_are_inverse(grid: Geometry, point: tuple[float, float, float]) -> None:
    np.testing.assert_allclose(grid.to_index(grid.to_mm(np.array(point))), point, atol=1e-6)


def test_points_of_any_shape_are_mapped() -> None:
    grid = geometry(degrees=(5, 6, 7))
    points = np.arange(24.0).reshape(2, 4, 3)
    assert grid.to_mm(points).shape == (2, 4, 3)
    np.testing.assert_allclose(grid.to_mm(points)[1, 2], grid.to_mm(points[1, 2]))


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_cropping_keeps_the_voxels_it_keeps(code: str) -> None:
    grid = geometry((9, 9, 9), degrees=(12, -20, 31)).reoriented(code)
    box = grid.cropped((2, 3, 4), (5, 9, 6))
    assert box.shape == (3, 6, 2)
    assert box.orientation == code
    np.testing.assert_allclose(box.to_mm(np.array([1, 2, 1])), grid.to_mm(np.array([3, 5, 5])))
    beyond = grid.cropped((-2, 0, 0), (11, 9, 9))
    np.testing.assert_allclose(beyond.to_mm(np.array([2, 0, 0])), grid.to_mm(np.array([0, 0, 0])))
    with pytest.raises(GeometryError, match="at least one voxel"):
        grid.cropped((2, 3, 4), (5, 3, 6))


def test_a_left_handed_grid_keeps_its_hand_when_respaced() -> None:
    grid = geometry().reoriented("LAS")
    assert np.linalg.det(grid.affine[:3, :3]) < 0
    assert np.linalg.det(grid.respaced((1, 1, 1)).affine[:3, :3]) < 0
    assert np.linalg.det(grid.reoriented("RAS").affine[:3, :3]) > 0
    assert grid.voxel_volume_ml > 0


def test_orientation_of_an_oblique_grid_is_the_nearest() -> None:
    assert geometry(degrees=(44, 0, 0)).orientation == "RAS"
    assert geometry(degrees=(46, 0, 0)).orientation == "RSP"
    # At 45 degrees each world axis is still named once.
    assert sorted(axis for axis, _ in geometry(degrees=(45, 0, 0)).world_axes) == [0, 1, 2]
    assert geometry(degrees=(45, 0, 0)).orientation == geometry(degrees=(45 + 1e-12, 0, 0)).orientation


@pytest.mark.parametrize("code", ["RA", "RAL", "RRS", "ras", "RASL", ""])
def test_a_wrong_orientation_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        geometry().axes_for(code)


def test_displacement_is_the_farthest_corner_in_voxels_of_this_grid() -> None:
    grid = geometry((11, 11, 11), (1, 2, 4), origin=(0, 0, 0))
    shifted = geometry((11, 11, 11), (1, 2, 4), origin=(0.06, 0, 0.08))
    assert grid.displacement_voxels(shifted) == pytest.approx(0.1)  # 0.1 mm by the smallest spacing, 1 mm
    stretched = geometry((11, 11, 11), (1, 2, 4.03), origin=(0, 0, 0))
    assert grid.displacement_voxels(stretched) == pytest.approx(0.3)  # ten voxels of 0.03 mm each
    assert grid.displacement_voxels(grid) == 0
    assert grid.displacement_voxels(geometry((11, 11, 12), (1, 2, 4), origin=(0, 0, 0))) == float("inf")


def test_grids_match_within_a_tenth_of_a_voxel() -> None:
    grid = geometry(spacing=(1, 1, 1))
    assert grid.matches(geometry(spacing=(1, 1, 1), origin=(-30.0, 12.5, 700.09)))
    assert not grid.matches(geometry(spacing=(1, 1, 1), origin=(-30.0, 12.5, 700.11)))
    assert grid.matches(geometry(spacing=(1, 1, 1), origin=(-30.0, 12.5, 700.11)), tolerance_voxels=0.2)
    assert not grid.matches(grid.reoriented("LAS"), tolerance_voxels=1.0)


def test_grids_are_equal_by_value_and_cannot_be_changed() -> None:
    grid, same = geometry(), geometry()
    assert grid == same
    assert hash(grid) == hash(same)
    assert grid != geometry(origin=(-30.0, 12.5, 700.0001))
    assert grid != geometry(shape=(5, 6, 8))
    assert grid != "grid"
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 0] = 3
    source = np.eye(4)
    own = Geometry((1, 1, 1), source)
    source[0, 0] = 5
    assert own.affine[0, 0] == 1


def test_shear_is_the_largest_cosine_between_axes() -> None:
    affine = np.eye(4)
    affine[:3, 1] = [np.sin(np.radians(10)), np.cos(np.radians(10)), 0]
    assert Geometry((2, 2, 2), affine).shear == pytest.approx(np.sin(np.radians(10)))
    assert geometry(degrees=(12, -20, 31)).shear == pytest.approx(0, abs=1e-12)


def changed(row: int, column: int, value: float) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[row, column] = value
    return affine


PARALLEL = np.array([[1, 1, 0, 0], [0, 1e-4, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (changed(1, 1, 0.0), r"above 0 mm on each axis, got 1\.00x0\.00x1\.00 mm"),
        (changed(0, 3, np.nan), "finite"),
        (changed(2, 2, np.inf), "finite"),
        (changed(3, 0, 0.1), "last row 0 0 0 1"),
        (np.eye(3), "4x4"),
        (PARALLEL, "singular: two axes of the grid are parallel"),
    ],
)
def test_an_affine_that_makes_no_grid_is_refused(affine: NDArray[np.float64], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        Geometry((2, 2, 2), affine)


def test_small_voxels_are_no_singular_affine() -> None:
    micrometres = Geometry((2, 2, 2), np.diag([1e-4, 1e-4, 1e-4, 1]))
    assert micrometres.voxel_volume_ml == pytest.approx(1e-15)


@pytest.mark.parametrize("shape", [(0, 1, 1), (2, 2), (2, 2, -1), (2, 2, 2, 2)])
def test_a_shape_without_three_axes_of_voxels_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(GeometryError, match="three axes of at least one voxel"):
        Geometry(shape, np.eye(4))
