"""Tracking in MLflow: training writes events to its run folder (`RunLog`), a follower process sends them.

The only importer of mlflow, and only in what sends, serves or fetches: the write side runs where it is not installed.
"""

from pipeline.tracking.environment import environment_tags
from pipeline.tracking.log import RunLog, Status, pending, tracking_uri

__all__ = ["RunLog", "Status", "environment_tags", "pending", "tracking_uri"]
