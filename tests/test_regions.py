"""Regions: what they leave to see when painted, and what cannot be painted or mirrored is refused."""

import numpy as np
import pytest

from pipeline.data.regions import named_regions, own_labels, region_problems

LABELS = ("background", "edema", "necrosis", "enhancing")
NESTED = {"whole": ("necrosis", "edema", "enhancing"), "core": ("necrosis", "enhancing"), "enhancing": ("enhancing",)}


def test_nested_regions_each_own_what_the_later_ones_leave() -> None:
    assert own_labels(NESTED) == {"whole": ["edema"], "core": ["necrosis"], "enhancing": ["enhancing"]}
    assert region_problems(NESTED, LABELS) == []


def test_painting_regions_in_order_gives_the_labels_back() -> None:
    classes = np.arange(len(LABELS))
    painted = np.zeros(len(LABELS), int)
    for index, names in enumerate(NESTED.values(), start=1):
        painted[np.isin(classes, [LABELS.index(name) for name in names])] = index
    assert painted.tolist() == classes.tolist()


def test_regions_need_not_be_nested() -> None:
    apart = {"lesion": ("edema", "enhancing"), "rim": ("necrosis", "enhancing"), "both": ("enhancing",)}
    assert region_problems(apart, LABELS) == []


@pytest.mark.parametrize(
    ("regions", "reason"),
    [
        ({**NESTED, "core": ("necrosis", "nose")}, "regions: core: 'nose' is not a structure"),
        ({**NESTED, "whole": ("background", "edema")}, "regions: whole: 'background' is not a structure"),
        ({"whole": ("edema", "necrosis"), "x": ("enhancing",)}, "whole: exactly one .* got edema, necrosis"),
        ({**NESTED, "again": NESTED["whole"]}, "regions: whole: exactly one .* got none"),
        ({"edema": NESTED["whole"], "core": NESTED["core"], "e": ("enhancing",)}, "'edema' is a label too"),
        ({"whole": ("edema", "enhancing"), "e": ("enhancing",)}, "necrosis: in no region"),
        (
            {"core": NESTED["core"], "edema": ("edema",), "enhancing": ("enhancing",)},
            "order them background, necrosis, ",
        ),
    ],
)
def test_what_cannot_be_painted_is_refused(regions: dict[str, tuple[str, ...]], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        assert not (problems := region_problems(regions, LABELS)), "; ".join(problems)


SIDES = ("background", "left", "right", "core")


@pytest.mark.parametrize(
    ("regions", "agrees"),
    [
        ({"left": ("left",), "right": ("right",), "core": ("core",)}, True),
        ({"left side": ("left", "core"), "right side": ("right", "core"), "core": ("core",)}, True),
        ({"left side": ("left", "core"), "right": ("right",), "core": ("core",)}, False),
        ({"both": ("left", "right", "core"), "right": ("right",), "core": ("core",)}, False),
    ],
)
def test_regions_must_be_mirrored_as_their_labels_are(regions: dict[str, tuple[str, ...]], agrees: bool) -> None:
    found = region_problems(regions, SIDES, [("left", "right")])
    assert (found == []) is agrees
    assert region_problems(regions, SIDES) == []


def test_values_that_are_always_together_are_one_label() -> None:
    labels, stored, regions = named_regions({"background": [0], "whole": [1, 2, 4], "core": [4]}, [2, 4])
    assert labels == {"background": 0, "whole_rest": 2, "core": 4}
    assert stored == {"whole_rest": (2, 1)}
    assert regions == {"whole": ("whole_rest", "core"), "core": ("core",)}


def test_regions_that_overlap_nowhere_are_labels() -> None:
    found = named_regions({"background": [0], "kidney": [1, 2], "tumour": [3]})
    assert found == ({"background": 0, "kidney": 1, "tumour": 3}, {"kidney": (1, 2)}, {})


def test_values_of_one_label_may_not_be_told_apart_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"\[1, 2\] belong to one region alone, but another has only some"):
        named_regions({"background": [0], "bone": [1, 3], "organ": [1, 2]})
