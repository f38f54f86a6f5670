"""`medseg ui`: the MLflow UI of a workspace on this machine, with the addresses of its most useful pages."""

from __future__ import annotations

import logging
import os
import sys
import webbrowser
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.stages.workspace import Workspace
from pipeline.tracking import (
    all_folds_url,
    compare_url,
    is_remote,
    prepare_pages,
    read_state,
    refuse_taken_port,
    runs_url,
    send_pending,
    serve_ui,
    tracked_runs,
    tracking_uri,
)

log = logging.getLogger(__name__)


def run(config: Config | None, workspace: Path | None, port: int, opens: bool | None = None) -> None:
    """Serve the MLflow UI on 127.0.0.1 until interrupted; of a remote server, say where it is.

    What is said first, and opened, is the page that compares all folds of an experiment.

    Args:
        config: The experiment; without one all of the workspace.
        workspace: In place of the configuration's; ./work without either.
        port: TCP port.
        opens: whether that page is opened in the user's browser; None: on a terminal of a desktop.

    Raises:
        PipelineError: nothing was tracked yet, or the port is taken.
    """
    root = workspace or (config.workspace if config else Path("work"))
    uri = tracking_uri(config.tracking.uri if config else None, root)
    local = Workspace(root)
    folders = tracked_runs(local.experiment(config.name) if config else local.runs)
    if not folders and not is_remote(uri):
        raise PipelineError(f"{config.name if config else root}: nothing was tracked yet; `medseg train` comes first")
    if not is_remote(uri):
        refuse_taken_port(port)
    send_pending(*folders)
    base = uri if is_remote(uri) else f"http://127.0.0.1:{port}"
    pages = _pages(base, folders)
    for said, address in pages.items():
        log.info("%s  %s", said, address)
    first = next(iter(pages.values()), base)
    opened = first if (_is_on_a_desktop() if opens is None else opens) else None
    if not is_remote(uri):
        serve_ui(uri, root / "mlartifacts", port, opened)
    else:
        log.info("Runs are tracked on a server; open %s", first)
        if opened:
            webbrowser.open(opened)


def _pages(base: str, folders: list[Path]) -> dict[str, str]:
    """Return what is worth opening: what it is -> its address, experiment by experiment."""
    states = {folder: read_state(folder) for folder in folders}
    experiments = {state.experiment: (state.experiment_id, folder) for folder, state in states.items()}
    known = {name: (number, folder) for name, (number, folder) in sorted(experiments.items()) if number}
    all_there = prepare_pages(*(folder for _, folder in known.values()))
    pages = {}
    for name, (number, _) in known.items():
        url = all_folds_url if all_there else compare_url
        pages[f"{name}: learning curves"] = url(base, number)
        pages[f"{name}: case by case   "] = compare_url(base, number, page="ARTIFACT")
        folds = [state.run_id for state in states.values() if state.experiment == name and state.parent]
        pages[f"{name}: what differs   "] = runs_url(base, number, [run_id for run_id in folds if run_id])
    return pages


def _is_on_a_desktop() -> bool:
    """Tell whether somebody sits at this machine, at a terminal of a desktop."""
    if not sys.stderr.isatty() or "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform == "darwin" or any(name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY"))
