"""`medseg fetch`: a data set from the internet, whole and checked, unpacked beside a note of where it comes from."""

from __future__ import annotations

import errno
import json
import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError

from pipeline.downloads.archives import unpack
from pipeline.downloads.decathlon import decathlon_task
from pipeline.downloads.download import FIRST_WAIT_S, Checksum, download, forget
from pipeline.downloads.transfer import address_of, refuse_address
from pipeline.errors import DownloadError, ResourceError
from pipeline.records import Record, digest_of, exclusively, file_digest, write_json

log = logging.getLogger(__name__)

MSD = "msd"
# Beside a folder that was fetched.
SOURCE = ".source.json"
_ENDINGS = (".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".tar", ".zip")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Source(Record):
    """Where a folder comes from; kept beside it.

    Attributes:
        address: of the archive, without a query.
        archive: its name here, by which it is recognised.
        size_bytes: of it.
        checksum: its digest, such as md5:9d24...; it was checked where one was known beforehand.
        was_checked: whether one was.
        folder: that was made of it.
        fetched: when.
    """

    address: str
    archive: str
    size_bytes: int
    checksum: str
    was_checked: bool
    folder: str
    fetched: str


@dataclass(frozen=True)
class FetchReport:
    """What was fetched.

    Attributes:
        folder: of the data set.
        source: where it comes from.
        was_there: it had been fetched before.
    """

    folder: Path
    source: Source
    was_there: bool

    def as_text(self) -> str:
        """Say what is there, and which command comes next."""
        if self.was_there:
            first = f"{self.folder}: fetched already, {self.source.fetched}; remove it to fetch it anew"
        else:
            checked = "as expected" if self.source.was_checked else "nothing to hold it against was given"
            first = f"{self.folder}: from {self.source.address}\n{self.source.checksum} ({checked})"
        name = re.sub(r"[^a-z0-9]+", "_", self.folder.name.lower()).strip("_") or "dataset"
        out = Path("data_manifests", f"{name}.json")
        return f"{first}\nnext: medseg manifest {shlex.quote(str(self.folder))} --out {out}"


def run(
    source: Sequence[str],
    out: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    keep_archive: bool = False,
    first_wait_s: float = FIRST_WAIT_S,
) -> FetchReport:
    """Fetch an archive, or what is missing of it, check it, and unpack it.

    Args:
        source: an address; or "msd" and a task of the Medical Segmentation Decathlon, by number or name.
        out: folder in which the data set's folder is made.
        sha256: what the archive's digest must be.
        md5: the same, for sources that know no other.
        keep_archive: leave it in `out`, as its name says.
        first_wait_s: before the second attempt.

    Returns:
        What is there. A folder that was fetched before is left as it is.

    Raises:
        DownloadError: it cannot be had, is not what it should be, or must not be unpacked; nothing of it is left.
        ResourceError: the disk has no room for it.
    """
    url, checksum = _where(source, sha256, md5)
    name = archive_name(url)
    busy = DownloadError(f"{out / name}: another process is fetching it")
    try:
        with exclusively(out / f".{name}.lock", busy):
            there = _fetched_before(out, name, checksum)
            return there or _fetch(url, out, name, checksum, keep_archive, first_wait_s)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise ResourceError(f"{out}: the disk is full; make room and give the same command again") from None
        raise DownloadError(f"{out}: {error}") from None


def archive_name(url: str) -> str:
    """Return a name for what an address leads to: that of its last part; a query makes it another."""
    parts = urlsplit(url)
    last = re.sub(r"[^A-Za-z0-9._-]+", "_", unquote(parts.path).rstrip("/").rpartition("/")[2]).lstrip(".")
    last = last[-100:] or "archive"
    return f"{digest_of(parts.query)[:8]}-{last}" if parts.query else last


def _where(source: Sequence[str], sha256: str | None, md5: str | None) -> tuple[str, Checksum | None]:
    """Return the address that is meant, and what the file must be."""
    checksum = Checksum("sha256", sha256) if sha256 else Checksum("md5", md5) if md5 else None
    if source[0].lower() == MSD:
        task = decathlon_task(" ".join(source[1:]))
        return task.url, checksum or task.checksum
    if len(source) > 1:
        raise DownloadError(f"{' '.join(source)}: expected an address, or msd and a task")
    refuse_address(source[0])
    return source[0], checksum


def _fetched_before(out: Path, name: str, checksum: Checksum | None) -> FetchReport | None:
    """Return what an archive of this name and digest has become, where its folder is still there."""
    for path in sorted(out.glob(f"*{SOURCE}")):
        try:
            source = Source.model_validate(json.loads(path.read_bytes()))
        except (ValueError, ValidationError):
            continue
        if source.archive == name and not _differ(source, checksum) and (out / source.folder).is_dir():
            return FetchReport(out / source.folder, source, was_there=True)
    return None


def _differ(source: Source, checksum: Checksum | None) -> bool:
    """Tell whether what was fetched is another file than is wanted, as far as their digests can be compared."""
    if checksum is None or not source.checksum.startswith(f"{checksum.algorithm}:"):
        return False
    return source.checksum != _said(checksum)


def _fetch(
    url: str, out: Path, name: str, checksum: Checksum | None, keep_archive: bool, first_wait_s: float
) -> FetchReport:
    """Fetch and unpack."""
    log.info("fetching %s", address_of(url))
    archive = download(url, out / name, checksum=checksum, first_wait_s=first_wait_s)
    made = checksum or Checksum("sha256", file_digest(archive))
    stem = next((name.removesuffix(ending) for ending in _ENDINGS if name.endswith(ending)), name) or name
    log.info("unpacking %s", name)
    try:
        folder = unpack(archive, out, name=stem)
    except FileExistsError as error:
        raise DownloadError(
            f"{error}, and did not come from here; move it away, or choose another --out. The archive is kept"
        ) from None
    except DownloadError:
        if checksum is None:  # What nobody vouched for is not worth keeping.
            forget(out / name)
        raise
    source = Source(
        address=address_of(url),
        archive=name,
        size_bytes=archive.stat().st_size,
        checksum=_said(made),
        was_checked=checksum is not None,
        folder=folder.name,
        fetched=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_json(out / f"{folder.name}{SOURCE}", source.model_dump(mode="json"))
    if keep_archive:
        archive.replace(out / name)
    forget(out / name)
    return FetchReport(folder, source, was_there=False)


def _said(checksum: Checksum) -> str:
    """Return a checksum as it is written down."""
    return f"{checksum.algorithm}:{checksum.digest.lower()}"
