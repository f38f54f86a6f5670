"""`medseg ui`: the MLflow UI of a workspace on this machine, with the addresses of its most useful pages."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.stages.workspace import Workspace
from pipeline.tracking import (
    compare_url,
    is_remote,
    read_state,
    runs_url,
    send_pending,
    serve_ui,
    tracked_runs,
    tracking_uri,
)

log = logging.getLogger(__name__)


def run(config: Config | None, workspace: Path | None, port: int) -> None:
    """Serve the MLflow UI on 127.0.0.1 until interrupted; of a remote server, say where it is.

    Args:
        config: The experiment; without one all of the workspace.
        workspace: In place of the configuration's; ./work without either.
        port: TCP port.

    Raises:
        PipelineError: nothing was tracked yet, or the port is taken.
    """
    root = workspace or (config.workspace if config else Path("work"))
    uri = tracking_uri(config.tracking.uri if config else None, root)
    local = Workspace(root)
    folders = tracked_runs(local.experiment(config.name) if config else local.runs)
    if not folders and not is_remote(uri):
        raise PipelineError(f"{config.name if config else root}: nothing was tracked yet; `medseg train` comes first")
    send_pending(*folders)
    base = uri if is_remote(uri) else f"http://127.0.0.1:{port}"
    for line in _addresses(base, folders):
        log.info("%s", line)
    if is_remote(uri):
        log.info("Runs are tracked on a server; open %s", uri)
    else:
        serve_ui(uri, root / "mlartifacts", port)


def _addresses(base: str, folders: list[Path]) -> list[str]:
    """Return a line for each page worth opening, experiment by experiment."""
    states = [read_state(folder) for folder in folders]
    experiments = {state.experiment: state.experiment_id for state in states if state.experiment_id}
    lines = []
    for name, experiment_id in sorted(experiments.items()):
        lines.append(f"{name}: learning curves  {compare_url(base, experiment_id)}")
        lines.append(f"{name}: case by case     {compare_url(base, experiment_id, page='ARTIFACT')}")
        folds = [state.run_id for state in states if state.experiment == name and state.parent and state.run_id]
        lines.append(f"{name}: what differs     {runs_url(base, experiment_id, folds)}")
    return lines
