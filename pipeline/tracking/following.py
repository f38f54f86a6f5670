"""The follower: a process beside a training that sends its events, samples the machine, and never slows it down."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from pipeline.tracking.log import RunLog, read_events, read_state
from pipeline.tracking.sending import send

log = logging.getLogger(__name__)

NICENESS = 10
POLL_S = 0.5
SEND_EVERY_S = 5.0
LONGEST_PAUSE_S = 60.0
SAMPLE_EVERY_S = 10.0
GIVE_UP_AFTER_S = 60.0
"""How long a server out of reach is tried once the writer is gone; `medseg sync` sends the rest."""


def follow(folder: Path, parent_pid: int) -> bool:
    """Send a run's events until it ends, or until the process that writes them is gone; return whether all arrived."""
    os.nice(NICENESS)
    writer, machine = Writer(folder, parent_pid), Machine(folder)
    over, pause = False, SEND_EVERY_S
    while True:
        over = over or writer.is_over()
        if send(folder):
            if over:
                return True
            pause = SEND_EVERY_S
        elif writer.gone_for_s() > GIVE_UP_AFTER_S:
            return False
        else:
            pause = min(2 * pause, LONGEST_PAUSE_S)
        next_try = time.monotonic() + pause
        while time.monotonic() < next_try and (over or not (over := writer.is_over())):
            if not over:
                machine.sample_when_due()
            time.sleep(POLL_S)


class Writer:
    """The process that writes a run's events, as the follower that it started sees it."""

    def __init__(self, folder: Path, pid: int):
        self._folder = folder
        self._pid = pid
        self._key = read_state(folder).key
        self._seen_bytes = 0
        self._resumed = 0
        self._finished = False
        self._gone_since: float | None = None
        self._look()
        self._resumed_before = self._resumed

    def is_over(self) -> bool:
        """Tell whether the run has ended; a writer gone without a word was killed, and that is logged for it."""
        gone = self.gone_for_s() > 0  # asked before looking: what it wrote last is then seen
        self._look()
        if gone and not self._finished and not self._taken_over():
            RunLog.open(self._folder).finish("KILLED")
        return gone or self._finished

    def gone_for_s(self) -> float:
        """Return for how many seconds the writer has been gone; 0 while it lives."""
        if os.getppid() == self._pid:
            return 0.0
        self._gone_since = self._gone_since or time.monotonic()
        return POLL_S + time.monotonic() - self._gone_since

    def _look(self) -> None:
        """Read the events since the last look."""
        for event, end in read_events(self._folder, self._seen_bytes):
            self._seen_bytes = end
            if event["kind"] in ("resume", "finish"):
                self._finished = event["kind"] == "finish"
                self._resumed += not self._finished

    def _taken_over(self) -> bool:
        """Tell whether another process resumed the run since, or began it anew."""
        return self._resumed > self._resumed_before or read_state(self._folder).key != self._key


class Machine:
    """The machine's load, sampled as MLflow's system metrics; the step is the run's age in seconds."""

    def __init__(self, folder: Path):
        self._run = RunLog.open(folder)
        self._began_s = read_state(folder).created_s
        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no NVIDIA GPU
            self._monitors.append(GPUMonitor())
        self._due = time.monotonic() + 1.0  # the CPU's load is that since the monitors began
        CPUMonitor().collect_metrics()

    def sample_when_due(self) -> None:
        """Log a sample when the last one is old enough."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + SAMPLE_EVERY_S
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        self._run.metrics({f"system/{key}": value for key, value in values.items()}, int(time.time() - self._began_s))
