"""`medseg plan` and `medseg train --dry-run` on phantoms and on cases that are nowhere."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import BudgetSection, Config, DataSection, NetworkSection, PreprocessingSection, TrainingSection
from pipeline.config_loading import dump_config
from pipeline.data.manifest import Case, ImageFile, Manifest, load_manifest, save_manifest
from pipeline.data.phantoms import write_phantom_dataset
from pipeline.data.plan import read_plan
from pipeline.errors import ConfigError, ManifestError, PipelineError
from pipeline.model import WEIGHTS
from pipeline.stages import dry_run, plan, preprocess, train
from pipeline.stages import manifest as manifest_stage
from pipeline.stages.made_up import Measured
from pipeline.stages.models import BEST
from pipeline.stages.plan import _fold_hours
from pipeline.stages.store_size import planned_voxels
from pipeline.stages.workspace import Workspace


@pytest.fixture(scope="module")
def phantom_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    source = write_phantom_dataset(folder / "set", cases=4, channels=2, layout="folder")
    manifest_stage.run(source, folder / "phantoms.json", folds=2)
    return folder / "phantoms.json"


def config_of(manifest: Path, workspace: Path, memory: float | str = "auto", **budget: float) -> Config:
    return Config(
        name="experiment",
        workspace=workspace,
        data=DataSection(manifest=manifest),
        preprocessing=PreprocessingSection(patch_size=(16, 16, 16), batch_size=2, memory_gb=memory),  # type: ignore[arg-type]
        network=NetworkSection(options={"width": 4}),
        training=TrainingSection(budget=BudgetSection.model_validate(budget or {"steps": 3600})),
    )


def test_a_plan_says_what_training_takes(phantom_set: Path, tmp_path: Path) -> None:
    config = config_of(phantom_set, tmp_path)
    report = plan.run(config, device="cpu")
    expected = report.expected
    assert report.plan == read_plan(report.path)
    written = json.loads(report.path.with_suffix(".expected.json").read_text())["expected"]
    assert written["step_s"] == expected.step_s
    assert expected.step_s is not None
    assert expected.fold_hours is not None
    assert expected.fold_hours > expected.step_s
    assert expected.all_hours == 2 * expected.fold_hours
    text = " ".join(report.as_text().split())
    for words in ("patch_size 16x16x16 voxels set in the configuration", "disk of the store", "for all folds"):
        assert words in text
    # Training goes on from there: the plan is kept, and the store holds no more than was said.
    made = preprocess.run(config)
    assert made.plan == report.plan
    stored = sum(path.stat().st_size for path in (made.folder / "cases").rglob("*.b2nd"))
    assert 0 < stored <= expected.cases_bytes


@pytest.mark.slow
def test_a_run_takes_the_disk_that_its_plan_says(phantom_set: Path, tmp_path: Path) -> None:
    config = config_of(phantom_set, tmp_path, steps=2)
    report = plan.run(config, device="cpu")
    preprocess.run(config)
    (folder,) = train.run(config, device="cpu")
    kept = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    best = (folder / BEST / WEIGHTS).stat().st_size  # MLflow has it once more
    assert kept + best == pytest.approx(report.expected.run_bytes, rel=0.1)
    assert "memory of the process" in report.as_text()


def test_hours_are_those_of_the_steps_and_of_the_voxels_that_are_scored(phantom_set: Path, tmp_path: Path) -> None:
    config = config_of(phantom_set, tmp_path, steps=3600)  # validated every 1,000
    preprocess.run(config)
    (task,) = train.fold_tasks(config, "0", "cpu")
    cases = list(preprocess.examinations_of(config, task.manifest, None).values())
    grids = [case.native for case in cases if case.native]
    volume_mm3 = [1000 * grid.voxel_volume_ml * math.prod(grid.shape) for grid in grids]
    voxels = [mm3 / math.prod(task.plan.spacing_mm) for mm3 in volume_mm3]
    assert [planned_voxels(case, task.plan) for case in cases] == pytest.approx(voxels, rel=0.2)
    found = Measured(steps=20, step_s=0.5, voxel_s=1e-2, peak_bytes=None)
    validations = 4 + task.calibration_passes  # the last one at the end of the budget
    of_steps, of_validations = 3600 * 0.5 / 3600, validations * sum(voxels) / 2 * 1e-2 / 3600
    assert of_validations > of_steps
    assert _fold_hours(task, cases, found) == pytest.approx(of_steps + of_validations, rel=0.2)
    # The last validation is at the end of the budget, wherever that lies.
    section = config.training.changed(budget=BudgetSection(steps=3000))
    shorter = _fold_hours(replace(task, config=config.changed(training=section)), cases, found)
    more = of_steps / 6 + of_validations / validations
    assert _fold_hours(task, cases, found) - shorter == pytest.approx(more, rel=0.2)
    # A case without a label is not scored.
    fewer = _fold_hours(task, [cases[0].changed(label=None), *cases[1:]], found)
    assert fewer == pytest.approx(of_steps + of_validations * (1 - voxels[0] / sum(voxels)), rel=0.2)


def test_a_gpu_that_is_not_here_is_planned_for_and_not_measured(phantom_set: Path, tmp_path: Path) -> None:
    report = plan.run(config_of(phantom_set, tmp_path, 24, minutes=30))
    assert report.expected.training_bytes > report.expected.computed_bytes
    if report.expected.device is None:
        assert (report.expected.step_s, report.expected.fold_hours) == (None, None)
        assert "not measured" in report.as_text()


def test_a_plan_stays_until_its_facts_change(phantom_set: Path, tmp_path: Path) -> None:
    config = config_of(phantom_set, tmp_path)
    before = preprocess.run(config).plan
    other = config.changed(network=config.network.changed(options={"width": 4, "levels": 2}))
    assert preprocess.run(other).plan == before
    folder = Workspace(tmp_path).store(config, "phantoms")
    (folder / "fingerprint.json").unlink()  # as of a run that was killed before it was written
    assert preprocess.run(config).plan == before
    assert (folder / "fingerprint.json").exists()


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """A manifest of 300 cases whose images are nowhere, one in ten without a label."""
    cases = tuple(
        Case(
            id=f"case_{n:03}",
            patient=f"p{n}",
            images={"CT": ImageFile(path=f"{n}.nii.gz")},
            label=None if n % 10 == 0 else ImageFile(path=f"{n}_label.nii.gz"),
            fold=n % 3 if n < 270 else None,
        )
        for n in range(300)
    )
    labels = {"background": 0, "organ": 1}
    manifest = Manifest(name="many", root=tmp_path / "no_images", channels={"CT": "CT"}, labels=labels, cases=cases)
    save_manifest(manifest, tmp_path / "many.json")
    return tmp_path / "many.json"


def test_a_dry_run_says_what_would_be_trained_and_what_is_missing(nowhere: Path, tmp_path: Path) -> None:
    found = dry_run.run(config_of(nowhere, tmp_path / "work"), fold="all")
    assert "300 cases, 30 held out, 3 folds" in found.facts["data"]
    assert found.facts["budget"] == "3,600 steps a fold, validated every 1,000"
    assert "decided by `medseg preprocess`" in found.facts["network"]
    assert [line.partition(";")[0] for line in found.folds] == [
        f"fold {n}: 162 cases to train on, 81 to validate on" for n in range(3)
    ]
    images, prepared = found.missing
    assert "no_images is no folder" in images
    assert "243 of 243 prepared cases" in prepared
    assert "case_001, case_002, case_003, case_004, case_005, ..." in prepared
    assert "medseg preprocess" in prepared
    assert not (tmp_path / "work").exists()


def test_a_dry_run_before_a_training_misses_nothing(phantom_set: Path, tmp_path: Path) -> None:
    config = config_of(phantom_set, tmp_path, minutes=5)
    preprocess.run(config)
    found = dry_run.run(config)
    assert found.missing == ()
    assert "nothing is missing" in found.as_text()
    assert "16x16x16 voxels" in found.facts["patch"]
    assert "parameters" in found.facts["network"]
    assert len(found.folds) == 1
    assert str(tmp_path / "runs" / "experiment" / "fold_0") in found.folds[0]
    assert "(new)" in found.folds[0]
    run = tmp_path / "runs" / "experiment" / "fold_0"
    run.mkdir(parents=True)
    (run / "checkpoint.safetensors").touch()
    assert "--resume goes on" in dry_run.run(config).folds[0]
    with pytest.raises(ConfigError, match="--fold 7: the manifest has folds 0, 1"):
        dry_run.run(config, fold="7")
    unfit = config.changed(network=config.network.changed(options={"levels": 9}))
    with pytest.raises(ConfigError, match="levels: 9"):
        dry_run.run(unfit)
    weighted = config.changed(training=config.training.changed(sampling_weights={"liver": 2.0}))
    with pytest.raises(ConfigError, match="'liver' cannot be drawn"):
        dry_run.run(weighted)
    of_one_class = config.changed(training=config.training.changed(loss_options={"class_weights": [1.0]}))
    with pytest.raises(ConfigError, match=r"class_weights: 1 numbers for \d outputs"):
        dry_run.run(of_one_class)


def test_the_commands_answer(nowhere: Path, phantom_set: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "many.yaml"
    yaml.write_text("extends: preset:standard\nname: many\ndata: {manifest: many.json}\n")
    answer = CliRunner().invoke(app, ["train", str(yaml), "--dry-run", "--workspace", str(tmp_path / "work")])
    assert answer.exit_code == 0, answer.output
    assert "missing: 243 of 243" in answer.output
    yaml.write_text(f"name: a\ndata: {{manifest: {phantom_set}}}\npreprocessing: {{patch_size: [16, 16, 16]}}\n")
    arguments = ["plan", str(yaml), "--gpu-memory", "8", "--set", "network.options={width: 4}"]
    answer = CliRunner().invoke(app, [*arguments, "--workspace", str(tmp_path / "work")])
    assert answer.exit_code == 0, answer.output
    assert "as many as fit a GPU of 8 GB" in answer.output


def test_folds_that_leave_nothing_to_train_on_are_refused(phantom_set: Path, tmp_path: Path) -> None:
    whole = load_manifest(phantom_set)
    for name, fold in (("none", None), ("one", 0)):
        cases = tuple(case.changed(fold=fold) for case in whole.cases)
        save_manifest(whole.changed(cases=cases), tmp_path / f"{name}.json")
    with pytest.raises(ConfigError, match="no case of the manifest has a fold"):
        dry_run.run(config_of(tmp_path / "none.json", tmp_path / "work"), fold="all")
    config = config_of(tmp_path / "one.json", tmp_path / "work")
    preprocess.run(config)
    (missing,) = dry_run.run(config).missing
    assert "fold 0: all cases to train on lie in it" in missing
    with pytest.raises(ConfigError, match="fold 0: all cases to train on lie in it"):
        train.run(config)


def test_what_is_wrong_with_a_manifest_is_said_in_our_words(phantom_set: Path, tmp_path: Path) -> None:
    content = json.loads(phantom_set.read_text())
    (tmp_path / "wrong.json").write_text(json.dumps({**content, "ignore_label": 1}))
    with pytest.raises(ManifestError, match=r"wrong.json: manifest: ignore_label: 1 is the value of"):
        load_manifest(tmp_path / "wrong.json")


def test_what_several_processes_would_refuse_is_said_once(phantom_set: Path, tmp_path: Path) -> None:
    config = config_of(phantom_set, tmp_path / "work")
    preprocess.run(config)
    yaml = tmp_path / "experiment.yaml"
    yaml.write_text(dump_config(config))

    def refused(*more: str, **environment: str) -> str:
        answer = CliRunner().invoke(app, ["train", str(yaml), *more], env=environment)
        assert isinstance(answer.exception, PipelineError), answer.output
        return str(answer.exception)

    assert "--fold 7: the manifest has folds" in refused("--processes", "2", "--fold", "7")
    assert "--jobs 2: with --processes" in refused("--processes", "2", "--fold", "all", "--jobs", "2")
    assert "--device cuda:0,cuda:1: with --processes" in refused("--processes", "2", "--device", "cuda:0,cuda:1")
    assert "2 patches cannot be divided evenly among 3" in refused("--processes", "3")
    assert "no checkpoint to resume from" in refused("--processes", "2", "--resume")
    # A job of one process trains folds side by side as any command does.
    alone = {"RANK": "0", "WORLD_SIZE": "1"}
    assert "name devices, and at least one job" in refused(
        "--fold", "all", "--jobs", "1", "--device", "cpu,cpu", **alone
    )
