"""Manifests: written once, the same each time, and nothing in them leads out of their root."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from pipeline.data.formats import Reading
from pipeline.data.label_options import named_labels
from pipeline.data.manifest import FORMAT_VERSION, load_manifest, save_manifest
from pipeline.data.phantoms import write_phantom_dataset
from pipeline.errors import ManifestError
from pipeline.preparation.survey import compare_cases, examine_cases
from pipeline.records import file_digest
from pipeline.stages.manifest import run

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("manifest") / "phantoms", cases=6, layout="csv")


@pytest.fixture
def written(phantoms: Path) -> Path:
    out = phantoms.parents[1] / "phantoms.json"
    run(phantoms, out, folds=2, force=True)
    return out


def changed(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return path


def test_manifests_of_old_keep_their_digests() -> None:
    # Stores and models name the manifest they were made from by its digest. The first was written before there were
    # regions, an ignored value and annotated classes; the second says an order of channels that is not by name.
    digests = {"hippocampus": "7287f0cf8c4ba512", "sts": "bb2a5ffce1f82b9e"}
    for name, digest in digests.items():
        assert load_manifest(REPOSITORY / "data_manifests" / f"{name}.json").digest().startswith(digest)


def test_what_is_known_of_the_labels_is_kept_and_told_apart(written: Path) -> None:
    plain = load_manifest(written)
    assert not {"regions", "ignore_label"} & set(json.loads(written.read_text()))
    said = {"regions": {"all": ["label_1", "label_2"], "label_2": ["label_2"]}, "ignore_label": -1}
    cases = json.loads(written.read_text())["cases"]
    cases[0]["annotated_classes"] = ["label_1"]
    found = load_manifest(changed(written, **said, cases=cases))
    assert found.regions == {"all": ("label_1", "label_2"), "label_2": ("label_2",)}
    assert found.ignore_label == -1
    assert [found.cases[0].is_annotated([name]) for name in ("label_1", "label_2")] == [True, False]
    assert found.cases[1].is_annotated(["label_1", "label_2"])
    save_manifest(found, written)
    assert load_manifest(written) == found
    digests = {plain.digest(), found.digest(), found.changed(regions={}).digest()}
    assert len(digests | {found.changed(ignore_label=None).digest()}) == 4


@pytest.mark.parametrize(
    ("annotated", "reason"),
    [
        (["nose"], "case 'phantom_000_visit1': annotated_classes: 'nose' is not a label"),
        (["label_1"], "label_1 and label_2 swap when left and right are flipped; name both, or neither"),
        (["background"], "no structure is named"),
    ],
)
def test_annotated_classes_that_make_no_sense_are_refused(written: Path, annotated: list[str], reason: str) -> None:
    cases = json.loads(written.read_text())["cases"]
    cases[0]["annotated_classes"] = annotated
    with pytest.raises(ManifestError, match=reason):
        load_manifest(changed(written, label_pairs=[["label_1", "label_2"]], cases=cases))


def test_a_manifest_says_what_was_found(phantoms: Path, written: Path) -> None:
    manifest = load_manifest(written)
    assert manifest.name == "phantoms"
    assert manifest.root == phantoms.parent
    assert json.loads(written.read_text())["root"] == "phantoms"
    assert manifest.labels == {"background": 0, "label_1": 1, "label_2": 2}
    for case in manifest.cases:
        for file in (*case.images.values(), case.label):
            assert file is not None
            assert file.sha256 == file_digest(manifest.path_of(file))
    patients = [case.patient for case in manifest.cases]
    visits = [case.fold for case in manifest.cases if patients.count(case.patient) == 2]
    assert len(visits) == 2
    assert visits[0] == visits[1]
    assert manifest.folds == (0, 1)


def test_it_is_written_once_and_the_same_each_time(phantoms: Path, written: Path) -> None:
    text = written.read_text()
    with pytest.raises(ManifestError, match=r"is there already.*--force"):
        run(phantoms, written, folds=2)
    assert written.read_text() == text
    run(phantoms, written, folds=2, force=True)
    assert written.read_text() == text
    run(phantoms, written, folds=2, seed=1, force=True)
    assert written.read_text() != text


def test_held_out_patients_have_no_fold(phantoms: Path, tmp_path: Path) -> None:
    manifest = run(phantoms, tmp_path / "held_out.json", folds=2, test_fraction=0.2)
    assert len({case.patient for case in manifest.test_cases}) == 1
    assert {case.patient for case in manifest.test_cases}.isdisjoint(c.patient for c in manifest.development_cases)
    assert all("fold" in case for case in json.loads((tmp_path / "held_out.json").read_text())["cases"])


def test_every_unreadable_file_is_named_at_once(tmp_path: Path) -> None:
    source = write_phantom_dataset(tmp_path / "data", cases=4)
    image, label = sorted(source.glob("imagesTr/*"))[0], sorted(source.glob("labelsTr/*"))[2]
    image.unlink()
    label.write_bytes(label.read_bytes()[:200])
    with pytest.raises(ManifestError) as error:
        run(source, tmp_path / "a.json", folds=2)
    first, second = str(error.value).splitlines()
    assert image.name in first
    assert "No such file" in first
    assert label.name in second
    assert "cut short" in second
    assert not (tmp_path / "a.json").exists()


def test_a_data_set_without_labels_is_refused(tmp_path: Path) -> None:
    source = write_phantom_dataset(tmp_path / "data", cases=2, layout="folder")
    for label in source.glob("*/label.nii.gz"):
        label.unlink()
    with pytest.raises(ManifestError, match="labelled patients"):
        run(source, tmp_path / "a.json", folds=2)


def test_labels_are_named_by_their_values() -> None:
    assert named_labels({0, 255}) == {"background": 0, "foreground": 255}
    assert named_labels({1, 0, -3}) == {"background": 0, "label_minus_3": -3, "label_1": 1}


@pytest.mark.parametrize("path", ["../outside.nii.gz", "/etc/passwd", "a/../../b.nii.gz", "a\\..\\b.nii.gz", ""])
def test_a_path_that_leaves_the_root_is_refused(written: Path, path: str) -> None:
    cases = json.loads(written.read_text())["cases"]
    cases[0]["images"]["T1"]["path"] = path
    with pytest.raises(ManifestError, match=r"cases\.0\.images\.T1\.path.*may not leave"):
        load_manifest(changed(written, cases=cases))


def test_a_link_that_leaves_the_root_is_refused(tmp_path: Path) -> None:
    source = write_phantom_dataset(tmp_path / "data", cases=2)
    run(source, tmp_path / "a.json", folds=2)
    image = sorted(source.glob("imagesTr/*"))[0]
    (source / "inside.nii.gz").write_bytes(image.read_bytes())
    for target, leaves in ((source / "inside.nii.gz", False), (tmp_path / "outside.nii.gz", True)):
        target.write_bytes((source / "inside.nii.gz").read_bytes())
        image.unlink()
        image.symlink_to(target)
        manifest = load_manifest(tmp_path / "a.json")
        file = manifest.cases[0].images["T1"]
        if leaves:
            with pytest.raises(ManifestError, match="leads out of the manifest's root"):
                manifest.path_of(file)
        else:
            assert manifest.path_of(file) == image


@pytest.mark.parametrize(
    ("version", "todo"),
    [(FORMAT_VERSION + 1, "update medseg"), (0, "write it anew with `medseg manifest"), (None, "write it anew")],
)
def test_another_format_version_says_what_to_do(written: Path, version: int | None, todo: str) -> None:
    with pytest.raises(ManifestError, match=todo):
        load_manifest(changed(written, format_version=version))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"channels": {}}, "at least one is needed"),
        ({"labels": {"background": 0}}, "at least one structure"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "two names share a value"),
        ({"label_pairs": [["label_1", "nose"]]}, "'nose' is not a label"),
        ({"ignore_label": 2}, "ignore_label: 2 is the value of label 'label_2'"),
        ({"regions": {"all": ["label_1", "label_2"]}}, "regions: all: exactly one"),
        ({"colour": "red"}, "colour: Extra inputs"),
        ({"channels": {"T2": "MR"}}, "channel 'T1' is not declared"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(written: Path, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        load_manifest(changed(written, **fields))


def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    for name, text in {"none.json": None, "text.json": "hello", "list.json": "[]"}.items():
        if text:
            (tmp_path / name).write_text(text)
        with pytest.raises(ManifestError, match=name):
            load_manifest(tmp_path / name)


def test_the_committed_manifest_holds_no_path_of_a_machine() -> None:
    path = REPOSITORY / "data_manifests" / "hippocampus.json"
    content = json.loads(path.read_text())
    assert content["root"] == "../../shared/data/Task04_Hippocampus"
    manifest = load_manifest(path)
    assert len(manifest.cases) == 200
    assert [len(manifest.validation_cases(fold)) for fold in manifest.folds] == [40] * 5
    assert manifest.licence
    assert manifest.source
    assert manifest.channels == {"MRI": "MR"}
    assert manifest.labels == {"background": 0, "anterior": 1, "posterior": 2}


def test_the_committed_sarcoma_manifest_has_missing_channels() -> None:
    path = REPOSITORY / "data_manifests" / "sts.json"
    assert json.loads(path.read_text())["root"] == "../../shared/data/STS"
    manifest = load_manifest(path)
    assert manifest.channels == {"MR_T1": "MR", "CT": "CT", "PET": "PET"}
    assert [sum(channel in case.images for case in manifest.cases) for channel in manifest.channels] == [18, 7, 19]
    assert len({case.patient for case in manifest.cases}) == 19
    assert "CC BY" in manifest.licence


def test_the_committed_manifest_is_what_the_data_give(shared_data: Path, tmp_path: Path) -> None:
    again = run(shared_data / "Task04_Hippocampus", tmp_path / "hippocampus.json")
    assert again.digest() == load_manifest(REPOSITORY / "data_manifests" / "hippocampus.json").digest()


def csv_with(tmp_path: Path, columns: dict[str, list[str]]) -> Path:
    """Write phantoms and a CSV with further columns, a cell a case."""
    source = write_phantom_dataset(tmp_path / "data", cases=6, layout="csv")
    first, *lines = source.read_text().splitlines()
    cells = zip(*columns.values(), strict=True)
    rows = [",".join([first, *columns]), *(",".join([line, *own]) for line, own in zip(lines, cells, strict=True))]
    source.write_text("\n".join(rows) + "\n")
    return source


def test_groups_and_strata_come_from_columns(tmp_path: Path) -> None:
    columns = {"site": ["a", "a", "b", "a", "b", "c"], "sex": ["f", "f", "m", "m", "m", "f"]}
    source = csv_with(tmp_path, columns)
    asked = {"group_by": "site", "stratify_by": "sex"}
    grouped = run(source, tmp_path / "grouped.json", folds=3, **asked)  # type: ignore[arg-type]
    assert list(grouped.channels) == ["T1"]
    assert [case.group for case in grouped.cases] == columns["site"]
    folds = {(case.group, case.fold) for case in grouped.cases}
    assert len(folds) == 3
    with pytest.raises(ManifestError, match="no column age; there are case, patient, T1, label, site, sex"):
        run(source, tmp_path / "a.json", group_by="age")
    with pytest.raises(ManifestError, match="the format decathlon knows no columns; csv, bids do"):
        run(write_phantom_dataset(tmp_path / "other", cases=2), tmp_path / "a.json", group_by="site")
    # Torn by hand, it is found; the first two cases are one patient.
    torn = grouped.changed(cases=tuple(case.changed(fold=int(case.id[8:11]) % 2) for case in grouped.cases))
    found = {(p.case_id, p.message.split(" is ")[0]) for p in compare_cases(torn, examine_cases(torn, tmp_path))}
    assert ("phantom_003", "group 'a'") in found
    assert not any("group 'c'" in message for _, message in found)


def test_strata_are_spread_evenly(tmp_path: Path) -> None:
    source = csv_with(tmp_path, {"sex": ["f", "f", "m", "m", "f", "m"]})
    split = run(source, tmp_path / "a.json", folds=2, stratify_by="sex")
    sexes = dict(zip((case.id for case in split.cases), "ffmmfm", strict=True))
    # By the labels alone both f would stand in one fold. The last phantom is empty: a stratum of its own.
    sides = sorted((sexes[case.id], case.fold) for case in split.cases[:-1] if not case.id.endswith("visit2"))
    assert [{fold for sex, fold in sides if sex == one} for one in "fm"] == [{0, 1}, {0, 1}]


def test_a_data_sets_own_folds_are_taken_unless_new_ones_are_asked_for(tmp_path: Path) -> None:
    source = csv_with(tmp_path, {"fold": ["1", "1", "0", "", "2", "2"]})
    own = run(source, tmp_path / "own.json")
    assert [case.fold for case in own.cases] == [1, 1, 0, None, 2, 2]
    new = run(source, tmp_path / "new.json", folds=2)
    assert new.folds == (0, 1)
    assert not new.test_cases
    with pytest.raises(ManifestError, match=r"the column fold of cases\.csv: 1 folds, at least 2"):
        run(csv_with(tmp_path / "one", {"fold": ["0", "0", "", "0", "0", "0"]}), tmp_path / "a.json")


def test_test_cases_of_a_layout_stay_held_out(tmp_path: Path) -> None:
    source = write_phantom_dataset(tmp_path / "data", cases=6, layout="nnunet")
    for side in ("images", "labels"):
        (source / f"{side}Ts").mkdir()
        for path in source.glob(f"{side}Tr/phantom_003*"):
            path.rename(source / f"{side}Ts" / path.name)
    split = run(source, tmp_path / "a.json", folds=2)
    assert [case.id for case in split.test_cases] == ["phantom_003"]
    assert split.test_cases[0].label is not None


def test_links_are_followed_below_a_root_above_both(tmp_path: Path) -> None:
    real = write_phantom_dataset(tmp_path / "real", cases=4)
    linked = tmp_path / "linked"
    (linked / "imagesTr").mkdir(parents=True)
    (linked / "labelsTr").mkdir()
    for path in real.glob("*Tr/*"):
        (linked / path.relative_to(real)).symlink_to(path)
    (linked / "dataset.json").write_text((real / "dataset.json").read_text())
    with pytest.raises(ManifestError, match=r"leads out of the manifest's root, .*--root FOLDER"):
        run(linked, tmp_path / "a.json", folds=2)
    above = run(linked, tmp_path / "a.json", folds=2, reading=Reading(root=tmp_path))
    assert above.root == tmp_path
    assert above.cases[0].images["T1"].path == "linked/imagesTr/phantom_000_visit1.nii.gz"


def test_nnunets_splits_serve_any_layout(tmp_path: Path) -> None:
    source = csv_with(tmp_path, {"site": [*"aabbcc"]})
    ids = [f"phantom_{name}" for name in ("000_visit1", "000_visit2", "002", "003", "004")]
    splits = [{"train": ids[2:], "val": ids[:2]}, {"train": ids[:2], "val": ids[2:]}]
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(splits))
    given = run(source, tmp_path / "a.json", reading=Reading(splits=path), group_by="site")
    assert [case.fold for case in given.cases] == [0, 0, 1, 1, 1, None]
    assert [case.group for case in given.cases] == [*"aabbcc"]
    with pytest.raises(ManifestError, match="--splits says on which side"):
        run(source, tmp_path / "b.json", reading=Reading(splits=path), folds=2)


def test_a_modality_that_no_name_tells_and_a_word_taken_for_a_patient_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(12):
        label = np.zeros((4, 4, 4), np.uint8)
        label[0, 0, number % 4] = 1
        for folder, array in (("images", label * 100 + number), ("labels", label)):
            path = tmp_path / "set" / folder / f"CT_scan_{number:03}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    with pytest.raises(ManifestError, match=r"12 of 12 cases being of 'CT'; .* or say with --patient"):
        run(tmp_path / "set", tmp_path / "guessed.json")
    found = run(tmp_path / "set", tmp_path / "said.json", reading=Reading(patient=".*"))
    assert len({case.patient for case in found.cases}) == 12
    assert 'image: the name tells no modality, and "other" is normalised case by case: write "CT"' in caplog.text
    assert "is it one?" not in caplog.text
    first, second = ([f"CT_scan_{number:03}" for number in range(start, 12, 2)] for start in (0, 1))
    splits = [{"train": second, "val": first}, {"train": first, "val": second}]
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    run(tmp_path / "set", tmp_path / "torn.json", reading=Reading(splits=tmp_path / "splits.json"))
    assert "patient CT has 12 cases: is it one? --patient says" in caplog.text
