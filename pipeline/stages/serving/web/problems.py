"""How a request is refused: a status, and the reason as application/problem+json (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.records import said
from pipeline.stages.serving.job import Failure

MEDIA_TYPE = "application/problem+json"
# Seconds after which a client that was put off may ask again.
RETRY_AFTER_S = 5
BUG = "something went wrong here, not with your request; the log has it by the request's id"

STATUS_OF: dict[Failure, int] = {"volume": 422, "memory": 413, "disk": 507, "bug": 500, "death": 503}


class Problem(BaseModel):
    """Why a request was refused."""

    type: str = "about:blank"
    title: str = Field(description="The status in words.", examples=["Content Too Large"])
    status: int = Field(examples=[413])
    detail: str = Field(description="What, where, got, expected, what to do.")
    request_id: str = Field(description="As in the header X-Request-ID, and in the service's log.")


class Refusal(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        detail: why, and what to do.
        headers: of the response.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


def later(status: int, detail: str) -> Refusal:
    """Return the refusal of what may well be asked again in a while."""
    return Refusal(status, detail, {"Retry-After": str(RETRY_AFTER_S)})


def problem_response(request_id: str, status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return a refusal as a response."""
    title = HTTPStatus(status).phrase
    problem = Problem(title=title, status=status, detail=detail, request_id=request_id)
    return JSONResponse(problem.model_dump(), status, dict(headers or {}), media_type=MEDIA_TYPE)


async def on_refusal(request: Request, error: Exception) -> Response:
    """Answer a request that we refuse."""
    assert isinstance(error, Refusal)
    return problem_response(_id_of(request), error.status, error.detail, error.headers)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer a request that leads nowhere: no such path, no such method."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:  # Starlette tells the methods of one route of several.
        headers["Allow"] = ", ".join(sorted(_methods_of(request)))
    return problem_response(_id_of(request), error.status_code, str(error.detail), headers)


async def on_invalid(request: Request, error: Exception) -> Response:
    """Answer a request whose parameters make no sense."""
    assert isinstance(error, RequestValidationError)
    detail = "; ".join(f"{'.'.join(map(str, one['loc']))}: {said(one)}" for one in error.errors())
    return problem_response(_id_of(request), 422, detail)


async def on_bug(request: Request, error: Exception) -> Response:
    """Answer a request over which we failed; the guard logs it."""
    return problem_response(_id_of(request), 500, BUG)


def _methods_of(request: Request) -> set[str]:
    """Return by which methods a path can be asked."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    return {method for route in routes if route.path_regex.match(request.url.path) for method in route.methods or ()}


def _id_of(request: Request) -> str:
    """Return a request's id, as the guard has put it down."""
    found: str = request.scope.get("request_id", "")
    return found
