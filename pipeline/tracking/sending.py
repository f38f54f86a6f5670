"""The sending side: a run's events go to MLflow, each with the same effect however often it is sent.

A crash may fall between sending an event and recording that it was sent. So each event is sent at least once and made
to count once: a run is found again by its key, a metric by its name, step and time, a file by its name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Run
from mlflow.exceptions import MlflowException
from requests import HTTPError
from sqlalchemy.exc import SQLAlchemyError

from pipeline.tracking.addresses import ALL_FOLDS, SHARED_VIEW
from pipeline.tracking.colours import colours_of, wanting_colours
from pipeline.tracking.deliveries import DELIVERIES, Destination
from pipeline.tracking.log import Line, RunState, locked, read_events, read_state, safe_name, write_state

log = logging.getLogger(__name__)

METRICS_PER_REQUEST = 1000
"""MLflow's own limit of one batch."""

COLOUR, PARENT = "mlflow.runColor", "mlflow.parentRunId"
"""MLflow's own tags."""

_TRY_AGAIN = {401, 403, 408, 429}
"""Client errors that pass, once a login is renewed or a server is less busy; any other refuses an event for good."""


def send(folder: Path) -> bool:
    """Send what a run, and first its parent, has logged and MLflow has not; return whether everything arrived.

    Safe to call from several processes: one sends, the others wait. What cannot be sent waits on disk, and what MLflow
    refuses for good, or what is gone from the disk, is left out with a warning.
    """
    try:
        with locked(folder):
            _send(folder)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        log.warning("%s: MLflow is out of reach (%s); what is not sent waits in %s", folder, _brief(error), folder)
        return False
    except Exception as error:
        # A store's own client, for instance of S3, is not there or raises errors of its own.
        log.warning("%s: cannot be sent (%s); what is not sent waits in %s", folder, _brief(error), folder)
        return False
    return True


def _send(folder: Path) -> None:
    """Send a run's events, its parent's first; for the holder of the run's lock."""
    state = read_state(folder)
    if state.parent is not None:
        with locked(folder / state.parent):
            _send(folder / state.parent)
    client = connect(state.uri)
    state = ensure_run(client, folder)
    destination = Destination(client, str(state.run_id), folder)
    for kind, group in groupby(read_events(folder, state.sent_bytes), key=lambda line: str(line.event["kind"])):
        for end in _deliver_metrics(destination, list(group)) if kind == "metrics" else _deliver(destination, group):
            state = state.changed(sent_bytes=end)
            write_state(folder, state)


def _deliver(destination: Destination, lines: Iterator[Line]) -> Iterator[int]:
    """Deliver events one by one; yield where each ends once it is done with."""
    for event, end in lines:
        with _refusals_are_left_out(destination.folder, str(event["kind"])):
            DELIVERIES[event["kind"]](destination, event)
        yield end


def _deliver_metrics(destination: Destination, lines: Sequence[Line]) -> Iterator[int]:
    """Deliver consecutive metrics in as few requests as MLflow allows; yield where they end."""
    metrics = [
        Metric(safe_name(key), value, event["time_ms"], event["step"])
        for event, _ in lines
        for key, value in event["values"].items()
    ]
    for start in range(0, len(metrics), METRICS_PER_REQUEST):
        with _refusals_are_left_out(destination.folder, "metrics"):
            destination.client.log_batch(destination.run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])
    yield lines[-1].end


class _refusals_are_left_out(AbstractContextManager[None]):
    """Log what MLflow refuses for good and go on, so that one bad event does not hold up all that follow."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if error is None or not _is_refusal(error):
            return False
        log.warning("%s: %s left out of MLflow: %s", self.folder, self.kind, _brief(error))
        return True


def _is_refusal(error: BaseException) -> bool:
    """Tell whether sending the same once more is bound to fail again."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, HTTPError) and error.response is not None:
        status = error.response.status_code
    else:
        return isinstance(error, ValueError) and not isinstance(error, OSError)
    return 400 <= status < 500 and status not in _TRY_AGAIN


def _brief(error: BaseException) -> str:
    """Return the first line of an error, short enough for a log."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def connect(uri: str) -> MlflowClient:
    """Return a client of a server or database; a database that is not there yet is made, by one process at a time."""
    with _alone_with_database(uri):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


def _alone_with_database(uri: str) -> AbstractContextManager[None]:
    """Hold the lock of an SQLite file's folder: two processes that make its tables at once would collide."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix):
        return nullcontext()
    folder = Path(uri.removeprefix(prefix)).parent
    folder.mkdir(parents=True, exist_ok=True)
    return locked(folder)


def ensure_run(client: MlflowClient, folder: Path) -> RunState:
    """Return a run's state once MLflow knows the run, making it where it does not; for the holder of the lock."""
    state = read_state(folder)
    if state.run_id is not None:
        return state
    experiment = _ensure_experiment(client, state)
    same = client.search_runs([experiment.experiment_id], f"tags.`medseg.key` = '{state.key}'", max_results=1)
    run_id = same[0].info.run_id if same else _create_run(client, folder, state, experiment)
    state = state.changed(run_id=run_id, experiment_id=experiment.experiment_id)
    write_state(folder, state)
    return state


def _ensure_experiment(client: MlflowClient, state: RunState) -> Experiment:
    """Return the run's experiment, after making it where it is missing; another process may be quicker."""
    if found := client.get_experiment_by_name(state.experiment):
        return found
    try:
        client.create_experiment(state.experiment, artifact_location=state.artifacts)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.get_experiment_by_name(state.experiment)


def _create_run(client: MlflowClient, folder: Path, state: RunState, experiment: Experiment) -> str:
    """Create a run in MLflow, under its parent's, and return its id."""
    tags = {"medseg.key": state.key, "medseg.folder": str(folder.resolve())}
    if state.parent is not None:
        tags[PARENT] = str(read_state(folder / state.parent).run_id)
    parents = {run.info.run_id: run.data.tags.get(PARENT) for run in runs_of(client, experiment.experiment_id)}
    tags[COLOUR] = colours_of({**parents, state.key: tags.get(PARENT)})[state.key]
    start_ms = int(state.created_s * 1000)
    run = client.create_run(experiment.experiment_id, start_time=start_ms, tags=tags, run_name=state.name)
    return str(run.info.run_id)


def runs_of(client: MlflowClient, experiment_id: str) -> list[Run]:
    """Return an experiment's runs, in the order in which they began; of very many the first."""
    return list(client.search_runs([experiment_id], max_results=1000, order_by=["attributes.start_time ASC"]))


def prepare_pages(folder: Path) -> bool:
    """Make the pages of a folder's experiment worth opening: its runs in colours that differ, and a view of them all.

    Returns:
        Whether MLflow could be reached.
    """
    state = read_state(folder)
    if state.experiment_id is None:
        return False
    try:
        client = connect(state.uri)
        _colour_runs(client, state.experiment_id)
        client.set_experiment_tag(state.experiment_id, f"mlflow.sharedViewState.{SHARED_VIEW}", json.dumps(ALL_FOLDS))
    except (MlflowException, SQLAlchemyError, OSError) as error:
        log.warning("%s: its pages stay as they are: MLflow is out of reach (%s)", state.experiment, _brief(error))
        return False
    return True


def _colour_runs(client: MlflowClient, experiment_id: str) -> None:
    """Give colours to the runs of medseg that have none, or that of an earlier run."""
    runs = runs_of(client, experiment_id)
    known = {run.info.run_id: run.data.tags[COLOUR] for run in runs if COLOUR in run.data.tags}
    own = {run.info.run_id for run in runs if "medseg.key" in run.data.tags}
    wanting = wanting_colours({run.info.run_id: run.data.tags.get(PARENT) for run in runs}, known)
    for run_id, colour in wanting.items():
        if run_id in own:
            client.set_tag(run_id, COLOUR, colour)
