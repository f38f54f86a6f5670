"""Record: the base of everything that is written to a file and read back; frozen, typed, unknown keys refused."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from pipeline.errors import PipelineError

# It can only be read by setting it, for the whole process: once, before there are threads.
UMASK = os.umask(0)
os.umask(UMASK)


def json_number(value: float) -> float | None:
    """Return a number as JSON knows it: what is no number is null."""
    return None if math.isnan(value) else value


class Record(BaseModel):
    """A frozen record with named fields; equality is by value."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def changed(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, validated as a whole."""
        return type(self).model_validate({**self.model_dump(), **changes})

    def digest(self) -> str:
        """Return a SHA-256 hex digest of the fields, equal for equal records."""
        return digest_of(self.model_dump(mode="json"))


def says_nothing(value: object) -> bool:
    """Tell whether a field is None or empty: `Field(exclude_if=says_nothing)` then leaves it out of file and digest.

    So a field can be added to a record, and the records written before keep their digests.
    """
    return value is None or value == {} or value == ()


def said(error: Mapping[str, Any]) -> str:
    """Return the message of one of pydantic's errors: of a check of ours without the prefix that pydantic gives it."""
    return str(error["msg"]).removeprefix("Value error, ")


def refuse_other_format(error: type[PipelineError], path: Path, version: Any, reads: int, remake: str) -> None:
    """Raise where a file's format version is not the one that is read.

    Args:
        error: what to raise.
        path: the file.
        version: what it says.
        reads: the version that this medseg reads.
        remake: what makes an older file anew, as an imperative.
    """
    if version != reads:
        todo = "update medseg" if isinstance(version, int) and version > reads else remake
        raise error(f"{path}: format version {version}, this medseg reads {reads}; {todo}")


def digest_of(value: Any) -> str:
    """Return the SHA-256 hex digest of a JSON-serialisable value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends well, and vanishes otherwise.

    The temporary name keeps the suffixes, which decide the format that writers choose. The file is flushed to the disk
    before the rename, so that a crash leaves either the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix="-" + path.name, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~UMASK)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place when the block ends well, and vanishes otherwise.

    An older folder is exchanged in one step, so that a crash leaves the old or the new one; where the file system
    cannot (NFS, other systems than Linux) two renames do it, and there is none between them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
    aside = temporary.with_name(temporary.name + "-old")
    try:
        yield temporary
        temporary.chmod(0o777 & ~UMASK)
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        if not path.exists():
            temporary.rename(path)
        elif not _exchange(temporary, path):
            path.rename(aside)
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change names in one step, by Linux's renameat2; False where that is not to be had."""
    if sys.platform != "linux":
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE, from fcntl.h and linux/fs.h.
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return bool(renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, making its folder where it is missing.

    The bytes of a path that are no UTF-8 are written as JSON writes them: backslash, u and four digits.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def exclusively(path: Path, busy: PipelineError | None = None, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock file against other processes; the kernel frees it when its holder dies.

    Args:
        path: the file.
        busy: raised where another process holds it; None: wait for that one.
        shared: others may hold it too, if they share it as well.

    Raises:
        PipelineError: `busy`; or the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:  # for reading too: NFS shares a lock only so
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            assert busy is not None
            raise busy from None
        except OSError as error:
            raise PipelineError(
                f"{path}: cannot be locked ({error.strerror}); put it on a file system that knows flock (of Lustre: "
                "mounted with -o flock)"
            ) from error
        yield
