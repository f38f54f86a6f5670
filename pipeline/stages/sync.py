"""`medseg sync`: send to MLflow what could not be sent while it was out of reach."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.stages.workspace import Workspace
from pipeline.tracking import pending, send_pending, tracked_runs

log = logging.getLogger(__name__)


def run(workspace: Path) -> bool:
    """Send the waiting events of every run in a workspace; return whether everything is in MLflow now.

    Raises:
        PipelineError: the workspace has no runs.
    """
    places = Workspace(workspace)
    kept = (places.runs, places.comparisons, places.evaluations, places.sweeps, places.reproduced)
    folders = [run for of in kept for run in tracked_runs(of)]
    if not folders:
        raise PipelineError(f"{workspace}: no run was tracked in this workspace; name another with --workspace")
    waiting = [folder for folder in folders if pending(folder)]
    send_pending(*waiting)
    left = sum(pending(folder) for folder in waiting)
    log.info("%d runs: %d had events to send, %d still have", len(folders), len(waiting), left)
    return left == 0
