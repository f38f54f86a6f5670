"""`training.init_from`: which weights a training begins with, what it says of them, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from phantom_experiments import changed, preprocessed
from safetensors.torch import load_file
from tiny_models import make_model
from torch import Tensor

from pipeline.config import Config, NetworkSection, Task
from pipeline.config_loading import load_config
from pipeline.data.plan import Normalisation, Plan
from pipeline.errors import ConfigError, ModelError, TrainingError
from pipeline.model import Model, save_model
from pipeline.networks.fitting import network_for, outputs_of
from pipeline.stages import train
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.initialisation import Initialisation, initialise
from pipeline.stages.workspace import Workspace
from pipeline.training.checkpoints import load_checkpoint, save_checkpoint
from pipeline.training.state import TrainState

SETTINGS = (
    "preprocessing.patch_size=[16, 16, 16]",
    "network.options={width: 4, levels: 2, norm: batch}",
    "training.budget.steps=1",
    "training.ema_decay=0.5",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An experiment on preprocessed phantoms, one step long."""
    return preprocessed(tmp_path_factory.mktemp("init"), SETTINGS, cases=4, folds=2)


def task_of(config: Config, init_from: Path | str) -> FoldTask:
    (task,) = train.fold_tasks(changed(config, "training", init_from=str(init_from)), "0", "cpu")
    return task


def write_model(folder: Path, config: Config, task: Task, seed: int = 7, name: str = "unet", **options: object) -> Path:
    """Write a model as trained for a task on other cases, with random weights of its own in every tensor."""
    (fold,) = train.fold_tasks(config, "0", "cpu")
    return write_model_of(folder, fold.plan, task, seed, name, **options)


def write_model_of(
    folder: Path, plan: Plan, task: Task = "segment", seed: int = 7, name: str = "unet", **options: object
) -> Path:
    """Write a model of a plan of its own."""
    section = NetworkSection(name=name, options={"width": 4, "levels": 2, "norm": "batch", **options})
    outputs = outputs_of(task, plan)
    network = network_for(plan, section, outputs)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=random) * 9)
    written = make_model(plan=plan)
    fields = {"task": task, "network": section, "num_classes": outputs, "name": "source"}
    model = Model(written.description.changed(**fields), network, plan, written.fingerprint, "name: source\n")
    save_model(folder, model)
    return folder


def begun(task: FoldTask) -> tuple[TrainState, Initialisation]:
    state = task.new_state()
    report = initialise(task, state)
    assert report is not None
    return state, report


def equal(names: tuple[str, ...], here: dict[str, Tensor], there: dict[str, Tensor]) -> bool:
    return all(torch.equal(here[name], there[name]) for name in names)


def test_without_a_model_nothing_changes(prepared: Config) -> None:
    (task,) = train.fold_tasks(prepared, "0", "cpu")
    assert task.initial_model is None
    assert initialise(task, task.new_state()) is None


def test_a_denoisers_encoder_is_copied_bit_for_bit_and_nothing_else(prepared: Config, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", prepared, "denoise", name="autoencoder")
    task = task_of(prepared, source)
    fresh = task.new_state().network.state_dict()
    state, report = begun(task)
    here, there = state.network.state_dict(), load_file(source / "weights.safetensors")
    encoder = tuple(name for name in here if name.startswith("encoder."))
    assert report.copied == encoder
    assert not report.other_shape
    assert not report.not_there
    assert not report.not_used
    assert equal(encoder, here, there)
    assert any(name.endswith("running_var") for name in encoder)
    others = tuple(name for name in here if name not in encoder)
    assert others
    assert equal(others, here, fresh)
    assert report.parameters == sum(p.numel() for n, p in state.network.named_parameters() if n in encoder)
    # The optimiser steps the tensors that were filled, and the running mean begins with them.
    assert {id(p) for group in state.optimiser.param_groups for p in group["params"]} == {
        id(p) for p in state.network.parameters()
    }
    assert state.average is not None
    assert torch.equal(state.average[0], next(state.network.parameters()))


def test_between_segmentations_all_that_fits_is_copied(prepared: Config, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", prepared, "segment")
    state, report = begun(task_of(prepared, source))
    here = state.network.state_dict()
    assert report.copied == tuple(here)
    assert equal(report.copied, here, load_file(source / "weights.safetensors"))


def test_other_classes_and_channels_are_taken_by_name(
    prepared: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (fold,) = train.fold_tasks(prepared, "0", "cpu")
    (channel,) = fold.plan.channels
    scheme = fold.plan.normalisation[channel]
    other = fold.plan.changed(
        labels={"background": 0, "stone": 1, "right": 2, "left": 3},
        label_pairs=(),
        channels={"PT": "PET", channel: fold.plan.channels[channel]},
        normalisation={"PT": Normalisation(scheme="none"), channel: scheme},
        spacing_mm=(4.0, 2.0, 2.0),
    )
    assert list(fold.plan.labels) == ["background", "left", "right"]
    source = write_model_of(tmp_path / "model", other)
    task = task_of(prepared, source)
    fresh = task.new_state().network.state_dict()
    with caplog.at_level("WARNING"):
        state, report = begun(task)
    here, there = state.network.state_dict(), load_file(source / "weights.safetensors")
    assert set(report.in_part) == {"encoder.0.0.0.weight", "heads.0.weight", "heads.0.bias"}
    assert (report.classes, report.new_classes) == (("background", "left", "right"), ())
    assert report.channels == (channel,)
    assert not report.other_shape
    assert equal(report.copied, here, there)
    assert torch.equal(here["heads.0.weight"], there["heads.0.weight"][[0, 3, 2]])
    assert torch.equal(here["encoder.0.0.0.weight"][:, 0], there["encoder.0.0.0.weight"][:, 1])
    assert not any(torch.equal(here[name], fresh[name]) for name in report.in_part)
    assert report.parameters == sum(p.numel() for p in state.network.parameters())
    assert any("3 fit in part, by the names of classes and channels" in line for line in report.as_lines())
    assert "its voxels have 4 x 2 x 2 mm, here 2 x 2 x 2" in caplog.text
    assert "its channels are PT, " in caplog.text


def test_a_class_that_the_model_lacks_begins_with_random_weights(prepared: Config, tmp_path: Path) -> None:
    (fold,) = train.fold_tasks(prepared, "0", "cpu")
    other = fold.plan.changed(labels={"background": 0, "right": 1, "lung": 2}, label_pairs=())
    source = write_model_of(tmp_path / "model", other)
    task = task_of(prepared, source)
    fresh = task.new_state().network.state_dict()["heads.0.weight"]
    state, report = begun(task)
    here, there = state.network.state_dict()["heads.0.weight"], load_file(source / "weights.safetensors")
    # As many classes, yet other ones: the head is no plain copy.
    assert "heads.0.weight" in report.in_part
    assert torch.equal(here[[0, 2]], there["heads.0.weight"][[0, 1]])
    assert torch.equal(here[1], fresh[1])
    assert report.as_lines()[-1] == "classes known: background, right; new: left"


def test_a_channel_of_another_name_is_taken_in_order(prepared: Config, tmp_path: Path) -> None:
    (fold,) = train.fold_tasks(prepared, "0", "cpu")
    (channel,) = fold.plan.channels
    scheme = fold.plan.normalisation[channel]
    other = fold.plan.changed(channels={"FLAIR": "MR"}, normalisation={"FLAIR": scheme})
    _, report = begun(task_of(prepared, write_model_of(tmp_path / "model", other)))
    assert "encoder.0.0.0.weight" in report.copied
    assert report.channels == ()


def test_what_does_not_fit_is_said(prepared: Config, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", prepared, "denoise", name="autoencoder", levels=3, convs=[2, 1, 1])
    wider = changed(prepared, "network", options={"widths": [4, 12], "norm": "batch", "levels": 2})
    state, report = begun(task_of(wider, source))
    assert set(report.copied) | set(report.other_shape) | set(report.not_there) == {
        name for name in state.network.state_dict() if name.startswith("encoder.")
    }
    first = next(name for name in report.other_shape if name.endswith("weight"))
    assert report.other_shape[first] == ((8, 4, 3, 3, 3), (12, 4, 3, 3, 3))
    assert report.not_there
    assert all(name.startswith("encoder.2.") for name in report.not_used)
    lines = report.as_lines()
    compared = len(report.copied) + len(report.other_shape) + len(report.not_there)
    assert lines[0].startswith(f"{len(report.copied)} of {compared} tensors compared fit, {report.parameters} param")
    assert "have another shape there: encoder.1." in lines[1]
    assert "(8, 4, 3, 3, 3) instead of (12, 4, 3, 3, 3)" in lines[1]
    assert "are not there: encoder.1." in lines[2]
    assert "of it are not here: encoder.2." in lines[3]


def test_nothing_fitting_is_an_error_that_leaves_the_disk_alone(prepared: Config, tmp_path: Path) -> None:
    # Of the same depth: the norms' counters of batches fit, and count for nothing.
    source = write_model(tmp_path / "model", prepared, "denoise", name="autoencoder", width=3)
    config = changed(prepared.changed(name="unfit"), "training", init_from=str(source))
    with pytest.raises(ConfigError, match=r"nothing fits network unet: .*another shape there: encoder\.0"):
        train.run(config)
    assert not Workspace(config.workspace).run("unfit", 0).exists()


def test_a_model_that_saw_the_cases_held_out_is_refused(prepared: Config, tmp_path: Path) -> None:
    (task,) = train.fold_tasks(prepared, "0", "cpu")
    model = make_model(plan=task.plan, network=prepared.network)
    seen = model.description.changed(manifest_name=task.manifest.name, fold=1)
    for fold in (0, 1):
        description = seen.changed(fold=fold)
        save_model(
            tmp_path / f"fold_{fold}", Model(description, model.network, model.plan, model.fingerprint, "name: a\n")
        )
    with pytest.raises(ConfigError, match=r"seen the validation cases of fold 0; train it with --fold 0 too"):
        begun(task_of(prepared, tmp_path / "fold_1"))
    begun(task_of(prepared, tmp_path / "fold_{fold}"))


def test_a_model_that_is_not_there_is_an_error(prepared: Config, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"fold_0: holds no model"):
        task_of(prepared, tmp_path / "fold_{fold}").initial_model  # noqa: B018


def test_a_path_is_relative_to_the_yaml_and_a_tracked_name_is_none(tmp_path: Path) -> None:
    base = "name: a\ndata: {manifest: m.json}\ntraining:\n  init_from: "
    for said, meant in (
        ("../pretrained/fold_{fold}", str(tmp_path / "pretrained" / "fold_{fold}")),
        ("models:/denoiser@latest", "models:/denoiser@latest"),
        ("runs:/0123abcd", "runs:/0123abcd"),
        ("null", None),
    ):
        path = tmp_path / "configs" / "a.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{base}{said}\n")
        assert load_config(path).training.init_from == meant


def test_a_checkpoint_knows_its_initial_model_wherever_that_lies(prepared: Config, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", prepared, "denoise", name="autoencoder")
    task = task_of(prepared, source)
    state, _ = begun(task)
    checkpoint = tmp_path / "checkpoint.safetensors"
    save_checkpoint(checkpoint, state, task.facts)
    moved = task_of(prepared, source.rename(tmp_path / "moved"))
    resumed = moved.new_state()
    load_checkpoint(checkpoint, resumed, moved.facts)
    weights = state.network.state_dict()
    assert equal(tuple(weights), resumed.network.state_dict(), weights)

    other = task_of(prepared, write_model(tmp_path / "other", prepared, "denoise", seed=8, name="autoencoder"))
    (without,) = train.fold_tasks(prepared, "0", "cpu")
    for task in (other, without):
        with pytest.raises(TrainingError, match="belongs to a run with another initial model"):
            load_checkpoint(checkpoint, task.new_state(), task.facts)


@pytest.mark.slow
def test_a_run_records_what_it_took_and_a_resumed_one_takes_nothing_again(prepared: Config, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", prepared, "denoise", name="autoencoder")
    config = changed(prepared.changed(name="recorded"), "training", init_from=str(source))
    (folder,) = train.run(config)
    report = Initialisation.model_validate_json((folder / "init_from.json").read_bytes())
    assert (report.name, report.task) == ("source", "denoise")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    logged = {key: value for event in events for key, value in event.get("values", {}).items()}
    assert logged["medseg.init_from_sha256"] == report.sha256
    assert logged["init_from.parameters"] == str(report.parameters)

    # Where the last model is missing, a resumed run writes it from the checkpoint.
    last = folder / "models" / "last"
    weights = load_file(last / "weights.safetensors")
    assert not equal(report.copied, weights, load_file(source / "weights.safetensors"))
    (last / "model.yaml").unlink()
    (folder / "init_from.json").unlink()
    train.run(config, resume=True)
    assert not (folder / "init_from.json").exists()
    assert equal(tuple(weights), load_file(last / "weights.safetensors"), weights)
