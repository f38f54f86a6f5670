"""The server: a socket, Uvicorn, and an end in good order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.errors import PipelineError
from pipeline.stages.serving.service import Service
from pipeline.stages.serving.web.app import create_app
from pipeline.stages.serving.web.guard import Guard
from pipeline.stages.serving.web.metrics import Metrics

log = logging.getLogger(__name__)

# A job in hand may take so long after SIGTERM; service managers wait for 90 s as a rule (systemd's TimeoutStopSec).
GRACE_S = 60
_HEADERS_S = 10.0  # For a request's head, from its first byte or the connection's beginning.
_WAITING_CONNECTIONS = 64  # Beside four for each place in the queue.
_BACKLOG = 512
_LOOK_EVERY_S = 0.2


class ImpatientProtocol(H11Protocol):
    """Closes a connection whose next request does not come to an end of its headers; Uvicorn itself waits for ever."""

    _headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        """Take bytes in, and wait for the rest of a request that they begin."""
        super().data_received(data)
        if self._answering():
            self._stop_waiting()
        elif self._headers_due is None:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _answering(self) -> bool:
        """Tell whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_headers(self) -> None:
        """Give the client some time."""
        self._headers_due = self.loop.call_later(_HEADERS_S, self._time_is_up)

    def _stop_waiting(self) -> None:
        """Give the client all the time it wants."""
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _time_is_up(self) -> None:
        """Close the connection, unless a request came."""
        self._headers_due = None
        if not self._answering() and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """Uvicorn's, which tells the service of its end first, and survives the signal of it.

    Args:
        config: Uvicorn's.
        service: that it serves.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._end_by: float | None = None

    @property
    def grace_s(self) -> float:
        """How long the jobs in hand may still take."""
        return 0.0 if self.force_exit or self._end_by is None else max(0.0, self._end_by - time.monotonic())

    async def on_tick(self, counter: int) -> bool:
        """Look whether to end: told to, or because no worker can begin."""
        return await super().on_tick(counter) or self._service.pool.refusal is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End in good order: nothing new is begun, who waits in vain is told, the jobs in hand are finished."""
        log.info("stopping: jobs in hand are finished, others wait for the next start; once more stops at once")
        self._end_by = time.monotonic() + GRACE_S
        self._service.stopping = True
        self._service.jobs.stop()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as a wish to end; Uvicorn's own way sends them to the process again."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        PipelineError: the port is taken, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise PipelineError(f"{host}:{port}: cannot be listened on: {error.strerror}; choose another --port") from error
    return listening


def serve(service: Service, listening: socket.socket) -> None:
    """Serve until a signal, then end in good order.

    Raises:
        PipelineError: no worker can begin.
    """
    settings, metrics = service.settings, Metrics()
    host, port = listening.getsockname()[:2]
    app = Guard(create_app(service, metrics), (settings.host, *settings.allowed_hosts), metrics)
    config = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        limit_concurrency=4 * settings.queue + _WAITING_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=GRACE_S,
    )
    # It tells of each body that is refused, and so does our log.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    service.pool.start()
    log.info("serving %s on http://%s:%d", service.info.name, f"[{host}]" if ":" in host else host, port)
    server = Server(config, service)
    try:
        server.run(sockets=[listening])
    finally:
        service.stopping = True
        service.pool.stop(server.grace_s)
        service.jobs.release()
    if service.pool.refusal:
        raise PipelineError(service.pool.refusal)
