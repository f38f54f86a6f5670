"""A Ray cluster of several nodes on this machine, in a network of its own: Ray has no password."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

PORT = 6391
START_S, STARTS = 90.0, 3
ONE_CORE = ("--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--node-ip-address=127.0.0.1")


class LoopbackCluster:
    """Nodes as processes; each is the first of a session of its own, which ends with it."""

    address = f"127.0.0.1:{PORT}"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._network = subprocess.Popen(
            ["unshare", "-rn", "sh", "-c", "ip link set lo up && echo up && exec sleep 3600"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._network.stdout is not None
        if "up" not in (said := self._network.stdout.readline()):
            pytest.skip(f"no network namespace can be made: {said.strip()}")
        self._nodes: list[subprocess.Popen[bytes]] = []

    def command(self, *words: str) -> list[str]:
        """Return a command that runs in the cluster's network."""
        return ["nsenter", "--preserve-credentials", "-U", "-n", "-t", str(self._network.pid), *words]

    def add(self, hidden: Path | None = None) -> None:
        """Start a node and wait until it is there: the first is the head.

        Args:
            hidden: a folder that the node does not see; it sees an empty one.
        """
        if self._nodes:
            # The head's log monitor sees the logs of all nodes of one machine.
            where = [f"--address={self.address}", "--include-log-monitor=false"]
        else:
            where = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self._folder}"]
        start = ["ray", "start", "--block", *where, *ONE_CORE]
        if hidden:
            blind = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
            start = ["unshare", "-m", "sh", "-c", blind, str(hidden), *start]
        # On a busy machine a start may fail.
        for attempt in range(STARTS):
            log = self._folder / f"node_{len(self._nodes)}_{attempt}.log"
            with log.open("wb") as file:
                node = subprocess.Popen(
                    self.command(*start),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
                )
            until = time.monotonic() + START_S
            while node.poll() is None and time.monotonic() < until:
                if "Ray runtime started" in log.read_text():
                    self._nodes.append(node)
                    return
                time.sleep(0.1)
            end_session(node)
        pytest.fail(f"a node of Ray does not start: {log.read_text()[-2000:]}")

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the cluster's processes whose title begins so, such as ray::SegmentActor."""
        return [p for node in self._nodes for p in in_session(node.pid) if " ".join(p.cmdline()).startswith(title)]

    def kill_node(self, number: int) -> None:
        """Kill a node and all that runs on it; 0 is the head."""
        end_session(self._nodes.pop(number))

    def end(self) -> None:
        """End all that was started."""
        while self._nodes:
            end_session(self._nodes.pop())
        self._network.kill()
        self._network.wait()
        if self._network.stdout:
            self._network.stdout.close()


def in_session(session: int) -> Iterator[psutil.Process]:
    """Yield the processes of a session."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            continue


def end_session(first: subprocess.Popen[bytes]) -> None:
    """Kill a process and all of its session."""
    for process in list(in_session(first.pid)):
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    first.kill()
    first.wait()


@contextmanager
def loopback_cluster(folder: Path, nodes: int) -> Iterator[LoopbackCluster]:
    """Yield a cluster of so many nodes of one core each.

    Args:
        folder: of Ray's logs and sockets; its path must be short.
        nodes: how many.
    """
    for program in ("unshare", "nsenter", "ip", "ray"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} to make a cluster on this machine with")
    cluster = LoopbackCluster(folder)
    try:
        for _ in range(nodes):
            cluster.add()
        yield cluster
    finally:
        cluster.end()
