"""Addresses of MLflow's pages that are worth opening."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal
from urllib.parse import quote, urlencode

# Folds only: runs with a parent, sorted by name. Without a sort of its own the page hides them under their parents,
# whose charts are empty.
_FOLDS = {"searchFilter": "tags.`mlflow.parentRunId` LIKE '%'", "orderByKey": "attributes.run_name"}

SHARED_VIEW = "medseg"
"""Name of the view that an experiment is given: MLflow's page takes its state from a tag of this name."""

ALL_FOLDS = {**_FOLDS, "orderByAsc": True, "runsHiddenMode": "SHOW_ALL"}
"""That view: every fold is drawn, where the page by itself draws the first ten."""


def all_folds_url(base: str, experiment_id: str) -> str:
    """Return the address of the page that compares all folds of an experiment, for which `prepare_pages` was called.

    Args:
        base: The server's address.
        experiment_id: MLflow's id of the experiment.
    """
    # A filter or a sort in the address would keep the page from looking for the view.
    query = {"workflowType": "machine_learning", "compareRunsMode": "CHART", "viewStateShareKey": SHARED_VIEW}
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?{urlencode(query, quote_via=quote)}"


def compare_url(base: str, experiment_id: str, page: Literal["CHART", "ARTIFACT"] = "CHART") -> str:
    """Return the address of the page that compares the runs of an experiment.

    Of curves it draws those of the first ten folds; the others are listed.

    Args:
        base: The server's address.
        experiment_id: MLflow's id of the experiment.
        page: CHART: curves of all metrics, and pictures; ARTIFACT: the tables, a row a case and a column a run.
    """
    query = {
        "workflowType": "machine_learning",
        "compareRunsMode": page,
        **_FOLDS,
        "orderByAsc": "true",
    }
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?{urlencode(query, quote_via=quote)}"


def runs_url(base: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Return the address of the page that sets runs side by side: parameters, with those that differ, and metrics.

    Args:
        base: The server's address.
        experiment_id: MLflow's id of the experiment.
        run_ids: MLflow's ids of the runs.
    """
    query = {"runs": json.dumps(list(run_ids)), "experiments": json.dumps([experiment_id])}
    return f"{base.rstrip('/')}/#/compare-runs?{urlencode(query, quote_via=quote)}"


def is_remote(uri: str) -> bool:
    """Tell whether runs are tracked by a server that has a UI of its own."""
    return uri.startswith(("http://", "https://"))
