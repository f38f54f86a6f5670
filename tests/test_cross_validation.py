"""`medseg train --fold all` on phantoms: folds that fail, folds side by side, and what MLflow has of them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from phantom_experiments import changed, preprocessed
from test_end_to_end import medseg
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import Config
from pipeline.config_loading import dump_config, packaged
from pipeline.errors import ConfigError, PipelineError, TrainingError
from pipeline.hardware import threads_per_worker
from pipeline.model import model_digest
from pipeline.records import exclusively
from pipeline.stages import cross_validation, evaluate, run
from pipeline.stages.models import BEST, LAST
from pipeline.stages.train import fold_tasks
from pipeline.stages.workspace import Workspace
from pipeline.tracking import read_state
from pipeline.tracking.log import read_events
from pipeline.volumes.stored import read_header
from pipeline.volumes.volume import read_label

SETTINGS = (
    "preprocessing.patch_size=[16,16,16]",
    "network.options={width: 4, levels: 2}",
    "training.batch_size=1",
    "training.budget={steps: 4}",
    "training.steps_per_epoch=2",
    "training.validation_every_epochs=2",
    "tracking.register_as=phantoms",
    "tracking.alias=champion",
    "evaluation.picture_cases=1",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return preprocessed(tmp_path_factory.mktemp("folds"), SETTINGS, cases=6, folds=3)


def run_folder(config: Config, fold: int) -> Path:
    return Workspace(config.workspace).run(config.name, fold)


def busy(config: Config, fold: int) -> AbstractContextManager[None]:
    """Hold the lock of a fold, as another process that trains it does."""
    folder = run_folder(config, fold)
    return exclusively(folder.with_name(f".{folder.name}.lock"), PipelineError("held already"))


def test_the_first_fold_alone_has_the_alias(prepared: Config) -> None:
    aliases = [task.config.tracking.alias for task in fold_tasks(prepared, "all", "cpu")]
    assert aliases == ["champion", None, None]
    assert [task.config.tracking.register_as for task in fold_tasks(prepared, "all", "cpu")] == ["phantoms"] * 3
    (alone,) = fold_tasks(prepared, "2", "cpu")
    assert alone.config.tracking.alias == "champion"


def test_there_must_be_something_to_resume_and_a_job_for_each_device(prepared: Config) -> None:
    with pytest.raises(TrainingError, match="no checkpoint"):
        cross_validation.run(prepared.changed(name="new"), resume=True, device="cpu")
    with pytest.raises(PipelineError, match="at least one job"):
        cross_validation.run(prepared, device="cpu,cpu", jobs=1)
    with pytest.raises(ConfigError, match="several devices train several folds"):
        run.run(prepared, device="cpu,cpu")
    assert not (prepared.workspace / "runs" / "new").exists()


@pytest.mark.slow
def test_a_fold_that_fails_is_listed_and_the_others_go_on(prepared: Config) -> None:
    config = changed(prepared, "training", budget={"steps": 2}).changed(name="one_by_one")
    with busy(config, 1):
        report = cross_validation.run(config, device="cpu")
    assert sorted(report.folders) == [0, 2]
    assert "being trained by another process" in report.failures[1]
    assert "2 of 3 folds are trained\nfailed: fold 1: " in report.as_text()
    before = model_digest(run_folder(config, 0) / BEST)
    path = prepared.workspace / "one_by_one.yaml"
    path.write_text(dump_config(config))
    with busy(config, 1):
        answer = CliRunner().invoke(app, ["run", str(path), "--fold", "all", "--device", "cpu", "--jobs", "1"])
    assert answer.exit_code == 1
    assert "2 of 3 folds are trained\nfailed: fold 1: " in answer.output
    evaluated = [run_folder(config, fold) / "evaluation" / "fold" / "summary.json" for fold in range(3)]
    assert [path.exists() for path in evaluated] == [True, False, True]
    again = cross_validation.run(config, resume=True, device="cpu")
    assert (sorted(again.folders), again.failures) == ([0, 1, 2], {})
    assert model_digest(run_folder(config, 0) / BEST) == before  # finished already
    summary = prepared.workspace / "runs" / "one_by_one" / "evaluation" / "fold" / "summary.json"
    stamps = []
    for _ in range(2):
        run.run(config, fold="all", device="cpu", jobs=1)
        assert json.loads(summary.read_text())["cross_validation"]["folds"] == [0, 1, 2]
        stamps.append(summary.stat().st_mtime_ns)
    assert stamps[0] == stamps[1]  # evaluated already


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning")
def test_folds_side_by_side_are_those_one_after_another(prepared: Config) -> None:
    from mlflow import MlflowClient

    together, alone = prepared.changed(name="together"), prepared.changed(name="alone")
    with busy(together, 2):
        report = cross_validation.run(together, device="cpu", jobs=2)
    assert sorted(report.folders) == [0, 1]
    assert "being trained by another process" in report.failures[2]
    cross_validation.run(together, resume=True, device="cpu", jobs=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_per_worker(2))  # Sums of other numbers of threads are rounded otherwise.
    cross_validation.run(alone, device="cpu")
    torch.set_num_threads(threads)
    for fold in range(3):
        folders = [run_folder(config, fold) for config in (together, alone)]
        weights = [(folder / LAST / "weights.safetensors").read_bytes() for folder in folders]
        assert weights[0] == weights[1]
    evaluate.run(together, device="cpu")
    client = MlflowClient(f"sqlite:///{prepared.workspace / 'mlflow.db'}")
    parent_id = str(read_state(prepared.workspace / "runs" / "together").run_id)
    parent = client.get_run(parent_id)
    assert parent.info.status == "FINISHED"
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent_id}'")
    assert sorted(child.info.run_name for child in children) == [f"together fold {fold}" for fold in range(3)]
    assert parent.data.metrics["cv/folds"] == 3
    assert parent.data.tags["medseg.cross_validation"] == "complete"
    champion = client.get_model_version_by_alias("phantoms", "champion")
    assert champion.run_id == str(read_state(run_folder(alone, 0)).run_id)
    versions = client.search_model_versions("name = 'phantoms'")
    assert {version.run_id for version in versions} >= {child.info.run_id for child in children}


@pytest.mark.slow
def test_ctrl_c_ends_all_and_resume_goes_on_with_each(prepared: Config, tmp_path: Path) -> None:
    config = changed(prepared, "training", budget={"steps": 4000}).changed(name="stopped")
    path = tmp_path / "stopped.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "pipeline", "train", str(path), "--fold", "all", "--device", "cpu", "--jobs", "2"]
    process = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        # A shell's job in the background, as this may run in, has Ctrl-C ignored, and so have its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    folders = [run_folder(config, fold) for fold in range(3)]
    try:
        until = time.monotonic() + 300
        while not all((folder / "checkpoint.safetensors").exists() for folder in folders[:2]):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) != 0
    finally:
        process.kill()
        process.wait()
    for folder in folders[:2]:
        assert [line.event["status"] for line in read_events(folder) if line.event["kind"] == "finish"] == ["KILLED"]
        with exclusively(folder.with_name(f".{folder.name}.lock"), PipelineError("a worker has survived")):
            pass
    assert not folders[2].exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning")
def test_real_mri_is_cross_validated_and_segmented_by_the_ensemble(tmp_path: Path, shared_data: Path) -> None:
    from mlflow import MlflowClient

    content = json.loads((Path(__file__).parents[1] / "data_manifests" / "hippocampus.json").read_text())
    content["root"] = str(shared_data / "Task04_Hippocampus")
    by_fold = [[case for case in content["cases"] if case["fold"] == fold][:3] for fold in range(2)]
    content["cases"] = [case for cases in by_fold for case in cases]
    (tmp_path / "hippocampus.json").write_text(json.dumps(content))
    (tmp_path / "few.yaml").write_text(
        f"extends: {packaged('hippocampus_unet.yaml')}\nname: few\ndata: {{manifest: hippocampus.json}}\n"
        "training:\n  budget: {steps: 20}\n  steps_per_epoch: 10\n  validation_every_epochs: 2\n"
        "  batch_size: 1\n  augmentation: {enabled: false}\n"
    )
    medseg(tmp_path, "preprocess", "few.yaml")
    assert (
        "2 of 2 folds are trained"
        in medseg(tmp_path, "train", "few.yaml", "--fold", "all", "--device", "cpu", "--jobs", 2).stdout
    )
    assert "Dice by fold" in medseg(tmp_path, "evaluate", "few.yaml", "--device", "cpu").stdout
    with (tmp_path / "work/runs/few/out_of_fold/cases.csv").open(newline="") as file:
        found = {(line["case"], int(line["fold"])) for line in csv.DictReader(file)}
    assert found == {(case["id"], fold) for fold, cases in enumerate(by_fold) for case in cases}
    client = MlflowClient(f"sqlite:///{tmp_path / 'work' / 'mlflow.db'}")
    parent = client.get_run(str(read_state(tmp_path / "work/runs/few").run_id))
    summary = json.loads((tmp_path / "work/runs/few/evaluation/fold/summary.json").read_text())
    for name in ("anterior", "posterior", "mean"):
        dice = summary["classes"][name]["metrics"]["dice"]["mean"]
        assert parent.data.metrics[f"cv/dice/{name}"] == pytest.approx(dice)
        sd = summary["cross_validation"]["classes"][name]["dice"]["sd"]
        assert parent.data.metrics[f"cv/dice/{name}_fold_sd"] == pytest.approx(sd)
    said = medseg(tmp_path, "find-best", "few.yaml", "--device", "cpu").stdout
    assert "few: the only configuration" in said
    assert "use: medseg segment INPUT... --model" in said
    image = shared_data / "Task04_Hippocampus" / by_fold[0][0]["images"]["MRI"]["path"]
    medseg(tmp_path, "segment", image, "--model", "work/runs/few", "--out", "out", "--device", "cpu")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["models"]) == 2
    evidence = json.loads((tmp_path / "work/runs/few/postprocessing.json").read_text())
    assert report["postprocessing"]["largest_component"] == evidence["largest_component"]
    assert read_label(tmp_path / "out" / image.name).geometry.matches(read_header(image).geometry)
