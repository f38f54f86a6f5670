"""`medseg segment`: a batch of files, whatever happens to some of them."""

import csv
import gzip
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from tiny_models import NEAREST_MEAN, NearestMean, make_model, make_plan, nearest_mean
from torch import Tensor
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.data.manifest import Case, ImageFile, Manifest, save_manifest
from pipeline.errors import ModelError, PipelineError
from pipeline.geometry import Geometry
from pipeline.model import save_model
from pipeline.networks import NETWORKS
from pipeline.stages import segment
from pipeline.stages.models import resolve_model
from pipeline.stages.segmenting.inputs import find_inputs
from pipeline.volumes.volume import Volume, read_label
from pipeline.volumes.writing import write_image

SHAPE = (24, 26, 30)


@pytest.fixture(autouse=True)
def _hand_made_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "nearest_mean", nearest_mean)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", make_model(network=NEAREST_MEAN))
    return tmp_path / "model"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Three volumes in three formats."""
    folder = tmp_path / "scans"
    for seed, name in enumerate(["a.nii.gz", "b.nrrd", "c.mha"]):
        write_scan(folder / name, seed)
    return folder


def classes_of(seed: int = 0) -> np.ndarray:
    """Blocks of the classes 0, 1 and 2."""
    blocks = np.random.default_rng(seed).integers(0, 3, [-(-n // 4) for n in SHAPE])
    return np.kron(blocks, np.ones((4, 4, 4), dtype=int))[: SHAPE[0], : SHAPE[1], : SHAPE[2]]


def write_scan(path: Path, seed: int = 0, spacing: float = 1.0, scale: float = 100.0) -> None:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [-10, 20, 5]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Volume((scale * classes_of(seed)[None]).astype(np.float32), Geometry(SHAPE, affine)))


def run(model: Path, *inputs: Path, out: Path, overwrite: bool = False) -> segment.SegmentReport:
    return segment.run(str(model), list(inputs), out, overwrite=overwrite, device="cpu", precision="fp32")


def statuses(report: segment.SegmentReport) -> dict[str, str]:
    return {result.name: result.status for result in report.results}


def test_formats_in_label_maps_out(model: Path, scans: Path, tmp_path: Path) -> None:
    report = run(model, scans, out=tmp_path / "out")
    assert statuses(report) == {"a": "done", "b": "done", "c": "done"}
    for seed, name in enumerate("abc"):
        label = read_label(tmp_path / "out" / f"{name}.nii.gz")
        assert np.array_equal(label.array, np.array([0, 1, 7])[classes_of(seed)])
        assert np.allclose(label.geometry.affine[:3, 3], [-10, 20, 5])
    first = report.results[0]
    assert first.volumes_ml == {
        "left": pytest.approx((classes_of(0) == 1).sum() / 1000),
        "right": pytest.approx((classes_of(0) == 2).sum() / 1000),
    }
    assert set(first.seconds) == {"read", "prepare", "predict", "write"}
    assert first.warnings == ()


def test_broken_files_are_listed_and_the_rest_go_on(model: Path, scans: Path, tmp_path: Path) -> None:
    whole = (scans / "a.nii.gz").read_bytes()
    (scans / "aa_truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (scans / "bb_text.nii").write_text("not a volume")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)), scans / "cc_four.nii.gz")
    nib.save(nib.Nifti1Pair(np.zeros((4, 4, 4), np.int16), np.eye(4)), scans / "dd_pair.hdr")
    (scans / "dd_pair.img").unlink()
    out = tmp_path / "out"
    report = run(model, scans, scans / "missing.nii.gz", out=out)
    failed = {result.name: result.reason or "" for result in report.failures}
    assert set(failed) == {"aa_truncated", "bb_text", "cc_four", "dd_pair", "missing"}
    assert not any("Error" in reason for reason in failed.values())
    assert all(name in reason for name, reason in failed.items())
    assert statuses(report)["c"] == "done"
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    written = json.loads((out / "report.json").read_text())
    assert [case["name"] for case in written["cases"]] == [r.name for r in report.results]
    with (out / "report.csv").open() as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert rows["missing"]["status"] == "failed"
    assert "No such file" in rows["missing"]["reason"]
    assert float(rows["a"]["left_ml"]) == pytest.approx(report.results[0].volumes_ml["left"], abs=1e-4)
    assert "5 failed" in report.as_text()


def test_command_line_exits_with_1_when_a_case_failed(model: Path, scans: Path, tmp_path: Path) -> None:
    (scans / "broken.nii.gz").write_bytes(b"")
    arguments = ["segment", str(scans), "--model", str(model), "--out", str(tmp_path / "out"), "--device", "cpu"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 1, answer.output
    assert "3 done, 1 failed" in answer.output
    (scans / "broken.nii.gz").unlink()
    assert CliRunner().invoke(app, arguments).exit_code == 0


@pytest.fixture
def _nothing_logged() -> Iterator[None]:
    """Keep names that are no UTF-8 out of the captured log, which pytest-xdist could not carry."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("_nothing_logged")
def test_names_that_are_no_utf8_are_names_like_others(model: Path, scans: Path, tmp_path: Path) -> None:
    strange = os.fsdecode(b"M\xfcller")
    shutil.copy(scans / "a.nii.gz", scans / f"{strange}.nii.gz")
    (scans / os.fsdecode(b"\xff.nii.gz")).write_bytes(b"")
    arguments = ["segment", str(scans), "--model", str(model), "--out", str(tmp_path / "out"), "--device", "cpu"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 1, answer.output
    assert r"failed   \udcff: " in answer.stdout
    label = tmp_path / "out" / f"{strange}.nii.gz"
    assert gzip.decompress(label.read_bytes()) == gzip.decompress((tmp_path / "out" / "a.nii.gz").read_bytes())
    cases = json.loads((tmp_path / "out" / "report.json").read_text())["cases"]
    assert strange in {case["name"] for case in cases}
    assert statuses(run(model, scans / f"{strange}.nii.gz", out=tmp_path / "out")) == {strange: "done"}
    assert statuses(run(model, scans / f"{strange}.nii.gz", out=tmp_path / "out")) == {strange: "skipped"}


def test_done_and_unchanged_is_skipped(model: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(model, scans, out=out)
    again = run(model, scans, out=out)
    assert set(statuses(again).values()) == {"skipped"}
    assert [r.volumes_ml for r in again.results] == [r.volumes_ml for r in first.results]
    write_scan(scans / "b.nrrd", seed=7)
    (out / "c.nii.gz").unlink()
    assert statuses(run(model, scans, out=out)) == {"a": "skipped", "b": "done", "c": "done"}
    assert np.array_equal(read_label(out / "b.nii.gz").array, np.array([0, 1, 7])[classes_of(7)])
    assert set(statuses(run(model, scans, out=out, overwrite=True)).values()) == {"done"}
    save_model(model, make_model(plan=make_plan(labels={"background": 0, "left": 3, "right": 4}), network=NEAREST_MEAN))
    assert set(statuses(run(model, scans, out=out)).values()) == {"done"}
    assert set(np.unique(read_label(out / "a.nii.gz").array)) == {0, 3, 4}


def test_journal_of_a_killed_run_is_gone_on_from(model: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, scans / "a.nii.gz", out=out)
    journal = out / ".medseg" / "journal.jsonl"
    journal.write_text(journal.read_text() + '\n{"name": "b", "status": "do')
    assert statuses(run(model, scans, out=out)) == {"a": "skipped", "b": "done", "c": "done"}
    assert set(statuses(run(model, scans, out=out)).values()) == {"skipped"}


class Faulty(NearestMean):
    """Raises an error of its own at an intensity that only one case has."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__(0.0, 100.0, 200.0)
        self.error = error

    def forward(self, image: Tensor) -> Tensor:
        if image.device.type != "meta" and (image == 999).any():
            raise self.error("at 999")
        return super().forward(image)


def write_bad_scan(path: Path) -> None:
    write_image(path, Volume(np.full((1, *SHAPE), 999, np.float32), Geometry(SHAPE, np.eye(4))))


def test_interrupt_leaves_all_valid_and_is_gone_on_from(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bad_scan(scans / "b.nrrd")
    monkeypatch.setitem(NETWORKS, "nearest_mean", lambda task: Faulty(KeyboardInterrupt))
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(model, scans, out=out)
    assert [case["name"] for case in json.loads((out / "report.json").read_text())["cases"]] == ["a"]
    assert [path.name for path in out.glob("*.nii*")] == ["a.nii.gz"]
    assert not list(out.rglob(".tmp-*"))
    assert np.array_equal(read_label(out / "a.nii.gz").array, np.array([0, 1, 7])[classes_of(0)])
    monkeypatch.setitem(NETWORKS, "nearest_mean", nearest_mean)
    assert statuses(run(model, scans, out=out)) == {"a": "skipped", "b": "done", "c": "done"}


def test_a_bug_in_one_case_is_listed_with_its_traceback_logged(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_bad_scan(scans / "b.nrrd")
    monkeypatch.setitem(NETWORKS, "nearest_mean", lambda task: Faulty(RuntimeError))
    report = run(model, scans, out=tmp_path / "out")
    assert statuses(report) == {"a": "done", "b": "failed", "c": "done"}
    assert report.failures[0].reason == "RuntimeError: at 999"
    assert "Traceback" in caplog.text


def test_changed_voxels_behind_a_detached_header_are_seen(model: Path, tmp_path: Path) -> None:
    for seed, folder in enumerate(["scans", "other"]):
        (tmp_path / folder).mkdir()
        image = sitk.GetImageFromArray((100 * classes_of(seed)).astype(np.int16))
        sitk.WriteImage(image, str(tmp_path / folder / "a.mhd"))
    assert statuses(run(model, tmp_path / "scans", out=tmp_path / "out")) == {"a": "done"}
    assert statuses(run(model, tmp_path / "scans", out=tmp_path / "out")) == {"a": "skipped"}
    shutil.copy(tmp_path / "other" / "a.raw", tmp_path / "scans")
    assert statuses(run(model, tmp_path / "scans", out=tmp_path / "out")) == {"a": "done"}


@pytest.mark.parametrize(("qform_code", "sform_code"), [(1, 0), (0, 2), (1, 4), (0, 0)])
def test_header_codes_and_affines_are_the_inputs(model: Path, tmp_path: Path, qform_code: int, sform_code: int) -> None:
    affine = np.array([[-0.9, 0.1, 0, 30], [0.1, 0.9, 0, -20], [0, 0, 1.1, 7], [0, 0, 0, 1]])
    image = nib.Nifti1Image((100 * classes_of()).astype(np.int16), affine)
    image.set_qform(affine, qform_code)
    image.set_sform(affine, sform_code)
    path = tmp_path / "scans" / "scan.nii"
    path.parent.mkdir()
    nib.save(image, path)
    report = run(model, path, out=tmp_path / "out")
    assert not report.failures, report.as_text()
    scan, label = nib.load(path), nib.load(tmp_path / "out" / "scan.nii.gz")
    assert label.shape == scan.shape
    assert np.array_equal(label.affine, scan.affine)
    assert (int(label.header["qform_code"]), int(label.header["sform_code"])) == (qform_code, sform_code)
    if qform_code:
        assert np.allclose(label.get_qform(), scan.get_qform(), atol=1e-6)
    assert np.array_equal(label.header["pixdim"], scan.header["pixdim"])


def test_unlike_the_training_cases(model: Path, tmp_path: Path) -> None:
    write_scan(tmp_path / "scans" / "coarse.nii.gz", spacing=5.0)
    write_scan(tmp_path / "scans" / "bright.nii.gz", scale=1000.0)
    write_scan(tmp_path / "scans" / "usual.nii.gz")
    report = run(model, tmp_path / "scans", out=tmp_path / "out")
    warnings = {result.name: " | ".join(result.warnings) for result in report.results}
    assert "voxels of 5.00x5.00x5.00 mm; in training 0.90x0.90x0.90 to 1.20x1.20x1.20 mm" in warnings["coarse"]
    assert "an extent of 120x130x150 mm; in training 20x20x20 to 60x60x60 mm" in warnings["coarse"]
    assert "channel T1 has a median of" in warnings["bright"]
    assert warnings["usual"] == ""


def test_several_channels_by_name_or_number_or_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    for name in ["p1_T1.nii.gz", "p1_POST_T1.nrrd", "p2_0000.mha", "p2_0001.nii.gz"]:
        write_scan(folder / name)
    channels = ("T1", "POST_T1")
    found = find_inputs([folder], channels, tmp_path / "out")
    assert {case.name: {c: f.path.name for c, f in case.files.items()} for case in found} == {
        "p1": {"T1": "p1_T1.nii.gz", "POST_T1": "p1_POST_T1.nrrd"},
        "p2": {"T1": "p2_0000.mha", "POST_T1": "p2_0001.nii.gz"},
    }
    assert [list(case.files) for case in found] == [list(channels)] * 2
    images = {"T1": ImageFile(path="p1_T1.nii.gz"), "POST_T1": ImageFile(path="p1_POST_T1.nrrd")}
    cases = (Case(id="p1", patient="p1", images=images),)
    manifest = Manifest(
        name="new", root=folder, channels={"T1": "MR", "POST_T1": "MR"}, labels={"b": 0, "x": 1}, cases=cases
    )
    save_manifest(manifest, tmp_path / "new.json")
    assert find_inputs([tmp_path / "new.json"], channels, tmp_path / "out") == [found[0]]
    with pytest.raises(PipelineError, match="lacks the model's channels FLAIR"):
        find_inputs([tmp_path / "new.json"], ("T1", "FLAIR"), tmp_path / "out")


def test_missing_channel_is_said(tmp_path: Path) -> None:
    plan = make_plan(
        channels={"T1": "MR", "T2": "MR"},
        normalisation={name: {"scheme": "zscore"} for name in ("T1", "T2")},
    )
    save_model(tmp_path / "model", make_model(plan=plan))
    write_scan(tmp_path / "scans" / "p1_T2.nii.gz")
    report = run(tmp_path / "model", tmp_path / "scans", out=tmp_path / "out")
    assert statuses(report) == {"p1": "done"}
    assert "channel T1 is missing: zeros stand in for it" in report.results[0].warnings


@pytest.mark.parametrize(
    ("names", "out", "channels", "expected"),
    [
        (["a.nii.gz", "a.mha"], "out", ("T1",), "would both write a.nii.gz"),
        (["a.nii.gz"], "scans", ("T1",), "holds the input"),
        (["a.nii.gz"], "out", ("T1", "T2"), "the name says none; expected CASE_T1 or CASE_0000"),
        (["a_T1.nii.gz", "a_0000.nii.gz"], "out", ("T1", "T2"), "both are channel 'T1' of case 'a'"),
        ([], "out", ("T1",), "holds no volume"),
    ],
)
def test_inputs_that_cannot_be_are_refused_by_name(
    names: list[str], out: str, channels: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "scans").mkdir()
    for name in names:
        write_scan(tmp_path / "scans" / name)
    with pytest.raises(PipelineError, match=expected):
        find_inputs([tmp_path / "scans"], channels, tmp_path / out)


def test_pair_hidden_files_and_repeats_are_one_case(tmp_path: Path) -> None:
    for name in ["a.hdr", "a.img", ".b.nii.gz", "notes.txt"]:
        (tmp_path / name).write_bytes(b"")
    found = find_inputs([tmp_path, tmp_path / "a.hdr"], ("T1",), tmp_path / "out")
    assert [next(iter(case.files.values())).path.name for case in found] == ["a.hdr"]


def test_model_is_found_by_folder_or_run(model: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "work"
    best = workspace / "runs" / "demo" / "fold_0" / "models" / "best"
    shutil.copytree(model, best)
    assert resolve_model(str(model), workspace) == model
    assert resolve_model(str(best.parents[1]), workspace) == best
    with pytest.raises(ModelError, match=r"holds no model.*runs with a model: .*fold_0"):
        resolve_model(str(tmp_path), workspace)
    with pytest.raises(ModelError, match="medseg train"):
        resolve_model(str(tmp_path), tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no MLflow database.*mlflow\.db"):
        resolve_model("runs:/0123", tmp_path / "nowhere", "sqlite:///" + str(tmp_path / "mlflow.db"))
