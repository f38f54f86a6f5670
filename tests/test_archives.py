"""Archives that strangers made: what is well made is unpacked, what could do harm leaves nothing behind."""

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.downloads import archives
from pipeline.downloads.archives import LARGEST_RATIO, unpack
from pipeline.errors import DownloadError

Files = dict[str, bytes]
FILES: Files = {"set/dataset.json": b"{}", "set/imagesTr/a.nii.gz": b"image" * 1000, "set/labelsTr/a.nii.gz": b""}


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size, made.mode = kind, link, size, 0o4777
    return made


def tar(path: Path, files: Files, *more: tarfile.TarInfo, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            archive.addfile(entry(name, size=len(content)), io.BytesIO(content))
        for special in more:
            archive.addfile(special)
    return path


def zipped(path: Path, files: Files, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "made",
    [
        lambda path: tar(path, FILES),
        lambda path: tar(path, FILES, mode="w:gz"),
        lambda path: tar(path, FILES, mode="w:bz2"),
        lambda path: tar(path, FILES, mode="w:xz"),
        lambda path: zipped(path, FILES),
    ],
)
def test_an_archive_of_one_folder_becomes_that_folder(tmp_path: Path, made: Callable[[Path], Path]) -> None:
    folder = unpack(made(tmp_path / "archive.part"), tmp_path / "out", name="archive")
    assert folder == tmp_path / "out" / "set"
    for name, content in FILES.items():
        path = tmp_path / "out" / name
        assert path.read_bytes() == content
        # Neither setuid nor what others may do is the archive's to say.
        assert stat.S_IMODE(path.stat().st_mode) & 0o7133 == 0
    assert everything(tmp_path / "out") == {*FILES, "set", "set/imagesTr", "set/labelsTr"}


def test_loose_files_get_a_folder_and_litter_is_left_out(tmp_path: Path) -> None:
    files = {"./a.nii": b"a", "b/c.nii": b"c", "._a.nii": b"x", "__MACOSX/a": b"x", "b/.DS_Store": b"x"}
    folder = unpack(tar(tmp_path / "a.tar", files), tmp_path / "out", name="loose")
    assert folder == tmp_path / "out" / "loose"
    assert everything(folder) == {"a.nii", "b", "b/c.nii"}


def test_a_hidden_folder_is_not_for_an_archive_to_name(tmp_path: Path) -> None:
    folder = unpack(tar(tmp_path / "a.tar", {".ssh/authorized_keys": b"key"}), tmp_path / "out", name="mine")
    assert folder == tmp_path / "out" / "mine"


def test_what_is_there_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out" / "set").mkdir(parents=True)
    with pytest.raises(FileExistsError):
        unpack(tar(tmp_path / "a.tar", FILES), tmp_path / "out", name="a")
    assert everything(tmp_path / "out") == {"set"}


def test_links_become_the_files_that_they_lead_to(tmp_path: Path) -> None:
    links = (
        entry("set/hard", tarfile.LNKTYPE, "set/dataset.json"),
        entry("set/x/soft", tarfile.SYMTYPE, "../dataset.json"),
    )
    folder = unpack(tar(tmp_path / "a.tar", FILES, *links), tmp_path / "out", name="a")
    for name in ("hard", "x/soft"):
        assert not (folder / name).is_symlink()
        assert (folder / name).read_bytes() == b"{}"


EVIL = [
    *(
        "../evil",
        "/tmp/evil",
        "set/../../evil",
        "..",
        "set/..\\evil",
        "C:/evil",
        "C:evil",
        "\\\\host\\evil",
        "set/a\nb",
    ),
]


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    files = FILES | {name: b"evil"}
    archive = tar(tmp_path / "a", files) if kind == "tar" else zipped(tmp_path / "a", files)
    before = everything(tmp_path)
    with pytest.raises(DownloadError, match="not unpacked"):
        unpack(archive, tmp_path / "out", name="a")
    assert everything(tmp_path) == before | {"out"}
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize(
    "special",
    [
        entry("set/link", tarfile.SYMTYPE, "/etc/passwd"),
        entry("set/link", tarfile.SYMTYPE, "../../secret"),
        entry("set/link", tarfile.SYMTYPE, ".."),
        entry("set/link", tarfile.SYMTYPE, "not_there"),
        entry("set/link", tarfile.LNKTYPE, "../secret"),
        entry("set/link", tarfile.LNKTYPE, "/etc/passwd"),
        entry("set/fifo", tarfile.FIFOTYPE),
        entry("set/device", tarfile.CHRTYPE),
        entry("../folder", tarfile.DIRTYPE),
    ],
)
def test_links_that_lead_out_and_devices_are_refused(tmp_path: Path, special: tarfile.TarInfo) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(DownloadError, match="not unpacked"):
        unpack(tar(tmp_path / "a.tar", FILES, special), tmp_path / "out", name="a")
    assert not everything(tmp_path / "out")


def test_nothing_is_written_through_a_link_that_the_archive_makes(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(entry("set/link", tarfile.SYMTYPE, str(tmp_path / "elsewhere")))
        archive.addfile(entry("set/link/evil", size=4), io.BytesIO(b"evil"))
    with pytest.raises(DownloadError, match="not unpacked"):
        unpack(tmp_path / "a.tar", tmp_path / "out", name="a")
    assert not everything(tmp_path / "elsewhere")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("set/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DownloadError, match="a link or a special file; not unpacked"):
        unpack(tmp_path / "a.zip", tmp_path / "out", name="a")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_bomb_is_not_unpacked(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED_BYTES", 10**6)
    zeros = {f"set/{n}": b"\0" * 400_000 for n in range(9)}
    archive = (
        tar(tmp_path / "a", zeros, mode="w:xz") if kind == "tar" else zipped(tmp_path / "a", zeros, zipfile.ZIP_LZMA)
    )
    assert archive.stat().st_size * LARGEST_RATIO < 9 * 400_000
    with pytest.raises(DownloadError, match=r"bytes and would be more than [\d,]+ bytes"):
        unpack(archive, tmp_path / "out", name="a")
    assert not everything(tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path: Path, kind: bytes, is_first: bool) -> None:
    huge = entry("header", kind, size=2**25)
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        if not is_first:
            archive.addfile(entry("set/a"))
        archive.addfile(huge, io.BytesIO(bytes(huge.size)))
    with pytest.raises(DownloadError, match="a header of 33,55"):
        unpack(tmp_path / "a.tar", tmp_path / "out", name="a")


def test_more_files_than_a_data_set_has_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST_MEMBERS", 2)
    with pytest.raises(DownloadError, match="or 2 files; not unpacked"):
        unpack(tar(tmp_path / "a.tar", FILES), tmp_path / "out", name="a")


def test_a_file_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(entry("set/a", size=1), io.BytesIO(b"a"))
    with pytest.raises(DownloadError, match="holds 'set/a' twice"):
        unpack(tmp_path / "a.tar", tmp_path / "out", name="a")
    with pytest.raises(DownloadError, match="holds 'set/a/b' twice"):
        unpack(tar(tmp_path / "b.tar", {"set/a": b"", "set/a/b": b""}), tmp_path / "out", name="b")


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_a_damaged_archive_is_said_to_be_and_leaves_nothing(tmp_path: Path, kind: str, share: float) -> None:
    path, files = tmp_path / f"a.{kind}", FILES | {"set/noise": os.urandom(200_000)}
    whole = (
        zipped(path, files) if kind == "zip" else tar(path, files, mode="w:gz" if kind == "tar.gz" else "w")
    ).read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DownloadError, match=r"is damaged|cut short|is no archive"):
        unpack(path, tmp_path / "out", name="a")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    path.write_bytes(flipped)
    if kind != "tar":  # A plain tar holds no checksum of its content.
        with pytest.raises(DownloadError, match="is damaged"):
            unpack(path, tmp_path / "out", name="a")
    assert kind == "tar" or not everything(tmp_path / "out")


def test_what_is_no_archive_is_shown(tmp_path: Path) -> None:
    (tmp_path / "page.tar").write_text("<!doctype html><title>Please log in</title>")
    with pytest.raises(DownloadError, match=r"is no archive .*it begins with b'<!doctype html>"):
        unpack(tmp_path / "page.tar", tmp_path / "out", name="page")
    with pytest.raises(DownloadError, match="holds no file"):
        unpack(tar(tmp_path / "empty.tar", {}), tmp_path / "out", name="empty")


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "out" / ".tmp-unpacking-a" / "set").mkdir(parents=True)
    (tmp_path / "out" / ".tmp-unpacking-a" / "set" / "half").write_text("half")
    unpack(tar(tmp_path / "a.tar", FILES), tmp_path / "out", name="a")
    assert everything(tmp_path / "out") == {*FILES, "set", "set/imagesTr", "set/labelsTr"}
