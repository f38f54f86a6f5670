"""MONAI's datalists: lists, folds, several images, and where their paths lead."""

from pathlib import Path

import numpy as np
import pytest
from layout_files import files_in, write_as_json

from pipeline.data.formats import Reading, find_cases
from pipeline.errors import ManifestError
from pipeline.geometry import Geometry
from pipeline.volumes.volume import Volume
from pipeline.volumes.writing import write_image


def entry(case: str, **more: object) -> dict[str, object]:
    return {"image": f"images/{case}.nii.gz", "label": f"labels/{case}.nii.gz", **more}


def test_folds_of_entries_are_our_folds(tmp_path: Path) -> None:
    content = {
        "training": [entry("a", fold=0), entry("b", fold=1)],
        "testing": [{"image": "images/t.nii.gz"}, "images/u.nii.gz"],
    }
    found = find_cases(write_as_json(tmp_path / "list.json", content))
    assert {case.id: case.fold for case in found.cases} == {"a": 0, "b": 1, "t": None, "u": None}
    assert found.split == "the folds and lists of list.json"
    assert files_in(found)["a"] == ({"image": "images/a.nii.gz"}, "labels/a.nii.gz")
    assert files_in(found)["u"] == ({"image": "images/u.nii.gz"}, None)


def test_a_list_for_validation_is_fold_zeros(tmp_path: Path) -> None:
    content = {"training": [entry("a"), entry("b")], "validation": [entry("v")], "test": [entry("t")]}
    found = find_cases(write_as_json(tmp_path / "list.json", content))
    assert {case.id: case.fold for case in found.cases} == {"a": 1, "b": 1, "v": 0, "t": None}
    assert found.held_out == {"t"}


def test_a_list_for_training_alone_says_nothing_of_the_split(tmp_path: Path) -> None:
    found = find_cases(
        write_as_json(tmp_path / "list.json", {"training": [entry("a"), entry("b")], "test": [entry("t")]})
    )
    assert (found.split, found.held_out) == ("", {"t"})


def test_several_images_are_channels(tmp_path: Path) -> None:
    listed = {"training": [{"image": ["x/t1.nii", "x/t2.nii"], "label": "x/seg.nii"}]}
    found = find_cases(write_as_json(tmp_path / "list.json", listed))
    assert files_in(found) == {"t1": ({"channel_0": "x/t1.nii", "channel_1": "x/t2.nii"}, "x/seg.nii")}
    named = {**listed, "modality": {"0": "T1", "1": "T2"}}
    assert list(find_cases(write_as_json(tmp_path / "list.json", named)).channels) == ["T1", "T2"]
    with pytest.raises(ManifestError, match="names 1 channels, T1, but images have 2"):
        find_cases(write_as_json(tmp_path / "list.json", {**listed, "modality": {"0": "T1"}}))


def test_keys_that_name_volumes_are_channels(tmp_path: Path) -> None:
    listed = {"training": [{"flair": "p/f.nii", "t1ce": "p/t.nii", "label": "p/seg.nii", "note": "good"}]}
    found = find_cases(write_as_json(tmp_path / "list.json", listed))
    assert found.channels == {"flair": "MR", "t1ce": "MR"}
    assert files_in(found) == {"f": ({"flair": "p/f.nii", "t1ce": "p/t.nii"}, "p/seg.nii")}


def test_a_file_of_several_volumes_is_several_channels(tmp_path: Path) -> None:
    write_image(
        tmp_path / "images" / "a.nii.gz", Volume(np.zeros((2, 4, 4, 4), np.float32), Geometry((4, 4, 4), np.eye(4)))
    )
    found = find_cases(write_as_json(tmp_path / "list.json", {"training": [entry("a")]}))
    assert {name: file.index for name, file in found.cases[0].images.items()} == {"channel_0": 0, "channel_1": 1}


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    listed = {"training": [{"image": f"{p}/image.nii", "label": f"{p}/label.nii"} for p in ("p1", "p2")]}
    found = find_cases(write_as_json(tmp_path / "list.json", listed))
    assert [case.id for case in found.cases] == ["p1_image", "p2_image"]


def test_paths_are_relative_to_monais_base_folder(tmp_path: Path) -> None:
    path = write_as_json(
        tmp_path / "lists" / "list.json", {"training": [entry("a"), entry(str(tmp_path / "data" / "b"))]}
    )
    content = {"training": [entry("a"), {"image": str(tmp_path / "data" / "b.nii.gz")}]}
    write_as_json(path, content)
    with pytest.raises(ManifestError, match="may not leave"):
        find_cases(path)
    found = find_cases(path, reading=Reading(root=tmp_path / "data"))
    assert found.root == tmp_path / "data"
    assert files_in(found) == {
        "a": ({"image": "images/a.nii.gz"}, "labels/a.nii.gz"),
        "b": ({"image": "b.nii.gz"}, None),
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"training": []}, "no case in training, validation"),
        ({"training": [{"label": "a.nii"}]}, r"training\[0\]: expected"),
        ({"training": [entry("a", fold="0")]}, "fold: expected a whole number from 0, got '0'"),
        ({"training": [{"image": "a.nii", "label": ["b.nii", "c.nii"]}]}, "label: expected one file"),
    ],
)
def test_a_broken_datalist_is_refused(tmp_path: Path, content: object, reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        find_cases(write_as_json(tmp_path / "list.json", content))
