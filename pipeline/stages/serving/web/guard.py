"""What stands between the network and the routes: ids of requests, strangers' names for us, the log, the unread rest.

It is plain ASGI and sees each request first: an answer that it or a route gives before the body was read reaches the
client all the same, for some of that body is read and thrown away before the connection is closed.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.stages.serving.web.metrics import Metrics
from pipeline.stages.serving.web.problems import BUG, problem_response

log = logging.getLogger(__name__)

REQUEST_ID = "X-Request-ID"
OWN_NAMES = ("127.0.0.1", "localhost", "::1")

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# What is read of a refused body so that its sender, still sending, is not cut off before it has read why.
_LINGER_BYTES, _LINGER_S = 2**26, 5.0
_ASKED_ALL_THE_TIME = ("/healthz", "/readyz", "/metrics")
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class Guard:
    """Wraps the application.

    Args:
        app: it.
        hosts: names by which it may be called.
        metrics: count the responses.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str], metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._hosts = {name.lower() for name in (*OWN_NAMES, *hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = scope["request_id"] = given if _ID.fullmatch(given) else secrets.token_hex(8)
        exchange = _Exchange(headers, receive, send, request_id)
        start = time.perf_counter()
        try:
            if refused := self._stranger(headers):
                await problem_response(request_id, *refused)(scope, exchange.receive, exchange.send)
            else:
                await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            log.exception("request %s: a bug", request_id)
            if exchange.status == 0:
                await problem_response(request_id, 500, BUG)(scope, exchange.receive, exchange.send)
        finally:
            # The route and not the path: that may hold a job's id, which is a secret.
            route = getattr(scope.get("route"), "path", "-")
            taken = time.perf_counter() - start
            self._metrics.count_response(scope["method"], route, exchange.status, taken)
            level = logging.DEBUG if route in _ASKED_ALL_THE_TIME else logging.INFO
            log.log(level, "request %s: %s %s %d in %.3f s", request_id, scope["method"], route, exchange.status, taken)

    def _stranger(self, headers: Headers) -> tuple[int, str] | None:
        """Say how to refuse a request that calls us by a name that is not ours, or comes from another's web page."""
        if _host_of(f"//{headers.get('host', '')}") not in self._hosts:
            return 421, "the Host header names another server than this one; allow a name by --allowed-host"
        origin = headers.get("origin")
        if origin is not None and _host_of(origin) not in self._hosts:
            return 403, "a web page of another host asks; pages are not served here"
        return None


class _Exchange:
    """One request and its response on their way.

    Attributes:
        status: of the response; 0 before there is one.
    """

    def __init__(self, headers: Headers, receive: Receive, send: Send, request_id: str) -> None:
        self._receive, self._send, self._id = receive, send, request_id
        self.status = 0
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self._unread = has_body
        # Who asks beforehand has sent nothing yet, and is told before it does.
        self._asks_first = headers.get("expect", "").lower() == "100-continue"

    async def receive(self) -> Message:
        """Pass a part of the request on."""
        message = await self._receive()
        self._asks_first = False
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        """Pass a part of the response on; its end waits until enough of the request was read."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID] = self._id
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        elif self._unread and not self._asks_first and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._drain()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _drain(self) -> None:
        """Read what still comes of the request, within bounds."""
        read = 0
        try:
            async with asyncio.timeout(_LINGER_S):
                while self._unread and read < _LINGER_BYTES:
                    read += len((await self.receive()).get("body", b""))
        except TimeoutError:
            return


def _host_of(address: str) -> str | None:
    """Return the host's name in an address; None where there is none."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
