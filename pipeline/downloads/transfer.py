"""One request for a file, or for what is missing of it: http and https only, few redirects, nothing executed.

What is on disk is never trusted to be the beginning of what the server has now: the rest is asked for with `If-Range`
(RFC 9110, section 13.1.5), so that another version of the file comes as a whole.
"""

from __future__ import annotations

import re
import shutil
import ssl
from collections.abc import Callable
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from pipeline import __version__
from pipeline.errors import DownloadError, ResourceError
from pipeline.records import Record

SCHEMES = ("http", "https")
MOST_REDIRECTS = 5
CHUNK_BYTES = 2**20
# Left free on the disk, whatever is fetched.
RESERVE_BYTES = 2**28
# What may be better in a moment: request timeout, too early, too many requests, and the server's own troubles.
_PASSING = (408, 425, 429, 500, 502, 503, 504)


class PassingError(Exception):
    """A transfer that broke off, or could not begin, and may go better when it is tried again.

    Attributes:
        wait_s: what the server asks for; None: it does not say.
        is_unfit: whether the part that is there is no beginning of what the server has.
    """

    def __init__(self, message: str, *, wait_s: float | None = None, is_unfit: bool = False) -> None:
        super().__init__(message)
        self.wait_s, self.is_unfit = wait_s, is_unfit


class Progress(Record):
    """What is known of a file that is being fetched; it lies beside the part that is there.

    Attributes:
        address: where it comes from, without the query, which may hold a secret.
        validator: what tells this version of the file from others: a strong ETag, or when it was last modified.
        size_bytes: of the whole file; None: the server has not said.
        was_resumed: whether the part was put together from several answers.
        is_whole: whether all of it is there, and is what it should be.
    """

    address: str
    validator: str | None = None
    size_bytes: int | None = None
    was_resumed: bool = False
    is_whole: bool = False


def refuse_address(url: str) -> None:
    """Refuse what is no address of a file on a web server.

    Raises:
        DownloadError: another scheme, no host, or a password in it, which would land in logs.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise DownloadError(f"{url!r}: is no address: {error}") from None
    if parts.scheme.lower() not in SCHEMES or not host:
        raise DownloadError(f"{url!r}: expected an address that begins with https:// or http://")
    if parts.username is not None or parts.password is not None:
        raise DownloadError(f"an address at {host}: holds a user name or password; take it out")


def address_of(url: str) -> str:
    """Return an address as it is shown and kept: without query and fragment."""
    return urlsplit(url)._replace(query="", fragment="").geturl()


def transfer(
    url: str,
    part: Path,
    known: Progress,
    *,
    may_resume: bool,
    timeout_s: float,
    keep: Callable[[Progress], None],
    advance: Callable[[int, int | None], None],
) -> None:
    """Fetch what is missing of a file.

    Args:
        url: of the file.
        part: what is there of it, which grows.
        known: of that part.
        may_resume: whether the part may be gone on with.
        timeout_s: of a connection that says nothing.
        keep: writes down what the server says of the file, before its bytes are.
        advance: told the bytes that are there, and those of the whole where that is known.

    Raises:
        PassingError: it broke off.
        DownloadError: it cannot be had.
        ResourceError: the disk has no room for it.
    """
    there = part.stat().st_size if may_resume and part.exists() else 0
    with _opened(url, there, known.validator, timeout_s) as response:
        known, start = _begin(response, known, there)
        if known.size_bytes is not None:
            _refuse_small_disk(part.parent, known.size_bytes - start, known.size_bytes)
        keep(known)
        done = _write(response, part, start, lambda size: advance(size, known.size_bytes))
    if known.size_bytes is not None and done != known.size_bytes:
        raise PassingError(f"ended at {done:,} of {known.size_bytes:,} bytes")


class _Redirects(HTTPRedirectHandler):
    """Follows a few redirects to web servers, and none from https to http."""

    max_redirections = MOST_REDIRECTS
    max_repeats = 2

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """Refuse where a redirect must not lead; file:// and ftp:// first of all."""
        refuse_address(newurl)
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise DownloadError(f"{address_of(req.full_url)}: redirects from https to {address_of(newurl)}; refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> OpenerDirector:
    """Return what opens addresses of web servers, and no others."""
    opener = OpenerDirector()
    for handler in (
        *(ProxyHandler(), UnknownHandler(), HTTPHandler(), HTTPSHandler()),
        *(HTTPDefaultErrorHandler(), _Redirects(), HTTPErrorProcessor()),
    ):
        opener.add_handler(handler)
    return opener


def _opened(url: str, there: int, validator: str | None, timeout_s: float) -> HTTPResponse:
    """Ask for a file from a byte on; what goes wrong is told apart by whether it may pass."""
    headers = {"User-Agent": f"medseg/{__version__}", "Accept-Encoding": "identity"}
    if there:
        headers |= {"Range": f"bytes={there}-"} | ({"If-Range": validator} if validator else {})
    try:
        response: HTTPResponse = _opener().open(Request(url, headers=headers), timeout=timeout_s)
    except HTTPError as error:
        with error:
            raise _refused(url, error) from None
    except URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"{address_of(url)}: its certificate cannot be trusted: {error.reason}") from None
        raise PassingError(f"no connection: {error.reason}") from None
    except (HTTPException, OSError) as error:
        raise PassingError(f"no answer: {error or type(error).__name__}") from None
    return response


def _refused(url: str, error: HTTPError) -> Exception:
    """Return what an answer that is no success means."""
    said = f"HTTP {error.code} {error.reason}".replace("\n", " ")
    if error.code == 416:
        return PassingError(f"there is nothing from that byte on ({said})", is_unfit=True)
    if error.code in _PASSING:
        wait = error.headers.get("Retry-After", "")
        return PassingError(said, wait_s=float(wait) if re.fullmatch(r"\d{1,4}", wait) else None)
    hint = "; a redirect that leads nowhere" if 300 <= error.code < 400 else "; look whether the address is right"
    return DownloadError(f"{address_of(url)}: {said}{hint}")


def _begin(response: HTTPResponse, known: Progress, there: int) -> tuple[Progress, int]:
    """Return what an answer says of the file, and at which byte it begins.

    Raises:
        PassingError: it begins elsewhere than was asked for; the part is of no use.
    """
    etag = response.headers.get("ETag", "")
    validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
    if response.status != 206:
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() else None
        return known.changed(validator=validator, size_bytes=size, was_resumed=False), 0
    place = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    size = int(place[2]) if place and place[2] != "*" else known.size_bytes
    if place is None or int(place[1]) != there or size != (known.size_bytes or size):
        raise PassingError("another range came than was asked for", is_unfit=True)
    return known.changed(size_bytes=size, was_resumed=True), there


def _write(response: HTTPResponse, part: Path, start: int, advance: Callable[[int], Any]) -> int:
    """Write what comes to the part, from a byte on; return how many bytes are there then."""
    with part.open("r+b" if start else "wb") as file:
        file.seek(start)
        file.truncate()
        done = start
        while True:
            try:
                chunk = response.read1(CHUNK_BYTES)  # What has come is kept, however slowly the rest does.
            except (HTTPException, OSError) as error:
                raise PassingError(f"broke off at {done:,} bytes: {error or type(error).__name__}") from None
            if not chunk:
                return done
            _refuse_small_disk(part.parent, len(chunk))
            file.write(chunk)
            file.flush()
            done += len(chunk)
            advance(done)


def _refuse_small_disk(folder: Path, missing_bytes: int, unpacked_bytes: int = 0) -> None:
    """Refuse what the disk has no room for: what is missing of a file, and what it will be at least unpacked."""
    free, needed = shutil.disk_usage(folder).free, missing_bytes + unpacked_bytes + RESERVE_BYTES
    if free < needed:
        raise ResourceError(
            f"{folder}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed for the archive and what is in "
            "it; make room, or choose another --out"
        )
