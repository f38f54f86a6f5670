"""`medseg train --processes N`: the command once more in N processes on this machine, by torch's own launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

LOOPBACK = "127.0.0.1"


def run(processes: int, arguments: Sequence[str]) -> int:
    """Run a medseg command in several processes that train together, and return its exit code.

    They meet on the loopback interface, by a free port: two trainings of one machine do not disturb one another.

    Args:
        processes: how many; one for each GPU, or of CPUs' cores shared evenly.
        arguments: of the command line, the command first.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes)]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{LOOPBACK}:0", "--local-addr", LOOPBACK]
    interface = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return subprocess.call(
        [*launcher, *meeting, "-m", "pipeline", *arguments], env={**os.environ, **interface, **_threads(processes)}
    )


def _threads(processes: int) -> dict[str, str]:
    """Return the environment that gives each process its share of the cores, unless one says otherwise."""
    from pipeline.hardware import threads_per_worker

    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads_per_worker(processes))}
