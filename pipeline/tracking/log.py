"""RunLog: what a run has to say, appended to a file in its own folder. No MLflow, no network, microseconds an event.

`events.jsonl` holds one JSON object a line and only ever grows; `tracking.json` says where the run belongs in MLflow,
and how many bytes of the events have arrived there. Training writes the first, whoever sends the second, under a lock.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import posixpath
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.errors import ModelError
from pipeline.records import Record, exclusively, write_json

log = logging.getLogger(__name__)

EVENTS, STATE, LOCK, TABLES = "events.jsonl", "tracking.json", ".tracking.lock", "tables"

Status = Literal["FINISHED", "FAILED", "KILLED"]
Event = dict[str, Any]


class RunState(Record):
    """Where a run belongs in MLflow, and how much of it has arrived."""

    key: str
    """Names this run for good, before MLflow has given it an id: creating it twice finds the first."""
    uri: str
    """Tracking server or database."""
    artifacts: str | None
    """Where a new experiment keeps its artifacts; none: the server decides."""
    experiment: str
    name: str
    parent: Path | None
    """Folder of the parent run, relative to this run's folder."""
    created_s: float
    experiment_id: str | None = None
    run_id: str | None = None
    sent_bytes: int = 0


class Line(NamedTuple):
    """One event, and where its line ends in the file."""

    event: Event
    end: int


class RunLog:
    """The write side of a run's tracking; every call appends one line and returns."""

    def __init__(self, folder: Path, already: frozenset[tuple[str, int]] = frozenset()):
        """Append to the events of `folder`; metrics in `already`, as (key, step), are left out."""
        self.folder = folder
        self._already = already
        self._file = os.open(folder / EVENTS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # a crash tore the last line: keep the next one apart from it

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        uri: str | None,
        workspace: Path,
        experiment: str,
        name: str,
        parent: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> RunLog:
        """Begin a new run in `folder`; events of an earlier run there are dropped.

        Args:
            folder: The run's folder, made where it is missing.
            uri: MLflow server or database; none: MLFLOW_TRACKING_URI, else `mlflow.db` in the workspace.
            workspace: Where the default database and its artifacts live.
            experiment: MLflow experiment, made where it is missing.
            name: Name of the run in MLflow.
            parent: Folder of the parent run, itself made by `create` or `ensure_parent`.
            tags: Tags of the run.
        """
        folder.mkdir(parents=True, exist_ok=True)
        uri = tracking_uri(uri, workspace)
        state = RunState(
            key=uuid.uuid4().hex,
            uri=uri,
            artifacts=artifact_location(uri, workspace),
            experiment=experiment,
            name=name,
            parent=None if parent is None else Path(os.path.relpath(parent, folder)),
            created_s=time.time(),
        )
        with locked(folder):
            write_state(folder, state)
            (folder / EVENTS).write_bytes(b"")
        run = cls(folder)
        run.tags(tags or {})
        return run

    @classmethod
    def open(cls, folder: Path) -> RunLog:
        """Go on logging to a run that is there, such as an evaluation to the run that trained.

        Raises:
            ModelError: no run was created in `folder`.
        """
        read_state(folder)
        return cls(folder)

    @classmethod
    def resume(cls, folder: Path) -> RunLog:
        """Go on with an interrupted run: it runs again in MLflow, and no metric is logged twice at one step.

        A resumed training does the steps since its last checkpoint again, the very same unless its budget is minutes;
        what was logged of them before stays as it is.

        Raises:
            ModelError: no run was created in `folder`.
        """
        read_state(folder)
        logged = (line.event for line in read_events(folder) if line.event["kind"] == "metrics")
        run = cls(folder, frozenset((key, event["step"]) for event in logged for key in event["values"]))
        run._append("resume")
        return run

    @classmethod
    def ensure_parent(cls, folder: Path, *, uri: str | None, workspace: Path, experiment: str, name: str) -> RunLog:
        """Open the parent run of an experiment's folds, or create it where there is none yet at this place; of several
        processes one does.
        """
        with exclusively(folder / ".parent.lock"):
            if (folder / STATE).exists():
                state = read_state(folder)
                if (state.uri, state.experiment) == (tracking_uri(uri, workspace), experiment):
                    return cls(folder)
            return cls.create(folder, uri=uri, workspace=workspace, experiment=experiment, name=name)

    @classmethod
    def attach(cls, folder: Path, *, uri: str | None, workspace: Path, run_id: str, name: str) -> RunLog:
        """Log from a folder of its own to a run that MLflow has, such as that of a model which was fetched.

        Args:
            folder: what is logged waits here, beside what an earlier call has logged to this run.
            uri: MLflow server or database; none: MLFLOW_TRACKING_URI, else `mlflow.db` in the workspace.
            workspace: where the default database lives.
            run_id: of the run in MLflow.
            name: for people who find the folder.
        """
        uri = tracking_uri(uri, workspace)
        if (folder / STATE).exists():
            state = read_state(folder)
            if (state.uri, state.run_id) == (uri, run_id):
                return cls(folder)
        run = cls.create(folder, uri=uri, workspace=workspace, experiment="", name=name)
        with locked(folder):
            write_state(folder, read_state(folder).changed(run_id=run_id))
        return run

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested mappings are flattened to `section.key`."""
        self._append("params", values=dict(flatten(values)))

    def tags(self, values: Mapping[str, str]) -> None:
        """Log tags; a later value replaces an earlier one."""
        if values:
            self._append("tags", values=dict(values))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics at a step; `/` in a name makes sections of charts, as in `val/dice/anterior`."""
        fresh = {key: float(value) for key, value in values.items() if (key, step) not in self._already}
        if fresh:
            self._append("metrics", step=step, values=fresh)

    def artifact(self, path: Path, to: str = "") -> None:
        """Log a file, or all of a folder, as it is when it is sent; `to` is a folder of the artifacts, "" their top."""
        self._append("artifact", path=self._relative(path), to=to)

    def image(self, key: str, path: Path, step: int) -> None:
        """Log a PNG as one picture of a series: MLflow shows a card with a slider over the steps."""
        self._append("image", key=key, path=self._relative(path), step=step)

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Log a table of equally long columns; one name in several runs compares them side by side.

        What is not finite becomes an empty cell.

        Raises:
            ValueError: the columns differ in length.
        """
        rows = list(zip(*columns.values(), strict=True))
        path = self.folder / TABLES / f"{name}.json"
        write_json(path, {"columns": list(columns), "data": [[_cell(value) for value in row] for row in rows]})
        self._append("table", path=self._relative(path))

    def dataset(self, name: str, digest: str, source: str, cases: Sequence[str], context: str) -> None:
        """Log a data set as an input of the run.

        Args:
            name: The manifest's name.
            digest: The manifest's digest; MLflow keeps 36 characters of it.
            source: Where the data comes from, as the manifest says.
            cases: Ids of the cases used.
            context: What for: training, validation or evaluation.
        """
        self._append("dataset", name=name, digest=digest, source=source, cases=list(cases), context=context)

    def model(self, folder: Path, register_as: str | None = None, alias: str | None = None) -> None:
        """Log a model folder as the artifact `model`, as it is when it is sent.

        With a name it becomes a registered version, and with an alias too it is found as `models:/NAME@ALIAS`.
        """
        self._append("model", path=self._relative(folder), register_as=register_as, alias=alias)

    def finish(self, status: Status = "FINISHED") -> None:
        """Say how the run ended; more may be logged afterwards."""
        self._append("finish", status=status)

    def close(self) -> None:
        """Close the file; every event is in it already."""
        os.close(self._file)

    def _append(self, kind: str, **fields: Any) -> None:
        """Append one event by one write: lines of several processes never mix, and a kill loses nothing."""
        event = {"time_ms": time.time_ns() // 1_000_000, "kind": kind, **fields}
        os.write(self._file, (json.dumps(event, ensure_ascii=False) + "\n").encode())

    def _relative(self, path: Path) -> str:
        """Return a path relative to the run folder where it lies inside: a moved workspace can still be sent."""
        path, folder = path.resolve(), self.folder.resolve()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


class SilentLog(RunLog):
    """What a run has to say in a process that is not the one that writes: nothing."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._already = frozenset()

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write no table."""

    def close(self) -> None:
        """Close nothing."""

    def _append(self, kind: str, **fields: Any) -> None:
        """Append nothing."""


def tracking_uri(uri: str | None, workspace: Path) -> str:
    """Return where runs are tracked: `uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` in the workspace."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.resolve() / 'mlflow.db'}"


def artifact_location(uri: str, workspace: Path) -> str | None:
    """Return where a new experiment keeps its artifacts: in the workspace, or where a server decides."""
    return (workspace.resolve() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested mappings as `section.key` and text; sequences become JSON."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple, Mapping)):
            yield f"{prefix}{key}", json.dumps(value, default=str)
        else:
            yield f"{prefix}{key}", str(value)


def read_state(folder: Path) -> RunState:
    """Read where a run belongs in MLflow.

    Raises:
        ModelError: no run was created in `folder`.
    """
    path = folder / STATE
    if not path.exists():
        raise ModelError(f"{folder}: no run was tracked here ({STATE} is missing); train first")
    return RunState.model_validate_json(path.read_text(encoding="utf-8"))


def write_state(folder: Path, state: RunState) -> None:
    """Write where a run belongs in MLflow; for those who hold the lock."""
    write_json(folder / STATE, state.model_dump(mode="json"))


def read_events(folder: Path, start: int = 0) -> Iterator[Line]:
    """Yield the complete events from byte `start` on; a torn line is left for later at the end, skipped elsewhere."""
    path = folder / EVENTS
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            start += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                yield Line(json.loads(line), start)
            except ValueError:
                if line.strip():
                    log.warning("%s: skipped a torn line that ends at byte %d", path, start)


def final_status(folder: Path) -> Status | None:
    """Return how a run has ended by its own log; None: it has not, or it goes on again."""
    turns = [event for event, _ in read_events(folder) if event["kind"] in ("finish", "resume")]
    return turns[-1].get("status") if turns else None


def metric_history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return all metrics that a run has logged: name -> (step, value), in the order of the steps."""
    history: dict[str, list[tuple[int, float]]] = {}
    for event, _ in read_events(folder):
        if event["kind"] == "metrics":
            for key, value in event["values"].items():
                history.setdefault(key, []).append((event["step"], value))
    return {key: sorted(points) for key, points in history.items()}


def read_tags(folder: Path) -> dict[str, str]:
    """Return the tags that a run has logged, the last value of each."""
    events = (event for event, _ in read_events(folder) if event["kind"] == "tags")
    return {name: value for event in events for name, value in event["values"].items()}


def training_seconds(folder: Path) -> float | None:
    """Return how long a run took until it was finished, in seconds, without the pauses before it was resumed.

    None where it is not finished, or nothing was logged here.
    """
    spent_ms, finished_ms, before_ms = 0, None, None
    for event, _ in read_events(folder):
        if event["kind"] != "resume" and before_ms is not None:
            spent_ms += event["time_ms"] - before_ms
        before_ms = event["time_ms"]
        if event["kind"] == "finish":
            finished_ms = spent_ms if event["status"] == "FINISHED" else None
    return None if finished_ms is None else finished_ms / 1000


def pending(folder: Path) -> bool:
    """Tell whether a run has events that have not arrived."""
    return next(read_events(folder, read_state(folder).sent_bytes), None) is not None


def is_tracked(folder: Path) -> bool:
    """Tell whether a folder is a run's."""
    return (folder / STATE).is_file()


def tracked_runs(folder: Path) -> list[Path]:
    """Return the folders of all runs below a folder, itself included, parents before their folds."""
    return sorted(state.parent for state in folder.rglob(STATE))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's sending side; the kernel frees it when its holder dies."""
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def safe_name(name: str) -> str:
    """Return the name of a metric, parameter or tag as MLflow takes it: a relative path of few kinds of characters."""
    path = posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII).strip("/"))
    return re.sub(r"^\.\.?(?=/|$)", "_", path)[:250].rstrip("/")


def _cell(value: Any) -> Any:
    """Return a table's value as JSON knows it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
