"""Downloads from a real server on 127.0.0.1 that breaks off, lies, fails, redirects, or sends another file."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from file_server import FileServer, file_server, head, in_chunks, leads_to, says, whole, without_ranges

from pipeline.downloads import transfer
from pipeline.downloads.decathlon import decathlon_task
from pipeline.downloads.download import FRUITLESS_ATTEMPTS, Checksum, download, forget, part_of, read_progress
from pipeline.errors import DownloadError, ResourceError

BODY = np.random.default_rng(0).integers(256, size=3_000_000, dtype=np.uint8).tobytes()
OTHER = BODY[::-1]
SHA = Checksum("sha256", hashlib.sha256(BODY).hexdigest())
HALF = 1_500_000


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "*")  # Of the machine, if it has one.
    with file_server() as running:
        yield running


def fetched(url: str, tmp_path: Path, checksum: Checksum | None = SHA) -> bytes:
    return download(url, tmp_path / "a.tar", checksum=checksum, first_wait_s=0.01, timeout_s=5).read_bytes()


def test_a_file_comes_whole_and_is_asked_for_once(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", whole(BODY))
    assert fetched(url, tmp_path) == BODY
    assert fetched(url, tmp_path) == BODY
    assert server.ranges == [None]
    assert server.asked[0][1]["User-Agent"].startswith("medseg/")
    forget(tmp_path / "a.tar")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("checksum", [SHA, None])
def test_what_breaks_off_goes_on_where_it_was(server: FileServer, tmp_path: Path, checksum: Checksum | None) -> None:
    url = server.on("/a.tar", whole(BODY, stop_after=HALF), whole(BODY, stop_after=1000), whole(BODY))
    assert fetched(url, tmp_path, checksum) == BODY
    assert server.ranges == [None, f"bytes={HALF}-", f"bytes={HALF + 1000}-"]
    assert [headers["If-Range"] for _, headers in server.asked] == [None, '"v1"', '"v1"']


def test_another_version_of_the_file_is_fetched_from_its_beginning(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", whole(OTHER, etag='"v0"', stop_after=HALF), whole(BODY))
    assert fetched(url, tmp_path, None) == BODY
    assert server.ranges == [None, f"bytes={HALF}-"]


def test_a_server_without_ranges_sends_all_again(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", without_ranges(BODY, stop_after=HALF), without_ranges(BODY))
    assert fetched(url, tmp_path) == BODY
    assert server.ranges == [None, f"bytes={HALF}-"]


def test_without_validator_and_checksum_nothing_is_put_together(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", whole(BODY, etag=None, stop_after=HALF), whole(BODY, etag=None))
    assert fetched(url, tmp_path, None) == BODY
    assert server.ranges == [None, None]


def test_a_weak_validator_promises_no_bytes(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", whole(BODY, etag='W/"v1"', stop_after=HALF), whole(BODY, etag='W/"v1"'))
    assert fetched(url, tmp_path, None) == BODY
    assert server.ranges == [None, None]


def test_parts_of_two_files_are_found_out_and_fetched_anew(server: FileServer, tmp_path: Path) -> None:
    # A server that gives two versions one name: only the checksum can tell.
    url = server.on("/a.tar", whole(OTHER, stop_after=HALF), whole(BODY), whole(BODY))
    assert fetched(url, tmp_path) == BODY
    assert server.ranges == [None, f"bytes={HALF}-", None]


def test_a_length_that_is_too_long_is_a_lie_that_ends(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", whole(BODY, length=len(BODY) + 500))
    with pytest.raises(DownloadError, match=rf"{FRUITLESS_ATTEMPTS} attempts brought nothing new") as error:
        fetched(url, tmp_path)
    assert "3,000,000 of 3,000,500 bytes" in str(error.value) or "nothing from that byte on" in str(error.value)
    assert len(server.asked) <= 2 * FRUITLESS_ATTEMPTS


def test_a_length_that_is_too_short_is_found_out_by_the_checksum(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", whole(BODY, length=len(BODY) - 500))
    with pytest.raises(DownloadError, match="is another file than was expected: sha256"):
        fetched(url, tmp_path)
    assert not part_of(tmp_path / "a.tar").exists()


def test_a_wrong_file_is_removed_and_both_sums_are_said(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", whole(OTHER))
    with pytest.raises(DownloadError) as error:
        fetched(url, tmp_path)
    assert SHA.digest in str(error.value)
    assert hashlib.sha256(OTHER).hexdigest() in str(error.value)
    assert not [*tmp_path.iterdir()]
    md5 = Checksum("md5", hashlib.md5(OTHER, usedforsecurity=False).hexdigest().upper())
    assert fetched(url, tmp_path, md5) == OTHER


def test_what_is_resumed_and_wrong_twice_is_an_end(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", *[whole(OTHER, stop_after=HALF), whole(OTHER)] * 5)
    with pytest.raises(DownloadError, match="another file than was expected"):
        fetched(url, tmp_path)
    assert len(server.asked) == 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(server: FileServer, tmp_path: Path, status: int) -> None:
    url = server.on("/a.tar", says(status), says(status, Retry_After="0"), whole(BODY))
    assert fetched(url, tmp_path) == BODY
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_does_not_pass_is_said_at_once(server: FileServer, tmp_path: Path, status: int) -> None:
    url = server.on("/a.tar", says(status))
    with pytest.raises(DownloadError, match=rf"/a\.tar: HTTP {status} .*; look whether the address is right"):
        fetched(f"{url}?token=secret", tmp_path)
    assert len(server.asked) == 1


def test_a_server_that_stays_down_is_given_up_and_the_part_is_kept(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", whole(BODY, stop_after=HALF), says(500))
    with pytest.raises(DownloadError, match=r"HTTP 500 .*What is there is kept: give the same command again"):
        fetched(url, tmp_path)
    assert part_of(tmp_path / "a.tar").stat().st_size == HALF
    server.on("/a.tar", whole(BODY))
    assert fetched(url, tmp_path) == BODY
    assert server.ranges[-1] == f"bytes={HALF}-"


def test_no_server_at_all_is_said(tmp_path: Path) -> None:
    with file_server() as gone:
        url = gone.url("/a.tar")
    with pytest.raises(DownloadError, match=r"no connection: .*refused"):
        fetched(url, tmp_path)


def test_a_connection_that_says_nothing_ends(server: FileServer, tmp_path: Path) -> None:
    released = threading.Event()

    def stalls(handler: BaseHTTPRequestHandler) -> None:
        head(handler, 200, len(BODY), ETag='"v1"')
        handler.wfile.write(BODY[:HALF])
        handler.wfile.flush()
        released.wait(20)

    url = server.on("/a.tar", stalls, whole(BODY))
    start = time.monotonic()
    made = download(url, tmp_path / "a.tar", checksum=SHA, first_wait_s=0.01, timeout_s=0.5)
    released.set()
    assert made.read_bytes() == BODY
    assert time.monotonic() - start < 15


def test_a_length_that_is_not_said_ends_with_its_last_chunk(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", in_chunks(BODY, stop_after=HALF), in_chunks(BODY))
    assert fetched(url, tmp_path, None) == BODY
    assert read_progress(tmp_path / "a.tar") is not None


def test_redirects_are_followed_a_few_times(server: FileServer, tmp_path: Path) -> None:
    server.on("/a.tar", whole(BODY, stop_after=HALF), whole(BODY))
    url = server.on("/moved", leads_to("/a.tar", 301))
    assert fetched(url, tmp_path) == BODY
    assert server.ranges == [None, None, f"bytes={HALF}-", f"bytes={HALF}-"]


@pytest.mark.parametrize(
    "target", ["/loop", "file:///etc/passwd", "ftp://127.0.0.1/a.tar", "http://user:word@127.0.0.1/"]
)
def test_redirects_that_lead_nowhere_are_refused(server: FileServer, tmp_path: Path, target: str) -> None:
    url = server.on("/loop", leads_to(target))
    with pytest.raises(DownloadError):
        fetched(url, tmp_path)
    assert len(server.asked) <= 1 + transfer.MOST_REDIRECTS
    assert not part_of(tmp_path / "a.tar").exists()


def test_a_chain_of_redirects_ends(server: FileServer, tmp_path: Path) -> None:
    for number in range(20):
        server.on(f"/{number}", leads_to(f"/{number + 1}"))
    with pytest.raises(DownloadError, match="a redirect that leads nowhere"):
        fetched(server.url("/0"), tmp_path)
    assert len(server.asked) == 1 + transfer.MOST_REDIRECTS


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/passwd", "begins with https:// or http://"),
        ("ftp://a/b.tar", "begins with https:// or http://"),
        ("a.tar", "begins with https:// or http://"),
        ("http:///a.tar", "begins with https:// or http://"),
        ("http://[a.tar", "is no address"),
        ("https://me:word@a.org/b.tar", "an address at a.org: holds a user name or password"),
    ],
)
def test_what_is_no_address_is_refused(url: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as error:
        fetched(url, tmp_path)
    assert said in str(error.value)
    assert "word" not in str(error.value) or "password" in str(error.value)
    assert not [*tmp_path.iterdir()]


def test_queries_are_neither_kept_nor_said(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", whole(BODY, stop_after=HALF), says(404)) + "?token=secret"
    with pytest.raises(DownloadError) as error:
        fetched(url, tmp_path)
    assert "secret" not in str(error.value)
    assert "secret" not in (tmp_path / "a.tar.part.json").read_text()
    assert server.asked[0][0] == "/a.tar?token=secret"


def test_a_file_that_the_disk_has_no_room_for_is_refused(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", whole(b"", length=10**15))
    with pytest.raises(ResourceError, match=r"GB are free, 2000000\.3 GB are needed"):
        fetched(url, tmp_path)
    assert len(server.asked) == 1


def test_a_damaged_record_is_no_reason_to_stop(server: FileServer, tmp_path: Path) -> None:
    url = server.on("/a.tar", whole(BODY))
    part_of(tmp_path / "a.tar").write_bytes(b"of another program")
    (tmp_path / "a.tar.part.json").write_text("{")
    assert fetched(url, tmp_path) == BODY
    known = json.loads((tmp_path / "a.tar.part.json").read_text())
    assert (known["size_bytes"], known["is_whole"], known["validator"]) == (len(BODY), True, '"v1"')


@pytest.mark.parametrize("digest", ["", "123", "g" * 64, "a" * 63])
def test_what_is_no_digest_is_refused(digest: str) -> None:
    with pytest.raises(DownloadError, match="expected 64 hexadecimal digits"):
        Checksum("sha256", digest)


@pytest.mark.parametrize("text", ["4", "04", "task04", "Task04_Hippocampus", "hippocampus", " HIPPO "])
def test_a_task_of_the_decathlon_is_named_in_many_ways(text: str) -> None:
    task = decathlon_task(text)
    assert task.name == "Task04_Hippocampus"
    assert task.url.startswith("https://")
    assert task.url.endswith("/Task04_Hippocampus.tar")
    assert task.checksum.algorithm == "md5"


def test_ten_is_not_one_and_what_is_unknown_lists_all() -> None:
    assert (decathlon_task("1").name, decathlon_task("10").name) == ("Task01_BrainTumour", "Task10_Colon")
    for text, said in (("knee", "no such task"), ("task", "names 10 tasks"), ("11", "no such task"), ("", "names 10")):
        with pytest.raises(DownloadError, match=rf"{said}.*Task01_BrainTumour, .*Task10_Colon"):
            decathlon_task(text)
