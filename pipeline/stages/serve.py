"""`medseg serve`: segments volumes that come over HTTP, one queue of them, in processes that load the models once."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import secrets
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.hardware import pick_device, threads_per_worker
from pipeline.stages.models import resolve_models
from pipeline.stages.segmenting.case import SegmentSettings
from pipeline.stages.serving.pool import Pool
from pipeline.stages.serving.queueing import JobQueue
from pipeline.stages.serving.service import Service, owners_of
from pipeline.stages.serving.settings import ServiceSettings, info_of
from pipeline.stages.serving.spool import Spool

log = logging.getLogger(__name__)

_NEEDED = ("fastapi", "uvicorn", "python_multipart")


def run(
    model: str | Sequence[str],
    settings: ServiceSettings,
    *,
    workspace: Path = Path("work"),
    tracking_uri: str | None = None,
) -> None:
    """Serve a model, or an ensemble, until Ctrl-C or SIGTERM.

    Args:
        model: a folder, runs:/ID or models:/NAME@ALIAS; several, or an experiment's folder, are an ensemble.
        settings: how the service is set up.
        workspace: where runs:/ and models:/ are looked up.
        tracking_uri: server or database of runs:/ and models:/; None: MLFLOW_TRACKING_URI, else the workspace's.

    Raises:
        PipelineError: the service cannot begin: a library, the model or a device is missing, the port is taken,
            another service has the spool, or it would be open to the network without tokens.
    """
    _refuse_missing_libraries()
    _refuse_open_to_all(settings)
    owners_of(settings.token_file)
    models = resolve_models([model] if isinstance(model, str) else model, workspace, tracking_uri)
    info = info_of(models)
    for device in settings.devices:
        pick_device(device)  # Refused here once, rather than by each worker.
    # Only now: it needs what may be missing.
    from pipeline.stages.serving.web.server import bound_socket, serve

    spool = Spool(settings.spool)
    with bound_socket(settings.host, settings.port) as listening, spool.opened():
        jobs = JobQueue(spool, settings.queue, settings.keep_minutes * 60)
        if waiting := jobs.load(info.models_digest):
            log.info("%d jobs wait from before", waiting)
        threads = threads_per_worker(len(settings.devices))
        pool = Pool(_of_each_case(models, settings), settings.devices, threads, jobs, settings.job_minutes * 60)
        serve(Service(settings, info, jobs, pool), listening)
        left = jobs.counts()
        if left["queued"] or left["done"]:
            log.info(
                "%d jobs wait and %d results were not fetched; they stay in %s for the next start",
                left["queued"],
                left["done"],
                spool.folder,
            )


def _of_each_case(models: Sequence[Path], settings: ServiceSettings) -> SegmentSettings:
    """Return how each case is segmented: as `medseg segment` does."""
    return SegmentSettings(
        models=tuple(models),
        out=settings.spool.resolve(),
        run=secrets.token_hex(6),
        precision=settings.precision,
        compile=settings.compile,
        skip_empty=settings.skip_empty,
        max_memory_bytes=settings.max_memory_bytes,
        pictures=False,
    )


def _refuse_missing_libraries() -> None:
    """Refuse to begin where a library is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise PipelineError(f"medseg serve needs {', '.join(missing)}: pip install '.[serve]' in medseg's checkout")


def _refuse_open_to_all(settings: ServiceSettings) -> None:
    """Refuse to listen to other machines without tokens."""
    if settings.token_file is None and not _is_own(settings.host):
        raise PipelineError(
            f"--host {settings.host}: whoever reaches this port could send volumes and fetch label maps; give a"
            " --token-file, or stay on 127.0.0.1 behind a reverse proxy"
        )


def _is_own(host: str) -> bool:
    """Tell whether an address can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
