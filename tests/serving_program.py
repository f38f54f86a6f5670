"""A service in a process of its own, for tests and nothing else: started, found, asked, ended."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import psutil

DEADLINE_S = 240.0
RUN = """
import json, logging, sys
from pathlib import Path
from pipeline.errors import PipelineError
from pipeline.stages import serve
from pipeline.stages.serving.settings import ServiceSettings
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
logging.getLogger("pipeline").setLevel(logging.DEBUG)
try:
    serve.run(sys.argv[1], ServiceSettings.model_validate(json.loads(sys.argv[2])))
except PipelineError as error:
    sys.exit(f"error: {error}")
"""


@dataclass
class Served:
    """A running service."""

    process: subprocess.Popen[bytes]
    url: str
    spool: Path
    log: Path

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=DEADLINE_S, **options)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def workers(self) -> list[psutil.Process]:
        """Its worker processes, those that were killed and not buried left out."""
        return [c for c in psutil.Process(self.process.pid).children() if c.status() != psutil.STATUS_ZOMBIE]

    def worker(self) -> psutil.Process:
        """Its worker process, once there is one."""
        found: list[psutil.Process] = []
        wait_until(lambda: bool(found.extend(self.workers()) or found))
        return found[0]

    def incoming(self) -> list[Path]:
        return list((self.spool / "incoming").iterdir())

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)


def is_file_of(content: bytes, path: Path) -> bool:
    """Whether it unpacks to what a file unpacks to: ISA-L was seen, once, to miss a repeat, which made other bytes."""
    return gzip.decompress(content) == gzip.decompress(path.read_bytes())


def wait_until(reached: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.02)


def start(model: Path, spool: Path, **settings: Any) -> Served:
    """Start a service and wait until it can take a job."""
    given = {"spool": str(spool), "port": 0, "devices": ["cpu"], **settings}
    log = spool.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", RUN, str(model), json.dumps(given)], stderr=file)

    def address() -> re.Match[str] | None:
        assert process.poll() is None, log.read_text()
        return re.search(r"http://\S+", log.read_text())

    try:
        wait_until(lambda: address() is not None)
        served = Served(process, address()[0], spool, log)  # type: ignore[index]
        with served.client() as client:
            wait_until(lambda: client.get("/readyz").status_code == 200)
    except BaseException:
        process.kill()
        raise
    return served


@contextmanager
def serving(model: Path, spool: Path, **settings: Any) -> Iterator[Served]:
    served = start(model, spool, **settings)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            served.process.kill()
        served.process.wait()


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """Let a process stand still."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if process.is_running():
            os.kill(process.pid, signal.SIGCONT)


def make_scan(path: Path, seed: int, shape: tuple[int, int, int] = (18, 17, 11)) -> Path:
    """Write a volume of noise on an oblique, anisotropic grid of its own."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(-0.3, 0.3)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * [0.9, 1.0, 1.2], rng.uniform(-50, 50, 3)
    nib.save(nib.Nifti1Image(rng.normal(100, 60, shape).astype(np.float32), affine), path)
    return path


def ended(client: httpx.Client, job: str) -> dict[str, Any]:
    """Wait for a job's end and return its status."""
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        status = client.get(f"/v1/jobs/{job}").raise_for_status().json()
        if status["state"] in ("done", "failed"):
            return dict(status)
        time.sleep(0.05)
    raise AssertionError(f"the job has come to no end: {status}")
