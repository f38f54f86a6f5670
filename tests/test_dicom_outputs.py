"""`medseg segment --dicom`, `medseg dicom labels`: objects beside label maps, gone on with; nobody named elsewhere."""

import json
import logging
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import MR, grid, write_series
from tiny_models import NEAREST_MEAN, make_model, nearest_mean
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config_loading import load_config, packaged
from pipeline.errors import PipelineError
from pipeline.model import save_model
from pipeline.networks import NETWORKS
from pipeline.stages import dicom_series, evaluate, manifest, preprocess, segment, train
from pipeline.stages.dicom_labels import import_labels
from pipeline.stages.segmenting.dicom_inputs import DicomOptions
from pipeline.stages.segmenting.dicom_objects import DicomOutput, dicom_output
from pipeline.stages.segmenting.report import SegmentReport
from pipeline.volumes.dicom.annotations.reading import read_annotations
from pipeline.volumes.dicom.annotations.rtstruct.writing import write_rtstruct
from pipeline.volumes.dicom.annotations.structures import Author, structures_of
from pipeline.volumes.dicom.choosing import SeriesChoice
from pipeline.volumes.dicom.series import Series, find_series
from pipeline.volumes.volume import Volume, read_label
from pipeline.volumes.writing import write_image

SHAPE = (24, 26, 12)
SECRETS = ("Zyxwvut", "Q7R8S9", "19330405", "20171118", "Hospital of Nowhere", "Xanadu")
BOTH = dicom_output(["seg", "rtstruct"])


@pytest.fixture(autouse=True)
def _hand_made_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "nearest_mean", nearest_mean)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", make_model(network=NEAREST_MEAN))
    return tmp_path / "model"


def blocks() -> np.ndarray:
    array = np.zeros(SHAPE, np.int16)
    array[3:9, 4:11, 2:5], array[12:20, 5:20, 4:10] = 1, 2
    return array


def write_scan(folder: Path, seed: int = 0, **attributes: object) -> Series:
    """Write an MR series that the model gets right, of a patient who is easy to find."""
    who = {"PatientName": "Zyxwvut^Xanadu", "PatientID": "Q7R8S9", "PatientBirthDate": "19330405"}
    study = {"StudyDate": "20171118", "InstitutionName": "Hospital of Nowhere", "SOPClassUID": MR, "Modality": "MR"}
    voxels = 100 * blocks() + seed  # No two patients are alike.
    write_series(folder, voxels, grid(SHAPE, (1, 1, 1)).affine, seed=seed, **who | study | attributes)
    (series,) = find_series(folder)
    return series


def run(model: Path, folder: Path, out: Path, objects: DicomOutput = BOTH, **options: object) -> SegmentReport:
    return segment.run(str(model), [folder], out, device="cpu", precision="fp32", objects=objects, **options)  # type: ignore[arg-type]


def test_objects_say_what_the_label_map_says(model: Path, tmp_path: Path) -> None:
    series = write_scan(tmp_path / "scan")
    report = run(model, tmp_path / "scan", tmp_path / "out")
    (result,) = report.results
    assert (result.status, result.objects) == ("done", "seg, rtstruct")
    label = read_label(tmp_path / "out" / f"{series.name}.nii.gz")
    for kind in ("seg", "rtstruct"):
        read = read_annotations(tmp_path / "out" / f"{series.name}.{kind}.dcm", series)
        assert read.labels == {"background": 0, "left": 1, "right": 2}
        np.testing.assert_array_equal(np.array([0, 1, 7])[read.label.array], label.array)
    seg = highdicom.seg.segread(tmp_path / "out" / f"{series.name}.seg.dcm")
    algorithm = seg.get_segment_description(1).SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == make_model(network=NEAREST_MEAN).description.name
    assert len(algorithm.AlgorithmVersion) == 12


def test_a_batch_goes_on_and_writes_what_it_lacks(model: Path, tmp_path: Path) -> None:
    """Objects that are missing, or wanted in another way, are made of the label map that is there."""
    series = write_scan(tmp_path / "scan")
    out, scan = tmp_path / "out", tmp_path / "scan"
    seg, rtstruct, label = (out / f"{series.name}.{kind}" for kind in ("seg.dcm", "rtstruct.dcm", "nii.gz"))
    run(model, scan, out, DicomOutput())
    assert not seg.exists() and not rtstruct.exists()
    written = label.stat().st_mtime_ns
    assert run(model, scan, out).results[0].status == "done"
    assert seg.exists() and rtstruct.exists() and label.stat().st_mtime_ns == written
    kept = seg.stat().st_mtime_ns
    assert run(model, scan, out).results[0].status == "skipped"
    assert run(model, scan, out, DicomOutput()).results[0].status == "skipped"
    assert seg.stat().st_mtime_ns == kept
    rtstruct.unlink()
    assert run(model, scan, out).results[0].status == "done" and rtstruct.exists()
    assert run(model, scan, out, dicom_output(["seg"], deidentify=True)).results[0].objects == "seg under a pseudonym"
    assert pydicom.dcmread(seg).PatientID == series.name and not rtstruct.exists()
    assert label.stat().st_mtime_ns == written


def test_objects_of_an_earlier_label_map_do_not_stay(model: Path, tmp_path: Path) -> None:
    series = write_scan(tmp_path / "scan")
    run(model, tmp_path / "scan", tmp_path / "out")
    (result,) = run(model, tmp_path / "scan", tmp_path / "out", DicomOutput(), overwrite=True).results
    assert result.objects == "" and not list((tmp_path / "out").glob("*.dcm"))
    assert (tmp_path / "out" / f"{series.name}.nii.gz").exists()


def test_cases_of_which_no_object_can_be_written_are_refused_before_the_batch(model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "volumes" / "case.nii.gz", Volume(np.zeros((1, *SHAPE), np.float32), grid(SHAPE)))
    write_scan(tmp_path / "nowhere", 1, FrameOfReferenceUID="")
    for folder, reason in (("volumes", "comes from no DICOM series"), ("nowhere", "no frame of reference")):
        with pytest.raises(PipelineError, match=reason):
            run(model, tmp_path / folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.nii.gz"))


def test_a_resampled_series_is_refused_before_the_batch(model: Path, tmp_path: Path) -> None:
    tilted = grid(SHAPE, (1, 1, 1)).affine.copy()
    tilted[1, 2] = 0.2
    write_series(tmp_path / "scan", 100 * blocks(), tilted, SOPClassUID=MR, Modality="MR")
    with pytest.raises(PipelineError, match="--untilt"):
        run(model, tmp_path / "scan", tmp_path / "out", dicom=DicomOptions(untilt=True))


def test_a_pseudonym_is_nowhere_betrayed(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file that a batch writes, and all that it says, is searched: the objects alone say whose they are."""
    caplog.set_level(logging.DEBUG)
    for seed in (0, 1):
        # A name without ^ is one that libraries complain of, naming it.
        write_scan(tmp_path / "scans" / str(seed), seed, PatientComments="Xanadu", PatientName="Zyxwvut Xanadu")
    bad = write_scan(tmp_path / "scans" / "2", 2)
    bad.slices[3].path.write_bytes(bad.slices[3].path.read_bytes()[:-200])
    report = run(model, tmp_path / "scans", tmp_path / "out")
    assert sorted(result.status for result in report.results) == ["done", "done", "failed"]
    hidden = run(model, tmp_path / "scans", tmp_path / "hidden", dicom_output(["seg", "rtstruct"], deidentify=True))
    assert len(hidden.failures) == 1
    said = caplog.text + report.as_text() + "".join(capsys.readouterr())
    assert [word for word in SECRETS if word in said] == []
    files = [file for folder in ("out", "hidden") for file in (tmp_path / folder).rglob("*") if file.is_file()]
    telling = {file for file in files if any(holds(file, word) for word in SECRETS)}
    assert {file.suffix for file in files} >= {".json", ".csv", ".html", ".jsonl", ".gz", ".dcm", ".jpg"}
    assert telling == {file for file in files if file.suffix == ".dcm" and file.parent.name == "out"}
    assert all(not holds(file, word) for file in telling for word in ("Nowhere", "Comments"))


def holds(file: Path, word: str) -> bool:
    """Whether a file, unpacked where it is packed, holds a word in its name or content."""
    content = file.read_bytes()
    if file.suffix == ".gz":
        content += b"".join(extension.get_content() for extension in nib.load(file).header.extensions)
    return word in file.name or word.encode() in content or word.encode("utf-16-le") in content


def test_from_the_command_line_and_back(model: Path, tmp_path: Path) -> None:
    series = write_scan(tmp_path / "scan")
    codes = tmp_path / "codes.csv"
    codes.write_text("label,scheme,value,meaning,side\nleft,SCT,5366008,Hippocampus,left\n")
    line = ["segment", str(tmp_path / "scan"), "--model", str(model), "--out", str(tmp_path / "out"), "--device", "cpu"]
    wrong = CliRunner().invoke(app, [*line, "--dicom", "sag"])
    assert isinstance(wrong.exception, PipelineError) and "seg, rtstruct" in str(wrong.exception)
    done = CliRunner().invoke(app, [*line, "--precision", "fp32", "--dicom", "seg", "--codes", str(codes)])
    assert done.exit_code == 0, done.output
    path = tmp_path / "out" / f"{series.name}.seg.dcm"
    assert highdicom.seg.segread(path).get_segment_description(1).segmented_property_type.value == "5366008"
    out = tmp_path / "labels" / "case.nii.gz"
    back = ["dicom", "labels", str(path), "--series", str(tmp_path / "scan"), "--out", str(out)]
    imported = CliRunner().invoke(app, back)
    assert imported.exit_code == 0 and "    2  right: 720 voxels" in imported.output
    assert (tmp_path / "labels" / "case.csv").read_text() == (
        "label,value,voxels,volume_ml\nleft,1,126,0.1260\nright,2,720,0.7200\n"
    )
    np.testing.assert_array_equal(read_label(out).array, blocks())
    again = CliRunner().invoke(app, [*back, "--label", "right"])
    assert isinstance(again.exception, PipelineError) and "--force" in str(again.exception)
    assert CliRunner().invoke(app, [*back, "--label", "right", "--force"]).exit_code == 0
    np.testing.assert_array_equal(read_label(out).array, blocks() == 2)
    names = json.loads(nib.load(out).header.extensions[0].get_content())["labels"]
    assert names == {"background": 0, "right": 1}


def test_of_several_series_the_one_that_is_referred_to(model: Path, tmp_path: Path) -> None:
    first, second = (write_scan(tmp_path / "scans" / str(seed), seed) for seed in (0, 1))
    run(model, tmp_path / "scans", tmp_path / "out", dicom_output(["rtstruct"]))
    path = tmp_path / "out" / f"{second.name}.rtstruct.dcm"
    assert import_labels(path, str(tmp_path / "scans"), tmp_path / "labels" / "a.nii.gz").series == second
    named = import_labels(path, f"{tmp_path / 'scans'}#{first.key}", tmp_path / "labels" / "b.nii.gz")
    assert named.series == first and "another series" in named.remarks[0]


def test_a_label_map_among_dicom_files_is_refused(model: Path, tmp_path: Path) -> None:
    series = write_scan(tmp_path / "scan")
    run(model, tmp_path / "scan", tmp_path / "out", dicom_output(["rtstruct"]))
    path = tmp_path / "out" / f"{series.name}.rtstruct.dcm"
    with pytest.raises(PipelineError, match="among the DICOM files"):
        import_labels(path, str(tmp_path / "scan"), tmp_path / "scan" / "a.nii.gz")
    with pytest.raises(PipelineError, match=r"\.nii\.gz"):
        import_labels(path, str(tmp_path / "scan"), tmp_path / "a.mha")


def test_codes_without_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="--dicom seg,rtstruct"):
        dicom_output([], deidentify=True)


@pytest.mark.slow
def test_from_contours_to_a_model_nobody_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """DICOM and RTSTRUCT to volumes and labels, a model trained, tracked, evaluated, used: all files are searched."""
    caplog.set_level(logging.DEBUG)
    rows = ["case,patient,T1,label"]
    for seed in range(6):
        series = write_scan(tmp_path / "scans" / str(seed), seed)
        drawn = tmp_path / "scans" / f"{seed}.dcm"
        label = Volume(blocks().astype(np.uint8), series.geometry)
        write_rtstruct(drawn, label, series, structures_of({"background": 0, "a": 1, "b": 2}), Author(kind="MANUAL"))
        import_labels(drawn, str(tmp_path / "scans" / str(seed)), tmp_path / "out" / "labels" / f"{series.name}.nii.gz")
        rows.append(f"{series.name},{series.name},volumes/{series.name}.nii.gz,labels/{series.name}.nii.gz")
    dicom_series.convert(tmp_path / "scans", tmp_path / "out" / "volumes", choice=SeriesChoice(), every=True)
    (tmp_path / "out" / "cases.csv").write_text("\n".join(rows))
    manifest.run(tmp_path / "out" / "cases.csv", tmp_path / "out" / "mine.json", folds=3)
    settings = ["preprocessing.patch_size=[16, 16, 8]", "training.steps_per_epoch=2", "training.budget.epochs=1"]
    config = load_config(packaged("demo.yaml"), [f"data.manifest={tmp_path / 'out' / 'mine.json'}", *settings])
    config = config.changed(workspace=tmp_path / "out" / "work")
    preprocess.run(config)
    train.run(config, fold="0", device="cpu")
    evaluate.run(config, device="cpu")
    model = next((tmp_path / "out").rglob("weights.safetensors")).parent
    run(model, tmp_path / "scans", tmp_path / "out" / "used", dicom_output(["seg"], deidentify=True))
    said = caplog.text + "".join(capsys.readouterr())
    assert [word for word in SECRETS if word in said] == []
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert any(file.name == "mlflow.db" for file in files)
    assert [file for file in files for word in SECRETS if holds(file, word)] == []
