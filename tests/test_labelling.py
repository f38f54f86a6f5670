import itertools
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.geometry import Geometry
from pipeline.inference import labelling
from pipeline.inference.labelling import label_from_planes
from pipeline.inference.planes import LogitPlanes
from pipeline.volumes.axes import AxisMap, axis_maps

ORDERS = list(itertools.product(itertools.permutations("RAS"), itertools.product((False, True), repeat=3)))
OPPOSITE = {"R": "L", "A": "P", "S": "I"}
CODES = ["".join(OPPOSITE[a] if flip else a for a, flip in zip(axes, flips, strict=True)) for axes, flips in ORDERS]


def stream(logits: np.ndarray, axis: int, planes: int = 1) -> Iterator[LogitPlanes]:
    """Hand out (K, X, Y, Z) logits some planes at a time, in memory that is overwritten by the next ones."""
    moved = np.moveaxis(logits, axis + 1, 1)
    for start in range(0, moved.shape[1], planes):
        handed = torch.from_numpy(moved[:, start : start + planes].copy())
        yield LogitPlanes(start, handed)
        handed.fill_(float("nan"))


def interpolated(values: np.ndarray, axis: int, axis_map: AxisMap) -> np.ndarray:
    weight = axis_map.weight.reshape([-1 if own == axis else 1 for own in range(values.ndim)])
    return (1 - weight) * values.take(axis_map.lower, axis) + weight * values.take(axis_map.upper, axis)


def decided(logits: np.ndarray, output: str) -> np.ndarray:
    """The class at each voxel of (K, X, Y, Z) logits, by the words of the two rules."""
    if output == "softmax":
        return logits.argmax(axis=0)
    classes = np.zeros(logits.shape[1:], int)
    for region, values in enumerate(logits, 1):
        classes[values > 0] = region
    return classes


def reference(logits, axis: int, prepared: Geometry, native: Geometry, thick: int | None = None, output="softmax"):
    """All K volumes interpolated in float64, then decided: slow and obvious."""
    maps = axis_maps(prepared, native)
    assert maps is not None
    by_source = {m.axis: m.rounded() if m.axis == thick else m for m in maps}
    volumes = logits.astype(np.float64)
    for own in (axis, *(own for own in range(3) if own != axis)):
        volumes = interpolated(volumes, own + 1, by_source[own])
    classes = decided(volumes, output).transpose([m.axis for m in maps])
    for own, axis_map in enumerate(maps):
        np.moveaxis(classes, own, 0)[~axis_map.inside] = 0
    return classes


def organs(rng: np.random.Generator, classes: int, shape: tuple[int, ...], smooth: float = 2.0) -> np.ndarray:
    fields = rng.normal(size=(classes, *shape))
    return ndimage.gaussian_filter(fields, (0, *[smooth] * 3)).astype(np.float32)


def grids(shape=(9, 8, 7), native=(11, 10, 13), code="RAS"):
    """A plan's grid, and a finer native one over about the same box, in another axis order, sticking out."""
    prepared = Geometry(shape, np.diag([1.5, 1.3, 2.0, 1.0]))
    affine = np.diag([1.1, 1.2, 0.9, 1.0])
    affine[:3, 3] = (-0.9, 0.4, -1.7)
    return prepared, Geometry(native, affine).reoriented(code)


@pytest.mark.parametrize("code", CODES)
def test_equals_interpolating_all_logits_in_every_axis_order(code):
    prepared, native = grids(code=code)
    logits = organs(np.random.default_rng(3), 5, prepared.shape, smooth=1.0)
    for axis, output in itertools.product(range(3), ("softmax", "regions")):
        got = label_from_planes(stream(logits, axis, 2), axis=axis, prepared=prepared, native=native, output=output)
        np.testing.assert_array_equal(got, reference(logits, axis, prepared, native, output=output))
        assert got.shape == native.shape
        assert got.dtype == np.uint8


def oblique(geometry: Geometry) -> Geometry:
    """The same grid, turned in space and moved far from the origin, its affine rounded to a header's float32."""
    a, b = 0.4, -0.3
    turn = np.eye(4)
    turn[:3, :3] = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
    )
    turn[:3, 3] = (-181.7, 93.3, 1204.9)
    return Geometry(geometry.shape, (turn @ geometry.affine).astype(np.float32))


axis_of_stream = st.integers(0, 2)
sizes = st.tuples(*[st.integers(1, 7)] * 3)
spacings = st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 1.3, 2.0, 3.1])] * 3)
shifts = st.tuples(*[st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.3])] * 3)


@settings(max_examples=300, deadline=None)
@given(
    sizes, spacings, sizes, spacings, shifts, st.sampled_from(CODES), axis_of_stream, st.none() | axis_of_stream,
    st.sampled_from([1, 2, 3, 6]), st.sampled_from(["softmax", "regions"]), st.booleans(), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_equals_interpolating_all_logits_on_any_pair_of_grids(
    shape, spacing, native_shape, native_spacing, shift, code, axis, thick, classes, output, few_values, seed
):
    affine = np.diag([*native_spacing, 1.0])
    affine[:3, 3] = shift
    prepared = oblique(Geometry(shape, np.diag([*spacing, 1.0])))
    native = oblique(Geometry(native_shape, affine).reoriented(code))
    rng = np.random.default_rng(seed)
    # Whole numbers from a few: many classes tie at corners, and between them.
    logits = rng.integers(-1, 2, (classes, *shape)) if few_values else rng.normal(size=(classes, *shape))
    logits = logits.astype(np.float32)
    got = label_from_planes(
        stream(logits, axis, 1 + seed % 3), axis=axis, prepared=prepared, native=native, thick_axis=thick, output=output
    )
    np.testing.assert_array_equal(got, reference(logits, axis, prepared, native, thick, output))


def test_a_row_of_three_voxels_by_hand():
    """Class 1 leads by 2 at the first centre and trails by 2, then 6, at the others: the lead ends midway, at 0.5."""
    logits = np.zeros((2, 3, 1, 1), np.float32)
    logits[1, :, 0, 0] = (2.0, -2.0, -6.0)
    prepared = Geometry((3, 1, 1), np.eye(4))
    affine = np.diag([0.25, 1.0, 1.0, 1.0])
    affine[0, 3] = -0.75
    native = Geometry((16, 1, 1), affine)
    got = label_from_planes(stream(logits, 0), axis=0, prepared=prepared, native=native)
    # Centres at -0.75 (outside the plan's box), -0.5 (its face), ... 0.25, then 0.5, where both are 0: the first wins.
    np.testing.assert_array_equal(got[:, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])


def test_a_third_class_wins_between_corners_where_it_leads_at_none():
    logits = np.array([[3.0, -9.0], [-9.0, 3.0], [2.0, 2.0]], np.float32).reshape(3, 2, 1, 1)
    native = Geometry((5, 1, 1), np.diag([0.25, 1.0, 1.0, 1.0]))
    got = label_from_planes(stream(logits, 0), axis=0, prepared=Geometry((2, 1, 1), np.eye(4)), native=native)
    np.testing.assert_array_equal(got[:, 0, 0], [0, 2, 2, 2, 1])


def test_the_last_region_above_zero_by_hand():
    """Regions that overlap: the first holds everywhere, the second until midway, the third from 0.75 on."""
    logits = np.array([[1.0, 1.0], [2.0, -2.0], [-3.0, 1.0]], np.float32).reshape(3, 2, 1, 1)
    native = Geometry((9, 1, 1), np.diag([0.125, 1.0, 1.0, 1.0]))
    grid = Geometry((2, 1, 1), np.eye(4))
    got = label_from_planes(stream(logits, 0), axis=0, prepared=grid, native=native, output="regions")
    np.testing.assert_array_equal(got[:, 0, 0], [2, 2, 2, 2, 1, 1, 1, 3, 3])  # at 0.5 and 0.75 a logit is just 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_crop_is_background_beyond_its_outer_faces_only(axis):
    native = Geometry((8, 9, 10), np.diag([0.7, 0.8, 3.0, 1.0]))
    prepared = native.cropped((2, 3, 1), (7, 8, 6))
    logits = np.zeros((2, 5, 5, 5), np.float32)
    logits[1] = 1.0
    got = label_from_planes(stream(logits, axis, 2), axis=axis, prepared=prepared, native=native)
    expected = np.zeros(native.shape, np.uint8)
    expected[2:7, 3:8, 1:6] = 1
    np.testing.assert_array_equal(got, expected)


def test_a_crop_beside_the_native_grid_is_all_background():
    native = Geometry((4, 4, 4), np.eye(4))
    logits = np.ones((2, 3, 3, 3), np.float32) * np.array([0, 1], np.float32).reshape(2, 1, 1, 1)
    got = label_from_planes(stream(logits, 0), axis=0, prepared=native.cropped((6, 0, 0), (9, 3, 3)), native=native)
    assert not got.any()


def test_the_grid_itself_is_the_plain_argmax():
    logits = np.random.default_rng(0).normal(size=(4, 5, 6, 7)).astype(np.float32)
    grid = oblique(Geometry((5, 6, 7), np.diag([0.7, 0.8, 3.0, 1.0])))
    got = label_from_planes(stream(logits, 2, 3), axis=2, prepared=grid, native=grid)
    np.testing.assert_array_equal(got, logits.argmax(axis=0))


def test_leads_of_a_few_ulps_are_decided_as_float64_does():
    """Two classes a float32 ulp apart, either way, at every corner, and a third far below."""
    rng = np.random.default_rng(1)
    prepared, native = grids()
    first = rng.normal(size=prepared.shape).astype(np.float32) * 100
    towards = np.where(rng.random(prepared.shape) < 0.5, -np.inf, np.inf).astype(np.float32)
    logits = np.stack([first, np.nextafter(first, towards), first - 1])
    got = label_from_planes(stream(logits, 1), axis=1, prepared=prepared, native=native)
    expected = reference(logits, 1, prepared, native)
    np.testing.assert_array_equal(got, expected)
    assert set(np.unique(expected)) == {0, 1}


@pytest.mark.parametrize("output", ["softmax", "regions"])
@pytest.mark.parametrize("gathered", [1, 30_000])
@pytest.mark.parametrize("threads", [1, 3])
def test_many_classes_without_any_agreement_in_small_portions(output, gathered, threads, monkeypatch):
    monkeypatch.setattr(labelling, "_GATHERED_LOGITS", gathered)
    prepared, native = grids(code="SPL")
    logits = np.random.default_rng(2).normal(-1.5, 1.0, size=(118, *prepared.shape)).astype(np.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = label_from_planes(stream(logits, 0, 4), axis=0, prepared=prepared, native=native, output=output)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(got, reference(logits, 0, prepared, native, output=output))


@pytest.mark.parametrize(
    ("output", "logits", "dtype"),
    [
        *(("softmax", 1, np.uint8), ("softmax", 256, np.uint8), ("softmax", 257, np.uint16)),
        *(("regions", 1, np.uint8), ("regions", 255, np.uint8), ("regions", 256, np.uint16)),
    ],
)
def test_the_smallest_type_that_holds_all_classes(output, logits, dtype):
    prepared, native = grids()
    values = np.zeros((logits, *prepared.shape), np.float32)
    values[-1, :, 3:] = 1  # elsewhere the first of equal ones, or no region
    got = label_from_planes(stream(values, 0), axis=0, prepared=prepared, native=native, output=output)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, reference(values, 0, prepared, native, output=output))
    assert got.max() == logits - (output == "softmax")


def test_centroids_stay_in_place_in_mm():
    """A ball's centroid on the native grid, which half a voxel of shift would move by 0.35 mm or more."""
    centre = np.array([14.2, 11.9, 16.3])
    prepared = Geometry((24, 20, 16), np.diag([1.3, 1.2, 2.0, 1.0]))
    mm = prepared.to_mm(np.moveaxis(np.indices(prepared.shape), 0, -1))
    logits = np.stack([np.zeros(prepared.shape), 8.0 - np.linalg.norm(mm - centre, axis=-1)]).astype(np.float32)
    for code in CODES[::7]:
        native = prepared.reoriented(code).respaced((0.7, 0.9, 0.8))
        got = label_from_planes(stream(logits, 1, 3), axis=1, prepared=prepared, native=native)
        centroid = native.to_mm(np.argwhere(got == 1)).mean(axis=0)
        assert np.abs(centroid - centre).max() < 0.05
        assert (got == 1).sum() * native.voxel_volume_ml == pytest.approx(4 / 3 * np.pi * 8**3 / 1000, rel=0.03)


def test_memory_does_not_grow_with_the_number_of_planes():
    """The planes of a long scan are made as they are asked for; all of them together would take 20 times the bound."""
    shape = (400, 24, 24)
    prepared = Geometry(shape, np.eye(4))
    plane = organs(np.random.default_rng(0), 30, (1, 24, 24), smooth=1.0)
    planes = (LogitPlanes(i, torch.from_numpy(plane)) for i in range(shape[0]))
    native = prepared.respaced((1.0, 0.8, 0.8))
    tracemalloc.start()
    label_from_planes(planes, axis=0, prepared=prepared, native=native)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - np.prod(native.shape) < np.prod(shape) * 30 * 4 / 20


@pytest.mark.parametrize("starts", [[0, 1], [1, 2, 3], [0, 2], [0, 1, 1], [0, 1, 2, 3], []])
def test_missing_or_disordered_planes_are_refused(starts):
    grid = Geometry((3, 2, 2), np.eye(4))
    planes = [LogitPlanes(start, torch.zeros(2, 1, 2, 2)) for start in starts]
    with pytest.raises(ValueError, match="expected"):
        label_from_planes(planes, axis=0, prepared=grid, native=grid)


def test_grids_that_are_not_parallel_are_refused():
    grid = Geometry((3, 2, 2), np.eye(4))
    with pytest.raises(ValueError, match="not parallel"):
        label_from_planes([], axis=0, prepared=grid, native=oblique(grid))
