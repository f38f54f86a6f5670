"""BIDS: entities, sessions, derivatives, tables."""

from pathlib import Path

import pytest
from layout_files import files_in, files_of, touch, write_as_json

from pipeline.data.formats import Reading, find_cases
from pipeline.data.formats.bids_names import channel_names, parse_name
from pipeline.errors import ManifestError

DRAWN = "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1"


def write_raw(root: Path) -> Path:
    """Two sessions of one subject, another without sessions, a series, a scan file, and one label."""
    return touch(
        root,
        "sub-01/ses-1/anat/sub-01_ses-1_acq-fast_T1w.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-fast_T1w.json",
        "sub-01/ses-1/pet/sub-01_ses-1_pet.nii.gz",
        "sub-01/ses-1/func/sub-01_ses-1_task-rest_bold.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_acq-fast_T1w.nii.gz",
        "sub-02/anat/sub-02_acq-fast_T1w.nii.gz",
        "sub-02/ct/sub-02_ct.nii.gz",
        f"{DRAWN}_dseg.nii.gz",
    )


def test_an_examination_is_a_subjects_session(tmp_path: Path) -> None:
    found = find_cases(write_raw(tmp_path))
    assert found.channels == {"T1w": "MR", "ct": "CT", "pet": "PET"}
    assert files_in(found) == {
        "sub-01_ses-1": (
            {
                "T1w": "sub-01/ses-1/anat/sub-01_ses-1_acq-fast_T1w.nii.gz",
                "pet": "sub-01/ses-1/pet/sub-01_ses-1_pet.nii.gz",
            },
            f"{DRAWN}_dseg.nii.gz",
        ),
        "sub-01_ses-2": ({"T1w": "sub-01/ses-2/anat/sub-01_ses-2_acq-fast_T1w.nii.gz"}, None),
        "sub-02": ({"T1w": "sub-02/anat/sub-02_acq-fast_T1w.nii.gz", "ct": "sub-02/ct/sub-02_ct.nii.gz"}, None),
    }
    assert [case.patient for case in found.cases] == ["sub-01", "sub-01", "sub-02"]


def test_entities_in_which_images_differ_make_channels(tmp_path: Path) -> None:
    names = [
        "sub-1/anat/sub-1_acq-fast_T1w.nii.gz",
        "sub-1/anat/sub-1_acq-fast_ce-gd_T1w.nii.gz",
        "sub-1/anat/sub-1_run-1_FLAIR.nii.gz",
        "sub-2/anat/sub-2_acq-fast_T1w.nii.gz",
        "sub-2/anat/sub-2_run-2_FLAIR.nii.gz",
    ]
    parsed = [parse_name(Path(name)) for name in names]
    assert list(channel_names(file for file in parsed if file).values()) == [
        *("T1w", "ce-gd_T1w", "T1w"),  # acq-fast is everywhere
        *("run-1_FLAIR", "run-2_FLAIR"),
    ]
    found = files_of(touch(tmp_path, *names), reading=Reading(images=("sub-*/anat/*_T1w.nii.gz",)))
    assert list(found["sub-1"][0]) == ["T1w", "ce-gd_T1w"]


@pytest.mark.parametrize(
    "name", ["T1w.nii.gz", "sub-1.nii.gz", "sub-1_T1w_old.nii.gz", "ses-1_T1w.nii", "sub-1_sub-2_T1w.nii"]
)
def test_other_names_are_none_of_bids(tmp_path: Path, name: str) -> None:
    assert parse_name(Path("sub-1/anat") / name) is None
    touch(tmp_path, "sub-1/anat/sub-1_T2w.nii.gz", f"sub-1/anat/{name}")
    (note,) = find_cases(tmp_path).notes
    assert note.startswith("1 files are not named as BIDS")


def test_spinal_cord_labels_name_the_image_they_were_drawn_on() -> None:
    file = parse_name(Path("derivatives/labels/sub-1/anat/sub-1_T2w_label-SC_seg.nii.gz"))
    assert file is not None
    assert (file.case_id, file.suffix, file.label_kind) == ("sub-1", "seg", ("labels", "SC", "", "seg"))


def test_several_kinds_of_label_must_be_chosen_from(tmp_path: Path) -> None:
    lesion, tissue = f"{DRAWN}_label-lesion_mask.nii.gz", f"{DRAWN}_dseg.nii.gz"
    touch(write_raw(tmp_path), lesion, f"{DRAWN}_desc-brain_mask.nii.gz")
    with pytest.raises(ManifestError) as error:
        find_cases(tmp_path)
    assert str(error.value).splitlines()[1:] == [
        "  derivatives/manual/...dseg: 1 files",
        "  derivatives/manual/...label-lesion_mask: 1 files",
    ]
    found = find_cases(tmp_path, reading=Reading(labels="derivatives/*_label-lesion_mask.nii.gz"))
    assert found.labels == {"background": 0, "lesion": 1}
    assert files_in(found)["sub-01_ses-1"][1] == lesion
    (tmp_path / lesion).unlink()
    assert files_of(tmp_path)["sub-01_ses-1"][1] == tissue  # a brain mask is no label where there is another


def test_two_labels_of_one_kind_are_refused(tmp_path: Path) -> None:
    touch(write_raw(tmp_path), f"{DRAWN}_run-2_dseg.nii.gz")
    with pytest.raises(ManifestError, match=r"sub-01_ses-1: two labels, .*choose with --labels"):
        find_cases(tmp_path)


def test_tables_name_the_labels(tmp_path: Path) -> None:
    (write_raw(tmp_path) / "derivatives" / "manual" / "dseg.tsv").write_text(
        "index\tname\tcolor\n3\tgrey\t#000\n1\twhite\t#fff\n9\tignore\t#f00\n"
    )
    found = find_cases(tmp_path)
    assert found.labels is not None
    assert list(found.labels.items()) == [("background", 0), ("white", 1), ("grey", 3)]
    assert found.ignore_label == 9
    (tmp_path / f"{DRAWN}_dseg.tsv").write_text("index\tname\n3\twhite\n")
    with pytest.raises(ManifestError, match="index 3 is white, elsewhere grey"):
        find_cases(tmp_path)


def test_participants_and_sessions_say_more_of_each_case(tmp_path: Path) -> None:
    (write_raw(tmp_path) / "participants.tsv").write_text("participant_id\tsite\tfold\nsub-01\tA\t1\nsub-02\tB\tn/a\n")
    (tmp_path / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tage\nses-2\t41\n")
    found = find_cases(tmp_path)
    assert found.columns["sub-01_ses-2"] == {"site": "A", "fold": "1", "age": "41"}
    assert found.columns["sub-02"] == {"site": "B", "fold": "n/a"}
    assert found.split == "the column fold of participants.tsv"
    assert [case.fold for case in found.cases] == [1, 1, None]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("id\tsite\nsub-01\tA\n", "no column participant_id"),
        ("participant_id\tsite\nsub-01\n", "tsv:2: more or fewer cells"),
        ("participant_id\tfold\nsub-01\tx\n", "fold: expected a whole number"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, table: str, reason: str) -> None:
    (write_raw(tmp_path) / "participants.tsv").write_text(table)
    with pytest.raises(ManifestError, match=reason):
        find_cases(tmp_path)


def test_derivatives_are_a_data_set_of_their_own(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "sub-1/anat/sub-1_desc-preproc_T1w.nii.gz",
        "sub-1/anat/sub-1_dseg.nii.gz",
        "sub-1/anat/sub-1_label-GM_probseg.nii.gz",
    )
    write_as_json(
        tmp_path / "dataset_description.json", {"Name": "Preprocessed", "DatasetType": "derivative", "License": "CC0"}
    )
    found = find_cases(tmp_path)
    assert files_in(found) == {
        "sub-1": ({"T1w": "sub-1/anat/sub-1_desc-preproc_T1w.nii.gz"}, "sub-1/anat/sub-1_dseg.nii.gz")
    }
    assert (found.description, found.licence) == ("Preprocessed", "CC0")
