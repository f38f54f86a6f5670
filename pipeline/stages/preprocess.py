"""`medseg preprocess`: fingerprint, plan, store; what is fresh is skipped, what is stale redone, not deleted first."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import Config
from pipeline.data.manifest import Case, Manifest
from pipeline.data.plan import Plan
from pipeline.data.store import STORE_FORMAT_VERSION, CaseStore
from pipeline.errors import ManifestError, PipelineError, StoreError
from pipeline.free_memory import available_bytes
from pipeline.preparation.examination import CaseExamination
from pipeline.preparation.planning import fingerprint
from pipeline.preparation.survey import compare_cases, cores, examine_cases, known_examinations
from pipeline.progress import track
from pipeline.records import digest_of, exclusively, write_json
from pipeline.stages.case_preparation import Wanted, prepare_into
from pipeline.stages.cluster.options import RayOptions
from pipeline.stages.dataset import dataset_of
from pipeline.stages.settling import settle_plan
from pipeline.stages.shards import Shard
from pipeline.stages.store_size import memory_at_once, needed_bytes, stored_bytes
from pipeline.stages.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.stages.cluster.preparing import OnCluster

log = logging.getLogger(__name__)

# In a store's folder: the cases, and the key that each case with a fold should have, by which `clean` knows the others.
CASES, KEYS = "cases", "keys.json"

State = Literal["fresh", "new", "stale", "damaged"]

# Share of the free memory that cases may take together.
MEMORY_SHARE = 0.7


@dataclass(frozen=True)
class PreprocessReport:
    """What was done.

    Attributes:
        folder: of the store: plan.yaml, fingerprint.json, cases/.
        plan: the configuration's, as it stands there.
        written: ids of the cases that were made or redone.
        fresh: ids of those that were left alone.
    """

    folder: Path
    plan: Plan
    written: tuple[str, ...]
    fresh: tuple[str, ...]


def run(
    config: Config,
    *,
    jobs: int | None = None,
    replan: bool = False,
    ray: RayOptions | None = None,
    shard: Shard | None = None,
) -> PreprocessReport:
    """Bring a configuration's store up to date.

    Args:
        config: the experiment.
        jobs: cases at once; None: as many as there are cores. Fewer where memory does not admit them.
        replan: plan anew, even where plan.yaml was edited by hand.
        ray: a cluster whose machines read and make the cases; None: this one does.
        shard: of the cases, that are made; None: all. The plan is that of all cases, which `medseg check` has read.

    Raises:
        ManifestError: the check found errors, or a shard was asked for and not all cases are read; names them all.
        ConfigError: an edited plan does not fit the manifest.
        StoreError: another process is writing here.
        PipelineError: cases failed; names them all. The others are done.
    """
    with ExitStack() as stack:
        cluster = None
        if ray:
            from pipeline.stages.cluster.preparing import on_cluster

            cluster = stack.enter_context(on_cluster(ray))
        return _brought_up_to_date(config, jobs, replan, cluster, shard)


def _brought_up_to_date(
    config: Config, jobs: int | None, replan: bool, cluster: OnCluster | None, shard: Shard | None
) -> PreprocessReport:
    """Bring a configuration's store up to date, here or on a cluster."""
    manifest = dataset_of(config)
    examinations = _all_read(config, manifest) if shard else examinations_of(config, manifest, jobs, cluster)
    folder = Workspace(config.workspace).store(config, manifest.name)
    store = CaseStore(folder / CASES)
    with store.lock(shared=shard is not None):
        facts = fingerprint(examinations.values(), manifest, config.preprocessing)
        with exclusively(folder / ".plan.lock"):
            plan = settle_plan(folder, facts, manifest, config, replan=replan)
            keys = {
                case.id: case_key(manifest, case, examinations[case.id], plan) for case in manifest.development_cases
            }
            write_json(folder / KEYS, {"sources": sources_digest(manifest, plan), "cases": keys})
        if shard is None:  # Else they may be other shards'.
            _drop_leftovers(store)
        cases = shard.of(manifest.development_cases) if shard else manifest.development_cases
        with ThreadPoolExecutor(jobs or cores()) as pool:
            found = pool.map(lambda case: _state(store, case.id, keys[case.id]), cases)
            states = {case.id: state for case, state in zip(cases, found, strict=True)}
            _say(store, states, keys)
            stale = [case for case in cases if states[case.id] != "fresh"]
            wanted = [Wanted(case, keys[case.id], needed_bytes(examinations[case.id], plan)) for case in stale]
            _say_costs(folder, [examinations[case.id] for case in stale], plan, jobs or cores())
            failures = _fill(_Preparation(manifest, plan, store), wanted, pool, cluster)
    if failures:
        lines = [f"case {case_id!r}: {reason}" for case_id, reason in sorted(failures.items())]
        raise PipelineError("\n".join([f"{len(lines)} of {len(stale)} cases failed; the others are done:", *lines]))
    written = tuple(case.id for case in stale)
    return PreprocessReport(folder, plan, written, tuple(i for i, state in states.items() if state == "fresh"))


def sources_digest(manifest: Manifest, plan: Plan) -> str:
    """Return the digest of what a store is made from: with another, its cases may be stale."""
    return digest_of([manifest.digest(), plan.preprocessing_digest()])


def case_key(manifest: Manifest, case: Case, examination: CaseExamination, plan: Plan) -> str:
    """Return the digest of all that a stored case depends on: its files' bytes and values, the plan, the format."""
    files = {**case.images, **({"": case.label} if case.label else {})}
    content: dict[str, Any] = {name: [examination.files[file.path].sha256, file.index] for name, file in files.items()}
    if case.label and manifest.file_values:
        content[""].append(sorted(manifest.value_table.items()))
    return digest_of([content, plan.preprocessing_digest(), STORE_FORMAT_VERSION])


class _Admission:
    """Lets cases in while the memory they need fits together; one alone may always."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, needed_bytes: int) -> Iterator[None]:
        """Wait until there is room, and hold it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used_bytes or self._used_bytes + needed_bytes <= self._limit_bytes)
            self._used_bytes += needed_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used_bytes -= needed_bytes
                self._changed.notify_all()


@dataclass(frozen=True)
class _Preparation:
    """What it takes to make a case, whichever."""

    manifest: Manifest
    plan: Plan
    store: CaseStore

    def by_threads(self, wanted: Sequence[Wanted], pool: ThreadPoolExecutor) -> Iterator[tuple[str, str]]:
        """Make cases side by side in threads, for NumPy, zlib and blosc2 let go of the interpreter."""
        admission = _Admission(_free_bytes())

        def make(one: Wanted) -> None:
            with admission.of(one.memory_bytes):
                prepare_into(self.store, self.manifest, one.case, self.plan, one.key)

        futures: dict[Future[None], str] = {pool.submit(make, one): one.case.id for one in wanted}
        try:
            for future in as_completed(futures):
                failed = ""
                try:
                    future.result()
                except (PipelineError, OSError, MemoryError) as error:
                    failed = str(error) or type(error).__name__
                yield futures[future], failed
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def examinations_of(
    config: Config, manifest: Manifest, jobs: int | None, cluster: OnCluster | None = None
) -> dict[str, CaseExamination]:
    """Return what one read of each case told, read now where `medseg check` has not; raise where there are errors."""
    folder = Workspace(config.workspace).checks
    over_cluster = (lambda cases: cluster.examined(manifest, cases, folder)) if cluster else None
    return _without_errors(config, manifest, examine_cases(manifest, folder, jobs, over_cluster))


def _all_read(config: Config, manifest: Manifest) -> dict[str, CaseExamination]:
    """Return what one read of each case told, which others have done; raise where any is missing."""
    known = known_examinations(manifest, Workspace(config.workspace).checks)
    if missing := len(manifest.cases) - len(known):
        raise ManifestError(
            f"{config.data.manifest}: {missing} of {len(manifest.cases)} cases are not read yet, and the plan is made "
            f"from all; first `medseg check {config.data.manifest} --workspace {config.workspace}`, in shards too"
        )
    return _without_errors(config, manifest, [known[case.id] for case in manifest.cases])


def _without_errors(
    config: Config, manifest: Manifest, examinations: Sequence[CaseExamination]
) -> dict[str, CaseExamination]:
    """Return examinations by case; raise where there are errors."""
    problems = [problem for examination in examinations for problem in examination.problems]
    problems += compare_cases(manifest, examinations)
    lines = [f"case {problem.case_id!r}: {problem.message}" for problem in problems if problem.severity == "error"]
    if lines:
        raise ManifestError(
            "\n".join([f"{config.data.manifest}: {len(lines)} errors, as `medseg check` says:", *lines])
        )
    return {examination.case_id: examination for examination in examinations}


def _fill(
    preparation: _Preparation, wanted: Sequence[Wanted], pool: ThreadPoolExecutor, cluster: OnCluster | None
) -> dict[str, str]:
    """Make cases side by side and return the reasons of those that failed."""
    if not wanted:
        return {}
    if cluster:
        made = cluster.prepared(preparation.manifest, wanted, preparation.plan, preparation.store)
    else:
        made = preparation.by_threads(wanted, pool)
    failures = {case_id: why for case_id, why in track(made, "preprocess", len(wanted)) if why}
    if cluster:
        _drop_leftovers(preparation.store)  # Of processes that died; nobody else writes now.
    return failures


def _state(store: CaseStore, case_id: str, key: str) -> State:
    """Tell what a case in the store is worth; its bytes are verified."""
    if case_id not in store:
        return "new"
    try:
        return "fresh" if store.verify(case_id).key == key else "stale"
    except StoreError as error:
        log.warning("%s", error)
        return "damaged"


def _say(store: CaseStore, states: Mapping[str, State], keys: Mapping[str, str]) -> None:
    """Log how many cases are fresh and what is to be done, and which others lie in the store."""
    counts = {state: sum(s == state for s in states.values()) for state in ("fresh", "new", "stale", "damaged")}
    log.info("%s: %s", store.folder, ", ".join(f"{n} {state}" for state, n in counts.items() if n))
    foreign = [case_id for case_id in store.case_ids() if case_id not in keys]
    if foreign:
        log.info("%d cases no longer needed: %s; see `medseg clean`", len(foreign), ", ".join(foreign))


def _say_costs(folder: Path, stale: Sequence[CaseExamination], plan: Plan, jobs: int) -> None:
    """Log what the cases that are to be made will take, and warn where the disk may not hold them."""
    if not stale:
        return
    disk = sum(stored_bytes(examination, plan) for examination in stale)
    memory = memory_at_once(stale, plan, jobs, _free_bytes())
    log.info("%d cases: at most %.2f GB on disk, %.2f GB of memory", len(stale), disk / 2**30, memory / 2**30)
    free = shutil.disk_usage(folder).free
    if disk > free:
        log.warning("%s: %.1f GB are free there, which may be too little", folder, free / 2**30)


def _drop_leftovers(store: CaseStore) -> None:
    """Remove what killed writers left; whoever holds the lock knows that they are dead."""
    for path in store.leftovers():
        log.info("%s: left by a writer that was killed; removed", path)
        shutil.rmtree(path)


def _free_bytes() -> int:
    """Return what cases may take together."""
    return int(MEMORY_SHARE * available_bytes())
