"""The routes: jobs that are sent, asked about, fetched; a request that waits for its label map; health, figures."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pipeline import __version__
from pipeline.stages.serving.job import TAG_SHOWN, Job, digest_of_secret, new_id
from pipeline.stages.serving.queueing import QueueFull, Stopping
from pipeline.stages.serving.service import NoWorker, Service
from pipeline.stages.serving.settings import ModelInfo
from pipeline.stages.serving.web import problems
from pipeline.stages.serving.web.metrics import MEDIA_TYPE, Metrics
from pipeline.stages.serving.web.problems import STATUS_OF, Refusal, later
from pipeline.stages.serving.web.schemas import (
    LABEL_TYPE,
    Health,
    JobStatus,
    Readiness,
    as_it_is,
    refusals,
    result_header,
    upload_body,
)
from pipeline.stages.serving.web.uploads import GONE, UploadLimits, receive_upload

log = logging.getLogger(__name__)

DESCRIPTION = """Segments volumes. Send one to `POST /v1/jobs`, ask for the job by its id, fetch its label map; or
send it to `POST /v1/segment` and wait. Research software, not a medical device."""
_HOUSEKEEPING_S = 1.0
_UPLOAD_REFUSALS = (400, 401, 408, 413, 415, 422, 429, 503, 507)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

_bearer = HTTPBearer(auto_error=False, description="A token of the service's --token-file.")


def _service_of(request: Request) -> Service:
    """Return the service that a request is for."""
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(_service_of)]


def _owner(service: Served, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> str:
    """Return by what a client's jobs are known; refuse a client without a token of ours."""
    owner = service.owner_of(credentials.credentials if credentials else None)
    if owner is None:
        raise Refusal(401, "a bearer token of this service is needed", {"WWW-Authenticate": "Bearer"})
    return owner


Owner = Annotated[str, Depends(_owner)]


async def submit(request: Request, response: Response, service: Served, owner: Owner) -> JobStatus:
    """Send a case: it is examined by its headers, queued, and its id returned."""
    secret, job = await _accepted(request, service, owner)
    response.headers["Location"] = f"/v1/jobs/{secret}"
    return _status(service, secret, job)


async def segment(request: Request, service: Served, owner: Owner) -> Response:
    """Send a case and wait for its label map; a client that hangs up is not waited for."""
    _, job = await _accepted(request, service, owner)
    try:
        ended = await _ended(request, service, job)
        if ended.failure:
            raise Refusal(STATUS_OF[ended.failure], ended.reason or "")
        return await asyncio.to_thread(_label_response, service, ended)
    finally:
        await asyncio.to_thread(service.jobs.remove, job.tag)


def status(id: str, service: Served, owner: Owner) -> JobStatus:
    """Ask how a job stands."""
    return _status(service, id, _found(service, id, owner))


def label(id: str, service: Served, owner: Owner) -> Response:
    """Fetch a job's label map, on its first channel's own grid."""
    job = _found(service, id, owner)
    if not job.has_ended:
        raise later(409, f"the job is {job.state}; ask again when it is done")
    if job.state == "failed":
        raise Refusal(409, f"the job failed: {job.reason}")
    return _label_response(service, job)


def remove(id: str, service: Served, owner: Owner) -> None:
    """Remove a job and its result; one at work is finished first, and its result dropped."""
    service.jobs.remove(_found(service, id, owner).tag)


def model(service: Served, owner: Owner) -> ModelInfo:
    """Ask what the model takes and tells apart."""
    return service.info


def healthz() -> Health:
    """Tell that the service answers."""
    return Health()


def readyz(service: Served) -> Readiness:
    """Tell whether a job can be taken: models loaded, a worker alive, room on the disk."""
    if obstacles := service.obstacles():
        raise later(503, "; ".join(obstacles))
    counts = service.jobs.counts()
    return Readiness(queued=counts["queued"], running=counts["running"])


def figures(request: Request, service: Served, owner: Owner) -> Response:
    """Give figures to Prometheus."""
    metrics: Metrics = request.app.state.metrics
    own = {
        "medseg_worker_deaths_total": ("counter", float(service.pool.deaths)),
        "medseg_worker_busy_seconds_total": ("counter", service.pool.busy_s),
        "medseg_ready": ("gauge", float(not service.obstacles())),
        "medseg_spool_free_bytes": ("gauge", float(service.jobs.spool.free_bytes())),
    }
    return Response(metrics.as_text(service.jobs.counts(), own), media_type=MEDIA_TYPE)


def create_app(service: Service, metrics: Metrics) -> FastAPI:
    """Make the application; with it the workers start and stop."""
    app = FastAPI(
        title=f"medseg: {service.info.name}",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,  # Their pages fetch scripts from elsewhere.
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.service, app.state.metrics = service, metrics
    _add_routes(app, upload_body(tuple(service.info.channels)))
    app.add_exception_handler(Refusal, problems.on_refusal)
    app.add_exception_handler(HTTPException, problems.on_http_error)
    app.add_exception_handler(Exception, problems.on_bug)
    app.add_exception_handler(RequestValidationError, problems.on_invalid)
    described = app.openapi
    app.openapi = lambda: as_it_is(described(), needs_token=service.needs_token)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI, body: dict[str, Any]) -> None:
    """Say which path leads where."""

    def add(path: str, function: Callable[..., Any], *statuses: int, method: str = "GET", **more: Any) -> None:
        app.add_api_route(path, function, methods=[method], responses=refusals(*statuses), **more)

    file: dict[int | str, Any] = {
        200: {"description": "The label map, .nii.gz.", "content": {LABEL_TYPE: {"schema": {"type": "string"}}}}
    }
    add("/v1/jobs", submit, *_UPLOAD_REFUSALS, method="POST", status_code=202, openapi_extra=body)
    app.add_api_route(
        "/v1/segment",
        segment,
        methods=["POST"],
        responses=file | refusals(*_UPLOAD_REFUSALS, 500),
        response_class=Response,
        openapi_extra=body,
    )
    add("/v1/jobs/{id}", status, 401, 404, 422)
    app.add_api_route(
        "/v1/jobs/{id}/label", label, responses=file | refusals(401, 404, 409, 422), response_class=Response
    )
    add("/v1/jobs/{id}", remove, 401, 404, 422, method="DELETE", status_code=204)
    add("/v1/model", model, 401)
    add("/healthz", healthz)
    add("/readyz", readyz, 503)
    add("/metrics", figures, 401, response_class=Response)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep house while the application runs."""
    housekeeper = asyncio.create_task(_keep_house(app.state.service))
    yield
    housekeeper.cancel()


async def _keep_house(service: Service) -> None:
    """Remove what was not fetched in time."""
    while True:
        await asyncio.sleep(_HOUSEKEEPING_S)
        with contextlib.suppress(OSError):
            await asyncio.to_thread(service.jobs.expire)


async def _accepted(request: Request, service: Service, owner: str) -> tuple[str, Job]:
    """Receive, examine and queue a case; return its id and the job.

    Raises:
        Refusal: it is not taken.
    """
    secret = new_id()
    try:
        with service.jobs.place():
            return secret, await _received(request, service, owner, digest_of_secret(secret))
    except QueueFull:
        raise later(429, f"{service.jobs.capacity} cases wait already; try again later") from None
    except Stopping:
        raise later(503, "the service is stopping; try again when it is back") from None
    except NoWorker:
        raise later(503, "no worker is ready; try again later") from None
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise later(507, "the disk is full; try again later") from None


async def _received(request: Request, service: Service, owner: str, tag: str) -> Job:
    """Receive and examine a case, and queue it."""
    settings, spool = service.settings, service.jobs.spool
    if not service.has_room(int(request.headers.get("content-length", "0"))):
        raise later(507, "the disk is full; try again later")
    limits = UploadLimits(settings.max_upload_bytes, settings.upload_idle_s, settings.upload_s)
    with spool.incoming(tag) as folder:
        files = await receive_upload(request, folder, service.info.channels, limits)
        request.app.state.metrics.upload_bytes += sum((folder / name).stat().st_size for name in files.values())
        answer = await service.examine(tag, {channel: folder / name for channel, name in files.items()}, folder)
        if answer.failure:
            raise Refusal(STATUS_OF[answer.failure], answer.reason or "")
        job = Job(tag=tag, owner=owner, model=service.info.models_digest, files=files, received_s=time.time())
        await asyncio.to_thread(service.jobs.add, job)
    log.info("request %s: job %s is queued", request.scope["request_id"], tag[:TAG_SHOWN])
    return job


async def _ended(request: Request, service: Service, job: Job) -> Job:
    """Wait for a job's end, as long as its client does."""
    ended = asyncio.wrap_future(service.jobs.ended(job.tag))
    gone = asyncio.create_task(_until_gone(request))
    try:
        both: set[asyncio.Future[Any]] = {ended, gone}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            raise Refusal(400, GONE)
        return ended.result()
    except Stopping:
        raise later(503, "the service is stopping; send the case again when it is back") from None
    finally:
        gone.cancel()
        ended.cancel()


async def _until_gone(request: Request) -> None:
    """Wait until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _found(service: Service, secret: str, owner: str) -> Job:
    """Return a client's job."""
    job = service.jobs.find(digest_of_secret(secret), owner)
    if job is None:
        raise Refusal(404, "there is no such job of yours: it was removed, its time ran out, or its id is wrong")
    return job


def _status(service: Service, secret: str, job: Job) -> JobStatus:
    """Return what is told of a job."""
    return JobStatus.of(secret, job, service.jobs.position(job.tag), service.settings.keep_minutes * 60)


def _label_response(service: Service, job: Job) -> Response:
    """Return a job's label map."""
    path: Path = service.jobs.spool.label_of(job.tag)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Refusal(404, "the job was removed, or its time ran out") from None
    headers = {"Content-Disposition": 'attachment; filename="label.nii.gz"', **result_header(job)}
    return Response(content, media_type=LABEL_TYPE, headers=headers)
