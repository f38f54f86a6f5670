"""Tracking in MLflow: training writes events to its run folder (`RunLog`), a follower process sends them.

The only importer of mlflow, and only in what sends, serves or fetches: the write side runs where it is not installed.
"""

from pipeline.tracking.addresses import all_folds_url, compare_url, is_remote, runs_url
from pipeline.tracking.environment import environment_tags
from pipeline.tracking.fetching import FetchedRun, fetch_model, fetch_run, run_of_fetched
from pipeline.tracking.log import (
    RunLog,
    RunState,
    SilentLog,
    Status,
    flatten,
    is_tracked,
    metric_history,
    pending,
    read_state,
    tracked_runs,
    tracking_uri,
    training_seconds,
)
from pipeline.tracking.processes import (
    Follower,
    prepare_pages,
    refuse_taken_port,
    send_pending,
    serve_ui,
    start_follower,
)

__all__ = [
    "FetchedRun",
    "Follower",
    "RunLog",
    "RunState",
    "SilentLog",
    "Status",
    "all_folds_url",
    "compare_url",
    "environment_tags",
    "fetch_model",
    "fetch_run",
    "flatten",
    "is_remote",
    "is_tracked",
    "metric_history",
    "pending",
    "prepare_pages",
    "read_state",
    "refuse_taken_port",
    "run_of_fetched",
    "runs_url",
    "send_pending",
    "serve_ui",
    "start_follower",
    "tracked_runs",
    "tracking_uri",
    "training_seconds",
]
