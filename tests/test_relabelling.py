"""Values in files that stand for other labels: named on the command line, kept in the manifest, seen by every stage."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import Config, DataSection, PreprocessingSection
from pipeline.data.cases import read_case_label
from pipeline.data.formats import Found
from pipeline.data.label_options import LabelOption, parse_label, with_labels
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.data.phantoms import write_phantom_dataset
from pipeline.data.plan import read_plan
from pipeline.data.store import CaseStore
from pipeline.errors import ManifestError, VolumeError
from pipeline.preparation.examining import examination_key, examine_case
from pipeline.stages import check, preprocess
from pipeline.stages import manifest as manifest_stage
from pipeline.stages.evaluating.cases import read_labelled
from pipeline.volumes.relabelling import relabelled
from pipeline.volumes.volume import Volume, read_label
from pipeline.volumes.writing import write_label

# What the phantoms' labels are replaced by, two values a structure; 7 is nothing, and 99 nobody knows.
OPTIONS = ["left:1=500,501", "right:2=3,4", "background=0,7", "ignore=99"]


def test_each_value_is_replaced_by_the_tables() -> None:
    label = np.array([[[0, 5], [300, 5]]], np.uint16)
    out = relabelled(label, {0: 0, 5: -1, 300: 2, 8: 1}, np.dtype(np.int8), "the manifest's")
    assert (out.dtype, out.tolist()) == (np.int8, [[[0, -1], [2, -1]]])
    with pytest.raises(VolumeError, match="the value 300, which is not one of the manifest's; name it"):
        relabelled(label, {0: 0, 5: 1}, np.dtype(np.uint8), "the manifest's")
    with pytest.raises(VolumeError, match="the value 300"):  # beyond the table's largest
        relabelled(label, {0: 0, 5: 1, 299: 1, 301: 1}, np.dtype(np.uint8), "any")


@pytest.mark.parametrize(
    ("text", "name", "value", "stored"),
    [
        ("kidney=1,4", "kidney", 1, (1, 4)),
        ("left kidney : 2 = 500, 501", "left kidney", 2, (500, 501)),
        ("air=-1000,-1000", "air", -1000, (-1000,)),
    ],
)
def test_a_label_is_a_name_and_its_values(text: str, name: str, value: int, stored: tuple[int, ...]) -> None:
    assert parse_label(text) == LabelOption(name, value, stored)


@pytest.mark.parametrize("text", ["kidney", "=1", "kidney=", "kidney=a", "kidney=1;2", "kidney:x=1"])
def test_what_is_no_label_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match="expected NAME=VALUES or NAME:VALUE=VALUES"):
        parse_label(text)


def named(*texts: str, **found: object) -> Found:
    return with_labels(Found(Path(), {"T1": "MR"}, (), **found), [parse_label(text) for text in texts])  # type: ignore[arg-type]


def test_the_users_labels_take_the_place_of_the_layouts() -> None:
    found = named(
        "all=1,2", labels={"nothing": 0, "a": 1, "b": 2}, ignore_label=9, regions={"both": ("a", "b"), "b": ("b",)}
    )
    assert found.labels == {"background": 0, "all": 1}
    assert (found.file_values, found.ignore_label, found.regions) == ({"all": (1, 2)}, 9, {})
    assert found.notes == ("regions both, b are dropped: their labels are named anew",)
    kept = named("b=2", "a=1,3", labels={"nothing": 0, "a": 1, "b": 2}, regions={"both": ("a", "b"), "a": ("a",)})
    assert (list(kept.labels or ()), list(kept.regions)) == (["background", "b", "a"], ["both", "a"])
    assert named("a=1", "background=0,5", "ignore=7").file_values == {"background": (0, 5)}
    assert named(labels={"x": 0, "y": 1}).labels == {"x": 0, "y": 1}


@pytest.mark.parametrize(
    ("texts", "reason"), [(("a=1", "a=2"), "each name once"), (("a=0,1",), "0 is no background any more")]
)
def test_labels_that_contradict_one_another_are_refused(texts: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        named(*texts)


def scattered(label: np.ndarray) -> np.ndarray:
    """Return a phantom's label with other values: two a structure, one for part of nothing, one that nobody knows."""
    checkered = np.indices(label.shape).sum(axis=0) % 2
    out = np.array([[0, 7], [500, 501], [3, 4]], np.int16)[label, checkered]
    out[0][label[0] == 0] = 99
    return out


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    """A data set whose labels are scattered over values, and one whose files say the same plainly."""
    folder = tmp_path_factory.mktemp("sets")
    manifests = []
    for name in ("scattered", "plain"):
        source = write_phantom_dataset(folder / name, cases=4, layout="folder")
        for path in source.glob("*/label.nii.gz"):
            label = read_label(path)
            values = scattered(label.array)
            plain = np.where(values == 99, 99, label.array).astype(np.int16)
            write_label(path, Volume(values if name == "scattered" else plain, label.geometry))
        options = OPTIONS if name == "scattered" else ["left=1", "right=2", "ignore=99"]
        manifest_stage.run(source, folder / f"{name}.json", folds=2, labels=[parse_label(text) for text in options])
        manifests.append(load_manifest(folder / f"{name}.json"))
    return manifests[0], manifests[1]


def test_the_manifest_says_what_stands_for_what(sets: tuple[Manifest, Manifest]) -> None:
    many, plain = sets
    assert many.labels == plain.labels == {"background": 0, "left": 1, "right": 2}
    assert many.ignore_label == plain.ignore_label == 99
    assert many.file_values == {"background": (0, 7), "left": (500, 501), "right": (3, 4)}
    assert many.value_table == {0: 0, 7: 0, 500: 1, 501: 1, 3: 2, 4: 2, 99: 99}
    assert "file_values" not in plain.model_dump()
    # Stratified by the same structures, the cases stand in the same folds.
    assert [case.fold for case in many.cases] == [case.fold for case in plain.cases]


def test_a_value_that_is_not_named_is_refused(sets: tuple[Manifest, Manifest], tmp_path: Path) -> None:
    source = sets[0].root
    with pytest.raises(
        ManifestError, match=r"hold 7 \(in 4 cases\), 99 \(in 4 cases\) too; .*--label background=0,7,99"
    ):
        manifest_stage.run(source, tmp_path / "a.json", labels=[parse_label(text) for text in OPTIONS[:2]])
    assert not (tmp_path / "a.json").exists()


def test_every_stage_sees_the_labels_and_not_the_values(sets: tuple[Manifest, Manifest], tmp_path: Path) -> None:
    stores = []
    for manifest in sets:
        path = manifest.root.parent / f"{manifest.name}.json"
        assert check.run(path, workspace=tmp_path / manifest.name).errors == ()
        config = Config(
            name="x",
            workspace=tmp_path / manifest.name,
            data=DataSection(manifest=path),
            preprocessing=PreprocessingSection(patch_size=(16, 16, 16), batch_size=2),
        )
        stores.append(preprocess.run(config).folder)
    assert (stores[0] / "fingerprint.json").read_bytes() == (stores[1] / "fingerprint.json").read_bytes()
    plan = read_plan(stores[0] / "plan.yaml")
    assert plan == read_plan(stores[1] / "plan.yaml")
    for case, other in zip(sets[0].cases, sets[1].cases, strict=True):
        first, second = (CaseStore(store / "cases").read(case.id) for store in stores)
        np.testing.assert_array_equal(first.label, second.label)
        np.testing.assert_array_equal(first.reference, second.reference)
        read = [read_labelled(manifest, own, plan).reference for manifest, own in zip(sets, (case, other), strict=True)]
        np.testing.assert_array_equal(read[0].array, read[1].array)
        assert len(np.unique(read[0].array)) > 1


def test_other_values_are_another_store_and_another_examination(sets: tuple[Manifest, Manifest]) -> None:
    many = sets[0]
    fewer = many.changed(file_values={**many.file_values, "left": (500,), "background": (0, 7, 501)})
    case = many.cases[0]
    seen = [examine_case(manifest, case) for manifest in (many, fewer)]
    assert all(not examination.problems for examination in seen)
    counts = [examination.label.voxels for examination in seen if examination.label]
    assert 0.4 < counts[1]["left"] / counts[0]["left"] < 0.6
    assert sum(counts[0].values()) == sum(counts[1].values())
    assert examination_key(many, case) != examination_key(fewer, case)


def test_a_value_that_stands_for_nothing_is_found(sets: tuple[Manifest, Manifest]) -> None:
    many = sets[0]
    fewer = many.changed(file_values={**many.file_values, "left": (500,)})
    (problem,) = examine_case(fewer, many.cases[0]).problems
    assert problem.kind == "label_values"
    assert "holds 501 (" in problem.message
    assert "left = 500, right = 3, 4, ignore = 99" in problem.message
    with pytest.raises(VolumeError, match="the value 501, which is not one of the manifest's"):
        read_case_label(fewer, many.cases[0], {})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"nose": [4]}, "file_values: 'nose' is not a label; labels are background, left, right, ignore"),
        ({"left": []}, "file_values: left: no value"),
        ({"left": [500, 2]}, "file_values: 2 stands for both left and right"),
        ({"left": [500], "right": [500]}, "file_values: 500 stands for both left and right"),
    ],
)
def test_values_that_contradict_the_labels_are_refused(
    sets: tuple[Manifest, Manifest], tmp_path: Path, values: dict[str, list[int]], reason: str
) -> None:
    content = json.loads((sets[1].root.parent / "plain.json").read_text())
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**content, "file_values": values}))
    with pytest.raises(ManifestError, match=reason):
        load_manifest(path)
