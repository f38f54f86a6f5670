"""Out of MLflow: `runs:/ID` and `models:/NAME@ALIAS` become a model's folder; of a run, all that it logged."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ModelError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def fetch_model(text: str, uri: str, into: Path) -> Path:
    """Return the folder of a model that MLflow keeps, downloading it unless these very weights are there already.

    Args:
        text: `runs:/ID`, `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        uri: Tracking server or database.
        into: Folder of fetched models, one folder each.

    Raises:
        ModelError: the name is of no such form, MLflow does not know it, or is out of reach.
    """
    with _client(text, uri) as client:
        run_id, version = _run_of(client, text)
        digest = client.get_run(run_id).data.tags.get("medseg.model_digest")
        if digest is None:
            raise ModelError(f"{text}: run {run_id} in {uri} has logged no model")
        wanted = digest if version is None else version.tags.get("medseg.model_digest", digest)
        folder = into / f"{run_id}-{wanted[:8]}"
        if not folder.is_dir() and wanted != digest:
            raise ModelError(
                f"{text}: its files in run {run_id} were replaced by those of a later version, as `medseg find-best` "
                "does when it chooses postprocessing; name that version, or the folder of the model that is meant"
            )
        if not folder.is_dir():
            _download(client, run_id, folder)
    return folder


@dataclass(frozen=True)
class FetchedRun:
    """What MLflow keeps of a run.

    Attributes:
        run_id: in MLflow.
        status: FINISHED, FAILED, KILLED or RUNNING.
        params: name -> text.
        tags: name -> text.
        metrics: name -> the last value.
        files: folder of the wanted artifacts, as far as there are any.
    """

    run_id: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    files: Path


def fetch_run(run_id: str, uri: str, into: Path, artifacts: Sequence[str]) -> FetchedRun:
    """Return what MLflow keeps of a run.

    Args:
        run_id: of the run.
        uri: Tracking server or database.
        into: Folder for the artifacts.
        artifacts: Names of files at the top of the run's artifacts.

    Raises:
        ModelError: MLflow does not know the run, or is out of reach.
    """
    with _client(f"runs:/{run_id}", uri) as client:
        run = client.get_run(run_id)
        into.mkdir(parents=True, exist_ok=True)
        there = {file.path for file in client.list_artifacts(run_id)}
        for name in sorted(there.intersection(artifacts)):
            client.download_artifacts(run_id, name, str(into))
    data = run.data
    return FetchedRun(run_id, str(run.info.status), dict(data.params), dict(data.tags), dict(data.metrics), into)


@contextmanager
def _client(text: str, uri: str) -> Iterator[MlflowClient]:
    """Yield a client of MLflow; what it cannot do for `text` is an error that users can mend.

    Raises:
        ModelError: MLflow is out of reach, or does not know what is asked for.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ModelError(f"{text}: there is no MLflow database {uri}; name the workspace or server that has it")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"  # it would stand among our own lines
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, OSError) as error:
        raise ModelError(f"{text}: cannot be fetched from {uri}: {error}") from error


def run_of_fetched(folder: Path, into: Path) -> str | None:
    """Return the id of the run that a fetched model is of; None where a folder was not fetched.

    Args:
        folder: of a model.
        into: folder of fetched models.
    """
    return folder.name.rpartition("-")[0] if folder.resolve().parent == into.resolve() else None


def _run_of(client: MlflowClient, text: str) -> tuple[str, ModelVersion | None]:
    """Return the id of the run that logged a model, and its version, where one is named."""
    kind, _, name = text.partition(":/")
    if kind == "runs" and name:
        return name.removesuffix("/").removesuffix("/model"), None
    version = None
    if kind == "models" and "@" in name:
        version = client.get_model_version_by_alias(*name.split("@", 1))
    elif kind == "models" and "/" in name:
        version = client.get_model_version(*name.split("/", 1))
    if version is not None:
        return str(version.run_id), version
    raise ModelError(f"{text}: not the name of a model; runs:/ID, models:/NAME@ALIAS or models:/NAME/VERSION")


def _download(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Download a run's model; the folder appears when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as scratch:
        model = client.download_artifacts(run_id, "model", scratch)
        shutil.move(model, folder)
