"""Examining and preparing cases on a Ray cluster: a task for each case, with the memory that it takes as a resource."""

from __future__ import annotations

import json
import logging
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.data.manifest import Case, Manifest
from pipeline.data.plan import Plan
from pipeline.data.store import CaseStore
from pipeline.errors import PipelineError
from pipeline.preparation.examination import CaseExamination
from pipeline.preparation.examining import examine_case
from pipeline.preparation.survey import memory_bytes
from pipeline.records import Record, write_text
from pipeline.stages.case_preparation import Wanted, prepare_into
from pipeline.stages.cluster.fitness import Common, misfits_once
from pipeline.stages.cluster.options import RayOptions
from pipeline.stages.cluster.ray_cluster import Cluster, Died, Need, Patience, joined

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
# A case over which so many processes died is given up.
DEATHS_ALLOWED = 2
# So many tasks for each that runs are asked for: a worker that has done one finds the next waiting.
AHEAD = 2


class CaseTask(Record):
    """What a task is told.

    Attributes:
        common: what its machine must have in common with that of the command, as JSON.
        manifest: of the data set, with this case alone.
        plan: how it is prepared; None: it is examined.
        store: folder of the prepared cases.
        key: of the prepared case.
    """

    common: str
    manifest: Manifest
    plan: Plan | None = None
    store: Path | None = None
    key: str = ""


class Answer(Record):
    """What became of a task.

    Attributes:
        unfit: why its machine cannot take part; empty where it can.
        failed: why the case could not be prepared; empty where it was.
        examination: of the case, where that was asked for.
    """

    unfit: tuple[str, ...] = ()
    failed: str = ""
    examination: CaseExamination | None = None


@dataclass(frozen=True)
class Order:
    """A task, and the memory that it takes at its peak."""

    task: CaseTask
    memory_bytes: int


class OnCluster:
    """Examines and prepares cases on a cluster.

    Args:
        cluster: it, joined.
        options: how it is used.
    """

    def __init__(self, cluster: Cluster, options: RayOptions) -> None:
        self._cluster, self._most = cluster, options.workers
        self._need = Need(options.cpus or 1)
        self._patience = Patience(cluster, self._need, options.wait_s)

    def examined(self, manifest: Manifest, cases: Sequence[Case], folder: Path) -> Iterator[CaseExamination]:
        """Yield the examinations of cases, as they are done.

        Args:
            manifest: of the data set.
            cases: of it.
            folder: where examinations are kept; all nodes must see it.

        Raises:
            PipelineError: the cluster cannot be used, or a case's process died twice.
        """
        with _common(manifest, cases, folder) as common:
            orders = {case.id: Order(_task(common, manifest, case), memory_bytes(manifest, case)) for case in cases}
            for case_id, answer in self._answers(orders):
                if answer.examination is None:
                    raise PipelineError(f"case {case_id!r}: could not be examined: {answer.failed}")
                yield answer.examination

    def prepared(
        self, manifest: Manifest, wanted: Sequence[Wanted], plan: Plan, store: CaseStore
    ) -> Iterator[tuple[str, str]]:
        """Yield the id of each case once it lies in the store, with an empty text, or once it has failed, with why.

        Args:
            manifest: of the data set.
            wanted: its cases that are to be made.
            plan: how they are prepared.
            store: where they are written; all nodes must see it.

        Raises:
            PipelineError: the cluster cannot be used; what is done is valid.
        """
        folder = store.folder.absolute()
        with _common(manifest, [one.case for one in wanted], folder) as common:
            orders = {}
            for one in wanted:
                made = {"plan": plan, "store": folder, "key": one.key}
                task = _task(common, manifest, one.case).model_copy(update=made)
                orders[one.case.id] = Order(task, one.memory_bytes)
            for case_id, answer in self._answers(orders):
                yield case_id, answer.failed

    def _answers(self, orders: Mapping[str, Order]) -> Iterator[tuple[str, Answer]]:
        """Yield the answer to each order, as it comes; one whose process died is given once more."""
        self._await_room()
        left, running, deaths = list(orders)[::-1], dict[object, str](), Counter[str]()
        while left or running:
            room = sum(node.room_for(self._need) for node in self._cluster.nodes())
            self._patience.look(is_served=room > 0)
            while left and len(running) < (self._most or AHEAD * max(1, room)):
                name = left.pop()
                running[self._submitted(orders[name])] = name
            for call in self._cluster.ended(list(running), LOOK_EVERY_S):
                name = running.pop(call)
                answer = self._answer(call, name, deaths)
                if answer is None:
                    left.append(name)
                elif answer.unfit:
                    raise PipelineError("\n".join(answer.unfit))
                else:
                    yield name, answer

    def _submitted(self, order: Order) -> object:
        """Have a task done; one that no node has the memory for may have all of the largest's, as it may here."""
        largest = max((node.memory_bytes for node in self._cluster.nodes()), default=0)
        need = replace(self._need, memory_bytes=min(order.memory_bytes, int(largest)))
        call: object = self._cluster.submit(do, need, _as_json(order.task))
        return call

    def _answer(self, call: object, name: str, deaths: Counter[str]) -> Answer | None:
        """Return the answer of a call that has ended; None where its process died and it is to be made once more."""
        try:
            return Answer.model_validate(json.loads(self._cluster.result(call)))
        except Died as died:
            deaths[name] += 1
            log.warning("%s: the process that worked on it died (out of memory?): %s", name, died)
        if deaths[name] < DEATHS_ALLOWED:
            return None
        return Answer(failed=f"the process that worked on it died, {deaths[name]} times: out of memory?")

    def _await_room(self) -> None:
        """Wait until something of ours can run; how tasks fare that were asked for, Ray does not tell."""
        call = self._cluster.submit(greet, self._need)
        while not self._cluster.ended([call], LOOK_EVERY_S):
            self._cluster.nodes()
            self._patience.look(is_served=False)
        self._cluster.result(call)


@contextmanager
def on_cluster(options: RayOptions) -> Iterator[OnCluster]:
    """Join a cluster to examine and prepare cases there, and leave it.

    Raises:
        PipelineError: it cannot be joined.
    """
    with joined(options.address) as cluster:
        yield OnCluster(cluster, options)


def do(task: str) -> str:
    """Do a CaseTask and return the Answer, both as JSON; called on the cluster."""
    return _as_json(_answered(CaseTask.model_validate(json.loads(task))))


def greet() -> str:
    """Answer; called on the cluster, to see that there is room."""
    return "here"


def _answered(task: CaseTask) -> Answer:
    """Examine or prepare a case."""
    if unfit := misfits_once(task.common):
        return Answer(unfit=unfit)
    (case,) = task.manifest.cases
    if task.plan is None or task.store is None:
        return Answer(examination=examine_case(task.manifest, case))
    try:
        prepare_into(CaseStore(task.store), task.manifest, case, task.plan, task.key)
    except (PipelineError, OSError, MemoryError) as error:
        return Answer(failed=str(error) or type(error).__name__)
    return Answer()


@contextmanager
def _common(manifest: Manifest, cases: Sequence[Case], folder: Path) -> Iterator[str]:
    """Yield what the nodes must have in common with this machine: among else a file in a folder, written for that."""
    token = folder.absolute() / f".seen-{secrets.token_hex(6)}"
    write_text(token, token.name)
    try:
        files = [manifest.root / file.path for case in cases for file in case.images.values()]
        yield _as_json(Common.of([token], files))
    finally:
        token.unlink(missing_ok=True)


def _task(common: str, manifest: Manifest, case: Case) -> CaseTask:
    """Return the task of examining a case."""
    return CaseTask(common=common, manifest=manifest.model_copy(update={"cases": (case,)}))


def _as_json(record: Record) -> str:
    """Return a record as JSON; not by pydantic, which refuses paths that are no UTF-8."""
    return json.dumps(record.model_dump(mode="json"))
