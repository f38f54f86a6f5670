"""Tracking against a real MLflow server on loopback, and its pages in a real browser."""

import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import LOOPBACK, browser
from PIL import Image

from pipeline.tracking import RunLog, compare_url, fetch_model, pending, read_state, send_pending, start_follower

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::mlflow")]  # what it says of its dependencies

CHROMIUM_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=40000"),
    "--window-size=1800,1400",
)


@pytest.fixture
def port() -> int:
    """Return a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run an MLflow server over a folder until the block ends."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/files"]
    with (folder / "server.log").open("ab") as output:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for(lambda: is_healthy(port))
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a server with the workers that it started."""
    import psutil

    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    process.wait()


def is_healthy(port: int) -> bool:
    """Tell whether a server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], limit_s: float = 120.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.1)


def new_run(workspace: Path, uri: str, name: str) -> RunLog:
    """Create a fold's run under its parent, as training does."""
    folder = workspace / "runs" / name
    place: dict[str, Any] = {"uri": uri, "workspace": workspace, "experiment": "phantoms"}
    RunLog.ensure_parent(folder, name=name, **place).close()
    return RunLog.create(folder / "fold_0", name=f"{name} fold 0", parent=folder, **place)


def test_a_server_killed_in_the_midst_gets_everything_once_it_is_back(tmp_path: Path, port: int) -> None:
    from mlflow import MlflowClient

    uri = f"http://127.0.0.1:{port}"
    run = new_run(tmp_path, uri, "wide")
    slowest_s = 0.0

    def log_steps(first: int, last: int) -> None:
        nonlocal slowest_s
        for step in range(first, last):
            start = time.perf_counter()
            run.metrics({"train/loss": 1 / (step + 1), "val/dice/mean": step / 300}, step)
            slowest_s = max(slowest_s, time.perf_counter() - start)
            time.sleep(0.01)

    with server(tmp_path, port) as process:
        follower = start_follower(run.folder)
        log_steps(0, 100)
        wait_for(lambda: read_state(run.folder).sent_bytes > 0)
        kill(process)
        log_steps(100, 200)
        model = run.folder / "models" / "best"
        model.mkdir(parents=True)
        (model / "weights.safetensors").write_bytes(b"weights")
        run.model(model, register_as="phantoms", alias="best")
        wait_for(lambda: "out of reach" in (run.folder / "tracking.log").read_text())
        assert pending(run.folder)
    with server(tmp_path, port):
        log_steps(200, 300)
        run.finish()
        assert follower.wait(120)
        client = MlflowClient(uri)
        (found,) = client.search_runs(["1"], "tags.`mlflow.runName` = 'wide fold 0'")
        assert found.info.status == "FINISHED"
        points = client.get_metric_history(found.info.run_id, "train/loss")
        assert sorted(point.step for point in points) == list(range(300))
        assert all(point.value == 1 / (point.step + 1) for point in points)
        folder = fetch_model("models:/phantoms@best", uri, tmp_path / "fetched")
        assert (folder / "weights.safetensors").read_bytes() == b"weights"
    assert slowest_s < 1.0  # far below any time-out, far above a busy machine's pauses


def test_the_compare_pages_show_two_runs_side_by_side(tmp_path: Path, port: int) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed here")
    uri = f"http://127.0.0.1:{port}"
    runs = [log_training(tmp_path, uri, name, width) for name, width in (("narrow", 16), ("wide", 32))]
    with server(tmp_path, port):
        assert send_pending(*(run.folder for run in runs))
        experiment_id = str(read_state(runs[0].folder).experiment_id)
        charts = page(chromium, compare_url(uri, experiment_id), tmp_path / "profile")
        table = page(chromium, compare_url(uri, experiment_id, page="ARTIFACT"), tmp_path / "profile")
    for text in ("narrow fold 0", "wide fold 0", "train/loss", "val/dice/anterior", "val/worst"):
        assert text in charts
    for text in ("narrow fold 0", "wide fold 0", "cases.json", "phantom_07", "0.1616", "0.3232"):
        assert text in table


def test_ui_opens_the_page_that_compares_all_folds(tmp_path: Path, port: int) -> None:
    """In the browser that BROWSER names: here a script that writes the address down, for a real one to open."""
    from mlflow import MlflowClient

    workspace, asked = tmp_path / "work", tmp_path / "asked"
    place: dict[str, Any] = {"uri": None, "workspace": workspace, "experiment": "phantoms"}
    folder = workspace / "runs" / "wide"
    RunLog.ensure_parent(folder, name="wide", **place).close()
    for fold in range(12):
        run = RunLog.create(folder / f"fold_{fold}", name=f"wide fold {fold:02}", parent=folder, **place)
        for step in range(5):
            run.metrics({"train/loss": 1 / (step + 1 + fold)}, step)
        run.finish()
        run.close()
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\nprintf %s "$1" > {asked}.part && mv {asked}.part {asked}\n')
    script.chmod(0o755)
    environment = {**os.environ, "BROWSER": f"{script} %s"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "pipeline", "ui", "--workspace", str(workspace), "--port", str(port), "--open"]
    with (tmp_path / "ui.log").open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for(asked.exists)
        said = "".join((tmp_path / "ui.log").read_text().split())  # without the breaks of a narrow terminal
        assert said.index("learningcurves") < said.index("casebycase")
        address = asked.read_text()
        assert address in said
        with browser(tmp_path / "profile", *LOOPBACK) as open_page:
            open_page.open(address, (1800, 1200))
            for fold in range(12):  # in the chart's legend, which names what it draws
                open_page.wait_for(f"document.body.innerText.includes('wide fold {fold:02} (train/loss)')", 90)
            drawn = np.asarray(open_page.picture()).astype(int)
        client = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
        for path in sorted(folder.glob("fold_*")):
            tags = client.get_run(str(read_state(path).run_id)).data.tags
            colour = list(bytes.fromhex(tags["mlflow.runColor"][1:]))
            assert (np.abs(drawn - colour).max(-1) < 6).sum() > 30
    finally:
        kill(process)


def log_training(workspace: Path, uri: str, name: str, width: int) -> RunLog:
    """Log what a short training logs."""
    run = new_run(workspace, uri, name)
    run.params({"network": {"name": "unet", "widths": [width, 2 * width]}})
    for epoch in range(20):
        dice = 0.9 - math.exp(-epoch / 5) - 1 / width
        run.metrics({"train/loss": 1 - dice, "val/dice/anterior": dice, "val/dice/posterior": dice - 0.02}, epoch)
    Image.new("RGB", (256, 256), (8 * (width - 1), 80, 80)).save(run.folder / "worst.png")
    run.image("val/worst", run.folder / "worst.png", step=19)
    cases = [f"phantom_{index:02}" for index in range(12)]
    run.table("cases", {"case": cases, "dice": [round(width * 0.0101, 4)] * len(cases)})
    run.finish()
    return run


def page(chromium: str, url: str, profile: Path) -> str:
    """Return a page's document as a browser shows it, its scripts having run."""
    command = [chromium, *CHROMIUM_FLAGS, f"--user-data-dir={profile}", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=180).stdout
