"""A batch on a Ray cluster: workers as actors, each with a GPU or cores of some node, on one shared folder.

As on one machine, the workers are further processes on the same folder: claims say who has which case, the journal what
became of it. Ray finds the machines, starts a worker on each and again where one dies, and says who died.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.free_memory import available_bytes
from pipeline.records import exclusively, write_json
from pipeline.stages.cluster.fitness import Common, is_seen, misfits
from pipeline.stages.cluster.options import RayOptions
from pipeline.stages.cluster.ray_cluster import Cluster, Died, Need, Node, Patience, joined, this_node
from pipeline.stages.segmenting.batch import Batch
from pipeline.stages.segmenting.case import CaseSteps, SegmentSettings
from pipeline.stages.segmenting.claims import left_by
from pipeline.stages.segmenting.inputs import BOOKKEEPING, SegmentInput
from pipeline.stages.segmenting.journal import Journal
from pipeline.stages.segmenting.report import CaseResult
from pipeline.stages.segmenting.workers import Task
from pipeline.stages.worker_processes import begin_work, log_level

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1
# So many workers may die before they have a case in hand; then it is not the cases that kill them.
STILLBORN_ALLOWED = 3


class RayTask(Task):
    """What a worker on a cluster is told.

    Attributes:
        need_cpus, need_gpus: what each worker takes of its node.
        common: what its machine must have in common with that of the command.
    """

    need_cpus: int
    need_gpus: int
    common: Common


class SegmentActor:
    """A worker, as Ray runs it in a process of its own.

    Args:
        task: path of the RayTask, on the shared file system, as bytes.
        name: by which its claims are known.
    """

    def __init__(self, task: bytes, name: str) -> None:
        self._path, self._name = Path(os.fsdecode(task)), name
        self._stop = threading.Event()

    def begin(self) -> tuple[str, tuple[str, ...]]:
        """Return where this worker runs, and why it cannot take part; empty where it can."""
        here = f"{socket.gethostname()}, process {os.getpid()}"
        if not is_seen(self._path):
            return here, (f"{socket.gethostname()}: does not see {self._path.parents[1]}; all nodes must share it",)
        return here, misfits(self._task().common)

    def work(self) -> tuple[str, bool]:
        """Work through the batch with whoever else does; return why that was refused, and whether the disk is full."""
        task = self._task()
        begin_work(task.threads, task.log_level)
        need = Need(task.need_cpus, task.need_gpus)
        try:
            batch = Batch(CaseSteps(_with_share(task.settings, need)), self._stop, worker=self._name)
            for _ in batch.results(task.cases):
                pass
        except PipelineError as error:
            return str(error), False
        return "", batch.disk_full

    def stop(self) -> None:
        """Finish the cases in hand and begin no other; called from another thread than `work`."""
        self._stop.set()

    def _task(self) -> RayTask:
        """Read what is to be done."""
        return RayTask.model_validate(json.loads(self._path.read_bytes()))


def _with_share(settings: SegmentSettings, need: Need) -> SegmentSettings:
    """Return the settings with this worker's share of its node's memory, unless they name one."""
    beside = this_node().room_for(need)
    if settings.max_memory_bytes is not None or beside < 2:
        return settings
    return settings.changed(max_memory_bytes=available_bytes() // beside)


@dataclass
class _Worker:
    """A worker seen from the command: the call that is waited for is first `begin`, then `work`."""

    name: str
    actor: Any
    call: Any
    place: str = ""
    works: bool = False


@dataclass
class _Crew:
    """The workers of a batch on a cluster."""

    cluster: Cluster
    need: Need
    path: Path
    names: Sequence[str]
    most: int | None
    stop: threading.Event
    workers: list[_Worker] = field(default_factory=list)
    unfit: list[_Worker] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    is_through: bool = False
    disk_full: bool = False
    _started: int = 0
    _stillborn: int = 0
    _told_to_stop: bool = False

    @property
    def is_working(self) -> bool:
        """Tell whether any worker is at work."""
        return any(worker.works for worker in self.workers)

    def look(self, cases_left: int, timeout_s: float) -> bool:
        """See to the workers, after waiting a while for news of them; False once there is nothing more to come."""
        if self.stop.is_set() or self.is_through:
            self._wind_up()
        elif self._stillborn < STILLBORN_ALLOWED:
            for _ in range(self._wanted(cases_left) - len(self.workers)):
                self._start()
        by_call = {worker.call: worker for worker in self.workers}
        for call in self.cluster.ended(list(by_call), timeout_s):
            self._take(by_call[call])
        return bool(self.workers)

    def dismiss(self) -> None:
        """End what still runs, at once; what it leaves is whole or can be done again."""
        for worker in (*self.workers, *self.unfit):
            self.cluster.kill(worker.actor)

    def _wanted(self, cases_left: int) -> int:
        """Return how many workers there should be, those that cannot take part left out."""
        room = max(1, sum(node.room_for(self.need) for node in self.cluster.nodes()))
        # The unfit keep their places, where others would be as unfit.
        return min(self.most or room, room - len(self.unfit), cases_left)

    def _start(self) -> None:
        """Ask for a worker; Ray finds a node that has room, now or later."""
        self._started += 1
        name = f"{self.path.stem}-{self._started}"
        actor = self.cluster.start(SegmentActor, self.need, os.fsencode(self.path), name)
        self.workers.append(_Worker(name, actor, actor.begin.remote()))

    def _take(self, worker: _Worker) -> None:
        """Take in how a call has ended."""
        try:
            result = self.cluster.result(worker.call)
        except Died as died:
            self.workers.remove(worker)
            self._bury(worker, str(died))
            return
        except Exception as error:
            # A bug: what the worker said shows it, and the others go on.
            self.workers.remove(worker)
            self.reasons.append(f"{worker.place}: {type(error).__name__}: {error}")
            log.error("%s", self.reasons[-1])
            self._stillborn += 1
            return
        if not worker.works:
            self._put_to_work(worker, *result)
        else:
            self.workers.remove(worker)
            self._take_end(worker, *result)

    def _put_to_work(self, worker: _Worker, place: str, problems: Sequence[str]) -> None:
        """Let a worker begin that has said where it is, unless it cannot take part."""
        worker.place = place
        if not problems:
            log.debug("a worker on %s begins", place)
            worker.works, worker.call = True, worker.actor.work.remote()
            return
        self.workers.remove(worker)
        self.unfit.append(worker)
        for problem in problems:
            if problem not in self.reasons:
                log.warning("not used: %s", problem)
                self.reasons.append(problem)

    def _take_end(self, worker: _Worker, refused: str, disk_full: bool) -> None:
        """Take in how a worker's work has ended."""
        self.cluster.kill(worker.actor)
        if refused:
            log.error("worker on %s: %s", worker.place, refused)
            self.reasons.append(refused)
            self._stillborn += 1
        elif disk_full:
            self.disk_full = True
            self.stop.set()
        else:
            self.is_through = True

    def _bury(self, worker: _Worker, why: str) -> None:
        """Say that a worker died; another is started in its place if it was not for itself that it did."""
        held = list(left_by(self.path.parents[1], worker.name, self.names))
        log.warning(
            "a worker%s died (out of memory?); it had in hand: %s",
            f" on {worker.place}" if worker.place else "",
            ", ".join(held) or f"no case: {why}",
        )
        log.debug("%s: %s", worker.name, why)
        if not held:
            self._stillborn += 1
            self.reasons.append(why)

    def _wind_up(self) -> None:
        """Ask those at work to finish the cases in hand, once; those that have not begun are not needed any more."""
        for worker in [worker for worker in self.workers if not worker.works]:
            self.workers.remove(worker)
            self.cluster.kill(worker.actor)
        if not self._told_to_stop and self.stop.is_set():
            self._told_to_stop = True
            for worker in self.workers:
                worker.actor.stop.remote()


class RayWorkers:
    """The workers of a batch on a cluster, seen from the command.

    Args:
        settings: of the batch; the memory is each worker's.
        options: of the cluster.
        stop: once it is set, the workers finish their cases in hand and end.

    Attributes:
        journal: of the folder.
        disk_full: nothing more could be written, and the batch was stopped.
    """

    def __init__(self, settings: SegmentSettings, options: RayOptions, stop: threading.Event) -> None:
        self.disk_full = False
        self.journal = Journal(settings.out, settings.run)
        self._settings, self._options, self._stop = settings, options, stop

    def results(self, cases: Sequence[SegmentInput]) -> Iterator[CaseResult]:
        """Yield what becomes of each case, as the journal tells.

        Raises:
            PipelineError: the cluster cannot be joined, is gone, has no room for too long, or none of its workers can
                take part.
        """
        cases = [case.absolute() for case in cases]
        told: set[str] = set()
        with joined(self._options.address) as cluster:
            need = need_of(cluster.nodes(), self._settings.device, self._options.cpus)
            patience = Patience(cluster, need, self._options.wait_s)
            with self._told(cases, need) as path:
                crew = _Crew(cluster, need, path, [case.name for case in cases], self._options.workers, self._stop)
                try:
                    while crew.look(len(cases) - len(told), LOOK_EVERY_S):
                        yield from self._news(told)
                        patience.look(is_served=crew.is_working)
                    yield from self._news(told)
                finally:
                    crew.dismiss()
        self.disk_full = crew.disk_full
        if len(told) < len(cases) and not self._stop.is_set():
            lines = [f"no worker is left, and {len(cases) - len(told)} cases are:", *crew.reasons]
            raise PipelineError("\n".join(lines))

    @contextmanager
    def _told(self, cases: Sequence[SegmentInput], need: Need) -> Iterator[Path]:
        """Lay down what the workers are told, and hold the lock by which they know that locks work; yield its path."""
        folder, run = self._settings.out / BOOKKEEPING, self._settings.run
        path, lock = folder / f"task-{run}.json", folder / f"lock-{run}"
        lockless = PipelineError(f"{folder}: its file system knows no locks; use --shard, which needs none")
        files = [path for case in cases for file in case.files.values() for path in file.files]
        try:
            with ExitStack() as held:
                try:
                    held.enter_context(exclusively(lock, lockless))
                except PipelineError:
                    raise lockless from None
                task = RayTask(
                    settings=self._settings.changed(device="cuda" if need.gpus else "cpu"),
                    cases=tuple(cases),
                    threads=need.cpus,
                    log_level=log_level(),
                    need_cpus=need.cpus,
                    need_gpus=need.gpus,
                    common=Common.of([lock], files, self._settings.models, lock),
                )
                write_json(path, task.model_dump(mode="json"))
                yield path
        finally:
            path.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)

    def _news(self, told: set[str]) -> Iterator[CaseResult]:
        """Yield the results that have not been told."""
        self.journal.refresh()
        for name in [name for name in self.journal.of_run if name not in told]:
            told.add(name)
            yield self.journal.of_run[name]


def need_of(nodes: Sequence[Node], device: str, cpus: int | None) -> Need:
    """Return what each worker takes.

    Args:
        nodes: of the cluster.
        device: cuda: a GPU; cpu: none; auto: one where the cluster has any.
        cpus: cores; None: an even share of those of the smallest node that comes into question.
    """
    gpus = 1 if device == "cuda" or (device == "auto" and any(node.gpus >= 1 for node in nodes)) else 0
    shares = [int(node.cpus // max(1, node.gpus if gpus else 1)) for node in nodes if node.gpus >= gpus]
    return Need(cpus or min((share for share in shares if share), default=1), gpus)
