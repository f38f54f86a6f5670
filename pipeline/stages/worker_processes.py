"""Worker processes: how they are shared out, how they are started, and how they learn that their parent has ended."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from pipeline.errors import PipelineError


def shared_out(devices: str, jobs: int | None) -> list[str]:
    """Return the device of each worker.

    Args:
        devices: as on the command line, such as cpu or cuda:0,cuda:1.
        jobs: workers; None: one for each device.

    Raises:
        PipelineError: fewer workers than devices.
    """
    named = [device.strip() for device in devices.split(",") if device.strip()]
    count = jobs or len(named)
    if not named or count < len(named):
        raise PipelineError(f"--device {devices} with --jobs {jobs}: name devices, and at least one job for each")
    return [named[index % len(named)] for index in range(count)]


def start_worker(module: str, *arguments: str, threads: int, stdout: int | None = None) -> subprocess.Popen[bytes]:
    """Start a module of ours as a process, which is told to end by closing its standard input.

    It has a session of its own, since a terminal sends Ctrl-C to all of one.

    Args:
        module: its full name.
        arguments: of its command line.
        threads: of OpenMP, which a process cannot change once torch is there.
        stdout: subprocess.PIPE, to read what it says there; None: ours.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=stdout,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        start_new_session=True,
    )


def begin_work(threads: int, log_level: int) -> None:
    """Set up a worker: its log like its parent's, its share of the cores."""
    import torch

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pipeline").setLevel(log_level)
    torch.set_num_threads(threads)


def when_parent_ends(act: Callable[[], object]) -> None:
    """Call a function, from another thread, once the parent closes the pipe or dies."""

    def wait() -> None:
        with suppress(OSError):
            os.read(sys.stdin.fileno(), 1)  # Not through its buffer: that has a lock, which must be free at the end.
        act()

    threading.Thread(target=wait, daemon=True).start()


def interrupted_when_parent_ends() -> None:
    """End as by Ctrl-C, once the parent closes the pipe or dies."""
    # Whoever starts us in the background may have had it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    when_parent_ends(lambda: os.kill(os.getpid(), signal.SIGINT))


def log_level() -> int:
    """Return the level of our log, for workers to share."""
    return logging.getLogger("pipeline").getEffectiveLevel()
