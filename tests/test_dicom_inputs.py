"""DICOM among the inputs of `medseg segment`: which series are cases, what they are called, and what comes out."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_files import CT, MR, SECRET, grid, write_series
from tiny_models import NEAREST_MEAN, make_model, make_plan, nearest_mean
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.data.plan import Normalisation
from pipeline.errors import PipelineError
from pipeline.geometry import Geometry
from pipeline.model import save_model
from pipeline.networks import NETWORKS
from pipeline.stages import segment
from pipeline.stages.segmenting.dicom_inputs import DicomOptions
from pipeline.stages.segmenting.inputs import SegmentInput, find_inputs
from pipeline.volumes.dicom.choosing import SeriesChoice
from pipeline.volumes.dicom.reading import read_series
from pipeline.volumes.dicom.series import Series, find_series
from pipeline.volumes.volume import read_label

SHAPE = (24, 26, 12)


@pytest.fixture(autouse=True)
def _hand_made_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "nearest_mean", nearest_mean)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", make_model(network=NEAREST_MEAN))
    return tmp_path / "model"


def classes_of(seed: int = 0) -> np.ndarray:
    """Blocks of the classes 0, 1 and 2."""
    blocks = np.random.default_rng(seed).integers(0, 3, [-(-n // 4) for n in SHAPE])
    return np.kron(blocks, np.ones((4, 4, 4), dtype=int))[: SHAPE[0], : SHAPE[1], : SHAPE[2]]


def upright() -> Geometry:
    return grid(SHAPE, (1.0, 1.0, 1.0))


def write_scan(folder: Path, seed: int = 0, **attributes: object) -> Series:
    """Write an MR series that the model gets right, and find it."""
    attributes = {"SOPClassUID": MR, "Modality": "MR", **attributes}
    write_series(folder, (100 * classes_of(seed)).astype(np.int16), upright().affine, seed=seed, **attributes)
    (series,) = find_series(folder)
    return series


def find(*inputs: str | Path, channels: dict[str, str], out: Path, **options: object) -> list[SegmentInput]:
    return find_inputs(inputs, tuple(channels), out, None, DicomOptions(modalities=channels, **options))  # type: ignore[arg-type]


def test_a_series_becomes_a_label_map_on_its_own_grid(model: Path, tmp_path: Path) -> None:
    series = write_scan(tmp_path / "scans" / "DOE_JANE" / "S1")
    report = segment.run(str(model), [tmp_path / "scans"], tmp_path / "out", device="cpu", precision="fp32")
    (result,) = report.results
    assert (result.status, result.name) == ("done", f"MR_{series.key}")
    # The folder as it was given, and none within, which an archive may have called after the patient.
    assert result.inputs == (f"{tmp_path / 'scans'}#{series.key}",)
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(written) > 5 and not [file for file in written if b"DOE_JANE" in file.read_bytes()]
    label = read_label(tmp_path / "out" / f"MR_{series.key}.nii.gz")
    assert label.geometry.matches(upright(), 1e-5)
    np.testing.assert_array_equal(label.array, np.array([0, 1, 7])[classes_of()])
    header = nib.load(tmp_path / "out" / f"MR_{series.key}.nii.gz").header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)


def test_series_are_recognised_by_their_contents(model: Path, tmp_path: Path) -> None:
    write_scan(tmp_path / "scans" / "1", 1)
    write_scan(tmp_path / "scans" / "2", 2)

    def run() -> list[str]:
        report = segment.run(str(model), [tmp_path / "scans"], tmp_path / "out", device="cpu", precision="fp32")
        return [result.status for result in report.results]

    assert run() == ["done", "done"]
    shutil.move(tmp_path / "scans" / "2", tmp_path / "scans" / "elsewhere")
    for number, file in enumerate(sorted((tmp_path / "scans" / "1").iterdir())):
        file.rename(file.with_name(f"I{number}"))
    assert run() == ["skipped", "skipped"]
    shutil.rmtree(tmp_path / "scans" / "1")
    write_scan(tmp_path / "scans" / "1", 1, RescaleIntercept=1)
    assert run() == ["done", "skipped"]


def test_workers_are_told_of_series(model: Path, tmp_path: Path) -> None:
    """As JSON: the series of a task go to another process and are read there."""
    first, second = write_scan(tmp_path / "scans" / "1", 1), write_scan(tmp_path / "scans" / "2", 2)
    from pipeline.stages.segmenting.case import SegmentSettings
    from pipeline.stages.segmenting.workers import Task

    cases = find(tmp_path / "scans", channels={"T1": "MR"}, out=tmp_path / "out")
    settings = SegmentSettings(models=(model,), out=tmp_path / "out", run="r")
    task = Task(settings=settings, cases=tuple(cases), threads=1, log_level=0)
    back = Task.model_validate(json.loads(json.dumps(task.model_dump(mode="json"))))
    assert [case.files["T1"].series for case in back.cases] == [first, second]
    np.testing.assert_array_equal(back.cases[1].files["T1"].read_image().array, read_series(second).array)


def test_what_cannot_be_read_fails_alone(model: Path, tmp_path: Path) -> None:
    good = write_scan(tmp_path / "scans" / "good", 1)
    broken = write_scan(tmp_path / "scans" / "broken", 2)
    broken.files[5].unlink()
    write_series(tmp_path / "scans" / "ct", seed=3)  # Of another modality: no case.
    write_series(tmp_path / "scans" / "dose", seed=4, SOPClassUID="1.2.840.10008.5.1.4.1.1.481.2", Modality="RTDOSE")
    report = segment.run(str(model), [tmp_path / "scans"], tmp_path / "out", device="cpu", precision="fp32")
    assert {one.name: one.status for one in report.results} == {
        f"MR_{good.key}": "done",
        f"MR_{broken.key}": "failed",
    }
    (failed,) = report.failures
    assert f"2.00 mm between {broken.files[4].name} and {broken.files[6].name} (1 missing)" in failed.reason
    assert SECRET not in failed.reason and SECRET not in (tmp_path / "out" / "report.json").read_text()


def test_series_are_chosen(tmp_path: Path) -> None:
    study, out = tmp_path / "study", tmp_path / "out"
    t1 = write_scan(study / "1", 1, SeriesDescription="T1 tra")
    t2 = write_scan(study / "2", 2, SeriesDescription="T2 tra")
    ct = write_scan(study / "3", 3, SOPClassUID=CT, Modality="CT")

    def keys(channel: str = "MR", folder: str = "study", **asked: str) -> list[str]:
        cases = find(tmp_path / folder, channels={"x": channel}, out=out, choice=SeriesChoice(**asked))
        return [case.files["x"].series.key for case in cases if case.files["x"].series]

    assert keys() == [t1.key, t2.key]
    assert keys("CT") == [ct.key]
    assert keys("other") == [t1.key, t2.key, ct.key]
    assert keys(modality="CT") == [ct.key]
    assert keys(description="t2") == [t2.key]
    assert keys(uid=ct.uid) == keys(uid=ct.key) == [ct.key]
    both = find(tmp_path, study, study / "1", channels={"x": "MR"}, out=out)
    assert [case.files["x"].series for case in both] == [t1, t2]  # Each once.
    assert keys(folder=f"study#{t2.key}") == keys(folder=f"study#{t2.uid}") == [t2.key]
    with pytest.raises(PipelineError, match=r"study: no DICOM series fits modality 'PT'; there are: "):
        keys("PET")
    with pytest.raises(PipelineError, match=r"study: no DICOM series fits series 'ffffffffff'"):
        keys(folder="study#ffffffffff")


def test_a_folder_without_the_series_is_told_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    venous = write_scan(tmp_path / "p1" / "1", 1, SeriesDescription="venous")
    write_scan(tmp_path / "p2" / "1", 2, SeriesDescription="native")
    choice = SeriesChoice(description="venous")
    (case,) = find(tmp_path / "p1", tmp_path / "p2", channels={"x": "MR"}, out=tmp_path / "out", choice=choice)
    assert case.files["x"].series == venous
    assert "p2: no DICOM series fits modality 'MR', description 'venous'; there are: " in caplog.text


def test_one_slice_is_not_its_series(tmp_path: Path) -> None:
    series = write_scan(tmp_path / "scan")
    with pytest.raises(PipelineError, match=r"\.dcm: is a file of a DICOM series; give its folder, .*scan"):
        find(series.files[0], channels={"x": "MR"}, out=tmp_path / "out")


def test_several_channels_come_from_a_csv(tmp_path: Path) -> None:
    study, channels = tmp_path / "study", {"T1": "MR", "T2": "MR", "CT": "CT"}
    t1, t2 = (write_scan(study / name, seed) for seed, name in enumerate(("a", "b"), 1))
    ct = write_scan(study / "c", 3, SOPClassUID=CT, Modality="CT")
    with pytest.raises(PipelineError, match=r"study: holds DICOM series.*in a CSV with the columns case,T1,T2,CT"):
        find(study, channels=channels, out=tmp_path / "out")
    with pytest.raises(PipelineError, match=r"holds DICOM series"):
        find(f"{study}#{t1.key}", channels=channels, out=tmp_path / "out")
    table = tmp_path / "cases.csv"
    # A channel's modality chooses among the series of a study; where that leaves two, a key does.
    table.write_text(f"case,T1,T2,CT\np1,study#{t1.key},study/b,study\np2,study/a,,gone.nii.gz\n")
    one, two = find(table, channels=channels, out=tmp_path / "out")
    assert [one.files[channel].series for channel in channels] == [t1, t2, ct]
    assert two.files["T1"].series == t1 and two.files["CT"].path == tmp_path / "gone.nii.gz"
    table.write_text("case,T1,T2,CT\np1,study,study/b,study\n")
    with pytest.raises(PipelineError, match=rf"2 DICOM series fit modality 'MR'.*FOLDER#KEY.*{t1.key}.*{t2.key}"):
        find(table, channels=channels, out=tmp_path / "out")


def test_volumes_come_before_dicom_and_nothing_is_neither(tmp_path: Path) -> None:
    write_scan(tmp_path / "scans" / "1", 1)
    (tmp_path / "scans" / "a.nii.gz").touch()
    (case,) = find(tmp_path / "scans", channels={"x": "MR"}, out=tmp_path / "out")
    assert case.name == "a"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(PipelineError, match=r"holds no volume \(NIfTI, NRRD or MetaImage\) and no DICOM series"):
        find(tmp_path / "nothing", channels={"x": "MR"}, out=tmp_path / "out")


def test_label_maps_do_not_land_among_the_slices(tmp_path: Path) -> None:
    write_scan(tmp_path / "scans" / "1", 1)
    with pytest.raises(PipelineError, match=r"scans/1: holds the input"):
        find(tmp_path / "scans", channels={"x": "MR"}, out=tmp_path / "scans" / "1")


def test_the_command_line_lists_and_converts(tmp_path: Path) -> None:
    study = tmp_path / "DOE_JANE"
    t1 = write_scan(study / "1", 1, SeriesDescription="T1 tra")
    t2 = write_scan(study / "2", 2, SeriesDescription="T2 tra")
    t2.files[3].unlink()

    def medseg(*arguments: str | Path) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["dicom", *map(str, arguments)])
        return done.exit_code, str(done.exception) if isinstance(done.exception, PipelineError) else done.output

    code, text = medseg("list", study)
    assert code == 0 and SECRET not in text and "4711" not in text
    assert f"{t1.key}  MR        12      24x26x12 1.00x1.00x1.00 mm, LPS  T1 tra       1       yes" in text
    assert "(1 missing)" in text
    assert SECRET in medseg("list", study, "--show-patient")[1]
    rows = json.loads(medseg("list", study, "--json")[1])
    assert [(row["key"], row["series_uid"], row["folder"]) for row in rows] == [
        (t1.key, t1.uid, "1"),
        (t2.key, t2.uid, "2"),
    ]
    assert json.loads(medseg("list", study, "--json", "--show-patient")[1])[0]["patient"]["name"] == SECRET
    out = tmp_path / "out"
    assert "holds 2 image series; say which by" in medseg("convert", study, "--out", out)[1]
    code, text = medseg("convert", study, "--out", out, "--all")
    assert code == 1 and f"DICOM series {t2.key} (MR, 11 slices): failed: 1 of 10 distances" in text
    assert sorted(path.name for path in out.iterdir()) == [f"MR_{t1.key}.json", f"MR_{t1.key}.nii.gz"]
    volume = nib.load(out / f"MR_{t1.key}.nii.gz")
    assert volume.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(volume.dataobj), 100 * classes_of(1))
    np.testing.assert_allclose(volume.affine, upright().affine, atol=1e-5)
    told = (out / f"MR_{t1.key}.json").read_text()
    assert t1.uid in told and SECRET not in told and "DOE_JANE" not in told and "2020" not in told
    before = (out / f"MR_{t1.key}.nii.gz").stat().st_mtime_ns
    assert "was there already" in medseg("convert", study, "--out", out, "--description", "T1")[1]
    assert (out / f"MR_{t1.key}.nii.gz").stat().st_mtime_ns == before
    assert medseg("convert", study, "--out", out, "--series", t1.key, "--force")[0] == 0
    assert (out / f"MR_{t1.key}.nii.gz").stat().st_mtime_ns > before
    assert "holds the DICOM files themselves" in medseg("convert", study, "--out", study / "1", "--all")[1]


def test_a_tilted_series_is_segmented_where_that_is_asked_for(tmp_path: Path) -> None:
    plan = make_plan(channels={"CT": "CT"}, normalisation={"CT": Normalisation(scheme="none")})
    save_model(tmp_path / "model", make_model(network=NEAREST_MEAN, plan=plan))
    affine = upright().affine.copy()
    affine[:3, 1] = [0, -np.cos(0.2), -np.sin(0.2)]
    write_series(tmp_path / "scan", np.full(SHAPE, 100, np.int16), affine)
    runner = CliRunner()
    given = ["segment", str(tmp_path / "scan"), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    failed = runner.invoke(app, given)
    assert failed.exit_code == 1 and "the gantry was tilted by 11.5 degrees" in failed.output
    done = runner.invoke(app, [*given, "--untilt"])
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "out").glob("CT_*.nii.gz")
    label = read_label(path)
    assert label.geometry.shear < 1e-5 and set(np.unique(label.array)) == {1}
