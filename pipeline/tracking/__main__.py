"""Send the events of run folders, in a process of its own: `python -m pipeline.tracking FOLDER... [--follow ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from pipeline.errors import PipelineError

HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""Short, because what is not sent is tried again anyway; a user's own values are left alone."""


def main() -> int:
    """Send and return 0 when everything arrived, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's folder")
    parser.add_argument("--follow", action="store_true", help="go on until the one run ends")
    parser.add_argument("--parent-pid", type=int, default=os.getppid(), help="the process whose end ends the run")
    parser.add_argument("--pages", action="store_true", help="send nothing: prepare the pages of their experiments")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s" if arguments.follow else "%(message)s")
    for name, value in HTTP_LIMITS.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    try:
        if arguments.pages:
            return 0 if _prepare_pages(arguments.folders) else 1
        return 0 if _send(arguments.folders, arguments.follow, arguments.parent_pid) else 1
    except PipelineError as error:
        logging.error("%s", error)
        return 1


def _send(folders: list[Path], follow_it: bool, parent_pid: int) -> bool:
    """Send the events of each folder; mlflow is imported only now, with its environment set."""
    if follow_it:
        from pipeline.tracking.following import follow

        return follow(folders[0], parent_pid)
    from pipeline.tracking.sending import send

    arrived = [send(folder) for folder in folders]  # each, whatever became of the one before
    return all(arrived)


def _prepare_pages(folders: list[Path]) -> bool:
    """Prepare the pages of the folders' experiments; return whether MLflow could be reached."""
    from pipeline.tracking.sending import prepare_pages

    prepared = [prepare_pages(folder) for folder in folders]
    return all(prepared)


if __name__ == "__main__":
    sys.exit(main())
