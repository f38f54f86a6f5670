"""Tracking in MLflow: training writes events to its run folder (`RunLog`), a follower process sends them.

The only importer of mlflow, and only in what sends, serves or fetches: the write side runs where it is not installed.
"""

from pipeline.tracking.environment import environment_tags
from pipeline.tracking.fetching import fetch_model
from pipeline.tracking.log import RunLog, Status, pending, tracking_uri
from pipeline.tracking.processes import Follower, compare_url, send_pending, serve_ui, start_follower

__all__ = [
    "Follower",
    "RunLog",
    "Status",
    "compare_url",
    "environment_tags",
    "fetch_model",
    "pending",
    "send_pending",
    "serve_ui",
    "start_follower",
    "tracking_uri",
]
