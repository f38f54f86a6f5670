"""A Ray cluster, joined for a while. The only module that imports Ray.

What is ours on the cluster are actors and tasks of our own classes and functions, which get and return text; what they
read and write lies on the shared file system. All of it ends when this process leaves, however it does.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import PipelineError

log = logging.getLogger(__name__)

# What keeps us waiting is said after so long, and again as often.
SAY_AFTER_S, SAY_AGAIN_S = 15.0, 60.0
# Ray ends a process that has not reached the head for 60 s on the spot; we have something to write before.
GONE_AFTER_S, CONNECT_S = 15.0, 3.0
# How often it is seen whether the head still answers, and what nodes there are.
LOOK_EVERY_S = 2.0


class Died(Exception):
    """The process of an actor or a task ended: it was killed, or its machine lost; says what Ray knows of it."""


@dataclass(frozen=True)
class Need:
    """What one worker takes of a node."""

    cpus: int
    gpus: int = 0
    memory_bytes: int = 0

    def as_text(self) -> str:
        """Return it for people."""
        parts = [f"{self.cpus} CPUs" if self.cpus != 1 else "1 CPU"]
        parts += [f"{self.gpus} GPU"] if self.gpus else []
        parts += [f"{self.memory_bytes / 2**30:.1f} GB of memory"] if self.memory_bytes else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Node:
    """A living node, and what it gives to Ray, free or not."""

    id: str
    name: str
    cpus: float
    gpus: float
    memory_bytes: float

    def room_for(self, need: Need) -> int:
        """Return how many workers the node holds, were nothing else there."""
        each = ((self.cpus, need.cpus), (self.gpus, need.gpus), (self.memory_bytes, need.memory_bytes))
        return min((int(there // wanted) for there, wanted in each if wanted), default=0)


@dataclass
class Cluster:
    """A cluster that this process has joined.

    Attributes:
        gone: its head was not to be reached for too long.
    """

    _ray: Any
    _head: tuple[str, int]
    gone: bool = False
    _reached: float = field(default_factory=time.monotonic)
    _looked: float = 0.0
    _nodes: list[Node] = field(default_factory=list)
    _remote: dict[Any, Any] = field(default_factory=dict)

    def nodes(self) -> list[Node]:
        """Return the living nodes, as they were at the last look.

        Raises:
            PipelineError: the cluster is gone.
        """
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            # Ray's own calls wait for a head that is gone until they end the process.
            if self._answers():
                self._nodes = _living(self._ray)
            self._looked = time.monotonic()
        return self._nodes

    def start(self, actor: type, need: Need, *arguments: Any) -> Any:
        """Start an actor, which has two threads: one to work in, one in which it can be told to stop."""
        options = {**_resources(need), "max_concurrency": 2, "runtime_env": _threads(need)}
        return self._known(actor).options(**options).remote(*arguments)

    def submit(self, function: Callable[..., Any], need: Need, *arguments: Any) -> Any:
        """Have a function called on some node, once: whoever asked decides what becomes of one that died."""
        options = {**_resources(need), "max_retries": 0, "runtime_env": _threads(need)}
        return self._known(function).options(**options).remote(*arguments)

    def ended(self, references: Sequence[Any], timeout_s: float) -> list[Any]:
        """Return which calls have ended, after waiting a while for one."""
        if not references:
            time.sleep(timeout_s)
            return []
        return list(self._ray.wait(list(references), num_returns=len(references), timeout=0)[0]) or list(
            self._ray.wait(list(references), num_returns=1, timeout=timeout_s)[0]
        )

    def result(self, reference: Any) -> Any:
        """Return what an ended call returned.

        Raises:
            Died: its process did.
            Exception: what the call raised.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except errors.RayError as error:
            raise Died(_last_line(error)) from error

    def kill(self, actor: Any) -> None:
        """End an actor at once."""
        if not self.gone:
            self._ray.kill(actor)

    def free(self) -> str:
        """Say what of the cluster is free, for people; what ours hold already is not."""
        if not self._answers():
            return "its head does not answer"
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        shown = [f"{free.get(kind, 0):g} of {total[kind]:g} {kind}s" for kind in ("CPU", "GPU") if kind in total]
        return f"{len(self._nodes)} nodes, free: {', '.join(shown) or 'neither CPU nor GPU is there'}"

    def _known(self, work: Callable[..., Any]) -> Any:
        """Make a class or function known to the cluster, once."""
        if work not in self._remote:
            self._remote[work] = self._ray.remote(work)
        return self._remote[work]

    def _answers(self) -> bool:
        """Tell whether the head accepts connections; raise where it has not for too long."""
        try:
            socket.create_connection(self._head, timeout=CONNECT_S).close()
        except OSError as error:
            if time.monotonic() - self._reached > GONE_AFTER_S:
                self.gone = True
                raise PipelineError(
                    f"the Ray cluster at {self._head[0]}:{self._head[1]} is gone ({error.strerror or error}); what is "
                    "done is valid, and the same command goes on from it"
                ) from error
            return False
        self._reached = time.monotonic()
        return True


class Patience:
    """Says what is waited for while nothing of ours runs on a cluster, and gives up in the end.

    Args:
        cluster: it.
        need: what is asked for.
        limit_s: how long it is waited.
    """

    def __init__(self, cluster: Cluster, need: Need, limit_s: float) -> None:
        self._cluster, self._need, self._limit_s = cluster, need, limit_s
        self._since = time.monotonic()
        self._next_s = SAY_AFTER_S

    def look(self, *, is_served: bool) -> None:
        """Take down whether anything runs.

        Raises:
            PipelineError: nothing has for as long as was to be waited.
        """
        if is_served:
            self._since, self._next_s = time.monotonic(), SAY_AFTER_S
            return
        waited_s = time.monotonic() - self._since
        if waited_s > self._limit_s:
            raise PipelineError(
                f"no worker could be started within {self._limit_s:.0f} s: {self._need.as_text()} wanted for each, and "
                f"the cluster has {self._cluster.free()}; wait longer with --wait-minutes, or ask for less with "
                "--cpus-per-worker"
            )
        if waited_s > self._next_s:
            self._next_s += SAY_AGAIN_S
            log.warning(
                "waiting for a worker to start: %s wanted; the cluster: %s", self._need.as_text(), self._cluster.free()
            )


@contextmanager
def joined(address: str) -> Iterator[Cluster]:
    """Join a cluster, and leave it.

    Args:
        address: HOST:PORT of its head, or auto.

    Raises:
        PipelineError: Ray is not installed, or there is no such cluster, or another Ray or Python runs there.
    """
    ray = _ray()
    if address != "auto":
        _refuse_unreachable(address)
    try:
        with _handlers_kept():
            ray.init(address=address, logging_level=logging.ERROR, configure_logging=True)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise PipelineError(
            f"--address {address}: cannot be joined: {_last_line(error)}; the command runs on a machine that "
            "`ray start` has made a node of the cluster, with one version of Ray and Python everywhere"
        ) from error
    host, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")
    cluster = Cluster(ray, (host, int(port)))
    try:
        yield cluster
    finally:
        ray.shutdown()


def this_node() -> Node:
    """Return the node that this actor or task runs on."""
    ray = _ray()
    own = ray.get_runtime_context().get_node_id()
    return next(node for node in _living(ray) if node.id == own)


def _ray() -> Any:
    """Import Ray, which tells its makers nothing about us."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise PipelineError("--engine ray: Ray is not installed; pip install '.[ray]' in medseg's checkout") from error
    return ray


def _refuse_unreachable(address: str) -> None:
    """Raise at once where nobody listens; Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise PipelineError(f"--address {address}: expected HOST:PORT, such as node1:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2 * CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise PipelineError(
            f"--address {address}: no Ray cluster answers there ({error}); start one with "
            f"`ray start --head --port={port}`, as docs/cluster.md says"
        ) from error


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Keep our handlers of signals; Ray sets one that ends the process at SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _living(ray: Any) -> list[Node]:
    """Return a cluster's living nodes."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            there = node["Resources"]
            cpus, gpus, memory = (float(there.get(kind, 0)) for kind in ("CPU", "GPU", "memory"))
            found.append(Node(node["NodeID"], node["NodeManagerHostname"], cpus, gpus, memory))
    return found


def _resources(need: Need) -> dict[str, Any]:
    """Return what a worker takes as Ray's options."""
    memory = {"memory": need.memory_bytes} if need.memory_bytes else {}
    return {"num_cpus": need.cpus, "num_gpus": need.gpus, **memory}


def _threads(need: Need) -> dict[str, Any]:
    """Return the environment of a worker: threads of OpenMP cannot be changed once torch is there."""
    return {"env_vars": {"OMP_NUM_THREADS": str(max(1, need.cpus))}}


def _last_line(error: BaseException) -> str:
    """Return the last line of an error, where Ray puts the cause, in moderate length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
