"""nnU-Net's raw data: channels by number, held-out cases, listed files, and its splits as our folds."""

from pathlib import Path

import pytest
from layout_files import files_in, files_of, touch, write_as_json

from pipeline.data.formats import Reading, find_cases
from pipeline.errors import ManifestError

TRAINING = [f"{case}_{number:04d}" for case in "abcd" for number in (0, 1)]
SPLITS = [{"train": ["b", "c"], "val": ["a"]}, {"train": ["a", "c"], "val": ["b"]}, {"train": ["a", "b"], "val": ["c"]}]


def write_raw(root: Path, ending: str = ".nii.gz", **changes: object) -> Path:
    touch(root, *(f"imagesTr/{name}{ending}" for name in TRAINING), *(f"labelsTr/{case}{ending}" for case in "abcd"))
    content = {
        "channel_names": {"1": "FLAIR", "0": "T1"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 4,
        "file_ending": ending,
        **changes,
    }
    write_as_json(root / "dataset.json", content)
    return root


def test_channels_are_named_by_their_numbers(tmp_path: Path) -> None:
    found = find_cases(write_raw(tmp_path, ".nrrd"))
    assert found.channels == {"T1": "MR", "FLAIR": "MR"}
    assert files_in(found)["b"] == (
        {"T1": "imagesTr/b_0000.nrrd", "FLAIR": "imagesTr/b_0001.nrrd"},
        "labelsTr/b.nrrd",
    )
    assert (found.split, found.held_out) == ("", frozenset())


def test_files_of_another_ending_are_no_part_of_it(tmp_path: Path) -> None:
    touch(write_raw(tmp_path), "imagesTr/e_0000.nrrd", "imagesTr/e_0001.nrrd")
    assert [case.id for case in find_cases(tmp_path).cases] == [*"abcd"]


def test_channels_of_one_name_are_told_apart(tmp_path: Path) -> None:
    found = find_cases(write_raw(tmp_path, channel_names={"0": "MRI", "1": "MRI"}))
    assert found.channels == {"MRI_0": "MR", "MRI_1": "MR"}


def test_test_cases_are_held_out_and_labelled_where_they_are_drawn(tmp_path: Path) -> None:
    touch(write_raw(tmp_path), "imagesTs/t_0000.nii.gz", "imagesTs/u_0000.nii.gz", "labelsTs/t.nii.gz")
    found = find_cases(tmp_path)
    assert found.held_out == {"t", "u"}
    assert files_in(found)["t"] == ({"T1": "imagesTs/t_0000.nii.gz"}, "labelsTs/t.nii.gz")
    assert files_in(found)["u"] == ({"T1": "imagesTs/u_0000.nii.gz"}, None)
    touch(tmp_path, "imagesTs/a_0000.nii.gz")
    with pytest.raises(ManifestError, match="in imagesTr and imagesTs: a"):
        find_cases(tmp_path)


def test_listed_files_lie_where_they_are_listed(tmp_path: Path) -> None:
    listed = {"x": {"images": ["../scans/x/t1.nii.gz", "../scans/x/flair.nii.gz"], "label": "../scans/x/seg.nii.gz"}}
    write_as_json(
        tmp_path / "set" / "dataset.json",
        {
            "channel_names": {"0": "T1", "1": "FLAIR"},
            "labels": {"background": 0, "lesion": 1},
            "numTraining": 1,
            "file_ending": ".nii.gz",
            "dataset": listed,
        },
    )
    with pytest.raises(ManifestError, match=r"case 'x': images.T1.path.*may not leave"):
        find_cases(tmp_path / "set")
    found = files_of(tmp_path / "set", reading=Reading(root=tmp_path))
    assert found == {"x": ({"T1": "scans/x/t1.nii.gz", "FLAIR": "scans/x/flair.nii.gz"}, "scans/x/seg.nii.gz")}


def test_version_ones_list_of_cases_stands_for_files_by_channel(tmp_path: Path) -> None:
    training = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in "abcd"]
    write_raw(tmp_path, training=training, modality={"0": "T1", "1": "FLAIR"})
    assert files_of(tmp_path)["a"][0] == {"T1": "imagesTr/a_0000.nii.gz", "FLAIR": "imagesTr/a_0001.nii.gz"}


@pytest.mark.parametrize("place", ["nnUNet_raw/Dataset001_X/splits_final.json", "given.json", "beside"])
def test_its_splits_are_our_folds(tmp_path: Path, place: str) -> None:
    source = write_raw(tmp_path / "nnUNet_raw" / "Dataset001_X")
    if place == "beside":
        place = "nnUNet_preprocessed/Dataset001_X/splits_final.json"
    path = write_as_json(tmp_path / place, SPLITS)
    found = find_cases(source, reading=Reading(splits=path if place == "given.json" else None))
    assert found.split == str(path)
    # d is in no split: it was held out.
    assert {case.id: case.fold for case in found.cases} == {"a": 0, "b": 1, "c": 2, "d": None}


def test_what_every_split_trains_on_gets_a_fold_of_its_own(tmp_path: Path) -> None:
    splits = [{"train": ["b", "d", "c"], "val": ["a"]}, {"train": ["a", "c", "d"], "val": ["b"]}]
    write_as_json(write_raw(tmp_path) / "splits_final.json", splits)
    assert {case.id: case.fold for case in find_cases(tmp_path).cases} == {"a": 0, "b": 1, "c": 2, "d": 2}


@pytest.mark.parametrize(
    ("splits", "reason"),
    [
        ([{"train": ["b"], "val": ["a"]}, {"train": ["b"], "val": ["a"]}], "case 'a' is validated in splits 0 and 1"),
        ([{"train": ["c"], "val": ["a"]}, {"train": ["a", "c"], "val": ["b"]}], "split 0 does not train on all .*: b"),
        ([{"train": ["z"], "val": ["a"]}, {"train": ["a"], "val": ["z"]}], "no case of the data set: z"),
        ({"train": []}, "expected .*train.*val"),
        ([{"train": ["a"]}], "expected .*train.*val"),
    ],
)
def test_splits_that_are_no_folds_are_refused(tmp_path: Path, splits: object, reason: str) -> None:
    write_as_json(write_raw(tmp_path) / "splits_final.json", splits)
    with pytest.raises(ManifestError, match=reason):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("imagesTr/e.nii.gz", "expected CASE_0000"), ("imagesTr/a_0002.nii.gz", "channel 0002 is not in dataset.json")],
)
def test_a_file_of_no_channel_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    touch(write_raw(tmp_path), name)
    with pytest.raises(ManifestError, match=reason):
        find_cases(tmp_path)
