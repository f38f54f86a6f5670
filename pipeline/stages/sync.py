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
    folders = tracked_runs(Workspace(workspace).runs)
    if not folders:
        raise PipelineError(f"{workspace}: no run was tracked in this workspace; name another with --workspace")
    waiting = [folder for folder in folders if pending(folder)]
    arrived = send_pending(*waiting)
    log.info(
        "%d of %d runs had something to send: %s", len(waiting), len(folders), "sent" if arrived else "not all sent"
    )
    return arrived
