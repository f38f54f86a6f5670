"""Metrics: worked out by hand, by a slow obvious implementation, and against monai's on real masks."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data.manifest import Case
from pipeline.data.plan import Plan
from pipeline.evaluation.metrics import METRICS, Comparison, Row, _surface, score_case
from pipeline.evaluation.structures import Structures
from pipeline.volumes.volume import read_label

SIDES = Structures({"left": (1,), "right": (2,)})
DISTANCES = [name for name, metric in METRICS.items() if metric.unit == "mm"]


def block(start: tuple[int, int, int], size: tuple[int, int, int], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A label map with one box of class 1."""
    array = np.zeros(shape, np.uint8)
    array[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = 1
    return array


def score(prediction: NDArray[np.uint8], reference: NDArray[np.uint8], **changes: object) -> Row:
    """The only foreground class' row."""
    arguments: dict[str, object] = {"spacing_mm": (1.0, 1.0, 1.0), "tolerance_mm": 1.0, **changes}
    return score_case(prediction, reference, structures=Structures({"left": (1,)}), **arguments)[0]  # type: ignore[arg-type]


# --- by hand


def test_volumes_by_hand() -> None:
    # 8 reference voxels, 4 predicted, 2 in common; a voxel is 2 x 3 x 5 mm = 0.03 ml.
    reference = block((1, 1, 1), (2, 2, 2), (6, 6, 6))
    prediction = block((1, 1, 2), (1, 2, 2), (6, 6, 6))
    values = score(prediction, reference, spacing_mm=(2.0, 3.0, 5.0)).values
    assert values["dice"] == pytest.approx(2 * 2 / 12)
    assert values["iou"] == pytest.approx(2 / 10)
    assert values["sensitivity"] == pytest.approx(2 / 8)
    assert values["precision"] == pytest.approx(2 / 4)
    assert values["volume_error_ml"] == pytest.approx(4 * 0.03)
    assert values["volume_error_percent"] == pytest.approx(50)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_two_single_voxels_on_an_anisotropic_grid(axis: int) -> None:
    # A voxel's surface is its eight corners, of equal area. Three voxels further on, the near corners are 2 steps away
    # and the far ones 3; the spacing's steps are 0.5, 1 and 4 mm.
    spacing = (0.5, 1.0, 4.0)
    start = [1, 1, 1]
    reference = block((1, 1, 1), (1, 1, 1), (6, 6, 6))
    start[axis] += 3
    prediction = block(tuple(start), (1, 1, 1), (6, 6, 6))
    step = spacing[axis]
    values = score(prediction, reference, spacing_mm=spacing, tolerance_mm=2 * step).values
    assert values["hd95"] == 3 * step
    assert values["assd"] == pytest.approx(2.5 * step)
    assert values["nsd"] == pytest.approx(0.5)
    assert values["dice"] == 0
    assert score(prediction, reference, spacing_mm=spacing, tolerance_mm=1.99 * step).values["nsd"] == 0
    assert score(prediction, reference, spacing_mm=spacing, tolerance_mm=3 * step).values["nsd"] == 1


@pytest.mark.parametrize("spacing", [1.00000003, 0.99999997])
def test_a_surface_a_voxel_off_lies_within_a_tolerance_of_one_voxel_whatever_its_rounding(spacing: float) -> None:
    reference, prediction = (block((0, 0, 0), (6, 6, height), (6, 6, 8)) for height in (3, 4))
    assert score(prediction, reference, spacing_mm=(spacing,) * 3, tolerance_mm=1.0).values["nsd"] == 1
    assert score(prediction, reference, spacing_mm=(1.001,) * 3, tolerance_mm=1.0).values["nsd"] < 1


def test_hd95_is_the_larger_direction_and_leaves_out_the_farthest_five_percent_of_the_area() -> None:
    reference = block((2, 2, 2), (12, 12, 12), (30, 30, 30))
    prediction = reference.copy()
    prediction[25, 25, 25] = 1  # one stray voxel: 8 of 872 elements, far below 5 % of the prediction's area
    assert score(prediction, reference).values["hd95"] == 0
    assert score(prediction, reference).values["assd"] > 0
    prediction[20:28, 20:28, 20:28] = 1  # now a quarter of it, in one direction only
    far = score(prediction, reference).values["hd95"]
    assert far > 10
    assert score(reference, prediction).values["hd95"] == far


def test_the_area_of_a_flat_face_does_not_depend_on_how_finely_it_is_sampled() -> None:
    # 24 mm cubes on two grids: but for the rounded edges 6 x 24^2 mm2.
    coarse = _surface(np.ones((8, 8, 8), bool), (3.0, 3.0, 3.0))[1].sum()
    fine = _surface(np.ones((24, 24, 8), bool), (1.0, 1.0, 3.0))[1].sum()
    assert fine == pytest.approx(6 * 24**2, rel=0.05)
    assert coarse == pytest.approx(6 * 24**2, rel=0.1)
    assert coarse != fine


def test_what_touches_the_border_has_a_surface_there() -> None:
    inside = block((1, 1, 1), (3, 3, 3), (5, 5, 5)) > 0
    assert _surface(inside, (1.0, 1.0, 1.0))[1].sum() == _surface(np.ones((3, 3, 3), bool), (1.0, 1.0, 1.0))[1].sum()


# --- empty masks, several classes, refusals


def test_an_empty_mask_is_never_a_silent_number() -> None:
    something, nothing = block((1, 1, 1), (2, 2, 2), (6, 6, 6)), np.zeros((6, 6, 6), np.uint8)
    rows = {
        "missed": score(nothing, something),
        "spurious": score(something, nothing),
        "both_empty": score(nothing, nothing),
    }
    for status, row in rows.items():
        assert row.status == status
        assert set(row.values) == set(METRICS)
        assert np.isnan(list(row.values.values())).all()
    assert rows["missed"].reference_ml == pytest.approx(0.008)
    assert rows["missed"].prediction_ml == 0
    assert rows["spurious"].prediction_ml == pytest.approx(0.008)


def test_classes_are_scored_apart_and_in_order() -> None:
    reference = np.zeros((8, 8, 8), np.uint8)
    reference[1:3], reference[5:7] = 1, 2
    prediction = np.where(reference == 2, 1, reference)
    left, right = score_case(prediction, reference, (1.0, 1.0, 1.0), SIDES, 1.0)
    assert (left.class_name, right.class_name) == ("left", "right")
    assert left.values["dice"] == pytest.approx(2 * 128 / (128 + 256))
    assert right.status == "missed"


def test_regions_are_scored_as_unions_of_their_labels() -> None:
    # Of 8 voxels in a row: the tumour is 2-6, its core 4-5; predicted are 3-7 and 5-6.
    reference, prediction = np.zeros((2, 8, 1, 1), np.uint8)
    reference[2:7], reference[4:6] = 1, 2
    prediction[3:8], prediction[5:7] = 1, 2
    regions = Structures({"tumour": (1, 2), "core": (2,)})
    tumour, core = score_case(prediction, reference, (10.0, 10.0, 10.0), regions, 1.0, metrics=("dice",))
    assert (tumour.class_name, core.class_name) == ("tumour", "core")
    assert tumour.values["dice"] == pytest.approx(2 * 4 / (5 + 5))
    assert core.values["dice"] == pytest.approx(2 * 1 / (2 + 2))
    assert (tumour.reference_ml, core.reference_ml) == (5, 2)


def test_ignored_voxels_count_neither_for_nor_against() -> None:
    # Of 4 predicted voxels 2 are right, 1 is wrong, and of 1 nobody knows.
    reference, prediction = np.zeros((2, 8, 1, 1), np.uint8)
    reference[1:3], reference[4] = 1, 3
    prediction[1:5] = 1
    known = score_case(prediction, reference, (10.0, 10.0, 10.0), Structures(SIDES.classes, ignored=3), 1.0)[0]
    assert known.values["dice"] == pytest.approx(2 * 2 / (3 + 2))
    assert (known.reference_ml, known.prediction_ml) == (2, 3)
    with pytest.raises(ValueError, match="class indices 0 to 3"):
        score_case(prediction, reference, (10.0, 10.0, 10.0), SIDES, 1.0)


def test_the_border_of_what_is_ignored_adds_no_distance() -> None:
    reference = block((1, 1, 1), (6, 3, 3), (8, 6, 6))
    reference[3] = 3  # half way through the structure
    prediction = block((1, 1, 1), (6, 3, 3), (8, 6, 6))
    values = score_case(prediction, reference, (1.0, 1.0, 1.0), Structures({"left": (1,)}, ignored=3), 1.0)[0].values
    assert {name: values[name] for name in ("dice", "hd95", "assd", "nsd")} == {
        "dice": 1,
        "hd95": 0,
        "assd": 0,
        "nsd": 1,
    }


def test_what_nobody_looked_for_has_no_score() -> None:
    prediction = np.full((2, 2, 2), 2, np.uint8)
    structures = Structures(SIDES.classes, unknown=frozenset({"right"}))
    left, right = score_case(prediction, np.zeros_like(prediction), (10.0, 10.0, 10.0), structures, 1.0)
    assert left.status == "both_empty"
    assert (right.status, right.prediction_ml) == ("not_annotated", 8)
    assert np.isnan([right.reference_ml, *right.values.values()]).all()


PLAN = Plan(
    channels={"T1": "MR"},
    labels={"background": 0, "rest": 1, "core": 2, "other": 3},
    regions={"tumour": ("rest", "core"), "core": ("core",), "other": ("other",)},
    orientation="RAS",
    spacing_mm=(1.0, 1.0, 1.0),
    crop="none",
    patch_size=(8, 8, 8),
    batch_size=2,
    normalisation={},
)


def test_a_region_is_known_where_people_looked_for_all_of_its_labels() -> None:
    case = Case(id="a", patient="a", images={}, annotated_classes=("core", "other"))
    structures = Structures.of(PLAN, case)
    assert structures.classes == {"tumour": (1, 2), "core": (2,), "other": (3,)}
    assert structures.unknown == {"tumour"}
    assert structures.ignored is None
    assert Structures.of(PLAN.changed(ignore_label=9), case.changed(annotated_classes=None)).ignored == 4
    assert Structures.of(PLAN.changed(regions={}), case).unknown == {"rest"}
    assert Structures.of_labels(PLAN) == Structures({"rest": (1,), "core": (2,), "other": (3,)})


def test_only_the_metrics_asked_for() -> None:
    mask = block((1, 1, 1), (2, 2, 2), (6, 6, 6))
    assert score(mask, mask, metrics=("dice", "iou")).values == {"dice": 1.0, "iou": 1.0}


def test_other_grids_and_unknown_classes_are_refused() -> None:
    mask = block((1, 1, 1), (2, 2, 2), (6, 6, 6))
    with pytest.raises(ValueError, match="share one 3-D grid"):
        score(mask, mask[1:])
    with pytest.raises(ValueError, match="class indices 0 to 2, expected 0 to 1"):
        score(mask, mask * 2)
    with pytest.raises(ValueError, match="class indices -1 to 0"):
        score(mask.astype(np.int8) * -1, mask)  # type: ignore[arg-type]


# --- over the table


def blobs(seed: int) -> Comparison:
    """Two overlapping irregular masks on an anisotropic grid."""
    rng = np.random.default_rng(seed)
    points = np.stack(np.indices((14, 12, 9)), axis=-1)
    masks = [
        np.linalg.norm((points - [6, 5, 4] - rng.normal(size=3)) / [4, 4, 3], axis=-1)
        + 0.1 * rng.normal(size=(14, 12, 9))
        < 1
        for _ in range(2)
    ]
    return Comparison(masks[0], masks[1], (0.8, 1.1, 2.5), 1.0)


@pytest.mark.parametrize("name", METRICS)
def test_identity_is_best(name: str) -> None:
    metric, masks = METRICS[name], blobs(0)
    same = Comparison(masks.reference, masks.reference, masks.spacing_mm, 0.0)
    assert metric.function(same) == metric.best
    worse = metric.function(masks)
    assert (worse < metric.best) if metric.higher_is_better else (worse > metric.best)
    assert metric.name == name
    assert metric.source


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_does_not_depend_on_where_the_mask_lies_nor_on_mirroring(name: str) -> None:
    function, masks = METRICS[name].function, blobs(1)
    moved = [np.pad(mask, ((5, 0), (0, 3), (2, 2))) for mask in (masks.prediction, masks.reference)]
    mirrored = [mask[::-1, :, ::-1] for mask in (masks.prediction, masks.reference)]
    value = function(masks)
    assert function(Comparison(*moved, masks.spacing_mm, 1.0)) == pytest.approx(value, rel=1e-6)
    assert function(Comparison(*mirrored, masks.spacing_mm, 1.0)) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_doubling_the_spacing(name: str) -> None:
    metric, masks = METRICS[name], blobs(2)
    doubled = Comparison(masks.prediction, masks.reference, tuple(2 * s for s in masks.spacing_mm), 2.0)  # type: ignore[arg-type]
    factor = {"mm": 2.0, "ml": 8.0}.get(metric.unit, 1.0)
    assert metric.function(doubled) == pytest.approx(factor * metric.function(masks), rel=1e-6)


# --- against other implementations


def slow_surfaces(masks: Comparison) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances by comparing every element with every other, found by visiting every corner of every voxel."""

    def corners(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        padded = np.pad(mask, 1)
        cells = itertools.product(*(range(n - 1) for n in padded.shape))
        found = [c for c in cells if 0 < padded[c[0] : c[0] + 2, c[1] : c[1] + 2, c[2] : c[2] + 2].sum() < 8]
        return (np.array(found) - 0.5) * masks.spacing_mm

    here, there = corners(masks.prediction), corners(masks.reference)
    every = np.linalg.norm(here[:, None] - there[None], axis=-1)
    return every.min(axis=1), every.min(axis=0)


@pytest.mark.parametrize("seed", [3, 4])
def test_surface_distances_equal_the_exhaustive_search(seed: int) -> None:
    masks = blobs(seed)
    prediction_mm, reference_mm = slow_surfaces(masks)
    np.testing.assert_allclose(masks.surfaces.prediction_mm, prediction_mm)
    np.testing.assert_allclose(masks.surfaces.reference_mm, reference_mm)


def monai_values(masks: Comparison) -> dict[str, float]:
    """hd95, assd and nsd from the distances and areas that monai finds, and its own surface Dice."""
    import torch
    from monai.metrics.surface_dice import compute_surface_dice
    from monai.metrics.utils import get_edge_surface_distance

    pair = [torch.from_numpy(mask.copy()) for mask in (masks.prediction, masks.reference)]
    edges, distances, areas = get_edge_surface_distance(
        *pair, spacing=masks.spacing_mm, use_subvoxels=True, symmetric=True
    )
    weights = [area[edge].double() for edge, area in zip(edges, areas, strict=True)]
    directed = []
    for distance, weight in zip(distances, weights, strict=True):
        order = distance.argsort()
        share = weight[order].cumsum(0) / weight.sum()
        directed.append(distance[order][(share >= 0.95).nonzero()[0, 0]].item())
    total = sum((d * w).sum() for d, w in zip(distances, weights, strict=True))
    batch = [mask[None, None].float() for mask in pair]
    tolerance = [masks.tolerance_mm]
    share = compute_surface_dice(
        *batch, tolerance, include_background=True, spacing=masks.spacing_mm, use_subvoxels=True
    )
    return {"hd95": max(directed), "assd": float(total / sum(w.sum() for w in weights)), "nsd": share.item()}


MONAI_DEPRECATION = "ignore:.*always_return_as_numpy:FutureWarning"


@pytest.mark.filterwarnings(MONAI_DEPRECATION)
@pytest.mark.parametrize("shift", [(1, 0, 0), (2, 1, 0), (0, -1, 3)])
def test_hippocampi_against_monai(shared_data: Path, shift: tuple[int, int, int]) -> None:
    label = read_label(sorted((shared_data / "Task04_Hippocampus" / "labelsTr").glob("*.nii.gz"))[0]).array
    # A tolerance that no distance on this grid equals: monai compares in float32.
    moved, spacing, tolerance = np.roll(label, shift, (0, 1, 2)), (1.0, 0.7, 3.0), 0.9
    structures = Structures({"anterior": (1,), "posterior": (2,)})
    for index, row in enumerate(score_case(moved, label, spacing, structures, tolerance), 1):
        expected = monai_values(Comparison(moved == index, label == index, spacing, tolerance))
        for name, value in expected.items():
            assert row.values[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.filterwarnings(MONAI_DEPRECATION)
def test_hd95_differs_from_a_count_of_border_voxels_by_less_than_a_voxel_diagonal(shared_data: Path) -> None:
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    label = read_label(sorted((shared_data / "Task04_Hippocampus" / "labelsTr").glob("*.nii.gz"))[1]).array
    mask, spacing = label == 1, (1.0, 0.7, 3.0)
    moved = np.roll(mask, (2, 3, 1), (0, 1, 2))
    pair = [torch.from_numpy(array.copy())[None, None] for array in (moved, mask)]
    theirs = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing).item()
    ours = METRICS["hd95"].function(Comparison(moved, mask, spacing, 1.0))
    assert ours != theirs
    assert abs(ours - theirs) < np.linalg.norm(spacing)


@pytest.mark.parametrize("folder", ["uninformative", "uninformative_slice"])
def test_masks_at_their_edges(shared_data: Path, folder: str) -> None:
    files = (shared_data / "nasty" / "masks" / folder / "mask").glob("*_mask.nii.gz")
    masks = {file.name.removesuffix("_mask.nii.gz"): (read_label(file).array != 0).astype(np.uint8) for file in files}
    assert masks.keys() == {"full", "empty", "one_voxel", "disconnected"}
    for (name, prediction), (other, reference) in itertools.product(masks.items(), repeat=2):
        row = score(prediction, reference, spacing_mm=(1.0, 1.0, 3.0))
        empty = ("empty" in name) * 2 + ("empty" in other)
        assert row.status == ("scored", "spurious", "missed", "both_empty")[empty]
        assert np.isfinite(list(row.values.values())).all() == (not empty)
        if not empty:
            assert (row.values["dice"] == 1) == (name == other)
            assert (row.values["hd95"] == 0) == (name == other)
