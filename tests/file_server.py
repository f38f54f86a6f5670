"""A web server on 127.0.0.1 that behaves as a test says: well, or in one of the ways in which servers do not."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class FileServer:
    """What it answers, by path: one answer after another, the last one again and again; and what it was asked."""

    answers: dict[str, list[Answer]] = field(default_factory=dict)
    asked: list[tuple[str, Message]] = field(default_factory=list)
    address: str = ""

    def url(self, path: str) -> str:
        return f"{self.address}{path}"

    def on(self, path: str, *answers: Answer) -> str:
        """Answer so at a path, and return its address."""
        self.answers[path] = [*answers]
        return self.url(path)

    @property
    def ranges(self) -> list[str | None]:
        """The Range of each request."""
        return [headers["Range"] for _, headers in self.asked]


@contextmanager
def file_server() -> Iterator[FileServer]:
    """Run a server in threads of this process."""
    server = FileServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            server.asked.append((self.path, self.headers))
            answers = server.answers[path]
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            self.close_connection = True
            answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.address = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def head(handler: BaseHTTPRequestHandler, status: int, length: int | None, **headers: str) -> None:
    handler.send_response(status)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def whole(
    body: bytes, *, etag: str | None = '"v1"', stop_after: int | None = None, length: int | None = None
) -> Answer:
    """Send a file, or the range that is asked for; or only so many bytes of it, or with a length that is a lie."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"] or "")
        condition = handler.headers["If-Range"]
        start = int(wanted[1]) if wanted and condition in (None, etag) else 0
        tags = {"ETag": etag} if etag else {}
        if start >= len(body) > 0:
            head(handler, 416, 0, Content_Range=f"bytes */{len(body)}")
            return
        sent = body[start:]
        size = len(sent) if length is None else length - start
        if start:
            place = f"bytes {start}-{start + size - 1}/{start + size}"
            head(handler, 206, size, Content_Range=place, **tags)
        else:
            head(handler, 200, size, **tags)
        handler.wfile.write(sent[:stop_after])

    return answer


def without_ranges(body: bytes, *, stop_after: int | None = None) -> Answer:
    """Send the whole file, whatever range is asked for; its versions are not told apart."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        head(handler, 200, len(body))
        handler.wfile.write(body[:stop_after])

    return answer


def in_chunks(body: bytes, *, stop_after: int | None = None) -> Answer:
    """Send a file of a length that is not said."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        head(handler, 200, None, Transfer_Encoding="chunked", ETag='"v1"')
        sent = body[:stop_after]
        handler.wfile.write(f"{len(sent):x}\r\n".encode() + sent + b"\r\n")
        if stop_after is None:
            handler.wfile.write(b"0\r\n\r\n")

    return answer


def says(status: int, **headers: str) -> Answer:
    """Answer with a status alone."""
    return lambda handler: head(handler, status, 0, **headers)


def leads_to(address: str, status: int = 302) -> Answer:
    """Redirect."""
    return says(status, Location=address)
