"""Archives from strangers unpacked: whole or not at all, and nothing outside of the folder that they go to.

tar (plain, gz, bz2, xz) and zip, told by their content. Only regular files are ever made, by us, one by one, each under
a name that was looked at; modes, owners and times are not taken over. A link becomes the file that it leads to, where
that is an earlier one of the same archive; every other link is refused, as are devices, absolute names and `..`.
Python's own `data` filter (PEP 706) is asked as well.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pipeline.errors import DownloadError, ResourceError

# Unpacked, an archive is at most so many times its size, or the smaller number of bytes: more is a bomb. Label maps
# that are not compressed themselves come to some 20.
LARGEST_RATIO, ALWAYS_ALLOWED_BYTES = 200, 2**30
MOST_MEMBERS = 1_000_000
RESERVE_BYTES = 2**28
_CHUNK_BYTES = 2**20
# tar fills its last record up, to some hundred KB at most.
_LONGEST_END_BYTES = 2**24
# Names and attributes of one file.
_LONGEST_HEADER_BYTES = 2**22
_COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
    *(EOFError, UnicodeError),
)
# What macOS adds to archives, and no data set means.
_LITTER = ("__MACOSX", ".DS_Store")


@dataclass(frozen=True)
class Member:
    """A file of an archive.

    Attributes:
        name: as it stands there.
        size_bytes: as it is said to be.
        opened: its content; None: it is a link.
        link_to: the name of the file that it leads to, within the archive.
    """

    name: str
    size_bytes: int
    opened: IO[bytes] | None
    link_to: str | None = None


def unpack(archive: Path, into: Path, *, name: str) -> Path:
    """Unpack an archive into a folder of its own.

    Args:
        archive: the file.
        into: folder in which that folder is made.
        name: of it, unless all of the archive is in one folder, whose name it takes.

    Returns:
        The new folder.

    Raises:
        DownloadError: the file is no archive, damaged, or must not be unpacked; nothing of it is left.
        FileExistsError: a folder of that name is there already.
        ResourceError: the disk has no room for it.
    """
    temporary = into / f".tmp-unpacking-{name}"
    shutil.rmtree(temporary, ignore_errors=True)  # Of a process that was killed.
    temporary.mkdir(parents=True)
    try:
        _unpack_all(archive, temporary)
        made = [*temporary.iterdir()]
        if not made:
            raise DownloadError(f"{archive.name}: holds no file")
        # A name such as .ssh is not for an archive to choose.
        is_one = len(made) == 1 and made[0].is_dir() and not made[0].name.startswith(".")
        source, target = (made[0], into / made[0].name) if is_one else (temporary, into / name)
        if target.exists():
            raise FileExistsError(f"{target}: is there already")
        source.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _unpack_all(archive: Path, folder: Path) -> None:
    """Write every file of an archive below a folder."""
    limit = max(ALWAYS_ALLOWED_BYTES, LARGEST_RATIO * archive.stat().st_size)
    total, count = 0, 0
    try:
        for member in _members(archive):
            total, count = total + member.size_bytes, count + 1
            if total > limit or count > MOST_MEMBERS:
                raise DownloadError(
                    f"{archive.name}: is {archive.stat().st_size:,} bytes and would be more than "
                    f"{limit:,} bytes or {MOST_MEMBERS:,} files; not unpacked"
                )
            _refuse_full_disk(folder, member.size_bytes)
            _write(member, folder, archive.name)
    except tarfile.FilterError as error:
        raise DownloadError(f"{archive.name}: {error}; not unpacked") from None
    except _DAMAGED as error:
        raise DownloadError(f"{archive.name}: is damaged ({error}); fetch it again") from None
    except NotImplementedError as error:
        raise DownloadError(f"{archive.name}: cannot be unpacked here ({error}); unpack it yourself") from None


def _members(archive: Path) -> Iterator[Member]:
    """Yield an archive's files, one open at a time."""
    if zipfile.is_zipfile(archive) and not _is_compressed(archive):
        with zipfile.ZipFile(archive) as listed:
            yield from _of_zip(listed)
        return
    with _decompressed(archive) as stream, _tar_of(stream, archive) as opened:
        yield from _of_tar(opened)
        _read_to_its_end(stream)


def _tar_of(stream: IO[bytes], archive: Path) -> tarfile.TarFile:
    """Open what was decompressed as a tar."""
    bounded: Any = _Bounded(stream)
    try:
        return tarfile.open(fileobj=bounded, mode="r:")
    except tarfile.ReadError:
        kinds = "tar, tar.gz, tar.bz2, tar.xz or zip"
        begins = _begins(archive)
        raise DownloadError(f"{archive.name}: is no archive ({kinds}); it begins with {begins!r}") from None


class _Bounded:
    """A stream of which nothing large is read at once: a tar's header may say that it is gigabytes long itself."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        """Read so many bytes."""
        if not 0 <= size <= _LONGEST_HEADER_BYTES:
            raise DownloadError(f"a header of {size:,} bytes in the archive; not unpacked")
        return self._stream.read(size)


def _begins(archive: Path) -> bytes:
    """Return a file's first bytes."""
    with archive.open("rb") as file:
        return file.read(60)


def _is_compressed(archive: Path) -> bool:
    """Tell whether all of a file is compressed, as a tar may be."""
    return _begins(archive).startswith(tuple(_COMPRESSED))


def _decompressed(archive: Path) -> IO[bytes]:
    """Open a file, to be read as what it was before it was compressed, if it is."""
    begins = _begins(archive)
    openers = (opener for magic, opener in _COMPRESSED.items() if begins.startswith(magic))
    opened: IO[bytes] = next(openers, Path.open)(archive, "rb")
    return opened


def _of_tar(archive: tarfile.TarFile) -> Iterator[Member]:
    """Yield the files of a tar; folders are made with what is in them."""
    for entry in archive:
        _safe(entry.name)
        if entry.isreg():
            tarfile.data_filter(entry, "/nowhere")
            content = archive.extractfile(entry)
            assert content is not None
            with closing(content):
                yield Member(entry.name, entry.size, content)
        elif entry.islnk() or entry.issym():
            # A symbolic link's target is seen from its own folder, a hard link's from the archive's.
            start = PurePosixPath(entry.name).parent if entry.issym() else PurePosixPath()
            yield Member(entry.name, 0, None, str(start / entry.linkname))
        elif not entry.isdir():
            raise DownloadError(f"{entry.name!r}: is a device or another special file; not unpacked")


def _read_to_its_end(stream: IO[bytes]) -> None:
    """Read what is left after a tar's last file: only at the end of a gz, bz2 or xz its checksum is looked at."""
    left = _LONGEST_END_BYTES
    while chunk := stream.read(_CHUNK_BYTES):
        left -= len(chunk)
        if left < 0:
            raise DownloadError(f"the archive goes on for more than {_LONGEST_END_BYTES:,} bytes after its end")


def _of_zip(archive: zipfile.ZipFile) -> Iterator[Member]:
    """Yield the files of a zip."""
    for entry in archive.infolist():
        mode = entry.external_attr >> 16
        if entry.is_dir():
            _safe(entry.filename)
        elif entry.flag_bits & 1:
            raise DownloadError(f"{entry.filename!r}: is encrypted; unpack it yourself")
        elif mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise DownloadError(f"{entry.filename!r}: is a link or a special file; not unpacked")
        else:
            with archive.open(entry) as content:
                yield Member(entry.filename, entry.file_size, content)


def _safe(name: str) -> PurePosixPath:
    """Return a name within an archive as a path below a folder.

    Raises:
        DownloadError: it leads elsewhere.
    """
    path = PurePosixPath(name)
    odd = "\\" in name or re.match("[A-Za-z]:", name) or any(ord(letter) < 32 for letter in name)
    if odd or path.is_absolute() or ".." in path.parts or not path.parts:
        raise DownloadError(f"{name!r}: a name that leads out of the folder, or may do so; not unpacked")
    return path


def _write(member: Member, folder: Path, archive: str) -> None:
    """Write a file of an archive below a folder."""
    path = _safe(member.name)
    if any(part in _LITTER or part.startswith("._") for part in path.parts):
        return
    target = folder / path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if member.opened is None:
            _write_link(member, target, folder)
            return
        with target.open("xb") as file:
            _copy(member, file)
            file.flush()
            os.fsync(file.fileno())
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise DownloadError(f"{archive}: holds {member.name!r} twice; not unpacked") from None


def _write_link(member: Member, target: Path, folder: Path) -> None:
    """Make a link's file a second name of the one that it leads to."""
    assert member.link_to is not None
    source = Path(os.path.normpath(folder / member.link_to))
    within = source.is_relative_to(folder) and not PurePosixPath(member.link_to).is_absolute()
    if not within or not source.is_file():
        raise DownloadError(
            f"{member.name!r}: a link to {member.link_to!r}, which is no earlier file of the archive; not unpacked"
        )
    target.hardlink_to(source)


def _copy(member: Member, file: IO[bytes]) -> None:
    """Copy a file's content; more than it was said to be is a bomb."""
    assert member.opened is not None
    left = member.size_bytes
    while chunk := member.opened.read(_CHUNK_BYTES):
        left -= len(chunk)
        if left < 0:
            raise DownloadError(f"{member.name!r}: is larger than the archive says; not unpacked")
        file.write(chunk)
    if left:
        raise DownloadError(f"{member.name!r}: is cut short; fetch the archive again")


def _refuse_full_disk(folder: Path, size_bytes: int) -> None:
    """Refuse a file that the disk has no room for."""
    free = shutil.disk_usage(folder).free
    if free < size_bytes + RESERVE_BYTES:
        raise ResourceError(f"{folder}: {free / 1e9:.1f} GB are free, which the archive does not fit in; make room")
