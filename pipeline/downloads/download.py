"""A file from the internet, whole or not at all: gone on with after whatever stopped it, and checked."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from pipeline.downloads.transfer import PassingError, Progress, address_of, refuse_address, transfer
from pipeline.errors import DownloadError
from pipeline.progress import transferred
from pipeline.records import write_json

log = logging.getLogger(__name__)

# So many attempts in a row that bring nothing new are the end; between them it waits, twice as long each time.
FRUITLESS_ATTEMPTS = 5
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
TIMEOUT_S = 60.0

_DIGITS = {"md5": 32, "sha256": 64}


@dataclass(frozen=True)
class Checksum:
    """What a file's digest must be."""

    algorithm: Literal["md5", "sha256"]
    digest: str

    def __post_init__(self) -> None:
        """Refuse what is no digest."""
        if len(self.digest) != _DIGITS[self.algorithm] or not set(self.digest.lower()) <= set("0123456789abcdef"):
            expected = f"{_DIGITS[self.algorithm]} hexadecimal digits"
            raise DownloadError(f"--{self.algorithm} {self.digest}: expected {expected}")

    def of(self, path: Path) -> str:
        """Return a file's digest."""
        with path.open("rb") as file:
            made = hashlib.file_digest(file, lambda: hashlib.new(self.algorithm, usedforsecurity=False))
        return made.hexdigest()


def download(
    url: str,
    path: Path,
    *,
    checksum: Checksum | None = None,
    first_wait_s: float = FIRST_WAIT_S,
    timeout_s: float = TIMEOUT_S,
) -> Path:
    """Fetch a file, or what is missing of it, and check it.

    What is there lies in PATH.part, what is known of it in PATH.part.json; both stay until `forget`. A part is gone on
    with where the server tells versions of the file apart, or where a checksum would show that it did not fit.

    Args:
        url: http or https.
        path: names the part; its folder is made.
        checksum: what the whole must be; None: its size is all that is looked at.
        first_wait_s: before the second attempt; doubled with each that brings nothing.
        timeout_s: of a connection that says nothing.

    Returns:
        PATH.part, which is whole.

    Raises:
        DownloadError: it cannot be had, or is not what it should be.
        ResourceError: the disk has no room for it.
    """
    refuse_address(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    known = read_progress(path)
    if known is not None and known.address == address_of(url) and known.is_whole and part.exists():
        return part
    if known is None or known.address != address_of(url):
        _discard(path)
    for is_last in (False, True):
        _fetch(url, path, checksum, first_wait_s, timeout_s)
        known = read_progress(path)
        assert known is not None
        if checksum is None or (digest := checksum.of(part)) == checksum.digest.lower():
            _keep(path, known.changed(is_whole=True))
            return part
        _discard(path)
        if is_last or not known.was_resumed:
            raise DownloadError(
                f"{address_of(url)}: is another file than was expected: {checksum.algorithm} {digest}, expected "
                f"{checksum.digest.lower()}; it is removed. Look whether the address is right, and the sum is its own"
            )
        log.warning("%s: the parts do not make the file that was expected; it is fetched anew", path.name)
    raise AssertionError("the second time ends it")


def forget(path: Path) -> None:
    """Remove a file that was fetched, and what is known of it."""
    _discard(path)


def part_of(path: Path) -> Path:
    """Return where what is there of a file lies."""
    return path.with_name(f"{path.name}.part")


def read_progress(path: Path) -> Progress | None:
    """Return what is known of the part of a file; None where that is nothing, or cannot be read."""
    try:
        return Progress.model_validate(json.loads(_record_of(path).read_bytes()))
    except (OSError, ValueError, ValidationError):
        return None


def _fetch(url: str, path: Path, checksum: Checksum | None, first_wait_s: float, timeout_s: float) -> None:
    """Fetch until the part is whole; what passes is tried again."""
    part, furthest, fruitless, is_unfit = part_of(path), _size(part_of(path)), 0, False
    with transferred(path.name) as advance:
        while True:
            known = read_progress(path) or Progress(address=address_of(url))
            if known.size_bytes is not None and known.size_bytes == _size(part) > 0:
                return
            may_resume = not is_unfit and (known.validator is not None or checksum is not None)
            keep = partial(_keep, path)
            try:
                transfer(url, part, known, may_resume=may_resume, timeout_s=timeout_s, keep=keep, advance=advance)
                return
            except PassingError as error:
                is_unfit = error.is_unfit
                # From the beginning again is no progress, before it has come further than ever.
                fruitless = 0 if _size(part) > furthest else fruitless + 1
                furthest = max(furthest, _size(part))
                if fruitless >= FRUITLESS_ATTEMPTS:
                    raise DownloadError(
                        f"{address_of(url)}: {error}; {fruitless} attempts brought nothing new. "
                        "What is there is kept: give the same command again later"
                    ) from None
                wait_s = _wait_s(error, fruitless, first_wait_s)
                log.warning("%s: %s; again in %.0f s", path.name, error, wait_s)
                time.sleep(wait_s)


def _wait_s(error: PassingError, fruitless: int, first_wait_s: float) -> float:
    """Return how long to wait: as the server asks, or twice as long with each attempt that brought nothing."""
    wanted = first_wait_s * 2 ** max(0, fruitless - 1) if error.wait_s is None else error.wait_s
    return min(wanted, LONGEST_WAIT_S)


def _size(part: Path) -> int:
    """Return how many bytes are there."""
    return part.stat().st_size if part.exists() else 0


def _record_of(path: Path) -> Path:
    """Return where what is known of a part lies."""
    return path.with_name(f"{path.name}.part.json")


def _keep(path: Path, known: Progress) -> None:
    """Write down what is known of a part."""
    write_json(_record_of(path), known.model_dump(mode="json"))


def _discard(path: Path) -> None:
    """Remove a part, and what is known of it."""
    part_of(path).unlink(missing_ok=True)
    _record_of(path).unlink(missing_ok=True)
