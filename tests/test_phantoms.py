"""Phantoms: repeatable, in space where they say they are, and hard in the ways that they promise."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.formats import find_cases, pairs_of
from pipeline.data.phantoms import (
    IGNORED,
    LABEL_PAIRS,
    LABELS,
    NESTED_LABELS,
    NESTED_REGIONS,
    Phantom,
    draw_geometry,
    make_phantom,
    write_phantom_dataset,
)
from pipeline.geometry import FloatArray, Geometry
from pipeline.volumes.volume import Volume, read_image, read_label


def centroid_mm(mask: np.ndarray, geometry: Geometry) -> FloatArray:
    return geometry.to_mm(np.argwhere(mask)).mean(axis=0)


def structure_mm(phantom: Phantom, name: str) -> FloatArray:
    return centroid_mm(phantom.label.array == LABELS[name], phantom.label.geometry)


def same(a: Volume, b: Volume) -> bool:
    return a.geometry == b.geometry and np.array_equal(a.array, b.array)


def test_equal_arguments_give_equal_voxels_and_others_differ() -> None:
    first, again, other = make_phantom(3), make_phantom(3), make_phantom(4)
    assert same(first.images["T1"], again.images["T1"])
    assert same(first.label, again.label)
    assert not same(first.images["T1"], other.images["T1"])


@pytest.mark.parametrize("seed", range(8))
def test_left_is_on_the_patients_left_whatever_the_grid(seed: int) -> None:
    phantom = make_phantom(seed)
    left, right = structure_mm(phantom, "left"), structure_mm(phantom, "right")
    # The structures' centres are drawn 12 to 14 mm from the midline, times a size of 0.92 to 1.08.
    assert 20 < right[0] - left[0] < 32
    assert abs(right[1:] - left[1:]).max() < 6


def test_grids_are_oblique_anisotropic_and_of_both_hands() -> None:
    grids = [draw_geometry(np.random.default_rng(seed)) for seed in range(24)]
    assert len({grid.orientation for grid in grids}) > 12
    assert {np.linalg.det(grid.affine[:3, :3]) > 0 for grid in grids} == {True, False}
    assert all(max(grid.spacing_mm) / min(grid.spacing_mm) > 1.05 for grid in grids)
    tilts = [np.degrees(np.arccos(np.abs(g.affine[:3, :3] / g.spacing_mm).max(axis=0).min())) for g in grids]
    assert 5 < max(tilts) <= 15.01
    assert all(30_000 < np.prod(grid.shape) < 90_000 for grid in grids)


def test_a_second_visit_is_the_same_patient_on_another_grid() -> None:
    first, second = make_phantom(5), make_phantom(5, visit=1)
    assert first.label.geometry != second.label.geometry
    distances = [structure_mm(p, "right") - structure_mm(p, "left") for p in (first, second)]
    assert np.abs(distances[0] - distances[1]).max() < 0.5
    assert not np.allclose(distances[0], structure_mm(make_phantom(6), "right") - structure_mm(make_phantom(6), "left"))


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_both_channels_show_the_same_place(modality: str) -> None:
    grid = make_phantom(0).label.geometry
    phantom = make_phantom(7, geometry=grid, modality=modality, channels=2)  # type: ignore[arg-type]
    plain = make_phantom(7, geometry=grid, modality=modality, channels=2, empty=True)  # type: ignore[arg-type]
    truth = centroid_mm(phantom.label.array > 0, grid)
    assert phantom.label.geometry == grid
    for name, image in phantom.images.items():
        # With and without the structures differs exactly in them, the noise being the same.
        changed = np.abs(image.array[0] - plain.images[name].array[0]) > 0
        # A third of the coarser voxel; half a voxel's shift would be 1.3 mm.
        assert np.abs(centroid_mm(changed, image.geometry) - truth).max() < 0.8
    first, second = phantom.images.values()
    assert min(np.array(second.geometry.spacing_mm) / first.geometry.spacing_mm) > 1.4


def test_brightness_alone_does_not_tell_the_structures() -> None:
    phantom = make_phantom(1, modality="CT")
    image, label = phantom.images["CT"].array[0], phantom.label.array
    means = [image[label == value].mean() for value in (1, 2)]
    assert abs(means[0] - means[1]) < 10
    unlabelled = (image > 150) & (label == 0)  # the midline
    assert unlabelled.sum() > 200


def test_an_empty_phantom_has_a_body_and_no_structure() -> None:
    phantom = make_phantom(2, empty=True)
    assert not phantom.label.array.any()
    assert phantom.images["T1"].array.std() > 0


@pytest.mark.parametrize("layout", ["decathlon", "folder", "csv"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_data_set_comes_back_as_the_same_cases(tmp_path: Path, layout: str, channels: int) -> None:
    found = find_cases(write_phantom_dataset(tmp_path / "set", cases=4, channels=channels, layout=layout))
    assert list(found.channels.values()) == ["MR"] * channels
    assert [case.patient for case in found.cases] == ["phantom_000", "phantom_000", "phantom_002", "phantom_003"]
    expected = make_phantom(2, channels=channels, shared_grid=layout == "decathlon")
    case = found.cases[2]
    assert case.label is not None
    assert np.array_equal(read_label(found.root / case.label.path).array, expected.label.array)
    for name, image in zip(found.channels, expected.images.values(), strict=True):
        file = case.images[name]
        assert np.array_equal(read_image(found.root / file.path, file.index).array, image.array)
    last = found.cases[-1].label
    assert last is not None and not read_label(found.root / last.path).array.any()


def test_a_core_lies_within_each_structure_and_is_brighter() -> None:
    plain, phantom = make_phantom(1), make_phantom(1, nested=True)
    label, image = phantom.label.array, phantom.images["T1"].array[0]
    value = NESTED_LABELS
    organ = np.isin(label, [value["organ_rest"], value["core"]])
    np.testing.assert_array_equal(organ, plain.label.array > 0)
    # Nothing of the core is at the organ's surface.
    inside = np.pad(organ, 1)
    for axis in range(3):
        inside = inside & np.roll(inside, 1, axis) & np.roll(inside, -1, axis)
    assert inside[1:-1, 1:-1, 1:-1][label == value["core"]].all()
    assert 0.1 < (label == value["core"]).sum() / organ.sum() < 0.4
    bright = {name: image[label == number].mean() for name, number in value.items()}
    assert bright["core"] > 1.3 * bright["organ_rest"] > 1.3 * bright["background"]


def test_a_sparse_data_set_says_what_is_known(tmp_path: Path) -> None:
    found = find_cases(write_phantom_dataset(tmp_path / "a", cases=3, nested=True, sparse=True))
    assert found.labels is not None
    assert (list(found.labels.items()), found.regions) == (list(NESTED_LABELS.items()), NESTED_REGIONS)
    assert found.ignore_label == IGNORED
    assert [case.annotated_classes for case in found.cases] == [None, ("organ_rest", "core"), None]
    labels = [read_label(found.root / case.label.path) for case in found.cases if case.label]
    ignored, midline = ([np.mean(label.array == value) for label in labels] for value in (IGNORED, 3))
    assert [bool(share) for share in ignored] == [True, False, True]
    assert [bool(share) for share in midline] == [True, False, True]
    heights_mm = [label.geometry.to_mm(np.argwhere(label.array == IGNORED))[:, 2].max() for label in labels[::2]]
    centres_mm = [label.geometry.to_mm((np.array(label.array.shape) - 1) / 2)[2] for label in labels[::2]]
    assert all(-2 < top - centre < 0 for top, centre in zip(heights_mm, centres_mm, strict=True))
    with pytest.raises(ValueError, match="only nested ones in decathlon"):
        write_phantom_dataset(tmp_path / "b", layout="csv", nested=True)


def test_the_labels_are_a_pair() -> None:
    assert pairs_of(LABELS) == LABEL_PAIRS
