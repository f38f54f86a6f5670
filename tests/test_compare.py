"""`medseg compare` on phantoms: two tiny networks go through the real stages, then stand beside each other."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_tracking_server import page, port, server  # noqa: F401, the fixture `port`
from tiny_models import make_model
from tracking_databases import lay_database

from pipeline.config import Config, NetworkSection
from pipeline.config_loading import dump_config, load_config, packaged
from pipeline.data.manifest import load_manifest
from pipeline.data.phantoms import write_phantom_dataset
from pipeline.data.plan import Plan
from pipeline.errors import ConfigError, EvaluationError, ModelError, PipelineError
from pipeline.model import model_digest, save_model
from pipeline.networks import NETWORKS
from pipeline.stages import compare, evaluate, manifest, preprocess
from pipeline.stages.fold.identity import configuration_digest
from pipeline.stages.member_runs import budget_of
from pipeline.stages.models import BEST, FACTS, LAST
from pipeline.stages.study import load_study, study_runs
from pipeline.stages.workspace import Workspace
from pipeline.tracking import (
    RunLog,
    compare_url,
    read_state,
    runs_url,
    send_pending,
    tracked_runs,
    training_seconds,
)

ROOT = Path(__file__).parents[1]

CONFIG = """
extends: {demo}
name: {name}
data: {{manifest: mine.json}}
preprocessing: {{patch_size: [16, 16, 16]}}
network: {{options: {{width: {width}, levels: 2}}}}
training:
  budget: {{steps: 2}}
  steps_per_epoch: 1
  validation_every_epochs: 2
evaluation: {{picture_cases: 1}}
"""
STUDY = """
name: widths
configs: [narrow.yaml, wide.yaml]
seeds: [1]
folds: [0]
"""


def write_configurations(folder: Path) -> list[Config]:
    """Write phantoms, two configurations and their study, and return the configurations."""
    manifest.run(write_phantom_dataset(folder / "set", cases=6), folder / "mine.json", folds=2)
    (folder / "study.yaml").write_text(STUDY)
    for name, width in (("narrow", 4), ("wide", 6)):
        (folder / f"{name}.yaml").write_text(CONFIG.format(demo=packaged("demo.yaml"), name=name, width=width))
    lay_database(folder / "work")
    paths = (folder / "narrow.yaml", folder / "wide.yaml")
    return [load_config(path).changed(workspace=folder / "work") for path in paths]


def write_run(config: Config, plan: Plan) -> None:
    """Write the run folder of fold 0 as training leaves it, with random weights and untracked, and evaluate it."""
    data, folder = load_manifest(config.data.manifest), Workspace(config.workspace).run(config.name, 0)
    made = make_model(plan=plan, network=config.network)
    description = made.description.changed(
        name=config.name, manifest_name=data.name, manifest_digest=data.digest(), fold=0, step=2
    )
    for model in (BEST, LAST):
        save_model(folder / model, replace(made, description=description, config_text=dump_config(config)))
    (folder / "config.yaml").write_text(dump_config(config))
    facts = {"configuration": configuration_digest(config), "manifest": data.digest()}
    (folder / FACTS).write_text(json.dumps(facts))
    evaluate.run(str(folder), device="cpu", workspace=config.workspace)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study of two configurations, each with an evaluated run in its folder `work`."""
    folder = tmp_path_factory.mktemp("compare")
    for config in write_configurations(folder):
        write_run(config, preprocess.run(config).plan)
    return folder


@pytest.fixture
def study(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change, as the current folder."""
    shutil.copytree(evaluated, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    return tmp_path / "study"


def fold(name: str) -> str:
    return f"work/runs/{name}/fold_0"


def test_two_runs_side_by_side(study: Path) -> None:
    report = compare.run([fold("narrow"), fold("wide")])
    assert report.folder == study / "work" / "comparisons" / "narrow_vs_wide"
    lines = {
        name: list(csv.DictReader((report.folder / f"{name}.csv").read_text().splitlines()))
        for name in ("comparison", "pairs", "cases")
    }
    narrow, wide = lines["comparison"]
    assert (narrow["member"], narrow["budget"], narrow["steps"]) == ("narrow", "2 steps", "2")
    assert int(wide["parameters"]) > int(narrow["parameters"]) > 100
    assert narrow["training_seconds"] == ""  # it was not tracked
    assert float(narrow["seconds_per_case"]) > 0
    assert 50e6 < float(narrow["peak_memory_bytes"]) < 20e9
    assert narrow["device"] == "cpu"
    own = list(csv.DictReader((study / fold("wide") / "evaluation/fold/cases.csv").read_text().splitlines()))
    assert [row["dice"] for row in lines["cases"] if row["member"] == "wide"] == [row["dice"] for row in own]
    assert {(row["first"], row["second"]) for row in lines["pairs"]} == {("narrow", "wide")}
    for name in ("comparison.html", "comparison.md"):
        text = (report.folder / name).read_text()
        assert "network.options.width" in text
        assert "narrow − wide" in text
    assert str(report.folder / "comparison.html") in report.as_text()


def test_experiments_evaluations_and_a_study_say_the_same(study: Path) -> None:
    runs = compare.run([fold("narrow"), fold("wide")]).result
    experiments = compare.run(["work/runs/narrow", f"{fold('wide')}/evaluation/fold"]).result
    found = compare.run(["study.yaml"], workspace=study / "work", baseline="wide", out=study / "here")
    assert (found.folder, found.result.name, found.result.baseline) == (study / "here", "widths", "wide")
    assert str(runs.pairs) == str(experiments.pairs) == str(found.result.pairs)  # nan differs from itself


def test_a_run_may_be_named_twice_and_is_told_apart(study: Path) -> None:
    shutil.copytree(fold("narrow"), "again/fold_0")
    result = compare.run([fold("narrow"), "again"]).result
    assert [member.name for member in result.members] == [f"narrow ({fold('narrow')})", "narrow (again)"]
    known = [pair for pair in result.pairs if pair.difference.cases]
    assert known
    assert all(pair.p == 1.0 and pair.difference.mean == 0.0 for pair in known)


def test_what_differs_is_refused(study: Path) -> None:
    path = Path(fold("wide")) / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("steps: 2\n", "steps: 3\n"))
    with pytest.raises(EvaluationError, match="different budgets: narrow: 2 steps; wide: 3 steps"):
        compare.run([fold("narrow"), fold("wide")])
    assert compare.run([fold("narrow"), fold("wide")], allow_different_budgets=True).result.warnings
    path.write_text(text)
    for model in ("best", "last"):
        card = Path(fold("wide")) / "models" / model / "model.yaml"
        card.write_text(card.read_text().replace("fold: 0\n", "fold: 1\n"))
    with pytest.raises(EvaluationError, match="different folds: narrow: 0, 1 seed; wide: 1, 1 seed"):
        compare.run([fold("narrow"), fold("wide")])


def test_a_missing_or_failed_case_is_refused(study: Path) -> None:
    evaluation = Path(fold("wide")) / "evaluation" / "fold"
    header, *lines = (evaluation / "cases.csv").read_text().splitlines()
    gone = lines[0].split(",")[0]
    kept = [line for line in lines if not line.startswith(f"{gone},")]
    (evaluation / "cases.csv").write_text("\n".join([header, *kept]) + "\n")
    with pytest.raises(EvaluationError, match=f"wide, fold 0: without {gone}"):
        compare.run([fold("narrow"), fold("wide")])
    summary = json.loads((evaluation / "summary.json").read_text())
    (evaluation / "summary.json").write_text(json.dumps({**summary, "failures": {gone: "cut short"}}))
    with pytest.raises(EvaluationError, match=f"wide, fold 0: case {gone} failed: cut short"):
        compare.run([fold("narrow"), fold("wide")])


def test_unfinished_and_unevaluated_runs_are_named_together(study: Path) -> None:
    shutil.rmtree(Path(fold("narrow")) / "models" / "last")
    card = Path(fold("wide")) / "models" / "best" / "model.yaml"
    card.write_text(card.read_text().replace("created: '2", "created: '3"))  # trained anew since
    with pytest.raises(EvaluationError) as error:
        compare.run([fold("narrow"), fold("wide")])
    first, second = str(error.value).splitlines()
    assert "narrow/fold_0: its training is not finished" in first
    assert "wide/fold_0: its best model is not evaluated on --cases fold; run `medseg evaluate" in second
    with pytest.raises(ModelError, match="nothing: neither a run's folder"):
        compare.run([fold("narrow"), "nothing"])
    with pytest.raises(PipelineError, match="name its YAML"):
        compare.run([fold("narrow"), fold("wide")], make=True)


def test_a_studys_missing_runs_are_named_with_their_commands(study: Path) -> None:
    Path("study.yaml").write_text(STUDY.replace("[1]", "[1, 2]") + "set: {training.learning_rate: 0.01}\n")
    runs = study_runs(load_study(Path("study.yaml")), study / "work")
    # A study's own settings and seeds never stand in the way of the configuration's own run.
    assert [found.config.name for found in runs] == [
        *("narrow-widths", "narrow-widths-seed2"),
        *("wide-widths", "wide-widths-seed2"),
    ]
    assert {found.config.training.learning_rate for found in runs} == {0.01}
    assert [found.config.seed for found in runs] == [1, 2, 1, 2]
    with pytest.raises(EvaluationError) as error:
        compare.run(["study.yaml"], workspace=study / "work")
    text = str(error.value)
    assert text.count("was not trained yet") == 4
    assert "--fold 0 --set training.learning_rate=0.01 --set seed=2 --set name=wide-widths-seed2 --workspace" in text
    assert "compare STUDY --run" in text


def test_a_run_of_other_settings_is_not_the_studys(study: Path) -> None:
    path = study / "narrow.yaml"
    path.write_text(path.read_text().replace("validation_every_epochs: 2", "validation_every_epochs: 1"))
    with pytest.raises(EvaluationError, match="narrow/fold_0: was trained with other settings than the study's"):
        compare.run(["study.yaml"], workspace=study / "work")


def test_a_run_on_other_data_is_not_the_studys(study: Path) -> None:
    mine = study / "mine.json"
    content = json.loads(mine.read_text())
    swapped = {0: 1, 1: 0}
    content["cases"] = [{**case, "fold": swapped.get(case.get("fold"))} for case in content["cases"]]
    mine.write_text(json.dumps(content))
    with pytest.raises(EvaluationError, match=r"wide/fold_0: was trained on other data than .*mine\.json names now"):
        compare.run(["study.yaml"], workspace=study / "work")


@pytest.mark.slow
def test_a_study_is_compared_on_the_cases_that_are_asked_for(study: Path) -> None:
    with pytest.raises(EvaluationError, match=r"wide/fold_0: its best model is not evaluated on --cases all"):
        compare.run(["study.yaml"], cases="all", workspace=study / "work")
    for name in ("narrow", "wide"):
        evaluate.run(fold(name), cases="all", device="cpu", workspace=study / "work")
    members = compare.run(["study.yaml"], cases="all", workspace=study / "work").result.members
    assert [run.evaluated_on for member in members for run in member.runs] == ["all", "all"]
    with pytest.raises(PipelineError, match=r"--run evaluates what it makes on --cases fold, got --cases all"):
        compare.run(["study.yaml"], make=True, cases="all", workspace=study / "work")


def test_what_a_study_sets_means_the_same_from_any_folder_and_in_any_order(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "set: {network.options.width: 8, network.name: dynunet, training.init_from: pre/fold_0}\n"
    Path("study.yaml").write_text(STUDY + text)
    monkeypatch.chdir(tmp_path)
    for found in study_runs(load_study(study / "study.yaml"), study / "work"):
        assert found.config.network == NetworkSection(name="dynunet", options={"width": 8})
        assert found.config.training.init_from == str(study.resolve() / "pre" / "fold_0")
        assert load_config(found.path, found.overrides).training == found.config.training


def test_a_study_of_unequal_budgets_is_refused_before_anything_is_trained(study: Path) -> None:
    path = study / "narrow.yaml"
    path.write_text(path.read_text().replace("steps: 2}", "steps: 5}"))
    with pytest.raises(EvaluationError, match="different budgets: narrow: 5 steps; wide: 2 steps"):
        compare.run(["study.yaml"], make=True, workspace=study / "new")
    assert not (study / "new").exists()


def test_a_run_that_began_with_another_model_is_not_the_studys(study: Path) -> None:
    def begin(model: Path) -> None:
        facts = Path(fold("narrow")) / FACTS
        known = json.loads(facts.read_text())
        facts.write_text(json.dumps({**known, "initial model": model_digest(model)}))

    path = study / "narrow.yaml"
    path.write_text(path.read_text().replace("training:\n", f"training:\n  init_from: {study / fold('wide')}\n"))
    begin(study / fold("narrow") / BEST)
    with pytest.raises(
        EvaluationError, match=r"narrow/fold_0: began with another model than training\.init_from names"
    ):
        compare.run(["study.yaml"], workspace=study / "work")
    begin(study / fold("wide") / BEST)
    assert compare.run(["study.yaml"], workspace=study / "work").result.cases


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nconfigs: [narrow.yaml]\n", "study.yaml:2:1: configs: .*at least 2"),
        (
            "name: a\nconfigs: [narrow.yaml, wide.yaml]\nseed: 1\n",
            "study.yaml:3:1: seed: unknown key, did you mean 'seeds'\\?",
        ),
        ("name: a\nconfigs: [narrow.yaml, wide.yaml]\nbaseline: c\n", "baseline c: is none of narrow, wide"),
        ("name: a\nconfigs: [narrow.yaml, narrow.yaml]\n", "named twice: .*narrow-seed0/fold_0"),
        ("name: a\nconfigs: [narrow.yaml, none.yaml]\n", "none.yaml: cannot be read"),
    ],
)
def test_a_wrong_study_is_refused(study: Path, text: str, message: str) -> None:
    Path("study.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        compare.run(["study.yaml"])


def test_the_hippocampus_study_names_configurations_beside_it() -> None:
    study = load_study(ROOT / "configs" / "studies" / "hippocampus_architectures.yaml")
    assert {path.parent for path in study.configs} == {ROOT / "configs"}
    runs = study_runs(study, None)
    assert len(runs) == len(study.configs)
    # Every network that segments; the autoencoder is there to denoise.
    assert {found.config.network.name for found in runs} == NETWORKS.keys() - {"autoencoder"}
    assert len({budget_of(found.config.training) for found in runs}) == 1


def test_the_time_of_a_training_leaves_pauses_out(tmp_path: Path) -> None:
    RunLog.create(tmp_path, uri=None, workspace=tmp_path, experiment="e", name="n").close()
    assert training_seconds(tmp_path) is None
    kinds = {1000: "params", 3000: "metrics", 63_000: "resume", 64_000: "metrics", 66_000: "finish", 99_000: "metrics"}
    events = [{"time_ms": time_ms, "kind": kind, "status": "FINISHED"} for time_ms, kind in kinds.items()]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert training_seconds(tmp_path) == 2.0 + 3.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study that `medseg compare --run` has trained, evaluated, compared and tracked."""
    folder = tmp_path_factory.mktemp("made")
    write_configurations(folder)
    done = compare_study(folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("was not trained yet") == 2
    assert (folder / "work/comparisons/widths/comparison.html").is_file()
    assert send_pending(*tracked_runs(folder / "work"))
    return folder


def compare_study(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "compare", str(folder / "study.yaml"), "--device", "cpu"]
    command += ["--run", "--workspace", str(folder / "work")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_what_is_there_of_a_study_is_left_alone(made: Path) -> None:
    weights = made / "work" / "runs" / "narrow" / "fold_0" / "models/best/weights.safetensors"
    before = weights.stat().st_mtime_ns
    again = compare_study(made)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is there") == 2
    assert weights.stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning")
def test_a_comparison_is_a_run_of_its_own_in_mlflow_that_links_its_members(made: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{made / 'work' / 'mlflow.db'}")
    runs = {found.info.run_name: found for found in client.search_runs(["1"])}
    found, members = runs["compare widths"], [runs[f"{name} fold 0"] for name in ("narrow", "wide")]
    assert found.info.status == "FINISHED"
    assert found.data.tags["medseg.compared_runs"].split() == [member.info.run_id for member in members]
    assert f"(#/experiments/1/runs/{members[0].info.run_id})" in found.data.tags["mlflow.note.content"]
    assert found.data.params["baseline"] == "narrow"
    assert "comparison/dice/narrow" in found.data.metrics
    top = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"comparison.html", "comparison.md", "boxes.png", "scatter.png", "tables"} <= top
    for member in members:
        logged = member.data.metrics
        assert float(member.data.params["network.parameters"]) == logged["network/parameters"] > 0
        assert {"evaluation/fold/seconds_per_case", "evaluation/fold/peak_memory_gib"} <= logged.keys()
    colours = [member.data.tags["mlflow.runColor"] for member in members]
    assert colours[0] != colours[1]
    targets = [f"runs:/{member.info.run_id}" for member in members]
    by_id = compare.run(targets, workspace=made / "work", out=made / "by_id").result
    assert all(member.runs[0].seconds and member.runs[0].steps == 2 for member in by_id.members)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::mlflow")
def test_mlflows_pages_show_a_studys_runs_side_by_side(made: Path, tmp_path: Path, port: int) -> None:  # noqa: F811
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed here")
    shutil.copy(made / "work" / "mlflow.db", tmp_path / "server.db")
    states = [read_state(made / "work" / "runs" / name / "fold_0") for name in ("narrow", "wide")]
    experiment_id, ids = str(states[0].experiment_id), [str(state.run_id) for state in states]
    base = f"http://127.0.0.1:{port}"
    with server(tmp_path, port):
        charts = page(chromium, compare_url(base, experiment_id), tmp_path / "profile")
        table = page(chromium, runs_url(base, experiment_id, ids), tmp_path / "profile")
    # A chart is drawn when it is scrolled to; its section stands there by name.
    for text in ("narrow fold 0", "wide fold 0", "evaluation/fold/dice", "calibration/ece"):
        assert text in charts
    for text in ("narrow fold 0", "wide fold 0", "network.parameters", "evaluation/fold/dice/right"):
        assert text in table
