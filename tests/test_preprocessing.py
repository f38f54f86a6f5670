"""Preprocessing: anatomy stays at its millimetres, intensities come out as defined, a case is what training needs."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from pipeline.data.plan import Normalisation, Plan
from pipeline.errors import VolumeError
from pipeline.geometry import Geometry
from pipeline.preparation.examination import nonzero_box
from pipeline.preparation.preprocessing import (
    CLASS_VOXELS,
    SLAB_PLANES,
    class_indices,
    cropped_to,
    normalise,
    prepare_case,
    prepare_images,
    sample_class_voxels,
    target_geometry,
)
from pipeline.volumes.resampling import resample_label
from pipeline.volumes.volume import Volume

PLAN = Plan(
    channels={"T1": "MR"},
    labels={"background": 0, "left": 1, "right": 2},
    orientation="RAS",
    spacing_mm=(1.5, 1.5, 1.5),
    crop="none",
    patch_size=(16, 16, 16),
    batch_size=2,
    normalisation={"T1": Normalisation(scheme="none")},
)
ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(["RL", "AP", "SI"]) for letters in itertools.product(*axes)
]
CENTRE_MM = np.array([3.0, -5.0, 11.0])
# Structures left and right of the centre, told apart by class: a flip that is lost swaps them.
LEFT_MM, RIGHT_MM = np.array([-5.0, -2.0, 13.0]), np.array([11.0, -7.0, 15.0])


def make_grid(
    orientation: str, *, degrees: float = 0.0, spacing: tuple[float, float, float] = (1.5, 1.5, 1.5)
) -> Geometry:
    """A grid about CENTRE_MM, turned about a slanted axis."""
    angle = np.radians(degrees)
    x, y, z = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    shape = tuple(round(n / s) for n, s in zip((54, 48, 57), spacing, strict=True))
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = CENTRE_MM - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Geometry(shape, affine).reoriented(orientation)


def points_of(grid: Geometry) -> np.ndarray:
    return grid.to_mm(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1))


def bump(grid: Geometry, centre_mm: np.ndarray, sigma_mm: float = 3.5) -> Volume:
    squares = ((points_of(grid) - centre_mm) ** 2).sum(axis=-1)
    return Volume(np.exp(-squares / (2 * sigma_mm**2)).astype(np.float32)[None], grid)


def pair(grid: Geometry) -> Volume:
    label = np.zeros(grid.shape, np.uint8)
    for value, centre in ((1, LEFT_MM), (2, RIGHT_MM)):
        label[((points_of(grid) - centre) ** 2).sum(axis=-1) < 5.5**2] = value
    return Volume(label, grid)


def centroid_mm(weights: np.ndarray, grid: Geometry) -> np.ndarray:
    return np.average(points_of(grid).reshape(-1, 3), axis=0, weights=weights.ravel().astype(np.float64))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
# A mask redrawn on other voxels has its rim elsewhere; half a voxel's slip would be 0.6 mm or more.
@pytest.mark.parametrize(
    ("degrees", "spacing", "image_mm", "label_mm"),
    [(0.0, (1.5, 1.5, 1.5), 1e-3, 1e-9), (17.0, (1.2, 1.7, 3.0), 0.02, 0.2)],
    ids=["straight", "oblique_anisotropic"],
)
def test_anatomy_stays_at_its_millimetres(
    orientation: str, degrees: float, spacing: tuple[float, float, float], image_mm: float, label_mm: float
) -> None:
    grid = make_grid(orientation, degrees=degrees, spacing=spacing)
    image, label = bump(grid, LEFT_MM), pair(grid)
    case = prepare_case({"T1": image}, label, PLAN, grid)
    assert case.geometry.orientation == "RAS"
    assert case.geometry.spacing_mm == pytest.approx((1.5, 1.5, 1.5), rel=0.05)
    assert np.linalg.norm(centroid_mm(case.image[0], case.geometry) - centroid_mm(image.array, grid)) < image_mm
    for index in (1, 2):
        moved = centroid_mm(case.label == index, case.geometry) - centroid_mm(label.array == index, grid)
        assert np.linalg.norm(moved) < label_mm
    np.testing.assert_array_equal(case.reference, label.array)
    assert case.native == grid


def test_channels_on_their_own_grids_meet_on_one() -> None:
    plan = PLAN.changed(
        channels={"T1": "MR", "PET": "PET"}, normalisation={name: {"scheme": "none"} for name in ("T1", "PET")}
    )
    fine, coarse = make_grid("LPS", degrees=10), make_grid("SAR", degrees=-5, spacing=(3.0, 3.0, 2.5))
    images = {"T1": bump(fine, LEFT_MM), "PET": bump(coarse, LEFT_MM)}
    prepared = prepare_images(images, plan, fine)
    assert prepared.array.shape == (2, *prepared.geometry.shape)
    one, other = (centroid_mm(channel, prepared.geometry) for channel in prepared.array)
    assert np.linalg.norm(one - other) < 0.1
    assert np.abs(prepared.array[0] - prepared.array[1]).max() < 0.1


def test_a_missing_channel_is_zeros_and_is_not_counted_present() -> None:
    plan = PLAN.changed(
        channels={"T1": "MR", "PET": "PET"}, normalisation={name: {"scheme": "zscore"} for name in ("T1", "PET")}
    )
    grid = make_grid("RAS")
    case = prepare_case({"PET": bump(grid, CENTRE_MM)}, None, plan, grid)
    assert not case.image[0].any()
    assert case.image[1].any()
    assert case.channels_present == ("PET",)
    assert case.label is None
    assert case.reference is None


@pytest.mark.parametrize("channels", [[], ["T2"]])
def test_channels_that_the_plan_does_not_know_are_refused(channels: list[str]) -> None:
    grid = make_grid("RAS")
    with pytest.raises(VolumeError, match="the plan's are T1"):
        prepare_images({channel: bump(grid, CENTRE_MM) for channel in channels}, PLAN, grid)


def test_the_zero_frame_is_cut_away_exactly() -> None:
    grid = make_grid("LPI")
    array = np.zeros((1, *grid.shape), np.float32)
    array[0, 4:20, 7:25, 3:30] = 2.0
    plan = PLAN.changed(crop="nonzero")
    prepared = prepare_images({"T1": Volume(array, grid)}, plan, grid)
    assert prepared.array.shape == (1, 16, 18, 27)
    assert (prepared.array == 2.0).all()
    assert prepare_images({"T1": Volume(array, grid)}, PLAN, grid).array.shape == array.shape


def test_a_voxel_of_any_channel_keeps_its_place() -> None:
    plan = PLAN.changed(
        crop="nonzero", channels={"T1": "MR", "T2": "MR"}, normalisation={n: {"scheme": "none"} for n in ("T1", "T2")}
    )
    grid = make_grid("RAS")
    one, other = np.zeros((2, 1, *grid.shape), np.float32)
    one[0, 5, 6, 7] = other[0, 20, 10, 9] = 1.0
    images = {"T1": Volume(one, grid), "T2": Volume(other, grid)}
    assert target_geometry(images, plan, grid) == grid.cropped((5, 6, 7), (21, 11, 10)).respaced((1.5, 1.5, 1.5))


def test_an_image_of_zeros_is_not_cropped_to_nothing() -> None:
    grid = make_grid("RAS")
    zeros = Volume(np.zeros((1, *grid.shape), np.float32), grid)
    plan = PLAN.changed(crop="nonzero", normalisation={"T1": {"scheme": "zscore_nonzero"}})
    prepared = prepare_images({"T1": zeros}, plan, grid)
    assert prepared.geometry.shape == grid.shape
    assert not prepared.array.any()


def test_a_box_beyond_the_grid_is_clipped() -> None:
    grid = Geometry((10, 10, 10), np.eye(4))
    assert cropped_to(grid, [grid.cropped((-5, 2, 3), (4, 30, 7))]) == grid.cropped((0, 2, 3), (4, 10, 7))
    assert cropped_to(grid, [grid.cropped((20, 20, 20), (30, 30, 30))]).shape == (1, 1, 1)
    assert cropped_to(grid, []) == grid


def test_where_the_body_is_is_told_before_air_becomes_a_number_like_any_other() -> None:
    plan = PLAN.changed(channels={"T1": "CT"}, normalisation={"T1": {"scheme": "zscore"}})
    grid = make_grid("LPI")
    array = np.full((1, *grid.shape), -1000.0, np.float32)
    array[0, :6, :6, :6] = 40.0  # right, front and head: the last voxels of the plan's RAS
    prepared = prepare_images({"T1": Volume(array, grid)}, plan, grid)
    assert prepared.body is not None
    assert prepared.body.occupied.shape == tuple(-(-n // 4) for n in prepared.geometry.shape)
    assert not prepared.body.any_in((0, 0, 0), tuple(n - 20 for n in prepared.geometry.shape))
    assert prepared.body.any_in(tuple(n - 1 for n in prepared.geometry.shape), prepared.geometry.shape)
    case = prepare_case({"T1": Volume(array, grid)}, None, plan, grid)
    assert case.body is not None
    np.testing.assert_array_equal(case.body.occupied, prepared.body.occupied)


def test_box_around_the_nonzero_voxels() -> None:
    mask = np.zeros((5, 6, 7), bool)
    assert nonzero_box(mask) is None
    mask[1, 2, 3] = mask[3, 2, 6] = True
    for voxels in (mask, np.asfortranarray(mask), mask * np.float32(-0.5), mask.transpose(1, 0, 2).transpose(1, 0, 2)):
        assert nonzero_box(voxels) == ((1, 2, 3), (4, 3, 7))
    assert nonzero_box(mask.transpose(2, 0, 1)) == ((3, 1, 2), (7, 4, 3))


@pytest.mark.parametrize("scheme", ["zscore", "zscore_nonzero"])
@pytest.mark.parametrize("value", [0.0, 7.3, -1e6, 1e-30])
def test_a_constant_image_becomes_zeros(scheme: str, value: float) -> None:
    grid = make_grid("RAS")
    plan = PLAN.changed(normalisation={"T1": {"scheme": scheme}})
    prepared = prepare_images({"T1": Volume(np.full((1, *grid.shape), value, np.float32), grid)}, plan, grid)
    assert not prepared.array.any()


def test_zscore_by_hand() -> None:
    image = np.array([[[1, 3]], [[5, 7]]], np.float32)
    normalise(image, Normalisation(scheme="zscore"))
    np.testing.assert_allclose(image.ravel(), np.array([-3, -1, 1, 3]) / np.sqrt(5), rtol=1e-6)


def test_zscore_is_exact_far_from_zero() -> None:
    rng = np.random.default_rng(0)
    image = (1e4 + rng.normal(size=(30, 40, 50))).astype(np.float32)
    expected = (image - image.mean(dtype=np.float64)) / image.std(dtype=np.float64)
    normalise(image, Normalisation(scheme="zscore"))
    np.testing.assert_allclose(image, expected, atol=1e-3)


def test_zscore_nonzero_by_hand() -> None:
    image = np.array([[[0, 3]], [[5, 0]]], np.float32)
    image[image == 0] = np.nan
    normalise(image, Normalisation(scheme="zscore_nonzero"))
    np.testing.assert_array_equal(image.ravel(), [0, -1, 1, 0])


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SPL"])
@pytest.mark.parametrize("thick_axis", [None, 0])
def test_zeros_are_left_out_slab_by_slab_as_they_are_at_once(orientation: str, thick_axis: int | None) -> None:
    rng = np.random.default_rng(0)
    grid = make_grid(orientation, degrees=12, spacing=(1.1, 1.9, 2.3))
    coarse = rng.random(tuple(-(-n // 5) for n in grid.shape)) < 0.5
    holes = np.kron(coarse, np.ones((5, 5, 5), bool))[tuple(slice(n) for n in grid.shape)]
    image = Volume((rng.normal(5, 1, grid.shape) * holes).astype(np.float32)[None], grid)
    plan = PLAN.changed(normalisation={"T1": {"scheme": "zscore_nonzero"}}, thick_axis=thick_axis)
    prepared = prepare_images({"T1": image}, plan, grid)
    assert len(prepared.array[0]) > 2 * SLAB_PLANES
    nonzero = resample_label(Volume(holes.astype(np.uint8), grid), prepared.geometry, thick_axis=thick_axis).array
    np.testing.assert_array_equal(prepared.array[0] != 0, nonzero == 1)
    assert prepared.array[0][nonzero == 1].mean() == pytest.approx(0, abs=1e-5)
    assert prepared.array[0][nonzero == 1].std() == pytest.approx(1, abs=1e-5)


def test_ct_by_hand_and_air_beyond_its_field_of_view() -> None:
    ct = Normalisation(scheme="ct", low=-100, high=300, mean=50, std=25)
    image = np.array([[[-1000, -100, 50, 100, 3000]]], np.float32)
    normalise(image, ct)
    np.testing.assert_array_equal(image.ravel(), [-6, -6, 0, 2, 10])
    plan = PLAN.changed(channels={"CT": "CT"}, normalisation={"CT": ct.model_dump()})
    grid = make_grid("RAS")
    half = grid.cropped((0, 0, 0), (18, *grid.shape[1:]))
    prepared = prepare_images({"CT": Volume(np.full((1, *half.shape), 50, np.float32), half)}, plan, grid)
    assert (prepared.array[0, :18] == 0).all()
    assert (prepared.array[0, 18:] == -6).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("scheme", ["none", "zscore", "zscore_nonzero"])
def test_what_is_not_finite_is_refused(scheme: str, value: float) -> None:
    grid = make_grid("RAS")
    image = bump(grid, CENTRE_MM)
    image.array[0, 3, 4, 5] = value
    with pytest.raises(VolumeError, match="'T1' holds NaN or infinity"):
        prepare_images({"T1": image}, PLAN.changed(normalisation={"T1": {"scheme": scheme}}), grid)


def test_intensities_beyond_float16_are_refused() -> None:
    grid = make_grid("RAS")
    image = bump(grid, CENTRE_MM)
    case = prepare_case({"T1": replace(image, array=image.array * 6e4)}, None, PLAN, grid)
    assert 5e4 < case.image.max() < np.inf
    with pytest.raises(VolumeError, match=r"set preprocessing\.normalisation\.T1 to zscore"):
        prepare_case({"T1": replace(image, array=image.array * 7e5)}, None, PLAN, grid)


def test_the_input_is_left_as_it_was() -> None:
    grid = make_grid("RAS")  # the plan's own grid: nothing is interpolated, and views are tempting
    image, label = bump(grid, CENTRE_MM), pair(grid)
    before = image.array.copy(), label.array.copy()
    case = prepare_case({"T1": image}, label, PLAN.changed(normalisation={"T1": {"scheme": "zscore"}}), grid)
    assert case.image.std() == pytest.approx(1, abs=0.01)
    np.testing.assert_array_equal(image.array, before[0])
    np.testing.assert_array_equal(label.array, before[1])


def test_any_label_values_become_class_indices() -> None:
    plan = PLAN.changed(labels={"background": 7, "left": -3, "right": 70_000})
    values = np.array([[[7, -3], [70_000, 7]]], np.int32)
    classes = class_indices(values, plan)
    assert classes.dtype == np.uint8
    np.testing.assert_array_equal(classes, [[[0, 1], [2, 0]]])
    for unknown in (0, -4, 70_001):
        with pytest.raises(VolumeError, match=f"the value {unknown}"):
            class_indices(np.array([[[7, unknown]]]), plan)


def test_an_ignored_value_becomes_one_more_class() -> None:
    plan = PLAN.changed(ignore_label=-1)
    np.testing.assert_array_equal(class_indices(np.array([[[-1, 2, 0]]]), plan), [[[3, 2, 0]]])
    with pytest.raises(VolumeError, match="the value -1"):
        class_indices(np.array([[[-1, 2, 0]]]), PLAN)


def test_ignored_voxels_are_resampled_as_one_more_class_and_never_drawn_from() -> None:
    grid = make_grid("LPS", degrees=10, spacing=(1.0, 1.2, 2.5))
    plain = pair(grid)
    label = replace(plain, array=np.where(plain.array == 2, 9, plain.array).astype(np.uint8))
    whole, ignoring = (
        prepare_case({"T1": bump(grid, CENTRE_MM)}, drawn, plan, grid)
        for drawn, plan in ((plain, PLAN), (label, PLAN.changed(ignore_label=9)))
    )
    assert whole.label is not None
    np.testing.assert_array_equal(ignoring.label, np.where(whole.label == 2, 3, whole.label))
    assert sorted(whole.class_voxels) == [1, 2]
    assert sorted(ignoring.class_voxels) == [1]


def test_what_learns_from_a_store_does_not_make_it_stale() -> None:
    digest = PLAN.preprocessing_digest()
    assert PLAN.changed(regions={"all": ("left", "right"), "right": ("right",)}).preprocessing_digest() == digest
    assert PLAN.changed(ignore_label=9).preprocessing_digest() != digest


def test_a_label_elsewhere_than_the_native_grid_is_a_callers_mistake() -> None:
    grid = make_grid("RAS")
    with pytest.raises(ValueError, match="native"):
        prepare_case({"T1": bump(grid, CENTRE_MM)}, pair(grid), PLAN, make_grid("LPS"))


def test_class_voxels_are_few_even_and_repeatable() -> None:
    label = np.zeros((40, 40, 40), np.uint8)
    label[:, :20], label[3, 39, 5] = 1, 3
    label[0, 39, 0] = 4  # nobody knows what it is
    voxels = sample_class_voxels(label, 4)
    assert sorted(voxels) == [1, 3]
    assert voxels[1].shape == (CLASS_VOXELS, 3)
    assert (label[tuple(voxels[1].T)] == 1).all()
    assert len(np.unique(voxels[1], axis=0)) == CLASS_VOXELS
    np.testing.assert_allclose(voxels[1].mean(axis=0), [19.5, 9.5, 19.5], atol=0.5)
    np.testing.assert_array_equal(voxels[3], [[3, 39, 5]])
    np.testing.assert_array_equal(sample_class_voxels(label, 4)[1], voxels[1])
    assert (sample_class_voxels(label, 4, seed=1)[1] != voxels[1]).any()
    assert sample_class_voxels(np.zeros((2, 2, 2), np.uint8), 4) == {}
