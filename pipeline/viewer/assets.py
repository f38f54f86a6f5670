"""NiiVue (niivue.com, BSD 2-Clause), which draws volumes in a browser: where it lies, and how it gets there.

It is no part of the repository. One version is taken, known by its digest; anything else under its name is refused.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.records import atomic_path

VERSION = "0.69.0"
# Of package/dist/niivue.umd.js in npm's package.
SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"

_PACKAGE, _MEMBER, _FILE = f"@niivue/niivue@{VERSION}", "package/dist/niivue.umd.js", "niivue.umd.js"
_OWN = Path(__file__).parent / "assets"
_LICENCE = _OWN / "LICENSE"
# Many times what it has: what claims to be more is not read.
_MOST_BYTES = 2**25
_LIMIT_S = 300.0
_NPM = ("npm", "pack", _PACKAGE, "--ignore-scripts", "--silent", "--fetch-retries=1", "--fetch-timeout=60000")


@cache
def niivue() -> str | None:
    """Return NiiVue's script with its licence above it; None where it is not installed.

    A file that is not the very one is taken for none.
    """
    for path in (_OWN / _FILE, _user_folder() / _FILE):
        content = _read(path)
        if content is not None and _is_niivue(content):
            return f"/*! NiiVue {VERSION}, niivue.com\n{_LICENCE.read_text(encoding='utf-8')}*/\n{content.decode()}"
    return None


def install(source: Path | None = None) -> Path:
    """Put NiiVue where pages find it: in medseg's own folder, or the user's where that cannot be written.

    Args:
        source: a file brought along, npm's package (.tgz) or its dist/niivue.umd.js; None: npm fetches it.

    Returns:
        Where it lies now.

    Raises:
        PipelineError: it cannot be fetched, read or written, or is not the one that is wanted.
    """
    content = _fetched() if source is None else _brought(source)
    if not _is_niivue(content):
        found = hashlib.sha256(content).hexdigest()
        raise PipelineError(
            f"{source or _PACKAGE}: is not NiiVue {VERSION}: its SHA-256 is {found}, wanted is {SHA256}; "
            f"take dist/niivue.umd.js of {_PACKAGE}, or the package itself"
        )
    niivue.cache_clear()
    try:
        return _write(_OWN, content)
    except OSError:
        pass
    try:
        return _write(_user_folder(), content)
    except OSError as error:
        raise PipelineError(
            f"neither {_OWN} nor {_user_folder()} can be written ({error.strerror}); make one of them writable"
        ) from error


def _user_folder() -> Path:
    """Return the user's folder for it (XDG Base Directory Specification 0.8)."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "share") / "medseg"


def _is_niivue(content: bytes) -> bool:
    """Tell whether bytes are the very file that is wanted."""
    return hashlib.sha256(content).hexdigest() == SHA256


def _read(path: Path) -> bytes | None:
    """Return a file's bytes; None where it is not there, or cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _write(folder: Path, content: bytes) -> Path:
    """Write the script with its licence beside it."""
    licence = _LICENCE.read_bytes()
    for name, data in (("LICENSE", licence), (_FILE, content)):
        if folder != _OWN or name != "LICENSE":
            with atomic_path(folder / name) as temporary:
                temporary.write_bytes(data)
    return folder / _FILE


def _fetched() -> bytes:
    """Let npm, as it is set up on this machine, fetch the package, and return the script in it."""
    by_hand = f"`npm pack {_PACKAGE}` on another machine, then `medseg install-viewer --from FILE`"
    if shutil.which("npm") is None:
        raise PipelineError(f"npm is not installed here; install it, or bring the package along: {by_hand}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [*_NPM, "--pack-destination", folder], capture_output=True, text=True, timeout=_LIMIT_S, check=False
            )
            said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0] if done.returncode else ""
        except subprocess.TimeoutExpired:
            said = f"no answer in {_LIMIT_S:.0f} s"
        if said:
            raise PipelineError(f"npm could not fetch {_PACKAGE} ({said}); bring it along: {by_hand}")
        (package,) = Path(folder).glob("*.tgz")
        return _brought(package)


def _brought(source: Path) -> bytes:
    """Return the script in a file: npm's package, of which nothing else is unpacked, or the script itself."""
    try:
        if not tarfile.is_tarfile(source):
            with source.open("rb") as file:
                return file.read(_MOST_BYTES)
        with tarfile.open(source) as package:
            member = package.extractfile(_MEMBER)
            return member.read(_MOST_BYTES) if member else b""
    except (OSError, KeyError, EOFError, tarfile.TarError) as error:
        raise PipelineError(f"{source}: cannot be read as NiiVue's package: {error}") from error
