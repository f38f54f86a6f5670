"""Uploads: bodies become files while they arrive, a piece at a time, within limits of size and time.

A body is multipart/form-data with a part a channel, named by it; for a model of one channel the part may be called
`image`, or the body be the file itself. Names of files are not looked at: the content says the format.
"""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from pipeline.stages.serving.web.problems import Refusal

MULTIPART = "multipart/form-data"
IMAGE = "image"
GONE = "the client went away"
_PLAIN_TYPES = ("application/octet-stream", "application/gzip", "application/x-gzip", "application/x-nifti")

_START_BYTES = 2**12
_NIFTI_SIZES = (348, 540)  # Of the headers of NIfTI-1 and -2, which begin with it in either byte order.


@dataclass(frozen=True)
class UploadLimits:
    """What a body may take.

    Attributes:
        size_bytes: of it all.
        idle_s: without a byte.
        whole_s: from its first byte to its last.
    """

    size_bytes: int
    idle_s: float
    whole_s: float


async def receive_upload(
    request: Request, folder: Path, channels: Iterable[str], limits: UploadLimits
) -> dict[str, str]:
    """Write a request's body to files.

    Args:
        request: whose body has not been read.
        folder: of the files.
        channels: the model's, in its order.
        limits: of the body.

    Returns:
        Channel -> name of its file, in the order of the model's channels.

    Raises:
        Refusal: it is too large, too slow, broken off, or not what is expected.
    """
    refuse_declared(request, limits)
    kind, options = parse_options_header(request.headers.get("content-type"))
    names = tuple(channels)
    with ExitStack() as stack:
        parts = Parts(folder, names, stack)
        if kind == MULTIPART.encode():
            await _read_parts(request, options.get(b"boundary", b""), parts, limits)
        elif kind.decode("latin-1") in _PLAIN_TYPES and len(names) == 1:
            parts.begin(names[0])
            async for piece in pieces_of(request, limits):
                parts.write(piece)
        else:
            raise Refusal(415, f"the body has no type that is taken here; expected {expected_body(names)}")
    return parts.named()


def expected_body(channels: tuple[str, ...]) -> str:
    """Say what a body should be."""
    if len(channels) > 1:
        return f"{MULTIPART} with a part a channel: {', '.join(channels)}"
    return f"{MULTIPART} with a part {channels[0]!r}, or the file itself as {_PLAIN_TYPES[0]}"


def refuse_declared(request: Request, limits: UploadLimits) -> None:
    """Refuse a body by what its headers say, before a byte of it is read."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "the body has a Content-Encoding; send files as they are: .nii.gz is packed already")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.size_bytes:
        raise _too_large(f"{int(length)} bytes", limits)


async def pieces_of(request: Request, limits: UploadLimits) -> AsyncIterator[bytes]:
    """Yield a body's bytes as they arrive, within its limits."""
    now = asyncio.get_running_loop().time
    until, size, more = now() + limits.whole_s, 0, True
    while more:
        try:
            message = await asyncio.wait_for(request.receive(), max(0.0, min(limits.idle_s, until - now())))
        except TimeoutError:
            told = f"no byte for {limits.idle_s:g} s" if now() < until else f"not there after {limits.whole_s:g} s"
            raise Refusal(408, f"the upload is too slow: {told}; send it again") from None
        if message["type"] == "http.disconnect":
            raise Refusal(400, GONE)
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        if size > limits.size_bytes:
            raise _too_large(f"more than {limits.size_bytes} bytes", limits)
        yield piece


class Parts:
    """The files that a body becomes.

    Args:
        folder: of them.
        channels: that they may be of.
        stack: closes them.
    """

    def __init__(self, folder: Path, channels: tuple[str, ...], stack: ExitStack) -> None:
        self._folder, self._channels, self._stack = folder, channels, stack
        self._files: dict[str, BinaryIO] = {}
        self._current: BinaryIO | None = None

    def begin(self, name: str) -> None:
        """Begin a channel's file."""
        channel = self._channels[0] if name == IMAGE and len(self._channels) == 1 else name
        if channel not in self._channels:
            raise Refusal(422, f"a part is no channel of the model; expected {expected_body(self._channels)}")
        if channel in self._files:
            raise Refusal(422, f"channel {channel!r} is there twice; send each once")
        file = (self._folder / str(self._channels.index(channel))).open("wb")
        self._current = self._files[channel] = self._stack.enter_context(file)

    def write(self, piece: bytes) -> None:
        """Add to the file last begun."""
        if self._current is not None:
            self._current.write(piece)

    def named(self) -> dict[str, str]:
        """Give each file the suffix that its content wants, and return channel -> name."""
        if not self._files:
            raise Refusal(422, f"the body holds no volume; expected {expected_body(self._channels)}")
        found = {}
        for channel in self._channels:
            if channel in self._files:
                path = self._folder / str(self._channels.index(channel))
                found[channel] = path.rename(path.with_suffix(suffix_of(path))).name
        return found


def suffix_of(path: Path) -> str:
    """Return the suffix of a volume's format by its content; what is unknown is left to NIfTI's reader to refuse."""
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    if start.startswith(b"NRRD"):
        return ".nrrd"
    is_nifti = any(struct.unpack(order, start[:4].ljust(4))[0] in _NIFTI_SIZES for order in ("<i", ">i"))
    return ".mha" if re.search(rb"^\s*NDims\s*=", start, re.MULTILINE) and not is_nifti else ".nii"


async def _read_parts(request: Request, boundary: bytes, parts: Parts, limits: UploadLimits) -> None:
    """Read a body of several parts."""
    reader = _PartReader(parts)
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
        if not boundary:
            raise Refusal(400, f"the Content-Type {MULTIPART} names no boundary")
        async for piece in pieces_of(request, limits):
            parser.write(piece)
    except FormParserError as error:
        raise Refusal(400, f"the body is no {MULTIPART}: {error}") from None
    if not reader.ended:
        raise Refusal(400, f"the body is cut short: it is no whole {MULTIPART}")


class _PartReader:
    """What the parser of a body calls; knows of each part's headers its name alone."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._field, self._value = b"", b""
        self._name: str | None = None
        self.ended = False

    def callbacks(self) -> dict[str, object]:
        """Return what the parser is to call."""
        return {
            "on_header_field": self._on_field,
            "on_header_value": self._on_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers,
            "on_part_data": lambda data, start, end: self._parts.write(data[start:end]),
            "on_end": self._on_end,
        }

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        """Take in some of a header's name."""
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        """Take in some of a header's value."""
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        """Learn a part's name from the header that holds it."""
        if self._field.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._field = self._value = b""

    def _on_headers(self) -> None:
        """Begin the part's file."""
        self._parts.begin(self._name or "")
        self._name = None

    def _on_end(self) -> None:
        """Note that the body is whole."""
        self.ended = True


def _too_large(got: str, limits: UploadLimits) -> Refusal:
    """Return the refusal of a body that is too large."""
    return Refusal(
        413,
        f"the upload is too large: {got}, at most {limits.size_bytes} are taken here (--max-upload); pack the volume"
        " (.nii.gz), or crop it",
    )
