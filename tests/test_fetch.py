"""`medseg fetch`: from a server to a folder that `medseg manifest` reads, through a kill, once."""

import hashlib
import json
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from file_server import FileServer, file_server, head, whole

from pipeline.data.phantoms import write_phantom_dataset
from pipeline.downloads import decathlon
from pipeline.downloads.decathlon import DecathlonTask
from pipeline.downloads.download import Checksum
from pipeline.errors import DownloadError
from pipeline.stages import fetch, manifest
from pipeline.stages.fetch import archive_name


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "*")
    with file_server() as running:
        yield running


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A Decathlon task in a tar."""
    folder = tmp_path_factory.mktemp("made")
    data = write_phantom_dataset(folder / "Task99_Phantoms", cases=2)
    with tarfile.open(folder / "a.tar", "w") as made:
        made.add(data, "Task99_Phantoms")
    return (folder / "a.tar").read_bytes()


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def everything(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_an_address_becomes_a_folder_that_a_manifest_is_made_of(
    server: FileServer, archive: bytes, tmp_path: Path
) -> None:
    url, out = server.on("/sets/phantoms.tar", whole(archive)), tmp_path / "data"
    report = fetch.run([url], out, sha256=sha(archive))
    assert report.folder == out / "Task99_Phantoms"
    assert everything(out) == {"Task99_Phantoms", "Task99_Phantoms.source.json"}
    assert report.as_text().splitlines()[1:] == [
        f"sha256:{sha(archive)} (as expected)",
        f"next: medseg manifest {report.folder} --out data_manifests/task99_phantoms.json",
    ]
    made = manifest.run(report.folder, tmp_path / "mine.json", folds=2)
    assert len(made.cases) == 2
    again = fetch.run([url], out, sha256=sha(archive))
    assert again.was_there
    assert "fetched already" in again.as_text()
    assert len(server.asked) == 1
    source = json.loads((out / "Task99_Phantoms.source.json").read_text())
    assert (source["address"], source["size_bytes"]) == (url, len(archive))


def test_a_task_of_the_decathlon_is_held_against_monais_checksum(
    server: FileServer, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.on("/Task99_Phantoms.tar", whole(archive))
    known = Checksum("md5", hashlib.md5(archive, usedforsecurity=False).hexdigest())
    tasks = {"Task99_Phantoms": DecathlonTask("Task99_Phantoms", url, known)}
    monkeypatch.setattr(decathlon, "decathlon_tasks", lambda: tasks)
    report = fetch.run(["msd", "phantoms"], tmp_path)
    assert report.source.was_checked
    assert report.source.checksum == f"md5:{known.digest}"
    tasks["Task99_Phantoms"] = DecathlonTask("Task99_Phantoms", url, Checksum("md5", "0" * 32))
    with pytest.raises(DownloadError, match="is another file than was expected"):
        fetch.run(["MSD", "99"], tmp_path / "other")


def test_without_a_checksum_it_is_said_and_what_cannot_be_unpacked_is_not_kept(
    server: FileServer, archive: bytes, tmp_path: Path
) -> None:
    report = fetch.run([server.on("/a.tar", whole(archive))], tmp_path / "one", keep_archive=True)
    assert f"sha256:{sha(archive)} (nothing to hold it against was given)" in report.as_text()
    assert (tmp_path / "one" / "a.tar").read_bytes() == archive
    page = server.on("/b.tar", whole(b"<html>log in</html>"))
    with pytest.raises(DownloadError, match="is no archive"):
        fetch.run([page], tmp_path / "two")
    assert everything(tmp_path / "two") == set()


def test_a_folder_that_is_there_stays_and_the_archive_waits(server: FileServer, archive: bytes, tmp_path: Path) -> None:
    url = server.on("/a.tar", whole(archive))
    (tmp_path / "Task99_Phantoms").mkdir()
    with pytest.raises(DownloadError, match=r"is there already, and did not come from here; .*archive is kept"):
        fetch.run([url], tmp_path)
    (tmp_path / "Task99_Phantoms").rmdir()
    assert fetch.run([url], tmp_path).folder.is_dir()
    assert len(server.asked) == 1


def test_what_is_meant_is_said_where_it_is_not_clear(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="expected an address, or msd and a task"):
        fetch.run(["msf", "4"], tmp_path)
    with pytest.raises(DownloadError, match="begins with https"):
        fetch.run(["hippocampus"], tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_file_is_named_by_its_address() -> None:
    assert archive_name("https://a.org/x/set%20one.tar.gz") == "set_one.tar.gz"
    assert archive_name("https://a.org/") == "archive"
    assert archive_name("https://a.org/../..%2F.ssh") == "ssh"
    one, two = (archive_name(f"https://a.org/get.zip?file={n}") for n in (1, 2))
    assert one != two
    assert one.endswith("-get.zip")


def command(url: str, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "fetch", url, "--out", str(out), *more]


def test_a_killed_fetch_goes_on_where_it_was(server: FileServer, archive: bytes, tmp_path: Path) -> None:
    half, released = len(archive) // 2, threading.Event()

    def stalls(handler: BaseHTTPRequestHandler) -> None:
        head(handler, 200, len(archive), ETag='"v1"')
        handler.wfile.write(archive[:half])
        handler.wfile.flush()
        released.wait(60)

    url, out = server.on("/a.tar", stalls, whole(archive)), tmp_path / "data"
    process = subprocess.Popen(command(url, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    part, deadline = out / "a.tar.part", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    # A second one keeps away from the first.
    second = subprocess.run(command(url, out), capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert second.stderr.endswith(f"error: {out / 'a.tar'}: another process is fetching it\n")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    released.set()
    there = part.stat().st_size
    assert 0 < there <= half
    done = subprocess.run(command(url, out, "--sha256", sha(archive)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "next: medseg manifest" in done.stdout
    assert server.ranges == [None, f"bytes={there}-"]
    assert everything(out) == {"Task99_Phantoms", "Task99_Phantoms.source.json"}


def test_an_error_of_fetch_has_no_traceback(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", whole(b"other"))
    done = subprocess.run(command(url, tmp_path, "--md5", "0" * 32), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "is another file than was expected: md5" in done.stderr
    assert "Traceback" not in done.stderr
