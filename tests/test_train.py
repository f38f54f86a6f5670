"""The train stage in one process: what it refuses, what it keeps, and what evaluate makes of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from phantom_experiments import changed, preprocessed, task_of

from pipeline.confidence.calibration import read_calibration
from pipeline.config import Config
from pipeline.data.plan import read_plan, write_plan
from pipeline.errors import ConfigError, ResourceError, StoreError, TrainingError
from pipeline.records import exclusively
from pipeline.stages import evaluate, segment, train
from pipeline.stages.fold.hooks import shareable
from pipeline.stages.fold.run import train_fold
from pipeline.stages.workspace import Workspace
from pipeline.training.losses import Target
from pipeline.volumes.stored import read_header

SETTINGS = (
    "preprocessing.patch_size=[16, 16, 16]",
    "training.budget.steps=2",
    "training.steps_per_epoch=1",
    "training.validation_every_epochs=2",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An experiment on preprocessed phantoms, two steps long."""
    return preprocessed(tmp_path_factory.mktemp("train"), SETTINGS, cases=6, folds=3)


def test_nothing_to_resume_is_an_error(prepared: Config) -> None:
    with pytest.raises(TrainingError, match="no checkpoint to resume from; start without --resume"):
        train.run(prepared.changed(name="new"), resume=True)


def test_a_fold_that_is_not_there_is_named(prepared: Config) -> None:
    with pytest.raises(ConfigError, match=r"--fold 7: the manifest has folds 0, 1, 2"):
        train.run(prepared, fold="7")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("segresnet", {"blocks_down": (1, 1, 1), "blocks_up": (1, 1)}),
        ("unet", {"width": 4, "levels": 3, "coarse_heads": False}),
    ],
)
def test_deep_supervision_of_a_network_without_it_is_refused(
    prepared: Config, name: str, options: dict[str, object]
) -> None:
    config = changed(prepared.changed(name="deep"), "training", deep_supervision=True)
    config = changed(config, "network", name=name, options=options)
    with pytest.raises(ConfigError, match=f"{name} has no coarser outputs"):
        train.run(config)
    assert not Workspace(config.workspace).run("deep", 0).exists()


@pytest.mark.slow
def test_a_patch_that_the_network_cannot_halve_is_rounded_up_with_the_reason(prepared: Config) -> None:
    config = changed(prepared.changed(name="odd"), "network", name="fcn", options={"width": 4, "stride": 32})
    (folder,) = train.run(config)
    calibration = read_calibration(folder / "models/best")
    assert calibration is not None
    assert calibration.cases == 2
    assert calibration.labels == {"left": None, "right": None}  # too few cases to learn from
    logged = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert calibration.temperature in [
        event["values"].get("calibration/temperature") for event in logged if event["kind"] == "metrics"
    ]
    for path in (folder / "plan.yaml", folder / "models/best/plan.yaml"):
        plan = read_plan(path)
        assert plan.patch_size == (32, 32, 32)
        assert plan.reasons["patch_size"] == "set in the configuration; rounded up to what fcn can yield"


@pytest.mark.slow
def test_a_2d_network_goes_the_whole_way_plane_by_plane(prepared: Config, tmp_path: Path) -> None:
    options = {"width": 4, "levels": 2}
    config = changed(prepared.changed(name="flat"), "network", spatial_dims=2, options=options)
    config = changed(config, "inference", flip_axes=("x", "z"))
    (folder,) = train.run(config)
    plan = read_plan(folder / "plan.yaml")
    assert plan.patch_size == (16, 16, 1)
    assert plan.batch_size == 32
    assert not evaluate.run(config).failures
    image = next((config.data.manifest.parent / "set" / "imagesTr").glob("*.nii.gz"))
    with pytest.raises(TrainingError, match="another configuration"):
        train.run(changed(config, "inference", flip_axes=()), resume=True)
    report = segment.run(str(folder / "models/best"), [image], tmp_path / "labels", device="cpu")
    assert not report.failures
    assert read_header(tmp_path / "labels" / image.name).geometry.matches(read_header(image).geometry)


@pytest.mark.slow
def test_a_network_with_margin_reads_more_than_its_patch_and_is_evaluated(prepared: Config) -> None:
    options = {"width": 4, "levels": 2, "convs": 1, "padding": "valid", "norm": "batch"}
    config = changed(prepared.changed(name="valid"), "network", options=options)
    task = train.fold_tasks(config, "0", "cpu")[0]
    network = task.new_state().network
    assert min(network.margin) > 0
    image, target = task.batches(network)(0)
    assert isinstance(target, Target)
    assert image.shape[2:] == network.input_size(task.plan.patch_size)
    assert target.classes.shape[1:] == task.plan.patch_size
    train.run(config)
    assert not evaluate.run(config).failures


def test_a_patch_that_memory_has_no_room_for_says_what_to_do(prepared: Config) -> None:
    sparse = prepared.training.augmentation.changed(elastic_spacing_voxels=1e6)
    task = task_of(changed(prepared.changed(name="vast"), "training", augmentation=sparse))
    patch = (2**17,) * 3  # of more bytes than there are addresses
    with pytest.raises(ResourceError, match=r"memory of cpu is used up, with 2 patches of 131072x.*accumulate"):
        train_fold(replace(task, plan=task.plan.changed(patch_size=patch)), resume=False)


def test_one_process_at_a_time_trains_a_fold(prepared: Config) -> None:
    folder = Workspace(prepared.workspace).run("busy", 0)
    with (
        exclusively(folder.with_name(".fold_0.lock"), TrainingError("held")),
        pytest.raises(TrainingError, match="is being trained by another process"),
    ):
        train.run(prepared.changed(name="busy"))


def test_a_plan_edited_after_preprocessing_is_not_trained_on(prepared: Config) -> None:
    path = Workspace(prepared.workspace).store(prepared, "mine") / "plan.yaml"
    plan = read_plan(path)
    write_plan(path, plan.changed(spacing_mm=(3.0, 3.0, 3.0)))
    try:
        with pytest.raises(StoreError, match="manifest or plan has changed since; run `medseg preprocess`"):
            train.run(prepared.changed(name="stale"))
    finally:
        write_plan(path, plan)


@pytest.mark.slow
def test_a_fold_trained_twice_keeps_the_earlier_run_apart(prepared: Config) -> None:
    config = prepared.changed(name="twice")
    (folder,) = train.run(config)
    first = (folder / "facts.json").read_text()
    train.run(config, resume=True)  # finished already: nothing happens
    assert not list(folder.parent.glob("earlier_*"))
    train.run(config)
    (earlier,) = folder.parent.glob("earlier_*")
    assert (earlier / "facts.json").read_text() == first
    assert (folder / "models" / "last" / "model.yaml").exists()
    report = evaluate.run(config)
    assert len(report.evaluation.cases) == 2
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    kinds = {event["kind"] for event in events}
    assert {"params", "tags", "dataset", "metrics", "image", "artifact", "model", "finish"} <= kinds
    logged = json.dumps([event for event in events if event["kind"] == "params"])
    assert "tracking" not in logged


def test_a_password_in_the_servers_address_stays_out_of_what_is_shared(prepared: Config) -> None:
    config = changed(prepared, "tracking", uri="http://user:secret@127.0.0.1:5000", experiment="mine")
    text = shareable(config)
    assert "secret" not in text
    assert "experiment: mine" in text
