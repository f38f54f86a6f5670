"""`medseg train --processes N`: the command once more in N processes on this machine, by torch's own launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.stages.train import fold_tasks, refuse_nothing_to_resume
from pipeline.training.distributed import Share

LOOPBACK = "127.0.0.1"


def refuse(config: Config, processes: int, *, fold: str, resume: bool, device: str, jobs: int | None) -> None:
    """Raise once what each process would raise for itself, between the lines of a launcher that has failed.

    Raises:
        PipelineError: options do not go together, or there is nothing to train or to resume.
    """
    if jobs is not None:
        raise ConfigError(f"--jobs {jobs}: with --processes all train one fold after another; leave one of the two out")
    if "," in device:
        raise ConfigError(f"--device {device}: with --processes each takes the GPU of its number; say cuda")
    tasks = fold_tasks(config, fold, "cpu")
    Share(0, processes).batch_size(tasks[0].batch_size)
    if resume:
        refuse_nothing_to_resume(tasks)


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
