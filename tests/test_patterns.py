"""Patterns: the files that a user describes, and no others."""

from pathlib import Path

import pytest
from layout_files import files_in, files_of, touch

from pipeline.data.formats import Reading, find_cases
from pipeline.errors import ManifestError


def test_files_are_found_by_case_and_channel(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *("scans/p_1_T1.nii.gz", "scans/p_1_T2.nii.gz", "scans/p_2_T1.nii.gz", "scans/deep/p_3_T1.nii.gz"),
        *("masks/p_1.nii.gz", "masks/p_9.nii.gz", "scans/notes.txt"),
    )
    found = find_cases(
        tmp_path, reading=Reading(images=("scans/{case}_{channel}.nii.gz",), labels="masks/{case}.nii.gz")
    )
    assert files_in(found) == {
        "p_1": ({"T1": "scans/p_1_T1.nii.gz", "T2": "scans/p_1_T2.nii.gz"}, "masks/p_1.nii.gz"),
        "p_2": ({"T1": "scans/p_2_T1.nii.gz"}, None),
    }
    assert found.notes == ("1 labels have no image and are left out: p_9",)


def test_a_label_tells_where_a_cases_name_ends(tmp_path: Path) -> None:
    touch(tmp_path, "p_1_T1_gd.nii", "p_2_T1_gd.nii", "masks/p_1_T1.nii", "masks/p_2.nii")
    # By the last word, unless only a shorter name has a label; here one word is too many for p_2.
    found = files_of(tmp_path, reading=Reading(images=("{case}_{channel}.nii",), labels="masks/{case}.nii"))
    assert {case: list(images) for case, (images, _) in found.items()} == {"p_1_T1": ["gd"], "p_2_T1": ["gd"]}
    touch(tmp_path, "q_T1_gd.nii", "masks/q.nii")
    found = files_of(tmp_path, reading=Reading(images=("{case}_{channel}.nii",), labels="masks/{case}.nii"))
    assert list(found["q"][0]) == ["T1_gd"]


def test_a_pattern_a_channel_with_names_that_repeat(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "A/s1/s1_t1.nii.gz",
        "A/s1/s1_pet.nii.gz",
        "A/s1/other_t1.nii.gz",
        "B/s2/s2_t1.nii.gz",
        "B/s2/s2_seg.nii.gz",
    )
    reading = Reading(
        images=("T1={patient}/{case}/{case}_t1.nii.gz", "PET=**/{case}_pet.nii.gz"), labels="*/{case}/{case}_seg.nii.gz"
    )
    found = find_cases(tmp_path, reading=reading)
    assert files_in(found) == {
        "s1": ({"T1": "A/s1/s1_t1.nii.gz", "PET": "A/s1/s1_pet.nii.gz"}, None),
        "s2": ({"T1": "B/s2/s2_t1.nii.gz"}, "B/s2/s2_seg.nii.gz"),
    }
    assert [case.patient for case in found.cases] == ["A", "B"]


def test_the_patient_is_found_by_a_regular_expression(tmp_path: Path) -> None:
    touch(tmp_path, "scan/P1x2.nii", "scan/P2x1.nii")
    reading = Reading(images=("scan/{case}.nii",), patient=r"^(P\d)x")
    assert [case.patient for case in find_cases(tmp_path, reading=reading).cases] == ["P1", "P2"]
    for pattern, reason in (("Q", "case 'P1x2': --patient 'Q' finds no patient"), ("(", "is no regular expression")):
        with pytest.raises(ManifestError, match=reason):
            find_cases(tmp_path, reading=Reading(images=("scan/{case}.nii",), patient=pattern))


@pytest.mark.parametrize(
    ("reading", "layout", "reason"),
    [
        (Reading(images=("*.nii",)), "patterns", r"\{case\} is missing"),
        (Reading(images=("{case}_{time}.nii",)), None, r"\{time\} is unknown"),
        (Reading(), "patterns", "needs --images"),
        (Reading(images=("{case}_*.nii",)), None, "two images of channel 'image'"),
        (Reading(images=("{case}_1.nii",), labels="{case}_*.nii"), None, "two labels"),
        (Reading(images=("nothing/{case}.nii",)), None, "no case found"),
        (Reading(labels="x"), "folder", "the format folder knows no --labels; bids, patterns do"),
        (Reading(images=("x",)), "csv", "the format csv knows no --images"),
        (Reading(columns=("site",)), "folder", "the format folder knows no columns; csv, bids do"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path: Path, reading: Reading, layout: str | None, reason: str) -> None:
    touch(tmp_path, "a_1.nii", "a_2.nii")
    with pytest.raises(ManifestError, match=reason):
        find_cases(tmp_path, layout, reading)
