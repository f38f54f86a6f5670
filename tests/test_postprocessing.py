import tracemalloc

import numpy as np
import pytest

from pipeline.config import InferenceSection
from pipeline.data.plan import Normalisation, Plan
from pipeline.errors import ConfigError
from pipeline.geometry import Geometry
from pipeline.inference.postprocessing import postprocess, postprocessing_bytes

PLAN = Plan(
    channels={"T1": "MR"},
    labels={"background": 0, "liver": 6, "spleen": 3},
    orientation="RAS",
    spacing_mm=(1.0, 2.0, 5.0),
    crop="none",
    patch_size=(8, 8, 8),
    batch_size=1,
    normalisation={"T1": Normalisation(scheme="zscore")},
)
NATIVE = Geometry((12, 10, 8), np.diag([1.0, 2.0, 5.0, 1.0]))  # 0.01 ml a voxel


def prediction() -> np.ndarray:
    """Liver: 12 voxels, 3 that hang together by a corner only, 1 alone. Spleen: two pieces of 4."""
    classes = np.zeros(NATIVE.shape, np.uint8)
    classes[0:3, 0:2, 0:2] = 1
    classes[6, 6, 6] = classes[7, 7, 7] = classes[8, 6, 6] = 1
    classes[11, 9, 0] = 1
    classes[5:9, 0, 0] = 2
    classes[5:9, 4, 0] = 2
    return classes


def voxels(classes: np.ndarray, index: int) -> int:
    return int((classes == index).sum())


def test_largest_component_of_the_label_named_and_of_no_other():
    before = prediction()
    after = postprocess(before, PLAN, NATIVE, InferenceSection(largest_component=("liver",)))
    assert (voxels(after, 1), voxels(after, 2)) == (12, 8)
    assert after[0:3, 0:2, 0:2].all()
    np.testing.assert_array_equal(before, prediction())
    assert after.dtype == before.dtype


def test_equal_components_leave_the_first():
    after = postprocess(prediction(), PLAN, NATIVE, InferenceSection(largest_component=("spleen",)))
    assert voxels(after, 2) == 4
    assert (after[5:9, 0, 0] == 2).all()


@pytest.mark.parametrize(("smallest_ml", "left"), [(0.005, 16), (0.03, 15), (0.031, 12), (0.12, 12), (0.121, 0)])
def test_smallest_volume_in_ml_counts_voxels_that_touch_by_a_corner(smallest_ml, left):
    after = postprocess(prediction(), PLAN, NATIVE, InferenceSection(smallest_volume_ml={"liver": smallest_ml}))
    assert (voxels(after, 1), voxels(after, 2)) == (left, 8)


def test_a_volume_of_whole_voxels_stays_whatever_the_rounding_of_the_grid():
    rounded = Geometry(NATIVE.shape, np.diag(np.float32([0.7, 0.7, 5.0, 1.0])))  # its voxels are a little smaller
    for voxels_ml, left in ((12, 12), (12.001, 0)):
        rules = InferenceSection(smallest_volume_ml={"liver": voxels_ml * 0.7 * 0.7 * 5.0 / 1000})
        assert voxels(postprocess(prediction(), PLAN, rounded, rules), 1) == left


def test_a_structure_inside_the_others_box_stays():
    classes = np.ones(NATIVE.shape, np.uint8)
    classes[4:6, 4:6, 4:6] = 2
    rules = InferenceSection(largest_component=("liver", "spleen"), smallest_volume_ml={"liver": 0.1})
    np.testing.assert_array_equal(postprocess(classes, PLAN, NATIVE, rules), classes)


def test_absent_label_and_absent_rules():
    empty = np.zeros(NATIVE.shape, np.uint8)
    rules = InferenceSection(largest_component=("liver",), smallest_volume_ml={"spleen": 1.0})
    assert not postprocess(empty, PLAN, NATIVE, rules).any()
    classes = prediction()
    assert postprocess(classes, PLAN, NATIVE, InferenceSection()) is classes


def test_rules_take_no_more_memory_than_is_planned():
    classes = np.zeros((96, 128, 160), np.uint8)
    for index, z in ((1, 0), (2, 10)):  # each label's box is most of the grid
        classes[:4, :9, z : z + 9] = classes[-9:, -9:, 151 - z : 160 - z] = index
    rules = InferenceSection(largest_component=("liver", "spleen"))
    tracemalloc.start()
    after = postprocess(classes, PLAN, Geometry(classes.shape, NATIVE.affine), rules)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < (after > 0).sum() < (classes > 0).sum()
    assert peak < 1.05 * postprocessing_bytes(classes.shape, rules)
    assert postprocessing_bytes(classes.shape, InferenceSection()) == 0


def test_a_rule_for_an_unknown_label_is_named():
    with pytest.raises(ConfigError, match=r"kidney.*liver, spleen"):
        postprocess(prediction(), PLAN, NATIVE, InferenceSection(largest_component=("kidney",)))
