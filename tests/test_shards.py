"""`--shard I/N`: parts of a list for jobs that know nothing of one another; together they do what one job does."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from label_maps import label_files
from tiny_models import NEAREST_MEAN, make_model, nearest_mean
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import Config, DataSection, PreprocessingSection
from pipeline.config_loading import dump_config
from pipeline.data.phantoms import write_phantom_dataset
from pipeline.errors import ManifestError, PipelineError
from pipeline.model import save_model
from pipeline.networks import NETWORKS
from pipeline.records import write_text
from pipeline.stages import check, preprocess, segment
from pipeline.stages import manifest as manifest_stage
from pipeline.stages.shards import Shard

CASES = 7


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_shards_are_all_items_once_in_order_and_as_even_as_can_be(count: int) -> None:
    items = list("abcdefg")
    parts = [Shard(index, count).of(items) for index in range(count)]
    assert sorted(item for part in parts for item in part) == items
    assert all(part == sorted(part) for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_names_no_shard_is_refused() -> None:
    assert Shard.parsed("2/3") == Shard(2, 3)
    assert str(Shard.parsed("0/10")) == "0/10"
    for text in ("3/3", "0/0", "-1/2", "1", "1/2/3", "a/b", "", "1/ 2"):
        with pytest.raises(PipelineError, match="expected I/N with I from 0 to N-1"):
            Shard.parsed(text)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", make_model())
    return tmp_path / "model"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for index in range(CASES - 1):
        noise = np.random.default_rng(index).normal(100, 30, (20, 22, 18)).astype(np.float32)
        nib.save(nib.Nifti1Image(noise, np.eye(4)), folder / f"case_{index}.nii.gz")
    (folder / "bad.nii.gz").write_bytes(b"no volume")
    return folder


def reported(out: Path) -> dict[str, str]:
    """Status of each case in the report, in its order."""
    return {case["name"]: case["status"] for case in json.loads((out / "report.json").read_text())["cases"]}


def test_each_shard_does_its_cases_and_the_report_is_of_all_shards_so_far(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "nearest_mean", nearest_mean)
    save_model(tmp_path / "model", make_model(network=NEAREST_MEAN))
    names = ["bad", *(f"case_{n}" for n in range(CASES - 1))]
    out, seen = tmp_path / "out", list[str]()
    for index in (1, 0, 2):
        report = segment.run(str(tmp_path / "model"), [scans], out, device="cpu", shard=Shard(index, 3))
        own = [result.name for result in report.results]
        assert own == names[index::3]
        assert report.not_reached == 0
        seen += own
        assert list(reported(out)) == [name for name in names if name in seen]
    assert report.as_text().splitlines()[-2] == "of all 7 cases, other shards' too: 6 done, 1 failed"
    assert reported(out) == {name: "failed" if name == "bad" else "done" for name in names}
    assert json.loads((out / "report.json").read_text())["not_reached"] == 0


@pytest.mark.slow
def test_shards_at_the_same_time_make_what_one_run_makes(model: Path, scans: Path, tmp_path: Path) -> None:
    segment.run(str(model), [scans], tmp_path / "one", device="cpu")
    out = tmp_path / "out"
    words = ["segment", str(scans), "--model", str(model), "--out", str(out), "--device", "cpu", "--shard"]
    answers = side_by_side(words, 3)
    # `bad` is the first shard's.
    assert [code for code, _ in answers] == [1, 0, 0], answers
    assert label_files(out) == label_files(tmp_path / "one")
    assert reported(out) == reported(tmp_path / "one")


def side_by_side(words: list[str], count: int) -> list[tuple[int, str]]:
    """Run the shards of a command as processes at the same time; return how each ended, and what it said."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline", *words, f"{index}/{count}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    said = [process.communicate()[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture
def phantoms(tmp_path: Path) -> Path:
    """A manifest of seven phantoms."""
    source = write_phantom_dataset(tmp_path / "set", cases=CASES, channels=1, layout="folder")
    manifest_stage.run(source, tmp_path / "phantoms.json", folds=2)
    return tmp_path / "phantoms.json"


def config_of(manifest: Path, workspace: Path) -> Config:
    preprocessing = PreprocessingSection(patch_size=(16, 16, 16), batch_size=2)
    return Config(name="x", workspace=workspace, data=DataSection(manifest=manifest), preprocessing=preprocessing)


def files_of(workspace: Path) -> dict[str, bytes]:
    """Every file of the stores, locks aside."""
    files = [path for path in (workspace / "stores").rglob("*") if path.is_file() and "lock" not in path.name]
    assert len(files) > CASES
    return {path.relative_to(workspace).as_posix(): path.read_bytes() for path in files}


def test_check_and_preprocess_by_shards_make_what_one_run_makes(phantoms: Path, tmp_path: Path) -> None:
    one, parts = tmp_path / "one", tmp_path / "parts"
    whole = check.run(phantoms, workspace=one)
    preprocess.run(config_of(phantoms, one))
    with pytest.raises(ManifestError, match=r"7 of 7 cases are not read yet.*first `medseg check"):
        preprocess.run(config_of(phantoms, parts), shard=Shard(0, 2))
    reports = [check.run(phantoms, workspace=parts, shard=Shard(index, 2)) for index in (1, 0)]
    assert [report.cases for report in reports] == [3, CASES]
    assert reports[1].examinations == whole.examinations
    assert reports[1].known[-1] == "shard 0/2: 7 of 7 cases are read and compared with one another by now"
    written = [preprocess.run(config_of(phantoms, parts), shard=Shard(index, 2)).written for index in (0, 1)]
    assert [len(ids) for ids in written] == [4, 3]
    assert files_of(parts) == files_of(one)
    assert preprocess.run(config_of(phantoms, parts)).written == ()


@pytest.mark.slow
def test_check_and_preprocess_by_shards_at_the_same_time(phantoms: Path, tmp_path: Path) -> None:
    one, parts = tmp_path / "one", tmp_path / "parts"
    preprocess.run(config_of(phantoms, one))
    yaml = tmp_path / "experiment.yaml"
    write_text(yaml, dump_config(config_of(phantoms, one)))
    workspace = ["--workspace", str(parts), "--shard"]
    assert [code for code, _ in side_by_side(["check", str(phantoms), *workspace], 3)] == [0] * 3
    answers = side_by_side(["preprocess", str(yaml), *workspace], 3)
    assert [code for code, _ in answers] == [0] * 3, answers
    assert files_of(parts) == files_of(one)


def test_a_shard_leaves_alone_what_another_may_be_writing(phantoms: Path, tmp_path: Path) -> None:
    config = config_of(phantoms, tmp_path / "work")
    store = preprocess.run(config).folder / "cases"
    unfinished = store / ".tmp-phantom_1-abcdefgh"
    unfinished.mkdir()
    preprocess.run(config, shard=Shard(0, 2))
    assert unfinished.exists()
    preprocess.run(config)
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "ray"], "--engine ray: name the cluster with --address HOST:PORT"),
        (["--address", "auto"], "--address: of a cluster; add --engine ray"),
        (["--engine", "ray", "--address", "ray://h:1"], "expected HOST:PORT or auto"),
        (["--engine", "ray", "--address", "h:1", "--jobs", "2"], "with --engine ray say --workers 2"),
        (["--engine", "ray", "--address", "h:1", "--shard", "0/2"], "Ray shares the cases out itself"),
        (["--engine", "ray", "--address", "h:1", "--device", "cuda:0"], "each worker is given its GPU"),
        (["--shard", "2/2"], "expected I/N"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_read(words: list[str], said: str) -> None:
    answer = CliRunner().invoke(app, ["segment", "nothing", "--model", "none", "--out", "out", *words])
    assert isinstance(answer.exception, PipelineError)
    assert said in str(answer.exception)
