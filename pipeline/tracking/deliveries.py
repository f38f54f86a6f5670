"""How each kind of event becomes something in MLflow; every delivery may be repeated without another effect."""

from __future__ import annotations

import json
import logging
import platform
import tempfile
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from mlflow.exceptions import MlflowException

from pipeline.records import digest_of, file_digest
from pipeline.tracking.log import Event, safe_name

log = logging.getLogger(__name__)

LOADER_MODULE = "pipeline.stages.mlflow_model"
"""Module whose `_load_pyfunc(folder)` MLflow calls to load a model."""

_PARAM_LENGTH, _TAG_LENGTH, _PER_REQUEST = 6000, 8000, 100
"""MLflow's own limits: characters of a value, values in one request."""

_THUMBNAIL = (256, 256)


@dataclass(frozen=True)
class Destination:
    """The run in MLflow that a folder's events go to."""

    client: MlflowClient
    run_id: str
    folder: Path

    def log_file(self, path: Path, to: str) -> bool:
        """Log a file or folder under its own name; return whether it is still there."""
        if not path.exists():
            log.warning("%s: %s is gone and left out of MLflow", self.folder, path)
            return False
        self.client.log_artifact(self.run_id, str(path), to or None)
        return True

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, within MLflow's limits."""
        entities = [RunTag(safe_name(key), str(value)[:_TAG_LENGTH]) for key, value in tags.items()]
        for start in range(0, len(entities), _PER_REQUEST):
            self.client.log_batch(self.run_id, tags=entities[start : start + _PER_REQUEST])

    def tag(self, name: str) -> str | None:
        """Return a tag's value, if it is set."""
        value = self.client.get_run(self.run_id).data.tags.get(name)
        return None if value is None else str(value)


def deliver_params(to: Destination, event: Event) -> None:
    """Log parameters; MLflow never changes one, so what differs after a resume becomes the tag `resumed.NAME`."""
    values = {safe_name(key): str(value)[:_PARAM_LENGTH] for key, value in event["values"].items()}
    known = to.client.get_run(to.run_id).data.params
    fresh = [Param(key, value) for key, value in values.items() if key not in known]
    for start in range(0, len(fresh), _PER_REQUEST):
        to.client.log_batch(to.run_id, params=fresh[start : start + _PER_REQUEST])
    to.set_tags({f"resumed.{key}": value for key, value in values.items() if known.get(key, value) != value})


def deliver_tags(to: Destination, event: Event) -> None:
    """Set tags."""
    to.set_tags(event["values"])


def deliver_artifact(to: Destination, event: Event) -> None:
    """Log a file or folder."""
    to.log_file(to.folder / event["path"], event["to"])


def deliver_image(to: Destination, event: Event) -> None:
    """Log one picture of a series, under the names that MLflow's own `log_image` gives, which its pages look for."""
    source = to.folder / event["path"]
    if not source.exists():
        log.warning("%s: %s is gone and left out of MLflow", to.folder, source)
        return
    key, step = safe_name(event["key"]), event["step"]
    unique = uuid.uuid5(uuid.NAMESPACE_OID, f"{key} {step} {event['time_ms']}")
    name = f"{key.replace('/', '~')}+step+{step}+timestamp+{event['time_ms']}+{unique}"
    with tempfile.TemporaryDirectory() as scratch:
        _write_picture(source, Path(scratch), name)
        to.client.log_artifacts(to.run_id, scratch, "images")
    to.set_tags({"mlflow.loggedImages": "True"})


def _write_picture(source: Path, into: Path, name: str) -> None:
    """Write a picture and its thumbnail; ValueError where it cannot be read, since trying again would not help."""
    from PIL import Image

    try:
        with Image.open(source) as picture:
            picture.save(into / f"{name}.png")
            picture.thumbnail(_THUMBNAIL)
            picture.convert("RGB").save(into / f"{name}+compressed.webp")
    except OSError as error:
        raise ValueError(f"{source}: not a whole picture: {error}") from error


def deliver_table(to: Destination, event: Event) -> None:
    """Log a table as one whole file: MLflow's own `log_table` would append to it when sent again."""
    path = to.folder / event["path"]
    if not to.log_file(path, ""):
        return
    tables = json.loads(to.tag("mlflow.loggedArtifacts") or "[]")
    entry = {"path": path.name, "type": "table"}
    if entry not in tables:
        to.set_tags({"mlflow.loggedArtifacts": json.dumps([*tables, entry])})


def deliver_dataset(to: Destination, event: Event) -> None:
    """Log a data set as an input; MLflow knows one by name and digest, so other cases of it need another digest."""
    cases: list[str] = event["cases"]
    dataset = Dataset(
        name=event["name"],
        digest=f"{event['digest'][:8]}-{digest_of([event['context'], cases])[:8]}",
        source_type="local",
        source=json.dumps({"uri": event["source"]}),
        profile=json.dumps({"num_cases": len(cases), "manifest_digest": event["digest"], "cases": cases}),
    )
    context = InputTag("mlflow.data.context", event["context"])
    to.client.log_inputs(to.run_id, [DatasetInput(dataset, [context])])


def deliver_model(to: Destination, event: Event) -> None:
    """Log a model folder as the artifact `model`, with an MLmodel file beside it, and register it when asked."""
    folder = to.folder / event["path"]
    if not folder.is_dir():
        log.warning("%s: the model %s is gone and left out of MLflow", to.folder, folder)
        return
    to.client.log_artifacts(to.run_id, str(folder), "model")
    with tempfile.TemporaryDirectory() as scratch:
        description = Path(scratch) / "MLmodel"
        description.write_text(yaml.safe_dump(_mlmodel(to.run_id, event["time_ms"]), sort_keys=False))
        to.client.log_artifact(to.run_id, str(description), "model")
        card = folder / "model.yaml"
        if card.exists():
            requirements = Path(scratch) / "requirements.txt"
            requirements.write_text(_requirements(card))
            to.client.log_artifact(to.run_id, str(requirements), "model")
    digest = digest_of({path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()})
    to.set_tags({"medseg.model_digest": digest})
    if event["register_as"]:
        _register(to, event["register_as"], event["alias"], digest)


def _requirements(card: Path) -> str:
    """Return what reloading a model takes, as pip reads it; medseg itself comes from its checkout."""
    versions = dict(yaml.safe_load(card.read_text(encoding="utf-8"))["versions"])
    own = versions.pop("medseg", "")
    return "".join([f"# medseg {own}\n", *(f"{name}=={str(v).split('+')[0]}\n" for name, v in versions.items())])


def _mlmodel(run_id: str, time_ms: int) -> dict[str, Any]:
    """Return what MLflow reads to load the folder as a function; nothing in it is a pickle."""
    flavor = {"loader_module": LOADER_MODULE, "python_version": platform.python_version()}
    created = datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
    return {
        "artifact_path": "model",
        "flavors": {"python_function": flavor},
        "mlflow_version": mlflow.__version__,
        "run_id": run_id,
        "utc_time_created": created,
    }


def _register(to: Destination, name: str, alias: str | None, digest: str) -> None:
    """Register the run's model, unless these very weights are registered already, and move the alias to it."""
    try:
        to.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = to.client.search_model_versions(f"name = '{name}' and run_id = '{to.run_id}'")
    same = [version for version in versions if version.tags.get("medseg.model_digest") == digest]
    version = same[0] if same else _new_version(to, name, digest)
    if alias:
        to.client.set_registered_model_alias(name, alias, version.version)


def _new_version(to: Destination, name: str, digest: str) -> Any:
    """Return a new version of a registered model: the run's model as it is now."""
    source = f"runs:/{to.run_id}/model"
    return to.client.create_model_version(name, source, to.run_id, tags={"medseg.model_digest": digest})


def deliver_resume(to: Destination, _: Event) -> None:
    """Let an interrupted run, and its parent, run again."""
    _set_status(to, "RUNNING")


def deliver_finish(to: Destination, event: Event) -> None:
    """End the run, and with it its parent, as the event says."""
    _set_status(to, event["status"], event["time_ms"])


def _set_status(to: Destination, status: str, end_ms: int | None = None) -> None:
    """Set the status of a run and of its parent: an experiment's is that of the fold that changed last."""
    for run_id in filter(None, (to.run_id, to.tag("mlflow.parentRunId"))):
        if end_ms is None:
            to.client.update_run(run_id, status=status)
        else:
            to.client.set_terminated(run_id, status, end_ms)


DELIVERIES: dict[str, Callable[[Destination, Event], None]] = {
    "params": deliver_params,
    "tags": deliver_tags,
    "artifact": deliver_artifact,
    "image": deliver_image,
    "table": deliver_table,
    "dataset": deliver_dataset,
    "model": deliver_model,
    "resume": deliver_resume,
    "finish": deliver_finish,
}
