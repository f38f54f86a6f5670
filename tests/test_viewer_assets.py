"""NiiVue: known by its digest, whoever brings it, and wherever it lies."""

import base64
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from test_viewer import NAMES, viewed

from pipeline.errors import PipelineError
from pipeline.viewer import assets
from pipeline.viewer.page import ViewedCase, viewer_part


def packed(folder: Path, content: bytes, member: str = "package/dist/niivue.umd.js") -> Path:
    """An npm package that holds a file."""
    path = folder / "package.tgz"
    with tarfile.open(path, "w:gz") as package:
        for name, data in (
            ("package/package.json", b'{"name": "@niivue/niivue", "version": "0.69.0"}'),
            (member, content),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            package.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of medseg's and the user's own, with nothing in them but the licence."""
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(assets._LICENCE, own / "LICENSE")
    monkeypatch.setattr(assets, "_OWN", own)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assets.niivue.cache_clear()
    yield tmp_path
    assets.niivue.cache_clear()


def bare(script: str) -> bytes:
    """NiiVue as it was installed, without the licence that is put above it."""
    return script.split("*/\n", 1)[1].encode()


def test_what_is_not_the_very_file_is_refused_whoever_brings_it(elsewhere: Path) -> None:
    for content in (b"alert(1)", b""):
        found = hashlib.sha256(content).hexdigest()
        for path in (packed(elsewhere, content), elsewhere / "niivue.umd.js"):
            if path.suffix == ".js":
                path.write_bytes(content)
            with pytest.raises(PipelineError, match=rf"{path.name}: is not NiiVue 0\.69\.0: its SHA-256 is {found}"):
                assets.install(path)
    with pytest.raises(PipelineError, match="cannot be read as NiiVue's package"):
        assets.install(packed(elsewhere, b"x", "../niivue.umd.js"))
    with pytest.raises(PipelineError, match="cannot be read"):
        assets.install(elsewhere / "missing.tgz")
    assert not list(elsewhere.glob("**/niivue.umd.js")) or list(elsewhere.glob("**/niivue.umd.js")) == [
        elsewhere / "niivue.umd.js"
    ]
    assert assets.niivue() is None


def test_a_file_that_was_changed_since_is_not_put_into_pages(niivue: str, elsewhere: Path) -> None:
    placed = assets.install(packed(elsewhere, bare(niivue)))
    assert placed == elsewhere / "own" / "niivue.umd.js"
    found = assets.niivue()
    assert found == niivue
    assert "BSD 2-Clause License" in found[:200]
    with placed.open("ab") as file:
        file.write(b"\nalert(1)")
    assets.niivue.cache_clear()
    assert assets.niivue() is None


def test_where_medsegs_own_folder_cannot_be_written_the_users_is_taken(
    niivue: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "file").write_text("a file is no folder, whoever asks")
    monkeypatch.setattr(assets, "_OWN", elsewhere / "file")
    placed = assets.install(packed(elsewhere, bare(niivue)))
    assert placed == elsewhere / "xdg" / "medseg" / "niivue.umd.js"
    assert (placed.parent / "LICENSE").read_text().startswith("BSD 2-Clause License")
    assert assets.niivue() == niivue


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A package registry on this machine, to which npm is pointed: it gives the package that stands in the list."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed here")
    given: list[bytes] = []

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = f"http://127.0.0.1:{self.server.server_address[1]}"
            integrity = "sha512-" + base64.b64encode(hashlib.sha512(given[0]).digest()).decode()
            version = {"name": "@niivue/niivue", "version": "0.69.0"}
            version |= {"dist": {"tarball": f"{host}/niivue.tgz", "integrity": integrity}}
            facts = {"name": "@niivue/niivue", "dist-tags": {"latest": "0.69.0"}, "versions": {"0.69.0": version}}
            content = given[0] if self.path.endswith(".tgz") else json.dumps(facts).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_address[1]}/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    yield given
    server.shutdown()
    server.server_close()


def test_npm_fetches_it_and_a_registry_that_gives_another_is_refused(elsewhere: Path, registry: list[bytes]) -> None:
    registry.append(packed(elsewhere, b"alert(1)").read_bytes())  # with the checksum that the registry says
    with pytest.raises(PipelineError, match=r"@niivue/niivue@0\.69\.0: is not NiiVue"):
        assets.install()
    registry[0] = b"no package"
    with pytest.raises(PipelineError, match=r"@niivue/niivue@0\.69\.0: is not NiiVue"):
        assets.install()
    assert assets.niivue() is None


def test_npm_installs_it(niivue: str, elsewhere: Path, registry: list[bytes]) -> None:
    registry.append(packed(elsewhere, bare(niivue)).read_bytes())
    assert assets.install().read_bytes() == bare(niivue)
    assert assets.niivue() == niivue


def test_there_is_no_viewer_without_niivue_or_without_volumes(elsewhere: Path) -> None:
    assert viewer_part(viewed({"a": 0.5, "b": 0.6}), NAMES, "mean Dice") == ""
    assert viewer_part([ViewedCase("a", 0.5)], NAMES, "mean Dice") == ""
