"""Data sets written for other tools: what comes back is what went out, and nnU-Net's own check passes."""

import csv
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_relabelling import OPTIONS, scattered
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.data.exports import EXPORTS, RECORD
from pipeline.data.formats import Reading, find_cases
from pipeline.data.label_options import parse_label
from pipeline.data.manifest import load_manifest, save_manifest
from pipeline.data.phantoms import write_phantom_dataset
from pipeline.errors import ManifestError, PipelineError
from pipeline.stages import check, export_dataset
from pipeline.stages import manifest as manifest_stage
from pipeline.volumes.resampling import resample_image
from pipeline.volumes.volume import Volume, read_image, read_label
from pipeline.volumes.writing import write_image, write_label

NAME = "Dataset007_Phantom"


def manifest_of(folder: Path, layout: str, *options: str, **phantoms: object) -> Path:
    """Write phantoms and their manifest; return the manifest's path."""
    source = write_phantom_dataset(folder / "data" / layout, cases=5, layout=layout, **phantoms)  # type: ignore[arg-type]
    labels = [parse_label(text) for text in options]
    manifest_stage.run(source, folder / "m.json", folds=2, test_fraction=0.2, labels=labels)
    return folder / "m.json"


def exported(path: Path, layout: str, **options: object) -> tuple[Path, dict[str, str]]:
    out = path.parent / "out" / NAME
    return out, export_dataset.run(path, out, layout=layout, **options).cases  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["nnunet", "decathlon"])
@pytest.mark.parametrize("layout", EXPORTS)
def test_what_was_written_is_read_back(tmp_path: Path, layout: str, source: str) -> None:
    path = manifest_of(tmp_path, source, "left=1", "right=2", channels=2)
    before = load_manifest(path)
    out, names = exported(path, layout)
    after = manifest_stage.run(out, tmp_path / "again.json", layout=layout, reading=Reading(root=tmp_path))
    assert after.labels == before.labels
    assert after.label_pairs == before.label_pairs == (("left", "right"),)
    assert list(after.channels.values()) == ["MR", "MR"]
    written = {case.id: case for case in after.cases}
    assert [case.id for case in before.cases] == list(names)
    assert len(written) == len(names)
    for case in before.cases:
        again = written[names[case.id]]
        assert again.fold == case.fold
        for file, other in zip(case.images.values(), again.images.values(), strict=True):
            first, second = (read_image(m.path_of(f), f.index) for m, f in ((before, file), (after, other)))
            np.testing.assert_array_equal(first.array, second.array)
            assert first.geometry.matches(second.geometry, 1e-3)
        assert case.label is not None
        assert again.label is not None
        labels = [read_label(m.path_of(c.label)).array for m, c in ((before, case), (after, again)) if c.label]
        np.testing.assert_array_equal(*labels)
    assert {case.fold for case in after.cases} == {0, 1, None}
    assert check.run(tmp_path / "again.json", workspace=tmp_path / "work").errors == ()


def test_two_visits_stay_one_patient_in_bids(tmp_path: Path) -> None:
    out, names = exported(manifest_of(tmp_path, "decathlon"), "bids")
    assert names["phantom_000_visit2"] == "sub-phantom000_ses-visit2"
    assert names["phantom_003"] == "sub-phantom003"
    with (out / "participants.tsv").open() as file:
        participants = [row["participant_id"] for row in csv.DictReader(file, delimiter="\t")]
    assert participants == ["sub-phantom000", "sub-phantom002", "sub-phantom003", "sub-phantom004"]
    assert (out / "sub-phantom003" / "anat" / "sub-phantom003_T1w.nii.gz").is_symlink()
    assert json.loads((out / "derivatives/labels/dataset_description.json").read_text())["DatasetType"] == "derivative"


def test_what_bids_does_not_know_is_ignored_and_said(tmp_path: Path) -> None:
    path = manifest_of(tmp_path, "folder", channels=2, modality="CT")
    out = tmp_path / "out"
    report = export_dataset.run(path, out, layout="bids")
    assert (out / "sub-phantom003" / "ct" / "sub-phantom003_ct.nii.gz").exists()
    assert (out / "sub-phantom003" / "pet" / "sub-phantom003_pet.nii.gz").exists()
    assert (out / ".bidsignore").read_text() == f"{RECORD}\n**/*_ct.nii.gz\n"
    assert [note.split(" ")[:2] for note in report.notes] == [["channels", "CT"], ["BIDS", "wants"]]
    found = find_cases(out, reading=Reading(root=tmp_path))
    assert found.channels == {"ct": "CT", "pet": "PET"}


def test_files_are_linked_or_copied_as_asked(tmp_path: Path) -> None:
    path = manifest_of(tmp_path, "nnunet")
    manifest = load_manifest(path)
    file = next(case for case in manifest.cases if case.fold is not None).images["T1"]
    original = manifest.path_of(file)
    for links in ("symbolic", "hard", "copy"):
        out, _ = exported(path, "nnunet", links=links, force=True)
        made = out / "imagesTr" / original.name
        assert made.is_symlink() == (links == "symbolic")
        assert made.samefile(original) == (links != "copy")
        assert made.read_bytes() == original.read_bytes()
        # Values 0, 1, 2 are nnU-Net's already, so labels are linked too.
        assert (out / "labelsTr" / original.name.replace("_0000", "")).is_symlink() == (links == "symbolic")


def test_held_out_cases_are_nnunets_test_cases_and_folds_its_splits(tmp_path: Path) -> None:
    path = manifest_of(tmp_path, "folder")
    manifest = load_manifest(path)
    out, _ = exported(path, "nnunet")
    held_out = [case.id for case in manifest.test_cases]
    assert held_out
    assert [file.name for file in sorted((out / "imagesTs").iterdir())] == [f"{name}_0000.nii.gz" for name in held_out]
    assert [file.name for file in sorted((out / "labelsTs").iterdir())] == [f"{name}.nii.gz" for name in held_out]
    splits = json.loads((out / "splits_final.json").read_text())
    assert [split["val"] for split in splits] == [[c.id for c in manifest.validation_cases(fold)] for fold in (0, 1)]
    assert [split["train"] for split in splits] == [[c.id for c in manifest.training_cases(fold)] for fold in (0, 1)]


def scattered_set(folder: Path) -> Path:
    """Write phantoms whose labels are scattered over values, and the manifest that says which stands for which."""
    source = write_phantom_dataset(folder / "data", cases=4, layout="folder")
    for path in source.glob("*/label.nii.gz"):
        label = read_label(path)
        write_label(path, Volume(scattered(label.array), label.geometry))
    manifest_stage.run(source, folder / "m.json", folds=2, labels=[parse_label(text) for text in OPTIONS])
    return folder / "m.json"


@pytest.mark.parametrize(
    ("layout", "ignored", "labels"),
    [
        ("nnunet", 3, "labelsTr/phantom_002.nii.gz"),
        ("decathlon", 99, "labelsTr/phantom_002.nii.gz"),
        ("bids", 99, "derivatives/labels/sub-phantom002/anat/sub-phantom002_dseg.nii.gz"),
    ],
)
def test_scattered_values_are_written_as_the_labels(tmp_path: Path, layout: str, ignored: int, labels: str) -> None:
    path = scattered_set(tmp_path)
    out, _ = exported(path, layout)
    stored = read_label(tmp_path / "data" / "phantom_002" / "label.nii.gz")
    written = read_label(out / labels)
    expected = np.zeros(stored.array.shape, int)
    for value, label in {500: 1, 501: 1, 3: 2, 4: 2, 99: ignored}.items():
        expected[stored.array == value] = label
    np.testing.assert_array_equal(written.array, expected)
    assert np.array_equal(written.geometry.affine, stored.geometry.affine)
    found = find_cases(out, reading=Reading(root=tmp_path))
    assert (found.labels, found.ignore_label) == ({"background": 0, "left": 1, "right": 2}, ignored)


def test_regions_are_written_as_nnunet_says_them(tmp_path: Path) -> None:
    path = manifest_of(tmp_path, "decathlon", nested=True)
    before = load_manifest(path)
    # Other values than nnU-Net's, in another order.
    moved = before.changed(
        labels={"background": 0, "organ_rest": 30, "core": 20, "midline": 10},
        file_values={"organ_rest": (1,), "core": (2,), "midline": (3,)},
        ignore_label=4,
    )
    save_manifest(moved, path)
    out, _ = exported(path, "nnunet")
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "organ": [1, 2], "core": 2, "midline": 3, "ignore": 4}
    assert content["regions_class_order"] == [1, 2, 3]
    assert content["channel_names"] == {"0": "T1"}
    found = find_cases(out, reading=Reading(root=tmp_path))
    assert found.regions == before.regions
    assert (list(found.labels or ()), found.ignore_label) == (list(before.labels), 4)
    decathlon, _ = exported(path, "decathlon", force=True)
    again = find_cases(decathlon, reading=Reading(root=tmp_path))
    assert (again.labels, again.regions, again.ignore_label) == (moved.labels, moved.regions, 4)


def test_channels_on_other_grids_are_refused_or_resampled(tmp_path: Path) -> None:
    path = manifest_of(tmp_path, "folder", channels=2)
    manifest = load_manifest(path)
    for layout in ("nnunet", "decathlon"):
        with pytest.raises(ManifestError) as error:
            exported(path, layout)
        lines = str(error.value).splitlines()
        assert [line.split(":")[0] for line in lines[:-1]] == [f"case {case.id!r}" for case in manifest.cases]
        assert "channel 'T2' lies on another grid" in lines[0]
        assert "5 cases cannot be written; --skip leaves them out" in lines[-1]
    assert not (tmp_path / "out").exists()
    out, _ = exported(path, "nnunet", resample=True)
    case = manifest.development_cases[0]
    assert case.label is not None
    grid = read_label(manifest.path_of(case.label)).geometry
    written = read_image(out / "imagesTr" / f"{case.id}_0001.nii.gz")
    assert written.geometry.matches(grid, 1e-3)
    expected = resample_image(read_image(manifest.path_of(case.images["T2"])), grid, order=1)
    np.testing.assert_array_equal(written.array, expected.array)
    # BIDS lets each channel have its own grid.
    _, names = exported(path, "bids", force=True)
    assert len(names) == 5


def test_cases_that_a_layout_cannot_say_are_left_out_if_asked(tmp_path: Path) -> None:
    path = manifest_of(tmp_path, "nnunet", channels=2)
    manifest = load_manifest(path)
    first, second, *others = manifest.cases
    lacking = first.changed(images={"T1": first.images["T1"]})
    partly = second.changed(annotated_classes=("right",))
    fully = others[0].changed(annotated_classes=("left", "right"))
    cases = [lacking, partly, fully, *others[1:]]
    save_manifest(manifest.changed(cases=cases, label_pairs=()), path)
    with pytest.raises(ManifestError, match=r"case 'phantom_000_visit1': has no T2, and every case needs all channels"):
        exported(path, "nnunet")
    out, names = exported(path, "nnunet", skip=True)
    assert list(names) == [case.id for case in others]
    listed = {name for split in json.loads((out / "splits_final.json").read_text()) for name in split["train"]}
    assert listed.isdisjoint({first.id, second.id})
    _, names = exported(path, "bids", skip=True, force=True)
    assert second.id not in names  # BIDS may lack a channel, but not an annotation
    assert first.id in names
    _, names = exported(path, "decathlon", skip=True, force=True)
    assert list(names) == [second.id, *(case.id for case in others)]
    found = find_cases(out, reading=Reading(root=tmp_path))
    assert {case.id: case.annotated_classes for case in found.cases}[second.id] == ("right",)


def test_other_formats_are_converted(tmp_path: Path) -> None:
    source = write_phantom_dataset(tmp_path / "data", cases=4, layout="folder")
    for path in sorted(source.glob("*/*.nii.gz")):
        target = path.with_name(path.name.replace(".nii.gz", ".nrrd"))
        if path.name.startswith("label"):
            write_label(target, read_label(path))
        else:
            write_image(target, read_image(path))
        path.unlink()
    manifest_stage.run(source, tmp_path / "m.json", folds=2)
    out, _ = exported(tmp_path / "m.json", "nnunet")
    for kind, name in (("imagesTr", "phantom_002_0000"), ("labelsTr", "phantom_002")):
        made = out / kind / f"{name}.nii.gz"
        assert not made.is_symlink()
        original = source / "phantom_002" / ("T1.nrrd" if kind == "imagesTr" else "label.nrrd")
        assert np.array_equal(read_image(made).array, read_image(original).array)


def test_a_folder_is_replaced_only_where_this_command_wrote_it(tmp_path: Path) -> None:
    path = manifest_of(tmp_path, "nnunet")
    data = load_manifest(path).root
    for place in (data, data / NAME, tmp_path):
        with pytest.raises(PipelineError, match="holds the data set or lies in it"):
            export_dataset.run(path, place, layout="decathlon")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(PipelineError, match="was not written by this command"):
            export_dataset.run(path, foreign, layout="decathlon", force=force)
    out, _ = exported(path, "nnunet")
    with pytest.raises(PipelineError, match="is there already; --force replaces it"):
        exported(path, "decathlon")
    assert (out / "splits_final.json").exists()
    exported(path, "decathlon", force=True)
    assert not (out / "splits_final.json").exists()
    assert json.loads((out / RECORD).read_text())["format"] == "decathlon"
    # Links were replaced, not what they lead to.
    assert len(list(data.glob("*/*.nii.gz"))) == 10


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    path = scattered_set(tmp_path)
    manifest = load_manifest(path)
    save_manifest(manifest.changed(file_values={**manifest.file_values, "left": (500,)}), path)
    with pytest.raises(PipelineError, match=r"case 'phantom_002': the label holds the value 501, which is not one of"):
        exported(path, "nnunet")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("layout", "changes", "reason"),
    [
        ("nnunet", {"labels": {"background": 0, "ignore": 1, "right": 2}}, "ignore means something else to nnU-Net"),
        ("zarr", {}, "format 'zarr': cannot be written; one of nnunet, decathlon, bids"),
        ("bids", {"channels": {"T1": "MR", "T.1w": "MR"}}, r"channel 'T\.1w': would be T1w, as 'T1' is"),
    ],
)
def test_what_a_layout_cannot_say_is_refused(
    tmp_path: Path, layout: str, changes: dict[str, object], reason: str
) -> None:
    path = manifest_of(tmp_path, "nnunet", "left=1", "right=2")
    manifest = load_manifest(path)
    save_manifest(manifest.changed(label_pairs=(), **changes), path)
    with pytest.raises(ManifestError, match=reason):
        exported(path, layout)


def test_nnunet_wants_its_own_name_for_a_folder(tmp_path: Path) -> None:
    path = manifest_of(tmp_path, "nnunet")
    with pytest.raises(ManifestError, match=r"folders called DatasetNNN_NAME; name it so, such as Dataset101_m"):
        export_dataset.run(path, tmp_path / "out" / "phantoms", layout="nnunet")


def test_the_command_says_what_it_left_out(tmp_path: Path) -> None:
    path = manifest_of(tmp_path, "nnunet", channels=2)
    manifest = load_manifest(path)
    first, *others = manifest.cases
    save_manifest(manifest.changed(cases=[first.changed(images={"T1": first.images["T1"]}), *others]), path)
    command = ["export-dataset", str(path), "--format", "nnunet", "--out", str(tmp_path / "out" / NAME)]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, ManifestError)
    with pytest.raises(PipelineError, match="name one of them"):
        CliRunner().invoke(app, [*command, "--copy", "--hard-links"], catch_exceptions=False)
    done = CliRunner().invoke(app, [*command, "--skip", "--copy"])
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "left out: case 'phantom_000_visit1': has no T2, and every case needs all channels"
    assert "copy it there before training" in lines[1]
    assert lines[2].endswith(f"{NAME}: 4 cases")


# nnU-Net imports torchvision, whose operators a CPU build of torch lacks: they are declared before.
VERIFY = """
import sys, torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
if __name__ == "__main__":
    verify_dataset_integrity(sys.argv[1], 1)
"""


def verified(python: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run nnU-Net's own check of a raw data set, in nnU-Net's own environment."""
    script = folder.parent / "verify.py"
    script.write_text(VERIFY)
    places = {name: str(folder.parent) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    environment = {**os.environ, **places, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(python), str(script), str(folder)]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_nnunets_own_check_passes_and_finds_a_planted_fault(tmp_path: Path, peer_python: Callable[[str], Path]) -> None:
    path = manifest_of(tmp_path, "decathlon", channels=2, nested=True, sparse=True)
    out, names = exported(path, "nnunet", skip=True)
    assert len(names) == 3  # of the two others only some labels are annotated
    done = verified(peer_python("nnunet"), out)
    assert "verify_dataset_integrity Done" in done.stdout, done.stdout + done.stderr
    label_path = next((out / "labelsTr").iterdir())
    label = read_label(label_path)
    wrong = label.array.copy()
    wrong[0, 0, 0] = 5
    label_path.unlink()
    write_label(label_path, Volume(wrong, label.geometry))
    done = verified(peer_python("nnunet"), out)
    assert done.returncode != 0
    assert "Unexpected labels found" in done.stdout


@pytest.mark.slow
def test_the_hippocampus_passes_nnunets_own_check(
    tmp_path: Path, shared_data: Path, peer_python: Callable[[str], Path]
) -> None:
    whole = load_manifest(
        Path(__file__).parents[1] / "data_manifests" / "hippocampus.json", shared_data / "Task04_Hippocampus"
    )
    some = whole.changed(cases=[case for fold in whole.folds for case in whole.validation_cases(fold)[:2]])
    save_manifest(some, tmp_path / "m.json")
    out, _ = exported(tmp_path / "m.json", "nnunet")
    done = verified(peer_python("nnunet"), out)
    assert "verify_dataset_integrity Done" in done.stdout, done.stdout + done.stderr
    splits = json.loads((out / "splits_final.json").read_text())
    assert [split["val"] for split in splits] == [[case.id for case in some.validation_cases(f)] for f in some.folds]
    # Read back, the folds are ours again.
    again = manifest_stage.run(out, tmp_path / "again.json", reading=Reading(root=Path("/")))
    assert {case.id: case.fold for case in again.cases} == {case.id: case.fold for case in some.cases}
