"""Which folder a model's name means."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import ModelError
from pipeline.model import DESCRIPTION
from pipeline.stages.workspace import Workspace

# Where a run keeps its models; the best is meant when the run itself is named.
BEST, LAST = Path("models/best"), Path("models/last")


def resolve_model(text: str, workspace: Path, uri: str | None = None) -> Path:
    """Return a model's folder.

    Args:
        text: a model's folder, a run's folder (its best model is meant), runs:/ID or models:/NAME@ALIAS.
        workspace: where fetched models are kept, and MLflow's database unless another is named.
        uri: tracking server or database; none: MLFLOW_TRACKING_URI, else the workspace's.

    Raises:
        ModelError: there is no such model.
    """
    if text.startswith(("runs:/", "models:/")):
        from pipeline.tracking.fetching import fetch_model
        from pipeline.tracking.log import tracking_uri

        return fetch_model(text, tracking_uri(uri, workspace), Workspace(workspace).fetched)
    folder = Path(text)
    for candidate in (folder, folder / BEST):
        if (candidate / DESCRIPTION).is_file():
            return candidate
    known = sorted(str(path.parents[2]) for path in Workspace(workspace).runs.glob(f"*/*/{BEST}/{DESCRIPTION}"))
    there = f"runs with a model: {', '.join(known)}" if known else f"no run in {workspace} has one yet: `medseg train`"
    raise ModelError(f"{text}: holds no model ({DESCRIPTION} or {BEST / DESCRIPTION}); {there}")
