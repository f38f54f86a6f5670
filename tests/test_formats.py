"""Layouts: the same cases come out of each, and what a layout cannot say is guessed or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from layout_files import files_of, touch

from pipeline.data.formats import FORMATS, Reading, find_cases, modality_of, pairs_of, patient_of
from pipeline.data.phantoms import make_phantom, write_phantom_dataset
from pipeline.errors import ManifestError
from pipeline.volumes.volume import read_image, read_label

# What a layout must be asked, where it cannot tell by itself.
ASKED = {"patterns": Reading(images=("scans/{case}_{channel}.nii.gz",), labels="masks/{case}.nii.gz")}


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("layout", FORMATS)
def test_the_phantoms_come_back_from_each_layout(tmp_path: Path, layout: str, channels: int) -> None:
    source = write_phantom_dataset(tmp_path, cases=4, channels=channels, layout=layout)
    found = find_cases(source, reading=ASKED.get(layout))
    assert list(found.channels.values()) == ["MR"] * channels
    # Two visits of the first patient, and two more.
    patients = [case.patient for case in found.cases]
    assert patients[0] == patients[1]
    assert len(set(patients)) == 3
    grids = {"shared_grid": layout in ("decathlon", "nnunet"), "channels": channels}
    for case, (seed, visit) in zip(found.cases, [(0, 0), (0, 1), (2, 0), (3, 0)], strict=True):
        made = make_phantom(seed, visit=visit, empty=seed == 3, **grids)  # type: ignore[arg-type]
        assert case.label is not None
        assert np.array_equal(read_label(found.root / case.label.path).array, made.label.array)
        for (name, file), image in zip(sorted(case.images.items()), made.images.values(), strict=True):
            assert name[:2] in ("T1", "T2")
            assert np.array_equal(read_image(found.root / file.path, file.index).array, image.array)


def test_the_decathlons_channels_stand_in_one_file(tmp_path: Path) -> None:
    found = find_cases(write_phantom_dataset(tmp_path, cases=1, channels=2), "decathlon")
    assert found.labels == {"background": 0, "left": 1, "right": 2}
    assert found.licence == "CC0"
    assert {name: file.index for name, file in found.cases[0].images.items()} == {"T1": 0, "T2": 1}
    assert len({file.path for file in found.cases[0].images.values()}) == 1


def write_json(root: Path, **changes: object) -> Path:
    content = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Left Kidney"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    }
    (root / "dataset.json").write_text(json.dumps({k: v for k, v in {**content, **changes}.items() if v is not None}))
    return root


@pytest.mark.parametrize(
    "labels", [{"0": "background", "2": "Left Kidney"}, {"Left Kidney": 2, "background": 0}], ids=["values", "names"]
)
def test_labels_are_read_both_ways_round(tmp_path: Path, labels: dict[str, object]) -> None:
    assert find_cases(write_json(tmp_path, labels=labels)).labels == {"background": 0, "left kidney": 2}


@pytest.mark.parametrize("class_order", [None, [2, 1, 3]])
def test_nnunets_regions_and_ignored_value_are_read(tmp_path: Path, class_order: list[int] | None) -> None:
    labels = {"Whole": [1, 2, 3], "Core": [1, 3], "background": 0, "Enhancing": 3, "ignore": 4}
    found = find_cases(write_json(tmp_path, labels=labels, regions_class_order=class_order))
    # What a region of several values leaves to see is called after it; labels stand in painting order.
    assert found.labels is not None
    assert list(found.labels.items()) == [("background", 0), ("whole_rest", 2), ("core_rest", 1), ("enhancing", 3)]
    assert found.regions == {
        "whole": ("core_rest", "whole_rest", "enhancing"),
        "core": ("core_rest", "enhancing"),
        "enhancing": ("enhancing",),
    }
    assert found.ignore_label == 4


def test_labels_beside_an_ignored_value_are_no_regions(tmp_path: Path) -> None:
    found = find_cases(write_json(tmp_path, labels={"background": 0, "liver": 1, "ignore": 2}))
    assert (found.labels, found.regions, found.ignore_label) == ({"background": 0, "liver": 1}, {}, 2)


def test_a_csv_says_what_is_annotated(tmp_path: Path) -> None:
    table = tmp_path / "cases.csv"
    table.write_text("case,CT,label,annotated_classes\na,a.nii,al.nii,liver; spleen\nb,b.nii,bl.nii,\n")
    found = find_cases(table)
    assert list(found.channels) == ["CT"]
    assert [case.annotated_classes for case in found.cases] == [("liver", "spleen"), None]


def test_nnunets_files_take_the_names_of_its_channels(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")
    write_json(tmp_path, modality=None, training=None, channel_names={"1": "FLAIR", "0": "T1"})
    assert list(find_cases(tmp_path).channels) == ["T1", "FLAIR"]
    expected = {"T1": "imagesTr/a_0000.nii.gz", "FLAIR": "imagesTr/a_0001.nii.gz"}
    assert files_of(tmp_path) == {"a": (expected, "labelsTr/a.nii.gz")}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"modality": ["MRI"]}, "modality: expected"),
        ({"labels": {"whole": ["a", 2]}}, "labels: each name needs one whole number"),
        ({"labels": {"whole": [1, 2]}}, "labels: beside regions, background needs one whole number"),
        (
            {"labels": {"background": 0, "core": [3], "whole": [1, 2, 3]}},
            r"regions_class_order: None, .*\[\], .*to see",
        ),
        (
            {"labels": {"background": 0, "whole": [1, 2, 3], "core": [3], "spots": [2, 3]}},
            r"regions_class_order: None, .*\[1\], \[\], \[2, 3\]",
        ),
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [2, 1]},
            r"regions_class_order: \[2, 1\], but",
        ),
        ({"labels": None}, "labels: expected"),
        ({"training": ["a.nii.gz"]}, "training: expected"),
        ({"training": []}, "no case found"),
        ({"training": [{"image": "../a.nii.gz", "label": "b.nii.gz"}]}, "case 'a': images.MRI.path.*may not leave"),
    ],
)
def test_a_broken_dataset_json_is_refused(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        find_cases(write_json(tmp_path, **changes))


def test_a_json_that_is_none_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]"):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ManifestError, match=r"dataset\.json"):
            find_cases(tmp_path)


FOLDERS = {
    "a folder per case": (
        ["p1/T1.nii.gz", "p1/p1_flair.nii.gz", "p1/label.nii.gz", "p1/notes.txt", "p2/T1.nii.gz", "empty/x.txt"],
        {
            "p1": ({"T1": "p1/T1.nii.gz", "flair": "p1/p1_flair.nii.gz"}, "p1/label.nii.gz"),
            "p2": ({"T1": "p2/T1.nii.gz"}, None),
        },
    ),
    "a mask per channel": (
        ["s/CT_mask.nii.gz", "s/PET_image.nii.gz", "s/PET_mask.nii.gz"],
        {"s": ({"PET": "s/PET_image.nii.gz"}, "s/PET_mask.nii.gz")},
    ),
    "images and labels": (
        ["images/a.nrrd", "images/b_T1.nii.gz", "images/b_T2.nii.gz", "labels/a.nrrd", "labels/b.nii.gz"],
        {
            "a": ({"image": "images/a.nrrd"}, "labels/a.nrrd"),
            "b": ({"T1": "images/b_T1.nii.gz", "T2": "images/b_T2.nii.gz"}, "labels/b.nii.gz"),
        },
    ),
    "side by side": (
        ["a_image.nii.gz", "a_mask.nii.gz", "a1.nii.gz", "a1_seg.nii.gz", "c_image.nii.gz"],
        {
            "a": ({"image": "a_image.nii.gz"}, "a_mask.nii.gz"),
            "a1": ({"image": "a1.nii.gz"}, "a1_seg.nii.gz"),
            "c": ({"image": "c_image.nii.gz"}, None),
        },
    ),
    "a pair of header and image": (
        ["p/T1.hdr", "p/T1.img", "p/label.hdr", "p/label.img"],
        {"p": ({"T1": "p/T1.img"}, "p/label.img")},
    ),
}


@pytest.mark.parametrize("pattern", FOLDERS)
def test_plain_folders(tmp_path: Path, pattern: str) -> None:
    names, expected = FOLDERS[pattern]
    assert files_of(touch(tmp_path, *names)) == expected


def test_a_label_without_an_image_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz")
    assert files_of(tmp_path) == {"a": ({"image": "images/a.nii.gz"}, "labels/a.nii.gz")}
    assert "1 labels to which no image belongs, left out: b.nii.gz" in caplog.text


def test_labels_that_belong_to_no_channel_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "p/T1.nii.gz", "p/liver_mask.nii.gz", "p/spleen_mask.nii.gz")
    with pytest.raises(ManifestError, match="several labels, of no channel: liver, spleen"):
        find_cases(tmp_path)


def test_the_sarcoma_patients_keep_their_missing_channels(shared_data: Path) -> None:
    found = find_cases(shared_data / "STS")
    assert found.channels == {"CT": "CT", "MR_T1": "MR", "PET": "PET"}
    by_channels: dict[tuple[str, ...], list[str]] = {}
    for case in found.cases:
        by_channels.setdefault(tuple(sorted(case.images)), []).append(case.id)
        first = next(name for name in found.channels if name in case.images)
        assert case.label is not None
        assert case.label.path == f"{case.id}/{first}_mask.nii.gz"
    assert {names: len(ids) for names, ids in by_channels.items()} == {
        ("CT", "MR_T1", "PET"): 7,
        ("MR_T1", "PET"): 11,
        ("PET",): 1,
    }
    assert by_channels["PET",] == ["STS_009"]


def test_a_csv_says_what_it_lacks(tmp_path: Path) -> None:
    text = "case,patient,label,T1,FLAIR\nb,p,b.nii.gz,b1.nii.gz,\na,,,x.nii.gz#0,x.nii.gz#1\n"
    (tmp_path / "cases.csv").write_text(text, encoding="utf-8-sig")
    a, b = find_cases(tmp_path / "cases.csv").cases
    assert (a.patient, b.patient) == ("a", "p")
    assert {name: (file.path, file.index) for name, file in a.images.items()} == {
        "T1": ("x.nii.gz", 0),
        "FLAIR": ("x.nii.gz", 1),
    }
    assert (list(b.images), a.label) == (["T1"], None)


def test_every_broken_line_of_a_csv_is_named(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text("case,T1\na,../x.nii.gz\nb,b.nii.gz,c\nc,c.nii.gz#x\nd\n")
    with pytest.raises(ManifestError) as error:
        find_cases(tmp_path / "cases.csv")
    lines = str(error.value).splitlines()
    assert [line.split("cases.csv:")[1][:1] for line in lines] == ["2", "3", "4", "5"]
    (tmp_path / "cases.csv").write_text("id,T1\na,x.nii.gz\n")
    with pytest.raises(ManifestError, match="the first line names the columns case"):
        find_cases(tmp_path / "cases.csv")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (("p1/T1.nii.gz", "p1/label.nii.gz", "p1/mask.nii.gz"), "label.nii.gz and mask.nii.gz are two labels"),
        (("p1.nii.gz", "p1_gt.nii.gz", "p1_seg.nii.gz"), "p1_gt.nii.gz and p1_seg.nii.gz are two labels"),
        (("images/p1.nii.gz", "labels/p1.nii.gz", "labels/p1_mask.nii.gz"), "are two labels of one name"),
        (("images/p1.nii.gz", "images/p1.nrrd", "labels/p1.nii.gz"), "p1.nii.gz and p1.nrrd are two images"),
    ],
)
def test_of_two_files_of_one_name_none_is_taken_for_the_other(
    tmp_path: Path, files: tuple[str, ...], reason: str
) -> None:
    touch(tmp_path, *files)
    with pytest.raises(ManifestError, match=f"{reason}.*list the files in a CSV"):
        find_cases(tmp_path)


def test_an_image_belongs_to_the_longest_label_that_it_begins_with(tmp_path: Path) -> None:
    names = ("a", "a_1", "a_10", "b-c")
    touch(tmp_path, *(f"labels/{name}.nii.gz" for name in names))
    touch(tmp_path, *(f"images/{name}_CT.nii.gz" for name in names), "images/a_2_0000.nii.gz", "images/ab.nii.gz")
    found = files_of(tmp_path)
    assert {name: set(images) for name, (images, _) in found.items()} == {
        **{name: {"CT"} for name in ("a_1", "a_10", "b-c")},
        "a": {"CT", "2_0000"},
        "ab": {"image"},
    }


@pytest.mark.parametrize("layout", ["nnunet", "decathlon"])
def test_a_test_case_whose_name_is_changed_stays_one(tmp_path: Path, layout: str) -> None:
    number = "_0000" if layout == "nnunet" else ""
    touch(tmp_path, f"imagesTr/Müller 3{number}.nii.gz", "labelsTr/Müller 3.nii.gz")
    touch(tmp_path, f"imagesTs/Patient 01{number}.nii.gz", "labelsTs/Patient 01.nii.gz")
    training = [{"image": "./imagesTr/Müller 3.nii.gz", "label": "./labelsTr/Müller 3.nii.gz"}]
    write_json(tmp_path, training=training, test=["./imagesTs/Patient 01.nii.gz"])
    found = find_cases(tmp_path, layout)
    assert found.held_out == {"Patient_01"}
    assert found.held_out < {case.id for case in found.cases} == {"Patient_01", "M_ller_3"}
    (tmp_path / "splits.json").write_text(json.dumps([{"train": [], "val": ["Müller 3"]}]))
    split = find_cases(tmp_path, layout, Reading(splits=tmp_path / "splits.json"))
    assert {case.id: case.fold for case in split.cases} == {"M_ller_3": 0, "Patient_01": None}


def test_a_source_that_is_nothing_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    for source, layout, reason in (
        (tmp_path / "none", None, "does not exist"),
        (tmp_path / "a.txt", None, "no known layout"),
        (tmp_path, None, "no case found.*DICOM is converted first: `medseg dicom convert`"),
        (tmp_path, "zarr", "format 'zarr': unknown; one of nnunet, decathlon, csv, monai"),
    ):
        with pytest.raises(ManifestError, match=reason):
            find_cases(source, layout)


def test_modalities_are_guessed_by_whole_words() -> None:
    guesses = {"MRI": "MR", "MR_T1": "MR", "t1gd": "MR", "FLAIR": "MR", "CT": "CT", "PET": "PET", "US": "US"}
    assert {name: modality_of(name) for name in guesses} == guesses
    assert modality_of("image") == modality_of("octopus") == "other"


def test_left_and_right_make_pairs() -> None:
    labels = ["background", "kidney_left", "liver", "kidney_right", "L femur", "R femur", "left"]
    assert set(pairs_of(labels)) == {("kidney_left", "kidney_right"), ("L femur", "R femur")}
    assert pairs_of(["background", "anterior"]) == ()


def test_patients_are_recognised_before_a_visit() -> None:
    patients = {"sub-01_ses-02": "sub-01", "P7_visit1": "P7", "x_tp2_T1": "x", "hippocampus_003": "hippocampus_003"}
    assert {name: patient_of(name) for name in patients} == patients
    assert np.unique([patient_of(f"sub-1_ses-{n}") for n in range(3)]).tolist() == ["sub-1"]
