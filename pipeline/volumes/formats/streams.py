"""Files as streams of bytes, gzip among them: by ISA-L (the package `isal`) where it is installed, else by zlib.

What is written depends on the content alone: no name, no time, and the same pieces whatever the number of threads.
Compare what it unpacks to, never the packed bytes: zlib's are others, and ISA-L's were seen, once, to vary.
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.errors import VolumeError

try:
    from isal import isal_zlib as codec
    from isal.igzip import IGzipFile as GzipFile
except ImportError:
    import zlib as codec  # type: ignore[no-redef]
    from gzip import GzipFile

# What reading damaged gzip raises.
DAMAGE: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error, cast("type[Exception]", codec.error))
# A byte of deflate stands for 1032 bytes at most (zlib's "Technical Details": 258 bytes in two bits).
LARGEST_RATIO = 1032

_MAGIC = b"\x1f\x8b"
# RFC 1952: magic, deflate, no flags, no time, no extra flags, unknown system.
_GZIP_HEADER = _MAGIC + b"\x08\x00" + bytes(4) + b"\x00\xff"
_LAST_BLOCK = b"\x03\x00"  # RFC 1951: an empty block that ends the stream.
_LEVEL = 1  # The fastest that finds repeats, of either library; label maps are all repeats.
_THREADS = 2


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say which file could not be read, and why; what is no file is not opened: a pipe or a device may never end."""
    try:
        if path.exists() and not path.is_file():
            raise VolumeError(f"{path}: cannot be read: it is no regular file")
        yield
    except DAMAGE as error:
        raise VolumeError(f"{path}: is cut short or damaged ({error}); copy it again") from error
    except OSError as error:
        raise VolumeError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error


def bytes_of(path: Path, count: int = -1) -> bytes:
    """Return a file's bytes, or its first `count`.

    Raises:
        VolumeError: the file cannot be read.
    """
    with reading(path), path.open("rb") as file:
        return file.read(count)


@contextmanager
def unpacked(path: Path, content: bytes | None = None) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file for reading, unpacked where its content is gzip, whatever its name says.

    Args:
        path: the file.
        content: its bytes, where they have been read already.

    Yields:
        The stream, and how many bytes it can hold at most.
    """
    with path.open("rb") if content is None else io.BytesIO(content) as file:
        packed = file.read(2) == _MAGIC
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if not packed:
            yield file, size
        else:
            stream = GzipFile(fileobj=file, mode="rb")
            yield cast(BinaryIO, stream), size * LARGEST_RATIO


def write_gzip(file: BinaryIO, pieces: Iterable[Callable[[], memoryview]], threads: int = _THREADS) -> None:
    """Write one gzip member from pieces that are made and compressed in threads.

    Args:
        file: open for writing.
        pieces: each makes a piece of what is written; at most `threads` + 1 are in memory.
        threads: how many; what is written does not depend on it.
    """
    file.write(_GZIP_HEADER)
    checksum, length = 0, 0
    with ThreadPoolExecutor(threads, "gzip") as pool:
        for piece, compressed in _in_order(pool, pieces, threads + 1):
            file.write(compressed)
            checksum = codec.crc32(piece, checksum)
            length += len(piece)
    file.write(_LAST_BLOCK + struct.pack("<II", checksum, length % 2**32))


def _in_order(
    pool: ThreadPoolExecutor, pieces: Iterable[Callable[[], memoryview]], ahead: int
) -> Iterator[tuple[memoryview, bytes]]:
    """Yield each piece and its compressed bytes in order, with a fixed number under way."""
    under_way: deque[Future[tuple[memoryview, bytes]]] = deque()
    for piece in pieces:
        under_way.append(pool.submit(_compress, piece))
        if len(under_way) == ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _compress(make: Callable[[], memoryview]) -> tuple[memoryview, bytes]:
    """Make a piece and compress it to whole bytes, so that another may follow."""
    piece = make()
    compressor = codec.compressobj(_LEVEL, codec.DEFLATED, -15)  # -15: bare deflate with the largest window.
    return piece, compressor.compress(piece) + compressor.flush(codec.Z_SYNC_FLUSH)
