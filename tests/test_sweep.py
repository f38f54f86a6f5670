"""medseg sweep: its YAML, its trials in a real SQLite database, and whole sweeps on phantoms."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from phantom_experiments import preprocessed
from tracking_databases import lay_database

from pipeline.cli.loading import option_checks
from pipeline.config import Config, NetworkSection
from pipeline.config_loading import dump_config, load_config
from pipeline.config_yaml import write_yaml
from pipeline.errors import ConfigError, PipelineError
from pipeline.stages import sweep
from pipeline.stages.sweeping.search import Search
from pipeline.stages.sweeping.study import Parameter, SweepStudy, load_sweep
from pipeline.tracking import read_state

SETTINGS = (
    "preprocessing.patch_size=[16, 16, 16]",
    "network.options={width: 4, levels: 2}",
    "training.budget.steps=4",
    "training.steps_per_epoch=1",
    "training.batch_size=2",
    "training.validation_every_epochs=1",
    "training.checkpoint_minutes=0.001",
)
RATE = "training.learning_rate"
# A seed by which a grid comes to the trial that learns before it comes to the one that does not.
LEARNER_FIRST = 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return preprocessed(tmp_path_factory.mktemp("sweep"), SETTINGS, cases=6, folds=3)


def written(folder: Path, config: Config | None = None, **study: Any) -> Path:
    """Write a configuration and a sweep of it."""
    text = "name: base\ndata: {manifest: m.json}\n" if config is None else dump_config(config)
    (folder / "base.yaml").write_text(text)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": "rates", "config": "base.yaml", **study}, sort_keys=False))
    return path


def test_every_error_of_a_sweep_has_its_place(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(
        "name: rates\nconfig: base.yaml\ntrails: 3\nsampler: tpee\nparameters:\n"
        "  training.learning_rate: {low: 1, high: 1}\n  network.options.width: {choices: [4], lo: 2}\n"
    )
    with pytest.raises(ConfigError) as raised:
        load_sweep(path)
    assert str(raised.value).splitlines() == [
        f"{path}:3:1: trails: unknown key, did you mean 'trials'?",
        f"{path}:4:1: sampler: Input should be 'tpe', 'random' or 'grid'",
        f"{path}:6:3: parameters.training.learning_rate: "
        "expected choices, or numbers low and high, the smaller one first",
        f"{path}:7:41: parameters.network.options.width.lo: unknown key, did you mean 'low'?",
    ]


def test_settings_that_the_configuration_does_not_take_are_named_before_anything_is_trained(tmp_path: Path) -> None:
    parameters = {
        "training.learning_rat": {"low": 0.1, "high": 1.0},
        RATE: {"low": -0.5, "high": 1.0},
        "network.options.widht": {"choices": [8]},
        "workspace": {"choices": ["a"]},
    }
    path = written(tmp_path, parameters=parameters)
    with pytest.raises(ConfigError) as raised:
        load_sweep(path, option_checks)
    said = str(raised.value)
    assert "parameters.training.learning_rat: with 0.1: training.learning_rat: unknown key, did you mean" in said
    assert f"parameters.{RATE}: with -0.5: {RATE}: expected a number above 0" in said
    assert "did you mean 'width'?" in said
    assert "parameters.workspace: says where or on what is trained, and cannot be searched" in said
    assert f"{RATE}: with 1.0" not in said


def test_options_that_not_every_network_of_the_sweep_has_are_refused(tmp_path: Path) -> None:
    names = {"network.name": {"choices": ["unet", "dynunet"]}}
    path = written(tmp_path, parameters={"network.options.dropout": {"choices": [0.1]}, **names})
    with pytest.raises(ConfigError) as raised:
        load_sweep(path, option_checks)
    (line,) = str(raised.value).splitlines()
    assert (
        "parameters.network.options.dropout: with 0.1 and network.name 'dynunet': network.options.dropout: dyn" in line
    )
    assert line.endswith("; vary both together, as choices of network")
    path = written(tmp_path, set={"network.options.dropout": 0.1}, parameters=names)
    with pytest.raises(ConfigError, match=r"network\.name: with 'dynunet': --set network\.options\.dropout=0\.1"):
        load_sweep(path, option_checks)
    path = written(tmp_path, parameters={"network.options.width": {"choices": [16, 24]}, **names})
    assert load_sweep(path, option_checks).planned_trials == 20
    path = written(tmp_path, set={"network.options": None}, parameters={"network.options.width": {"choices": [16]}})
    with pytest.raises(ConfigError, match=r"width: lies in network\.options, which set empties"):
        load_sweep(path, option_checks)


def test_a_trial_and_a_yaml_that_says_what_it_does_are_one(tmp_path: Path) -> None:
    parameters = {
        "network.options.width": {"choices": [16, 24]},
        "network.name": {"choices": ["unet", "dynunet"]},
        "training.loss": {"choices": ["dice_ce", "tversky"]},
        "training.init_from": {"choices": ["other/fold_0", "pre/fold_0"]},
    }
    settings = {"training.loss_options.smooth": 2, "data.root": "images"}
    study = load_sweep(written(tmp_path, set=settings, parameters=parameters))
    values = {key: parameter.extremes[1] for key, parameter in study.parameters.items()}
    trial = study.config_of(values, "trial")
    assert trial.network == NetworkSection(name="dynunet", options={"width": 24})
    assert (trial.training.loss, trial.training.loss_options) == ("tversky", {"smooth": 2})
    assert trial.training.init_from == str(tmp_path.resolve() / "pre" / "fold_0")
    assert trial.data.root == tmp_path.resolve() / "images"
    path = tmp_path / "elsewhere" / "best.yaml"
    path.parent.mkdir()
    path.write_text(write_yaml({"extends": str(study.config), **study.said_of(values, "trial")}))
    assert load_config(path) == trial


@pytest.mark.parametrize(
    ("parameter", "grid"),
    [
        (Parameter(choices=("a", [1, 2])), ["a", [1, 2]]),
        (Parameter(low=2, high=4), [2, 3, 4]),
        (Parameter(low=2, high=7, step=2), [2, 4, 6]),
        (Parameter(low=0.0, high=0.3, step=0.1), [0.0, 0.1, 0.2, pytest.approx(0.3)]),
        (Parameter(low=0.5, high=4.0), None),
        (Parameter(low=1, high=4, log=True), None),
    ],
)
def test_the_values_of_a_grid(parameter: Parameter, grid: list[Any] | None) -> None:
    assert parameter.grid == grid


def search_of(folder: Path, base: str = "as it was", **settings: Any) -> Search:
    """Return the trials of a sweep without trainings."""
    parameters = {"a": Parameter(choices=(1, [2, 3])), "b": Parameter(low=1, high=3)}
    study = SweepStudy.model_validate({"name": "s", "config": "c.yaml", "parameters": parameters, **settings})
    search = Search(study, folder)
    search.begin(base)
    return search


def test_a_grid_is_gone_through_once_by_two_processes_and_values_keep_their_types(tmp_path: Path) -> None:
    searches = [search_of(tmp_path, sampler="grid", trials=50) for _ in range(2)]
    seen = []
    for number in range(6):
        trial = searches[number % 2].next_trial()
        assert trial is not None
        trial.completed(number / 10)
        seen.append(json.dumps([trial.values["a"], trial.values["b"]]))
    assert sorted(seen) == sorted(json.dumps([a, b]) for a in (1, [2, 3]) for b in (1, 2, 3))
    assert searches[0].next_trial() is None
    assert max(searches[1].outcomes(), key=lambda outcome: outcome.value or 0).run == 5


def test_a_hopeless_trial_is_pruned_and_a_failed_one_is_listed(tmp_path: Path) -> None:
    search = search_of(tmp_path, trials=4, startup_trials=2, sampler="random")
    for value in (0.8, 0.9):
        good = search.next_trial()
        assert good is not None
        assert not good.is_hopeless(0.5, value)
        good.completed(value)
    bad, broken = search.next_trial(), search.next_trial()
    assert bad is not None and broken is not None
    assert bad.is_hopeless(0.5, 0.1)
    bad.pruned()
    broken.failed("no memory")
    assert search.next_trial() is None
    assert [(outcome.state, outcome.error) for outcome in search.outcomes()][2:] == [
        ("pruned", None),
        ("failed", "no memory"),
    ]
    with pytest.raises(ConfigError, match="are of other parameters, settings or data"):
        search_of(tmp_path, trials=4, startup_trials=2, sampler="tpe")
    with pytest.raises(ConfigError, match=r"of the sweep or of c\.yaml"):
        search_of(tmp_path, "edited", trials=4, startup_trials=2, sampler="random")


def test_trainings_that_are_validated_at_different_points_are_held_against_one_another(tmp_path: Path) -> None:
    search = search_of(tmp_path, trials=6, startup_trials=2, sampler="random")
    # By the clock one training's epochs end elsewhere than another's.
    for points in ({0.21: 0.4, 0.63: 0.7, 1.0: 0.8}, {0.28: 0.6, 0.83: 0.85, 1.0: 0.9}):
        earlier = search.next_trial()
        assert earlier is not None
        assert not any(earlier.is_hopeless(done, value) for done, value in points.items())
        earlier.completed(max(points.values()))
    late, slow, good = (search.next_trial() for _ in range(3))
    assert late is not None and slow is not None and good is not None
    assert not late.is_hopeless(0.1, 0.1)  # nobody was measured so early
    assert not late.is_hopeless(0.25, 0.41)  # the one that was by then had 0.4
    assert late.is_hopeless(0.7, 0.6)  # 0.7 and, by then, 0.6: their median is 0.65
    assert not slow.is_hopeless(0.7, 0.66)
    assert not slow.is_hopeless(0.75, 0.1)  # what it had at its best counts
    assert not good.is_hopeless(0.9, 0.9)


DIES = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_sweep import search_of
trial = search_of(Path(sys.argv[1]), trials=2).next_trial()
trial.is_hopeless(0.25, 0.5)
print(trial.run, trial.values, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_a_trial_whose_process_died_goes_on_and_is_given_up_after_the_third_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DIES, str(tmp_path), str(Path(__file__).parent)]
    said = [subprocess.run(command, capture_output=True, text=True, check=False).stdout for _ in range(3)]
    assert said[0].startswith("0 {'a': ")
    assert said[0] == said[1] == said[2]
    search = search_of(tmp_path, trials=2)
    other = search.next_trial()
    assert other is not None
    assert other.run != 0
    other.completed(0.5)
    assert search.next_trial() is None
    first, second = search.outcomes()
    assert (first.run, first.state, first.error) == (0, "failed", "its process died 3 times")
    assert second.state == "complete"


def test_without_optuna_the_command_says_what_to_install(tmp_path: Path) -> None:
    path = written(tmp_path, parameters={RATE: {"low": 0.1, "high": 1.0}})
    code = "import sys; sys.modules['optuna'] = None; from pipeline.cli import main; main()"
    command = [sys.executable, "-c", code, "sweep", str(path), "--workspace", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    install = "pip install '.[sweep]' in medseg's checkout, or pip install optuna"
    assert done.stderr == f"error: medseg sweep needs Optuna: {install}\n"


def test_choosing_no_process_for_a_device_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, load_config(written(tmp_path).parent / "base.yaml"), parameters={RATE: {"choices": [0.1]}})
    with pytest.raises(PipelineError, match="at least one job for each"):
        sweep.shared_out("cuda:0,cuda:1", 1)
    assert load_sweep(path).planned_trials == 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::mlflow")
def test_a_sweep_prunes_lists_failures_and_writes_a_configuration_that_trains(prepared: Config, tmp_path: Path) -> None:
    config = prepared.changed(workspace=prepared.data.manifest.parent / "work")
    # Of the grid's four points two have no model to begin with, and one learns nothing.
    parameters = {RATE: {"choices": [0.02, 1.0e-9]}, "training.init_from": {"choices": [None, "/nowhere"]}}
    settings = {"training.budget.steps": 40, "training.steps_per_epoch": 10}
    study = {"sampler": "grid", "startup_trials": 1, "trials": 4, "set": settings, "seed": LEARNER_FIRST}
    path = written(tmp_path, config, parameters=parameters, **study)
    report = sweep.run(path, device="cpu")
    states = [outcome.state for outcome in report.outcomes]
    assert sorted(states) == ["complete", "failed", "failed", "pruned"]
    assert [outcome.error for outcome in report.outcomes if outcome.error] == 2 * [
        next(outcome.error for outcome in report.outcomes if outcome.error)
    ]
    assert "training.init_from: /nowhere: holds no model" in report.as_text()
    assert report.best is not None
    assert report.best.values[RATE] == 0.02
    best = load_config(report.folder / "best.yaml")
    assert best.training.learning_rate == report.best.values[RATE]
    assert best.data.manifest == config.data.manifest
    assert best == load_sweep(path).config_of(report.best.values, "rates-best")
    again = sweep.run(path, device="cpu")
    assert again.outcomes == report.outcomes

    from mlflow import MlflowClient

    state = read_state(report.folder)
    client = MlflowClient(tracking_uri=state.uri)
    runs = client.search_runs([str(state.experiment_id)])
    trials = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == state.run_id]
    assert sorted(run.data.tags["medseg.sweep.state"] for run in trials) == sorted(states)
    ends = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
    assert all(run.info.status == ends[run.data.tags["medseg.sweep.state"]] for run in trials)
    assert all({RATE, "training.init_from"} <= set(run.data.params) for run in trials)


@pytest.mark.slow
def test_a_killed_sweep_of_two_processes_goes_on_where_it_was(prepared: Config, tmp_path: Path) -> None:
    config = prepared.changed(workspace=tmp_path / "work")
    lay_database(config.workspace)
    parameters = {RATE: {"low": 0.001, "high": 0.1, "log": True}}
    path = written(tmp_path, config, parameters=parameters, trials=3, pruner="none", set={"training.budget.steps": 30})
    command = [sys.executable, "-m", "pipeline", "sweep", str(path), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, env=environment)
    checkpoint = config.workspace / "runs" / "rates-trial-000" / "fold_0" / "checkpoint.safetensors"
    end = time.monotonic() + 120
    while not checkpoint.exists():
        assert time.monotonic() < end and killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = subprocess.run([*command, "--jobs", "2"], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on at step" in done.stderr
    found = json.loads((config.workspace / "sweeps" / "rates" / "sweep.json").read_text())
    assert [outcome["state"] for outcome in found["outcomes"]] == ["complete"] * 3
    assert 0 in [outcome["run"] for outcome in found["outcomes"]]
    assert len(list((config.workspace / "runs").glob("rates-trial-*"))) == 3
    assert not list((config.workspace / "runs").rglob("earlier_*"))
