"""The whole way through the command line: real subprocesses, from a folder that is not the checkout."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from pipeline.config_loading import packaged
from pipeline.data.phantoms import LABEL_PAIRS, LABELS, make_phantom, write_phantom_dataset
from pipeline.model import read_description
from pipeline.stages.fold.record import RECOUNTS
from pipeline.volumes.volume import read_label
from pipeline.volumes.writing import write_image

pytestmark = pytest.mark.slow

# Small and quick, for what does not ask how well a network has learned.
TINY = ["preprocessing.patch_size=[16, 16, 16]", "training.steps_per_epoch=5", "training.validation_every_epochs=2"]


def medseg(folder: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder; its exit code must be as expected."""
    done = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, f"{arguments}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pipeline", *map(str, arguments)]


def overrides(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def new_experiment(folder: Path, *, channels: int, layout: str, cases: int) -> Path:
    """Write a data set, its manifest and a YAML that extends the demo's; return the YAML."""
    source = write_phantom_dataset(folder / "set", cases=cases, channels=channels, layout=layout)  # type: ignore[arg-type]
    medseg(folder, "manifest", source, "--out", "manifests/mine.json", "--folds", 3)
    manifest = folder / "manifests" / "mine.json"
    # A plain folder does not name its labels; one does so in the manifest.
    named = {**json.loads(manifest.read_text()), "labels": LABELS, "label_pairs": LABEL_PAIRS}
    manifest.write_text(json.dumps(named))
    config = folder / "configs" / "mine.yaml"
    config.parent.mkdir()
    config.write_text(f"extends: {packaged('demo.yaml')}\nname: mine\ndata:\n  manifest: ../manifests/mine.json\n")
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two channels on different grids were checked, preprocessed and trained on, stage by stage."""
    folder = tmp_path_factory.mktemp("two_channels")
    config = new_experiment(folder, channels=2, layout="csv", cases=10)
    report = json.loads(medseg(folder, "check", "manifests/mine.json", "--json").stdout)
    assert not report["errors"]
    assert any("empty" in json.dumps(warning) for warning in report["warnings"])
    medseg(folder, "preprocess", config)
    medseg(folder, "train", config)
    return folder


def test_two_channels_on_different_grids_are_learned(trained: Path) -> None:
    medseg(trained, "evaluate", trained / "configs" / "mine.yaml")
    evaluation = trained / "work" / "runs" / "mine" / "fold_0" / "evaluation" / "fold"
    summary = json.loads((evaluation / "summary.json").read_text())
    # A network that has learned nothing scores below 0.1, and one that does not tell the sides 0.5.
    assert all(summary["classes"][name]["metrics"]["dice"]["mean"] > 0.8 for name in ("left", "right"))
    assert "<html" in (evaluation / "report.html").read_text()
    assert not list(trained.glob("mlruns"))


def test_a_label_map_lies_where_its_image_lies_and_a_broken_input_stops_nothing(trained: Path) -> None:
    inputs = trained / "new"
    phantom = make_phantom(777, channels=2)
    for channel, image in phantom.images.items():
        write_image(inputs / f"patient_{channel}.nii.gz", image)
        (inputs / f"broken_{channel}.nii.gz").write_bytes(b"not a volume")
    model = trained / "work" / "runs" / "mine" / "fold_0" / "models" / "best"
    medseg(trained, "segment", "--model", model, inputs, "--out", "out", code=1)
    (written,) = (trained / "out").glob("*.nii.gz")
    image, label = nib.load(inputs / "patient_T1.nii.gz"), nib.load(written)
    assert label.shape == image.shape
    assert np.array_equal(label.affine, image.affine)
    assert [int(label.header[code]) for code in ("qform_code", "sform_code")] == [
        int(image.header[code]) for code in ("qform_code", "sform_code")
    ]
    prediction, reference = read_label(written), phantom.label
    for name in ("left", "right"):
        centroids = [
            v.geometry.to_mm(np.argwhere(v.array == LABELS[name])).mean(axis=0) for v in (prediction, reference)
        ]
        assert np.abs(centroids[0] - centroids[1]).max() < 1.0
    report = (trained / "out" / "report.json").read_text()
    assert "broken" in report


def test_after_a_kill_resume_gives_the_weights_of_the_uninterrupted_run(tmp_path: Path) -> None:
    config = new_experiment(tmp_path, channels=1, layout="folder", cases=4)
    settings = overrides(*TINY, "training.budget.epochs=8")
    medseg(tmp_path, "preprocess", config, *settings)
    medseg(tmp_path, "train", config, *settings, "--set", "name=whole")
    killed = [*settings, "--set", "name=killed"]
    medseg(tmp_path, "train", config, *killed, "--resume", code=2)  # nothing to resume
    folder, resume = tmp_path / "work" / "runs" / "killed" / "fold_0", []
    # Killed at its first sign of life, about the first validation, and some epochs later.
    for sign in ("training.total_steps", '"step": 10', '"step": 25'):
        process = subprocess.Popen(command("train", config, *killed, *resume), cwd=tmp_path, start_new_session=True)
        wait_for(folder, sign, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (folder / "models" / "last").exists()
        resume = ["--resume"]
    medseg(tmp_path, "train", config, *killed, "--resume")
    whole, resumed = (
        load_file(tmp_path / "work" / "runs" / name / "fold_0" / "models" / "last" / "weights.safetensors")
        for name in ("whole", "killed")
    )
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)


def wait_for(run: Path, sign: str, process: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
    """Wait until a run has logged something and has a checkpoint."""
    deadline = time.monotonic() + seconds
    events, checkpoint = run / "events.jsonl", run / "checkpoint.safetensors"
    while not (checkpoint.exists() and sign in events.read_text()):
        assert process.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline, f"{sign} was not logged in {seconds} s"
        time.sleep(0.02)


def test_run_does_each_stage_once(tmp_path: Path) -> None:
    config = new_experiment(tmp_path, channels=1, layout="decathlon", cases=6)
    settings = overrides(*TINY, "training.budget.epochs=2")
    medseg(tmp_path, "run", config, *settings)
    folder = tmp_path / "work" / "runs" / "mine" / "fold_0"
    report, weights = folder / "evaluation" / "fold" / "report.html", folder / "models" / "last" / "weights.safetensors"
    written = [path.stat().st_mtime_ns for path in (report, weights)]
    medseg(tmp_path, "run", config, *settings)
    assert [path.stat().st_mtime_ns for path in (report, weights)] == written
    medseg(tmp_path, "run", config, *overrides(*TINY, "training.budget.epochs=3"))
    assert all(path.stat().st_mtime_ns > old for path, old in zip((report, weights), written, strict=True))


def test_real_mri_goes_the_whole_way(tmp_path: Path, shared_data: Path) -> None:
    manifest = packaged("hippocampus_unet.yaml").parents[1] / "data_manifests" / "hippocampus.json"
    content = json.loads(manifest.read_text())
    content["root"] = str(shared_data / "Task04_Hippocampus")
    content["cases"] = content["cases"][:20]
    (tmp_path / "hippocampus.json").write_text(json.dumps(content))
    config = tmp_path / "few.yaml"
    config.write_text(
        f"extends: {packaged('hippocampus_unet.yaml')}\nname: few\ndata:\n  manifest: hippocampus.json\n"
        "training:\n  budget: {steps: 150}\n  steps_per_epoch: 50\n  validation_every_epochs: 3\n"
        "  augmentation: {enabled: false}\n"
    )
    medseg(tmp_path, "run", config)
    summary = json.loads((tmp_path / "work/runs/few/fold_0/evaluation/fold/summary.json").read_text())
    # Steps, not minutes: a busy machine takes longer and learns the same. An untrained network stays below 0.3.
    assert all(summary["classes"][name]["metrics"]["dice"]["mean"] > 0.6 for name in ("anterior", "posterior"))


@pytest.mark.parametrize("name", ["sts_unet", "sts_multiscale_pathways"])
def test_channels_on_grids_of_their_own_of_which_some_are_missing(tmp_path: Path, shared_data: Path, name: str) -> None:
    settings = overrides(
        f"data.root={shared_data / 'STS'}",
        "preprocessing.patch_size=[48, 48, 16]",
        "preprocessing.spacing_mm=[2, 2, 6.6]",
        "training.budget={steps: 4}",
        "training.steps_per_epoch=2",
        "evaluation.bootstrap_samples=100",
    )
    medseg(tmp_path, "run", packaged(f"{name}.yaml"), *settings)
    folder = tmp_path / "work" / "runs" / name / "fold_0"
    summary = json.loads((folder / "evaluation/fold/summary.json").read_text())
    assert not summary["failures"]
    # Which channels a case has makes no difference to what is scored: all four of the fold.
    assert len((folder / "evaluation/fold/cases.csv").read_text().splitlines()) == 1 + 4


def test_minutes_become_steps_and_are_written_down_as_those(tmp_path: Path) -> None:
    config = new_experiment(tmp_path, channels=1, layout="decathlon", cases=4)
    settings = overrides(*TINY, "training.budget={minutes: 0.5}")
    medseg(tmp_path, "preprocess", config, *settings)
    said = medseg(tmp_path, "train", config, *settings).stderr
    folder = tmp_path / "work" / "runs" / "mine" / "fold_0"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (probed,) = (e["values"]["training.total_steps"] for e in events if "training.total_steps" in e.get("values", {}))
    recounts = json.loads((folder / RECOUNTS).read_text())
    assert recounts[0] == [0, int(probed)]
    total = recounts[-1][1]
    assert f"step {total} of {total}" in said
    assert read_description(folder / "models" / "last" / "model.yaml").step == total
    assert total > 5
    assert "finished already" in medseg(tmp_path, "train", config, *settings, "--resume").stderr


def test_after_a_kill_minutes_are_what_is_left_of_them(tmp_path: Path) -> None:
    config = new_experiment(tmp_path, channels=1, layout="folder", cases=4)
    settings = overrides(*TINY, "training.budget={minutes: 0.7}")
    medseg(tmp_path, "preprocess", config, *settings)
    folder = tmp_path / "work" / "runs" / "mine" / "fold_0"
    process = subprocess.Popen(command("train", config, *settings), cwd=tmp_path, start_new_session=True)
    wait_for(folder, '"step": 10', process)  # so that there is a checkpoint of the epoch before
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = checkpointed(folder)
    assert before["step"] >= 5 and 0 < before["spent_s"] < 42
    said = medseg(tmp_path, "train", config, *settings, "--resume").stderr
    assert f"going on at step {before['step']} of" in said
    after = checkpointed(folder)
    # It goes on from what was spent, counts anew from there, and keeps what was counted before.
    assert after["spent_s"] > before["spent_s"]
    kept = [[pair for pair in found["recounts"] if pair[0] < before["step"]] for found in (before, after)]
    assert kept[0] == kept[1] and kept[0][0][0] == 0
    assert after["step"] == after["total_steps"] == after["recounts"][-1][1]
    # Where only the end was missing, no step is done, however much of the minutes is left.
    shutil.rmtree(folder / "models" / "last")
    said = medseg(tmp_path, "train", config, *settings, "--resume").stderr
    assert f"going on at step {after['step']} of {after['step']}" in said
    assert checkpointed(folder) == after
    assert (folder / "models" / "last").exists()


def checkpointed(folder: Path) -> dict[str, Any]:
    """Return the numbers in a run's checkpoint."""
    with safe_open(folder / "checkpoint.safetensors", framework="np") as file:
        numbers: dict[str, Any] = json.loads(file.metadata()["medseg"])["numbers"]
    return numbers
