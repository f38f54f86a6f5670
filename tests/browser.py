"""A real browser, driven by the DevTools protocol over a pair of pipes: no port, no library, no network."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

import pytest
from PIL import Image

# No name resolves: what a page asks the network for would fail, and be seen.
FLAGS = (
    *("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run", "--disable-sync", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-quic"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars"),
)
SOFTWARE_GL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")
NO_GL = ("--disable-gpu", "--disable-3d-apis", "--disable-software-rasterizer")
LOOPBACK = ("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",)


class Browser:
    """One page of a browser.

    Attributes:
        requests: addresses that the page has asked for, data: left out.
        complaints: what it wrote to its console as a warning or an error, and exceptions that nobody caught.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._buffer, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._loaded = False

    def open(self, address: str, size: tuple[int, int] = (1400, 1300)) -> None:
        """Open a page, and wait until it is loaded."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")
        width, height = size
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._loaded = False
        self._call("Page.navigate", url=address)
        while not self._loaded:
            self._note(self._message())

    def run(self, script: str) -> Any:
        """Return the value of an expression; of a promise, what it comes to."""
        found = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition: str, limit_s: float = 60.0) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + limit_s
        while not self.run(condition):
            assert time.monotonic() < end, f"never came true: {condition}; {self.complaints}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press and release a key."""
        code = f"Key{key.upper()}" if key.isalpha() and len(key) == 1 else key
        self._call("Input.dispatchKeyEvent", type="keyDown", key=key, code=code, text=key if len(key) == 1 else "")
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key, code=code)

    def picture(self, selector: str = "") -> Image.Image:
        """Return what is seen, of the page or of an element."""
        # Two frames, so that what was drawn last is on the screen.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        clip = {}
        if selector:
            box = self.run(
                f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView(); "
                "const b = e.getBoundingClientRect(); "
                "return [b.x + scrollX, b.y + scrollY, b.width, b.height]; })()"
            )
            clip = {"clip": dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1}}
        taken = self._call("Page.captureScreenshot", format="png", **clip)
        return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self._note(answer)

    def _message(self, limit_s: float = 120.0) -> dict[str, Any]:
        """Return the next message."""
        end = time.monotonic() + limit_s
        while b"\0" not in self._buffer:
            ready, _, _ = select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser says nothing"
            piece = os.read(self._read, 2**20)
            assert piece, "the browser is gone"
            self._buffer += piece
        first, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(first))

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what an event says."""
        kind, said = event.get("method"), event.get("params", {})
        if kind == "Page.loadEventFired":
            self._loaded = True
        elif kind == "Network.requestWillBeSent" and not said["request"]["url"].startswith("data:"):
            self.requests.append(said["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(said["exceptionDetails"])[:2000])
        elif kind == "Runtime.consoleAPICalled" and said["type"] in ("warning", "error", "assert"):
            self.complaints.append(json.dumps(said["args"])[:2000])
        elif kind == "Log.entryAdded" and said["entry"]["level"] in ("warning", "error"):
            self.complaints.append(said["entry"]["text"])


@contextmanager
def browser(profile: Path, *flags: str) -> Iterator[Browser]:
    """Start a browser, with a profile of its own and further flags, until the block ends; skip where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed here")
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    # Above 9, so that none is 3 or 4, where the browser looks for them.
    high_in, high_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out))
    shell = f'exec "$0" "$@" 3<&{high_in} 4>&{high_out}'
    command = ["bash", "-c", shell, program, *FLAGS, *flags, f"--user-data-dir={profile}"]
    with (profile.parent / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            command, pass_fds=(high_in, high_out), stdout=log, stderr=log, start_new_session=True
        )
    for end in (theirs_in, theirs_out, high_in, high_out):
        os.close(end)
    try:
        yield Browser(ours_in, ours_out)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for end in (ours_in, ours_out):
            os.close(end)
