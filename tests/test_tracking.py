import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image
from tiny_models import NEAREST_MEAN, make_model, make_plan, nearest_mean
from tracking_databases import lay_database

from pipeline.errors import ModelError, PipelineError
from pipeline.geometry import Geometry
from pipeline.model import save_model
from pipeline.networks import NETWORKS
from pipeline.stages import sync, ui
from pipeline.tracking import (
    RunLog,
    all_folds_url,
    environment_tags,
    fetch_model,
    pending,
    prepare_pages,
    read_state,
    send_pending,
    start_follower,
)
from pipeline.tracking.log import EVENTS, flatten, locked, read_events, safe_name, tracking_uri, write_state
from pipeline.volumes.volume import Volume
from pipeline.volumes.writing import write_image

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")  # what it says of its own dependencies


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with an MLflow database of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lay_database(tmp_path)
    return tmp_path


def new_run(workspace: Path, name: str = "wide", uri: str | None = None) -> RunLog:
    """Create a fold's run under its parent, as training does."""
    folder = workspace / "runs" / name
    place = {"uri": uri, "workspace": workspace, "experiment": "phantoms"}
    RunLog.ensure_parent(folder, name=name, **place)
    return RunLog.create(folder / "fold_0", name=f"{name}/fold_0", parent=folder, tags={"who": "test"}, **place)


def log_everything(run: RunLog) -> None:
    """Log one event of each kind, and three epochs."""
    model = run.folder / "models" / "best"
    model.mkdir(parents=True)
    (model / "weights.safetensors").write_bytes(b"weights")
    (run.folder / "summary.html").write_text("<p>0.9</p>")
    run.params({"network": {"name": "unet", "widths": [16, 32]}, "note": "x" * 10_000})
    run.dataset("phantoms", "ab" * 32, "generated", ["a", "b"], "training")
    run.dataset("phantoms", "ab" * 32, "generated", ["c"], "validation")
    for epoch in range(3):
        run.metrics({"train/loss": 1 / (epoch + 1), "val/dice/left (L)": math.nan}, epoch)
    Image.new("RGB", (300, 200)).save(run.folder / "worst.png")
    run.image("val/worst", run.folder / "worst.png", step=2)
    run.table("cases", {"case": ["a", "b"], "dice": [0.5, math.nan]})
    run.artifact(run.folder / "summary.html")
    run.artifact(run.folder / "models", to="kept")
    run.model(model, register_as="phantoms", alias="best")
    run.finish()


def test_the_write_side_needs_no_mlflow_and_no_torch() -> None:
    code = "import sys, pipeline.tracking as t; print(*{'mlflow', 'torch', 'numpy', 'requests'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_an_event_is_a_line(tmp_path: Path) -> None:
    run = RunLog.create(tmp_path / "run", uri="http://127.0.0.1:1", workspace=tmp_path, experiment="e", name="n")
    run.metrics({"loss": 0.5}, step=3)
    run.params({"a": {"b": 1, "c": [1, 2]}, "none": None})
    events = [json.loads(line) for line in (run.folder / EVENTS).read_text().splitlines()]
    assert [event.pop("time_ms") > 1.7e12 for event in events] == [True, True]
    assert events == [
        {"kind": "metrics", "step": 3, "values": {"loss": 0.5}},
        {"kind": "params", "values": {"a.b": "1", "a.c": "[1, 2]", "none": "None"}},
    ]


def test_nested_values_are_flattened() -> None:
    assert dict(flatten({"a": {"b": {"c": 1}}, "d": (1, "x"), "e": {}})) == {"a.b.c": "1", "d": '[1, "x"]', "e": "{}"}


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("val/dice/left", "val/dice/left"),
        ("dice (L) größe", "dice _L_ gr__e"),
        ("/a//b/../c", "a/c"),
        ("x" * 300, "x" * 250),
        ("..", "_"),
    ],
)
def test_names_that_mlflow_refuses_are_changed(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_what_was_logged_before_sigkill_is_there(tmp_path: Path) -> None:
    run = RunLog.create(tmp_path / "run", uri=None, workspace=tmp_path, experiment="e", name="n")
    code = (
        "import os, sys; from pathlib import Path; from pipeline.tracking import RunLog\n"
        "run = RunLog.open(Path(sys.argv[1]))\n"
        "for step in range(100): run.metrics({'loss': 1.0}, step)\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run.folder)], check=False).returncode == -signal.SIGKILL
    assert [line.event["step"] for line in read_events(run.folder)] == list(range(100))


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    run = RunLog.create(tmp_path / "run", uri=None, workspace=tmp_path, experiment="e", name="n")
    run.metrics({"loss": 1.0}, 0)
    with (run.folder / EVENTS).open("ab") as file:
        file.write(b'{"kind": "metr')
    assert [line.event["step"] for line in read_events(run.folder)] == [0]
    RunLog.open(run.folder).metrics({"loss": 0.5}, 1)
    assert [line.event["step"] for line in read_events(run.folder)] == [0, 1]


def test_a_resumed_run_logs_no_point_twice(tmp_path: Path) -> None:
    run = RunLog.create(tmp_path / "run", uri=None, workspace=tmp_path, experiment="e", name="n")
    for step in range(3):
        run.metrics({"loss": 1.0}, step)
    resumed = RunLog.resume(run.folder)
    for step in range(1, 5):
        resumed.metrics({"loss": 1.0, "new": 2.0}, step)
    points = [
        (key, line.event["step"])
        for line in read_events(run.folder)
        if line.event["kind"] == "metrics"
        for key in line.event["values"]
    ]
    assert sorted(points) == [("loss", step) for step in range(5)] + [("new", step) for step in range(1, 5)]


def test_a_run_created_anew_forgets_the_old_one(tmp_path: Path) -> None:
    place = {"uri": None, "workspace": tmp_path, "experiment": "e", "name": "n"}
    first = RunLog.create(tmp_path / "run", **place)
    first.metrics({"loss": 1.0}, 0)
    key = read_state(first.folder).key
    second = RunLog.create(tmp_path / "run", **place)
    assert list(read_events(second.folder)) == []
    assert read_state(second.folder).key != key


def test_logging_where_no_run_was_created_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="train first"):
        RunLog.open(tmp_path)
    with pytest.raises(ModelError, match="train first"):
        RunLog.resume(tmp_path)


def test_a_table_of_unequal_columns_is_refused(tmp_path: Path) -> None:
    run = RunLog.create(tmp_path / "run", uri=None, workspace=tmp_path, experiment="e", name="n")
    with pytest.raises(ValueError, match="shorter"):
        run.table("cases", {"case": ["a", "b"], "dice": [1.0]})
    run.table("cases", {"case": ["a", "b"], "dice": [1.0, math.inf]})
    table = json.loads((run.folder / "tables" / "cases.json").read_text())
    assert table == {"columns": ["case", "dice"], "data": [["a", 1.0], ["b", None]]}


def test_where_runs_are_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert tracking_uri("sqlite:////x.db", tmp_path) == "sqlite:////x.db"
    assert tracking_uri(None, tmp_path) == "http://server"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


def test_the_repository_around_the_current_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "a.yaml"
    config.write_text("name: a")
    assert "mlflow.source.git.commit" not in environment_tags()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "a.yaml"], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True)
    tags = environment_tags()
    assert (len(tags["mlflow.source.git.commit"]), tags["medseg.git_dirty"]) == (40, "false")
    config.write_text("name: b")
    assert environment_tags()["medseg.git_dirty"] == "true"
    assert tags["version.python"] == ".".join(map(str, sys.version_info[:3]))


def test_everything_arrives_in_mlflow_once_however_often_it_is_sent(workspace: Path) -> None:
    from mlflow import MlflowClient

    from pipeline.tracking.sending import send

    run = new_run(workspace)
    log_everything(run)
    assert send(run.folder)
    client = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    state = read_state(run.folder)
    first = contents(client, str(state.run_id))
    # As after a crash before anything was recorded as sent, not even the run.
    with locked(run.folder):
        write_state(run.folder, state.changed(sent_bytes=0, run_id=None))
    assert send(run.folder)
    assert read_state(run.folder).run_id == state.run_id
    assert contents(client, str(state.run_id)) == first
    assert len(client.search_runs([str(state.experiment_id)])) == 2
    parent = client.get_run(first["tags"]["mlflow.parentRunId"])
    assert (parent.info.run_name, parent.info.status, first["status"]) == ("wide", "FINISHED", "FINISHED")
    assert first["params"] == {"network.name": "unet", "network.widths": "[16, 32]", "note": "x" * 6000}
    assert first["tags"]["who"] == "test"
    assert [(step, value) for _, step, value in first["history"]["train/loss"]] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert [(step, value) for _, step, value in first["history"]["val/dice/left _L_"]] == [(s, "nan") for s in range(3)]
    assert first["inputs"] == [("phantoms", "training"), ("phantoms", "validation")]
    assert first["artifacts"] == ["cases.json", "images", "kept", "model", "summary.html"]
    assert (first["images"], first["versions"]) == (2, 1)


def contents(client, run_id: str) -> dict:
    """Return all that MLflow has of a run, but its system metrics."""
    run = client.get_run(run_id)
    return {
        "status": run.info.status,
        "params": run.data.params,
        "tags": run.data.tags,
        "history": {
            key: [
                (point.timestamp, point.step, "nan" if math.isnan(point.value) else point.value)
                for point in client.get_metric_history(run_id, key)
            ]
            for key in run.data.metrics
            if not key.startswith("system/")
        },
        "inputs": sorted((i.dataset.name, i.tags[0].value) for i in run.inputs.dataset_inputs),
        "artifacts": sorted(file.path for file in client.list_artifacts(run_id)),
        "images": len(client.list_artifacts(run_id, "images")),
        "versions": len(client.search_model_versions(f"run_id = '{run_id}'")),
    }


def test_a_model_comes_back_from_mlflow(workspace: Path) -> None:
    from pipeline.tracking.sending import send

    run = new_run(workspace)
    log_everything(run)
    assert send(run.folder)
    uri, into = f"sqlite:///{workspace}/mlflow.db", workspace / "fetched"
    folder = fetch_model("models:/phantoms@best", uri, into)
    assert (folder / "weights.safetensors").read_bytes() == b"weights"
    run_id = read_state(run.folder).run_id
    assert fetch_model(f"runs:/{run_id}", uri, into) == folder
    assert fetch_model("models:/phantoms/1", uri, into) == folder
    (run.folder / "models" / "best" / "weights.safetensors").write_bytes(b"better")
    run.model(run.folder / "models" / "best", register_as="phantoms", alias="best")
    assert send(run.folder)
    newer = fetch_model(f"runs:/{run_id}", uri, into)
    assert newer != folder
    # The run's files are now those of version 2: version 1 is what was fetched of it, and nothing else.
    assert fetch_model("models:/phantoms/2", uri, into) == newer
    assert fetch_model("models:/phantoms/1", uri, into) == folder
    with pytest.raises(ModelError, match=r"models:/phantoms/1: its files in run .* were replaced by those of a later"):
        fetch_model("models:/phantoms/1", uri, workspace / "elsewhere")
    assert (newer / "weights.safetensors").read_bytes() == b"better"
    parent_id = read_state(run.folder.parent).run_id
    for text in ("models:/phantoms@worst", "models:/other/1", "runs:/none", "phantoms", f"runs:/{parent_id}"):
        with pytest.raises(ModelError, match=text):
            fetch_model(text, uri, into)
    with pytest.raises(ModelError, match="no MLflow database"):
        fetch_model("runs:/none", f"sqlite:///{workspace}/other.db", into)


def test_mlflow_itself_loads_and_runs_a_model_without_a_pickle(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas as pd

    from pipeline.tracking.sending import send

    monkeypatch.setitem(NETWORKS, "nearest_mean", nearest_mean)
    run = new_run(workspace)
    save_model(run.folder / "models" / "best", make_model(plan=make_plan(), network=NEAREST_MEAN))
    run.model(run.folder / "models" / "best", register_as="phantoms", alias="best")
    assert send(run.folder)
    uri = f"sqlite:///{workspace}/mlflow.db"
    fetched = fetch_model("models:/phantoms@best", uri, workspace / "fetched")
    assert not list(fetched.rglob("*.pkl"))
    assert "torch==" in (fetched / "requirements.txt").read_text()
    classes = np.random.default_rng(0).integers(0, 3, (10, 11, 12))
    path = workspace / "image.nii.gz"
    write_image(path, Volume((100.0 * classes[None]).astype(np.float32), Geometry((10, 11, 12), np.eye(4))))
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    mlflow.set_tracking_uri(uri)
    for name in ("models:/phantoms@best", f"runs:/{read_state(run.folder).run_id}/model"):
        model = mlflow.pyfunc.load_model(name)
        for cases in ([str(path)], [{"T1": str(path)}], pd.DataFrame({"T1": [str(path)]})):
            (label,) = model.predict(cases)
            assert np.array_equal(label, np.array([0, 1, 7])[classes])


def test_what_mlflow_refuses_or_is_gone_holds_nothing_up(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mlflow import MlflowClient

    from pipeline.tracking.sending import send

    run = new_run(workspace)
    (run.folder / "model").mkdir()
    run.model(run.folder / "model", register_as="phantoms", alias="v1")  # an alias that looks like a version
    run.artifact(run.folder / "never_written.html")
    run.image("val/worst", run.folder / "never_written.png", 0)
    (run.folder / "torn.png").write_bytes(b"\x89PNG")
    run.image("val/worst", run.folder / "torn.png", 1)
    run.params({"lr": 1})
    run.params({"lr": 2})
    run.metrics({"loss": 1.0}, 0)
    assert send(run.folder)
    expected = ("v1", "never_written.html", "never_written.png", "torn.png")
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("pipeline")]
    assert [text in message for text, message in zip(expected, messages, strict=True)] == [True] * 4
    data = MlflowClient(f"sqlite:///{workspace}/mlflow.db").get_run(str(read_state(run.folder).run_id)).data
    assert (data.metrics["loss"], data.params["lr"], data.tags["resumed.lr"]) == (1.0, "1", "2")


@pytest.mark.skipif(find_spec("boto3") is not None, reason="boto3 is installed: the store would be looked for")
def test_a_store_that_cannot_be_written_from_here_keeps_no_other_run_from_being_sent(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    from pipeline.tracking.sending import send

    uri = f"sqlite:///{workspace}/mlflow.db"
    MlflowClient(uri).create_experiment("far", artifact_location="s3://nowhere/at/all")
    folder = workspace / "runs" / "far"
    far = RunLog.create(folder, uri=uri, workspace=workspace, experiment="far", name="far")
    (folder / "summary.html").write_text("<p>0.9</p>")
    far.artifact(folder / "summary.html")
    assert not send(folder)
    assert "cannot be sent (ModuleNotFoundError: No module named 'boto3'" in caplog.text
    near = new_run(workspace)
    near.metrics({"loss": 1.0}, 0)
    assert not send_pending(folder, near.folder)
    assert pending(folder)
    assert not pending(near.folder)


def test_a_server_out_of_reach_slows_nothing_and_loses_nothing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from pipeline.tracking.sending import send

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = new_run(workspace, uri=f"http://127.0.0.1:{free_port()}")
    start = time.perf_counter()
    for step in range(1000):
        run.metrics({"loss": 1.0}, step)
    assert time.perf_counter() - start < 1.0
    assert not send(run.folder)
    assert pending(run.folder)
    for folder in (run.folder, run.folder.parent):  # the server is there again, elsewhere
        with locked(folder):
            write_state(folder, read_state(folder).changed(uri=f"sqlite:///{workspace}/mlflow.db", artifacts=None))
    assert send(run.folder)
    assert not pending(run.folder)
    client = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    assert len(client.get_metric_history(str(read_state(run.folder).run_id), "loss")) == 1000


def test_runs_have_colours_that_differ(workspace: Path) -> None:
    from mlflow import MlflowClient

    from pipeline.tracking.sending import send

    for index in range(4):
        assert send(new_run(workspace, f"run_{index}").folder)
    client = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("phantoms").experiment_id])
    assert len({run.data.tags["mlflow.runColor"] for run in runs}) == 8


@pytest.mark.slow
def test_pages_are_prepared_for_old_runs_too(workspace: Path) -> None:
    from mlflow import MlflowClient

    folders = [new_run(workspace, f"run_{index}").folder for index in range(3)]
    assert send_pending(*folders)
    client, ids = MlflowClient(f"sqlite:///{workspace}/mlflow.db"), [str(read_state(f).run_id) for f in folders]
    experiment_id = str(read_state(folders[0]).experiment_id)
    own = client.get_run(ids[2]).data.tags["mlflow.runColor"]
    client.delete_tag(ids[0], "mlflow.runColor")  # as older versions left them
    client.set_tag(ids[1], "mlflow.runColor", own)  # the earlier run keeps it, as if somebody had chosen it
    stranger = client.create_run(experiment_id).info.run_id  # by another program
    assert prepare_pages(folders[0])
    tags = [client.get_run(run_id).data.tags for run_id in ids]
    assert tags[1]["mlflow.runColor"] == own
    assert len({tag["mlflow.runColor"] for tag in tags}) == 3
    assert "mlflow.runColor" not in client.get_run(stranger).data.tags
    view = json.loads(client.get_experiment(experiment_id).tags["mlflow.sharedViewState.medseg"])
    assert view["runsHiddenMode"] == "SHOW_ALL"
    url = all_folds_url("http://127.0.0.1:5000/", experiment_id)
    assert url.startswith(f"http://127.0.0.1:5000/#/experiments/{experiment_id}/runs?")
    assert "viewStateShareKey=medseg" in url
    assert not set(view) & set(parse_qs(urlsplit(url).fragment.partition("?")[2]))  # it would not be looked for


def test_sync_and_ui_say_when_nothing_was_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(PipelineError, match="no run was tracked"):
        sync.run(tmp_path)
    with pytest.raises(PipelineError, match="nothing was tracked yet"):
        ui.run(None, tmp_path, 5000)


def test_sync_sends_what_waits_and_ui_refuses_a_taken_port(workspace: Path) -> None:
    run = new_run(workspace)
    run.metrics({"loss": 1.0}, 0)
    assert sync.run(workspace)
    assert not pending(run.folder)
    assert send_pending(run.folder)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PipelineError, match="--port"):
        ui.run(None, workspace, taken.getsockname()[1])


@pytest.mark.slow
def test_the_follower_sends_while_the_run_goes_on_and_marks_a_killed_one(workspace: Path) -> None:
    from mlflow import MlflowClient

    run = new_run(workspace)
    code = (
        "import os, sys; from pathlib import Path; from pipeline.tracking import RunLog, start_follower\n"
        "run = RunLog.open(Path(sys.argv[1]))\n"
        "run.metrics({'loss': 1.0}, 0)\n"
        "start_follower(run.folder)\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.folder)], check=False, env=dict(os.environ))
    client = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    wait_for(lambda: read_state(run.folder).run_id is not None and not pending(run.folder))
    run_id = str(read_state(run.folder).run_id)
    assert client.get_run(run_id).info.status == "KILLED"
    resumed = RunLog.resume(run.folder)
    follower = start_follower(run.folder)
    resumed.metrics({"loss": 1.0}, 0)
    resumed.metrics({"loss": 0.5}, 1)
    wait_for(lambda: any(line.event.get("values", {}).keys() >= {MEMORY} for line in read_events(run.folder)))
    assert client.get_run(run_id).info.status == "RUNNING"
    resumed.finish()
    assert follower.wait(30)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [0, 1]
    assert client.get_run(run_id).data.metrics[MEMORY] > 0


MEMORY = "system/system_memory_usage_megabytes"


def wait_for(condition, limit_s: float = 60.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.1)


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
