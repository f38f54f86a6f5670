"""Folds trained with the options of the training section: all at once through the stages, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from phantom_experiments import changed, preprocessed, task_of

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.stages import train
from pipeline.stages.fold import budgeting
from pipeline.stages.fold.diagnosis import FoldDiagnosis
from pipeline.stages.fold.hooks import FoldHooks
from pipeline.tracking import RunLog
from pipeline.training import budget
from pipeline.training.diagnosis.stopwatch import Stopwatch
from pipeline.training.loop import Batch, train_step

SETTINGS = (
    "preprocessing.patch_size=[16, 16, 16]",
    "network.options={width: 4, levels: 2, norm: batch}",
    "training.budget.steps=3",
    "training.steps_per_epoch=2",
    "training.validation_every_epochs=2",
    "training.accumulate=2",
    "training.activation_checkpointing=true",
    "training.optimiser=sgd",
    "training.optimiser_options={momentum: 0.9}",
    "training.learning_rate=null",
    "training.encoder_learning_rate_factor=0.5",
    "training.schedule=one_cycle",
    "training.ema_decay=0.5",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An experiment on preprocessed phantoms, three steps long."""
    return preprocessed(tmp_path_factory.mktemp("options"), SETTINGS, cases=4, folds=2)


def metrics_of(folder: Path) -> dict[str, float]:
    """Return the last value of each metric of a run."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return {key: value for e in events if e["kind"] == "metrics" for key, value in e["values"].items()}


@pytest.mark.slow
def test_a_fold_is_trained_with_every_option(prepared: Config) -> None:
    (folder,) = train.run(prepared.changed(name="every"))
    found = metrics_of(folder)
    # Step 2 of 3, of which 30 % rise: half a cosine between step 1 at the peak of 1e-2 and the end of the budget.
    assert found["train/learning_rate"] == pytest.approx((1e-2 + 1e-2 / 25e4) / 2)
    assert 0 < found["train/gradient_norm"] < float("inf")
    assert (folder / "models/last/model.yaml").exists()


def test_a_fold_recomputes_what_it_forgot_and_steps_as_if_it_had_not(prepared: Config) -> None:
    states = []
    for recomputed in (True, False):
        task = task_of(changed(prepared, "training", activation_checkpointing=recomputed))
        state = task.new_state()
        batches = task.batches(state.network)
        for step in range(2):
            train_step(state, batches, task.schedule(state)(step, 3), task.settings)
        batches.close()
        states.append(state.network.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_a_probe_takes_whole_steps_and_leaves_the_training_alone(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgeting, "MOST_PROBE_STEPS", 1)
    task = task_of(prepared.changed(name="probed"))
    state = task.new_state()
    before = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    batches = task.batches(state.network)
    tracked = RunLog.create(task.folder, uri=None, workspace=prepared.workspace, experiment="x", name="x")
    hooks = FoldHooks(task, state, tracked, FoldDiagnosis(task, state, batches, Stopwatch(task.device)))
    taken = []

    def recording(number: int) -> Batch:
        taken.append(number)
        return batches(number)

    costs = budgeting.probe(hooks, recording, pictured=True)
    batches.close()
    assert taken == list(range(2 * (budget.WARMUP_STEPS + 1)))
    assert min(costs.step_s, costs.epoch_end_s, costs.validation_s) > 0
    assert state.step == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in state.network.state_dict().items())


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"optimiser_options": {"beta1": 0.5}}, "training.optimiser sgd: .*no such option.*it has momentum, nesterov"),
        (
            {"loss_options": {"class_weights": [1.0, 2.0]}},
            "training.loss_options.class_weights: 2 numbers for 3 outputs",
        ),
        ({"schedule_options": {"power": 2.0}}, "training.schedule one_cycle: .*it has div_factor, final_div_factor"),
    ],
)
def test_options_of_another_entry_are_refused(prepared: Config, values: dict[str, object], why: str) -> None:
    task = task_of(changed(prepared, "training", **values))
    with pytest.raises(ConfigError, match=why):
        task.schedule(task.new_state())


def test_a_network_without_an_encoder_has_one_rate(prepared: Config) -> None:
    config = changed(prepared, "network", name="simple_fcn", options={"width": 4})
    with pytest.raises(ConfigError, match="the network has no encoder that is told apart; leave it 1"):
        task_of(config).new_state()
