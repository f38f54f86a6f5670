import itertools

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.geometry import Geometry
from pipeline.volumes.axes import AxisMap, axis_maps
from pipeline.volumes.resampling import _LABEL_SLAB_VOXELS, resample_image, resample_label
from pipeline.volumes.volume import Volume

OPPOSITE = {"R": "L", "A": "P", "S": "I"}
CODES = [
    "".join(OPPOSITE[letter] if flip else letter for letter, flip in zip(axes, flips, strict=True))
    for axes, flips in itertools.product(itertools.permutations("RAS"), itertools.product((False, True), repeat=3))
]
# A left-handed, anisotropic grid, turned in space.
TURN = np.array([[np.cos(0.35), -np.sin(0.35), 0], [np.sin(0.35), np.cos(0.35), 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, np.cos(0.2), np.sin(0.2)], [0, -np.sin(0.2), np.cos(0.2)]]
)


def grid(shape=(24, 20, 16), spacing=(-1.1, 0.9, 2.0), *, turned=True) -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = (TURN if turned else np.eye(3)) * spacing
    affine[:3, 3] = (31.0, -47.5, 12.3)
    return Geometry(shape, affine)


def ball(geometry: Geometry, centre_mm: np.ndarray, radius_mm: float = 6.0) -> np.ndarray:
    """A smooth blob, 1 at its centre and 0 well inside the grid."""
    mm = geometry.to_mm(np.moveaxis(np.indices(geometry.shape), 0, -1))
    return np.exp(-(((mm - centre_mm) / (radius_mm / 2)) ** 2).sum(-1)).astype(np.float32)


def centroid_mm(weights: np.ndarray, geometry: Geometry) -> np.ndarray:
    mm = geometry.to_mm(np.moveaxis(np.indices(geometry.shape), 0, -1))
    return (weights[..., None] * mm).sum((0, 1, 2)) / weights.sum()


def noise(geometry: Geometry, channels: int = 1, seed: int = 0) -> Volume:
    return Volume(np.random.default_rng(seed).normal(size=(channels, *geometry.shape)).astype(np.float32), geometry)


def coordinates(source: Geometry, onto: Geometry) -> np.ndarray:
    """(3, X, Y, Z) clamped indices on the source."""
    indices = source.to_index(onto.to_mm(np.moveaxis(np.indices(onto.shape), 0, -1)))
    return np.clip(np.moveaxis(indices, -1, 0), 0, np.array(source.shape).reshape(3, 1, 1, 1) - 1)


@pytest.mark.parametrize("code", CODES)
def test_centroid_in_mm_in_every_axis_order(code):
    source = grid()
    centre = source.to_mm(np.array([11.3, 9.8, 7.9]))
    onto = source.reoriented(code).respaced((0.9, 0.8, 1.3))
    image = Volume(ball(source, centre)[None], source)
    for order in (1, 3):
        resampled = resample_image(image, onto, order=order)
        assert np.abs(centroid_mm(resampled.array[0], onto) - centroid_mm(image.array[0], source)).max() < 0.02
    label = Volume((image.array[0] > 0.4) * np.uint8(7), source)
    drawn = resample_label(label, onto)
    assert np.abs(centroid_mm(drawn.array, onto) - centre).max() < 0.15
    assert set(np.unique(drawn.array)) == {0, 7}


@pytest.mark.parametrize("order", [1, 3])
def test_centroid_in_mm_between_grids_that_are_not_parallel(order):
    source, onto = grid(), grid((30, 34, 33), (0.9, 1.0, -1.2), turned=False)
    centre = source.to_mm(np.array([11.3, 9.8, 7.9]))
    start = onto.to_index(centre) - np.array(onto.shape) / 2
    onto = onto.cropped(tuple(np.rint(start).astype(int)), tuple(np.rint(start).astype(int) + onto.shape))
    assert axis_maps(source, onto) is None
    image = Volume(ball(source, centre)[None], source)
    resampled = resample_image(image, onto, order=order)
    assert np.abs(centroid_mm(resampled.array[0], onto) - centroid_mm(image.array[0], source)).max() < 0.03
    drawn = resample_label(Volume((image.array[0] > 0.4).astype(np.uint8), source), onto)
    assert np.abs(centroid_mm(drawn.array, onto) - centre).max() < 0.15


@pytest.mark.parametrize("code", CODES)
def test_reorienting_is_exact_and_there_and_back_again(code):
    image = noise(grid(), channels=2)
    there = resample_image(image, image.geometry.reoriented(code))
    for index in [(0, 0, 0), (3, 7, 15), (23, 19, 1)]:
        mm = image.geometry.to_mm(np.array(index))
        moved = tuple(np.rint(there.geometry.to_index(mm)).astype(int))
        np.testing.assert_array_equal(there.array[(slice(None), *moved)], image.array[(slice(None), *index)])
    back = resample_image(there, image.geometry)
    np.testing.assert_array_equal(back.array, image.array)
    assert np.shares_memory(back.array, image.array)
    label = Volume(np.random.default_rng(0).integers(-3, 900, image.geometry.shape), image.geometry)
    again = resample_label(resample_label(label, there.geometry), image.geometry)
    np.testing.assert_array_equal(again.array, label.array)


def test_one_grid_is_the_same_array_despite_a_headers_rounding():
    image = noise(grid())
    rounded = Geometry(image.geometry.shape, image.geometry.affine.astype(np.float32))
    assert resample_image(image, rounded).array is image.array


def test_a_box_beyond_the_grid_is_cut_exactly_and_filled_outside():
    image = noise(grid((6, 5, 4)))
    box = image.geometry.cropped((2, -1, 0), (9, 4, 4))
    cut = resample_image(image, box, outside=-9.0).array[0]
    expected = np.full((7, 5, 4), -9.0, np.float32)
    expected[:4, 1:] = image.array[0, 2:, :4]
    np.testing.assert_array_equal(cut, expected)
    label = Volume(np.full((6, 5, 4), 3, np.int8), image.geometry)
    np.testing.assert_array_equal(resample_label(label, box, outside=-1).array, np.where(expected == -9, -1, 3))
    assert (label.array == 3).all()


def test_a_grid_beside_the_image_is_all_outside():
    image = noise(grid((6, 5, 4)))
    beside = image.geometry.cropped((8, 0, 0), (9, 4, 4))
    kept = image.array.copy()
    assert (resample_image(image, beside, outside=2.5).array == 2.5).all()
    np.testing.assert_array_equal(image.array, kept)


def line(values: list[float]) -> Volume:
    return Volume(np.array(values, np.float32).reshape(1, -1, 1, 1), Geometry((len(values), 1, 1), np.eye(4)))


def points(start: float, step: float, count: int) -> Geometry:
    affine = np.diag([step, 1.0, 1.0, 1.0])
    affine[0, 3] = start
    return Geometry((count, 1, 1), affine)


def test_linear_along_a_line_by_hand():
    """From -0.75 in steps of 0.25: outside, clamped to the outer centre, then a quarter of the way each."""
    resampled = resample_image(line([0, 4, 2]), points(-0.75, 0.25, 15), order=1, outside=-1)
    expected = [-1, 0, 0, 0, 1, 2, 3, 4, 3.5, 3, 2.5, 2, 2, 2, -1]
    np.testing.assert_allclose(resampled.array.ravel(), expected, atol=1e-6)


def test_cubic_goes_through_the_voxels_and_overshoots_between_them():
    image = line([0, 0, 0, 1, 1, 1])
    fine = resample_image(image, points(0, 0.5, 11), order=3).array.ravel()
    np.testing.assert_allclose(fine[::2], image.array.ravel(), atol=1e-6)
    assert fine.max() > 1.05
    assert resample_image(image, points(0, 0.5, 11), thick_axis=0).array.max() == 1


def test_labels_along_a_line_by_hand():
    """Midway between two values the smaller wins, whatever their number."""
    label = Volume(np.array([5, -2, 300], np.int16).reshape(3, 1, 1), Geometry((3, 1, 1), np.eye(4)))
    drawn = resample_label(label, points(-0.75, 0.25, 15), outside=77)
    expected = [77, 5, 5, 5, 5, -2, -2, -2, -2, -2, 300, 300, 300, 300, 77]
    assert drawn.array.dtype == np.int16
    drawn_list = drawn.array.ravel().tolist()
    assert drawn_list[:9] + drawn_list[10:] == expected[:9] + expected[10:]
    assert drawn_list[9] == -2
    nearest = resample_label(label, points(-0.75, 0.25, 15), thick_axis=0, outside=77)
    assert nearest.array.ravel().tolist() == [77, 5, 5, 5, 5, -2, -2, -2, -2, 300, 300, 300, 300, 300, 77]


def test_shrinking_is_smoothed_beyond_a_factor_of_one_and_a_half_only():
    stripes = line([0.0, 1.0] * 32)
    coarse = resample_image(stripes, stripes.geometry.respaced((4.0, 1, 1)), order=1).array[0, 1:-1]
    np.testing.assert_allclose(coarse, 0.5, atol=1e-3)
    finer = resample_image(stripes, stripes.geometry.respaced((1.4, 1, 1)), order=1).array[0, 1:-1]
    assert np.ptp(finer) > 0.9


def test_smoothing_before_shrinking_keeps_the_centroid_and_the_target_resolution():
    """Variances add: the blob's, and that of a 4 mm point spread (full width at half maximum) less the 1 mm one's."""
    mm = np.arange(96.0)
    blob = line(np.exp(-((mm - 48.3) ** 2) / (2 * 4.0**2)).tolist())
    onto = blob.geometry.respaced((4.0, 1, 1))
    coarse = resample_image(blob, onto, order=3).array[0]
    centroid = centroid_mm(coarse, onto)[0]
    variance = (coarse.ravel() * (onto.to_mm(np.argwhere(coarse < 2))[:, 0] - centroid) ** 2).sum() / coarse.sum()
    assert centroid == pytest.approx(48.3, abs=0.01)
    assert variance == pytest.approx(16 + (16 - 1) / (8 * np.log(2)), rel=0.01)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("turned", [True, False])
def test_equals_scipy_on_the_same_grid(order, turned):
    image = noise(grid(), channels=2)
    onto = image.geometry.reoriented("SPL").respaced((1.5, 0.7, 0.8)) if turned else grid((20, 22, 25), turned=False)
    assert (axis_maps(image.geometry, onto) is not None) == turned
    places = coordinates(image.geometry, onto)
    resampled = resample_image(image, onto, order=order, outside=0.0).array
    inside = resample_image(Volume(np.ones_like(image.array), image.geometry), onto, order=1).array[0] > 0.5
    for channel in range(2):
        expected = ndimage.map_coordinates(image.array[channel].astype(float), places, order=order, mode="mirror")
        np.testing.assert_allclose(resampled[channel][inside], expected[inside], atol=1e-5)
        assert (resampled[channel][~inside] == 0).all()


@pytest.mark.parametrize("order", [1, 3])
def test_equals_simpleitk_between_the_outer_centres(order):
    image = noise(grid())
    onto = image.geometry.reoriented("IRA").respaced((1.4, 0.8, 0.7))
    ours = resample_image(image, onto, order=order).array[0]
    theirs = with_simpleitk(image, onto, sitk.sitkLinear if order == 1 else sitk.sitkBSpline)
    indices = np.moveaxis(image.geometry.to_index(onto.to_mm(np.moveaxis(np.indices(onto.shape), 0, -1))), -1, 0)
    between = (np.abs(indices - coordinates(image.geometry, onto)) < 1e-9).all(axis=0)
    assert between.mean() > 0.7
    assert np.abs(ours - theirs)[between].max() < 1e-3 * np.ptp(image.array)


def with_simpleitk(image: Volume, onto: Geometry, interpolator: int) -> np.ndarray:
    """Resample with SimpleITK; index order and LPS are its own."""
    source = placed(sitk.GetImageFromArray(image.array[0].T), image.geometry)
    target = placed(sitk.Image(onto.shape, sitk.sitkFloat32), onto)
    return sitk.GetArrayFromImage(sitk.Resample(source, target, sitk.Transform(), interpolator)).T


def placed(image: sitk.Image, geometry: Geometry) -> sitk.Image:
    to_lps = np.diag([-1.0, -1.0, 1.0])
    image.SetSpacing(geometry.spacing_mm)
    image.SetDirection((to_lps @ geometry.affine[:3, :3] / geometry.spacing_mm).ravel().tolist())
    image.SetOrigin((to_lps @ geometry.affine[:3, 3]).tolist())
    return image


def one_hot_argmax(label: Volume, onto: Geometry) -> np.ndarray:
    """One linear 0/1 volume per value, then the argmax, in float64: slow and obvious."""
    values = np.unique(label.array)
    places = coordinates(label.geometry, onto)
    places = np.where(np.abs(places - np.rint(places)) < 1e-4, np.rint(places), places)
    shares = [ndimage.map_coordinates((label.array == v).astype(float), places, order=1, mode="mirror") for v in values]
    return values[np.round(shares, 12).argmax(axis=0)]


sizes = st.tuples(*[st.integers(1, 6)] * 3)
spacings = st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 1.3, 3.1])] * 3)


@settings(max_examples=150, deadline=None)
@given(sizes, spacings, spacings, st.sampled_from(CODES), st.booleans(), st.integers(0, 2**32 - 1))
def test_labels_equal_the_argmax_of_linear_shares(shape, spacing, onto_spacing, code, turned, seed):
    rng = np.random.default_rng(seed)
    source = grid(shape, spacing, turned=turned)
    values = rng.choice([-(2**63), -7, 0, 1, 255, 70_000, 2**62], size=4)
    label = Volume(rng.choice(values, shape), source)
    onto = source.reoriented(code).respaced(onto_spacing)
    drawn = resample_label(label, onto)
    np.testing.assert_array_equal(drawn.array, one_hot_argmax(label, onto))
    assert drawn.array.dtype == np.int64


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int64])
def test_labels_keep_their_type_and_its_largest_value(dtype):
    highest = np.iinfo(dtype).max
    label = Volume(np.array([0, highest, highest, 0], dtype).reshape(4, 1, 1), Geometry((4, 1, 1), np.eye(4)))
    drawn = resample_label(label, points(0.25, 0.5, 6))
    assert drawn.array.dtype == dtype
    assert drawn.array.ravel().tolist() == [0, highest, highest, highest, highest, 0]


def test_a_label_map_of_both_extremes_of_the_widest_type_is_refused():
    label = Volume(np.array([0, 2**64 - 1], np.uint64).reshape(2, 1, 1), Geometry((2, 1, 1), np.eye(4)))
    with pytest.raises(ValueError, match="both 0 and 18446744073709551615"):
        resample_label(label, points(0.25, 0.5, 2))


def test_a_read_only_image_is_resampled_and_stays():
    image = noise(grid((6, 5, 4)))
    image.array.setflags(write=False)
    kept = image.array.copy()
    resample_image(image, image.geometry.respaced((0.5, 0.5, 0.5)))
    np.testing.assert_array_equal(image.array, kept)


# Blocks of 32 rows and slabs begin and end within; the second grows along its first axis, the third shrinks.
@pytest.mark.parametrize("onto_spacing", [(0.9, 0.8, 1.3), (0.3, 1.5, 2.1), (3.5, 0.9, 2.0)])
@pytest.mark.parametrize("code", ["LAS", "RPI", "SLP", "AIR"])
@pytest.mark.parametrize("order", [1, 3])
def test_a_part_of_the_target_is_that_part_of_the_whole(onto_spacing, code, order):
    source = grid((90, 70, 40))
    image = noise(source, channels=2)
    onto = source.cropped((-5, 3, 0), (88, 75, 40)).reoriented(code).respaced(onto_spacing)
    whole = resample_image(image, onto, order=order, outside=7.0).array
    start = tuple(n // 3 for n in onto.shape)
    stop = tuple(2 * n // 3 + 1 for n in onto.shape)
    part = resample_image(image, onto.cropped(start, stop), order=order, outside=7.0).array
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    np.testing.assert_allclose(part, whole[(slice(None), *box)], atol=2e-5)
    assert (whole == 7.0).any()


def test_a_part_of_a_label_map_is_that_part_of_the_whole():
    source = grid((12, 900, 700), (3.0, 0.9, 1.0))
    coarse = np.random.default_rng(0).integers(0, 3, (2, 18, 14)).astype(np.uint8)
    label = Volume(np.kron(coarse, np.ones((6, 50, 50), np.uint8)), source)
    onto = source.reoriented("SLP").respaced((1.3, 1.4, 1.2))
    affine = onto.affine.copy()
    affine[:3, 3] += np.pi / 100  # no voxel lies half way between two others: there are no ties
    onto = Geometry(onto.shape, affine)
    whole = resample_label(label, onto).array
    assert whole.size > 2 * _LABEL_SLAB_VOXELS
    for axis in range(3):
        for start in (0, onto.shape[axis] // 2):
            low, high = [0, 0, 0], list(onto.shape)
            low[axis], high[axis] = start, start + 3
            part = resample_label(label, onto.cropped(tuple(low), tuple(high))).array
            np.testing.assert_array_equal(part, whole.take(range(start, start + 3), axis))


@pytest.mark.parametrize("spacing", [(1.1, 0.9, 2.0), (1.4, 0.9, 1.2)], ids=["taken", "interpolated"])
@pytest.mark.parametrize("turned", [False, True])
def test_an_image_is_resampled_into_an_array(spacing, turned):
    source = grid(turned=False)
    image = noise(source, channels=2)
    onto = (grid() if turned else source).reoriented("SLA").respaced(spacing[::-1])
    expected = resample_image(image, onto).array
    into = np.full((3, *onto.shape), 5.0, np.float32)
    assert resample_image(image, onto, out=into[1:]).array.base is into
    np.testing.assert_array_equal(into[1:], expected)
    assert (into[0] == 5.0).all()


def test_axis_maps_say_where_each_axis_comes_from():
    source = Geometry((10, 4, 6), np.diag([1.0, 2.0, 3.0, 1.0]))
    maps = axis_maps(source, source.reoriented("SRP").respaced((1.5, 1.0, 2.0)))
    assert maps is not None
    assert [axis_map.axis for axis_map in maps] == [2, 0, 1]
    np.testing.assert_allclose(maps[0].coordinates[:3], [-0.25, 0.25, 0.75])
    np.testing.assert_array_equal(maps[1].coordinates, np.arange(10))
    np.testing.assert_array_equal(maps[2].coordinates, [3, 2, 1, 0])


def test_an_axis_map_by_hand():
    axis_map = AxisMap(0, 3, np.array([-0.6, -0.5, 0.0, 0.25, 1.5, 2.5, 2.6]))
    assert axis_map.inside.tolist() == [False, True, True, True, True, True, False]
    assert axis_map.lower.tolist() == [0, 0, 0, 0, 1, 2, 2]
    assert axis_map.upper.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert axis_map.weight.tolist() == [0, 0, 0, 0.25, 0.5, 0, 0]
    rounded = axis_map.rounded()
    assert rounded.lower.tolist() == [0, 0, 0, 0, 2, 2, 2]
    assert rounded.on_centres
    assert rounded.inside.tolist() == axis_map.inside.tolist()


def test_the_number_of_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        resample_image(noise(grid()), grid().respaced((1.0, 1.0, 1.0)))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
