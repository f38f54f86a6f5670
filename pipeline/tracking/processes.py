"""MLflow in processes of its own: what sends, so that imports and time-outs stay out of a training, and the UI."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser
from pathlib import Path
from threading import Thread

from pipeline.errors import PipelineError
from pipeline.tracking.log import pending

log = logging.getLogger(__name__)

FOLLOWER_LOG = "tracking.log"
HOST = "127.0.0.1"
_START_LIMIT_S = 300.0

# Without job execution the server starts no queues of workers, which only MLflow's language-model features use.
_SERVER_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONWARNINGS": "ignore",
}

# Followers may outlive the training that started them: kept here, or Python would warn of each as if it had been
# forgotten.
_followers: list[subprocess.Popen[bytes]] = []


class Follower:
    """The process that sends a run's events while the run goes on."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes] | None):
        self.folder = folder
        self.process = process

    def wait(self, limit_s: float) -> bool:
        """Wait until everything has arrived, at most `limit_s` seconds; return whether it has.

        Call it after `RunLog.finish`. A follower that needs longer goes on by itself for a minute or so.
        """
        if self.process is None:
            return False
        try:
            if self.process.wait(limit_s) == 0:
                return True
            why = self.folder / FOLLOWER_LOG
            log.warning("%s: not everything is in MLflow, %s says why; `medseg sync` sends the rest", self.folder, why)
        except subprocess.TimeoutExpired:
            log.info("%s: not everything is in MLflow yet; `medseg sync` sends what may be left", self.folder)
        return False


def start_follower(folder: Path) -> Follower:
    """Start sending a run's events as they are logged; without MLflow they wait on disk for `medseg sync`.

    The follower lives in a session of its own, so that Ctrl-C ends the training first and its last words still arrive.
    """
    if not _has_mlflow():
        log.info("MLflow is not installed here: %s keeps all that is logged, `medseg sync` sends it later", folder)
        return Follower(folder, None)
    command = [*_command(folder), "--follow", "--parent-pid", str(os.getpid())]
    with (folder / FOLLOWER_LOG).open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=_environment(), start_new_session=True
        )
    _followers.append(process)
    return Follower(folder, process)


def send_pending(*folders: Path, limit_s: float | None = None) -> bool:
    """Send what runs have logged and MLflow does not have yet; return whether everything arrived in time.

    Args:
        folders: The runs' folders.
        limit_s: Time limit in seconds for all of them; what is not sent by then stays on disk.
    """
    waiting = [folder for folder in folders if pending(folder)]
    if not waiting:
        return True
    if not _has_mlflow():
        log.info("MLflow is not installed here: `medseg sync` sends what is logged, from where it is")
        return False
    try:
        done = subprocess.run(_command(*waiting), env=_environment(), timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        log.warning("MLflow took more than %.0f s; `medseg sync` sends the rest", limit_s)
        return False
    return done.returncode == 0


def prepare_pages(*folders: Path) -> bool:
    """Give the runs of some folders' experiments colours that differ, and each experiment a view of all its folds.

    Args:
        folders: of one run of each experiment.

    Returns:
        Whether that is done: `all_folds_url` leads to a page.
    """
    if not folders or not _has_mlflow():
        return False
    return subprocess.run([*_command(*folders), "--pages"], env=_environment(), check=False).returncode == 0


def serve_ui(uri: str, artifacts: Path, port: int, opened: str | None = None) -> None:
    """Serve the MLflow UI of a database on 127.0.0.1 until interrupted.

    Args:
        uri: The database.
        artifacts: Folder of artifacts that clients upload through the server.
        port: TCP port.
        opened: address that the user's browser opens once the server answers; None: none.

    Raises:
        PipelineError: the port is taken, or the server could not start.
    """
    refuse_taken_port(port)
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri, "--artifacts-destination", str(artifacts.resolve())]
    command += ["--uvicorn-opts", "--log-level warning"]
    environment = {**os.environ, **_SERVER_ENVIRONMENT}
    log.info("The server answers in some seconds; Ctrl-C ends it")
    if opened:
        Thread(target=_open_once_served, args=(port, opened), daemon=True).start()
    try:
        status = subprocess.run(command, env=environment, check=False).returncode
    except KeyboardInterrupt:
        return
    if status:
        raise PipelineError(f"the MLflow server ended with exit code {status}; its own messages stand above")


def _open_once_served(port: int, address: str) -> None:
    """Open an address in the user's browser once the server answers; not if that takes minutes."""
    end = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
                break
        except OSError:
            time.sleep(0.5)
    else:
        return
    if not webbrowser.open(address):
        log.info("no browser could be opened here; the address stands above")


def _has_mlflow() -> bool:
    """Tell whether MLflow is installed, without importing it."""
    return importlib.util.find_spec("mlflow") is not None


def _command(*folders: Path) -> list[str]:
    """Return the command that sends the events of some run folders."""
    return [sys.executable, "-m", "pipeline.tracking", *(str(folder.resolve()) for folder in folders)]


def _environment() -> dict[str, str]:
    """Return the environment of a sending process: this package importable from any folder, one thread of its own."""
    package_parent = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def refuse_taken_port(port: int) -> None:
    """Refuse a port of this machine that is taken.

    Raises:
        PipelineError: it is, or may not be had.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise PipelineError(
                f"port {port} on {HOST} is taken or not allowed ({error.strerror}); choose another with --port"
            ) from error
