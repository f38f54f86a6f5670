"""`medseg preprocess`: fingerprint, plan, store; what is fresh is skipped, what is stale redone, not deleted first."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from pipeline.config import Config
from pipeline.data.cases import read_case_images, read_case_label
from pipeline.data.manifest import Case, Manifest
from pipeline.data.plan import Plan
from pipeline.data.store import STORE_FORMAT_VERSION, CaseStore
from pipeline.errors import ManifestError, PipelineError, StoreError
from pipeline.preparation.examination import CaseExamination
from pipeline.preparation.planning import fingerprint
from pipeline.preparation.preprocessing import prepare_case
from pipeline.preparation.survey import compare_cases, cores, examine_cases
from pipeline.progress import track
from pipeline.records import digest_of, write_json
from pipeline.stages.dataset import dataset_of
from pipeline.stages.settling import settle_plan
from pipeline.stages.store_size import memory_at_once, needed_bytes, stored_bytes
from pipeline.stages.workspace import Workspace

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


def run(config: Config, *, jobs: int | None = None, replan: bool = False) -> PreprocessReport:
    """Bring a configuration's store up to date.

    Args:
        config: the experiment.
        jobs: cases at once; None: as many as there are cores. Fewer where memory does not admit them.
        replan: plan anew, even where plan.yaml was edited by hand.

    Raises:
        ManifestError: the check found errors; names them all.
        ConfigError: an edited plan does not fit the manifest.
        StoreError: another process is writing here.
        PipelineError: cases failed; names them all. The others are done.
    """
    manifest = dataset_of(config)
    examinations = examinations_of(config, manifest, jobs)
    folder = Workspace(config.workspace).store(config, manifest.name)
    store = CaseStore(folder / CASES)
    with store.lock():
        facts = fingerprint(examinations.values(), manifest, config.preprocessing)
        plan = settle_plan(folder, facts, manifest, config, replan=replan)
        keys = {case.id: case_key(manifest, case, examinations[case.id], plan) for case in manifest.development_cases}
        write_json(folder / KEYS, {"sources": sources_digest(manifest, plan), "cases": keys})
        _drop_leftovers(store)
        with ThreadPoolExecutor(jobs or cores()) as pool:
            states = dict(zip(keys, pool.map(lambda case_id: _state(store, case_id, keys[case_id]), keys), strict=True))
            _say(store, states)
            stale = [case for case in manifest.development_cases if states[case.id] != "fresh"]
            _say_costs(folder, [examinations[case.id] for case in stale], plan, jobs or cores())
            preparation = _Preparation(manifest, plan, store, _Admission(_free_bytes()))
            failures = _fill(pool, preparation, {case.id: case for case in stale}, keys, examinations)
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
    """What it takes to make a case; called from threads, for NumPy, zlib and blosc2 let go of the interpreter."""

    manifest: Manifest
    plan: Plan
    store: CaseStore
    admission: _Admission

    def __call__(self, case: Case, examination: CaseExamination, key: str) -> None:
        """Read, prepare and write a case."""
        with self.admission.of(needed_bytes(examination, self.plan)):
            images = read_case_images(self.manifest, case)
            label = read_case_label(self.manifest, case, images)
            native = label.geometry if label else next(iter(images.values())).geometry
            self.store.write(case.id, prepare_case(images, label, self.plan, native), key)


def examinations_of(config: Config, manifest: Manifest, jobs: int | None) -> dict[str, CaseExamination]:
    """Return what one read of each case told, read now where `medseg check` has not; raise where there are errors."""
    examinations = examine_cases(manifest, Workspace(config.workspace).checks, jobs)
    problems = [problem for examination in examinations for problem in examination.problems]
    problems += compare_cases(manifest, examinations)
    lines = [f"case {problem.case_id!r}: {problem.message}" for problem in problems if problem.severity == "error"]
    if lines:
        raise ManifestError(
            "\n".join([f"{config.data.manifest}: {len(lines)} errors, as `medseg check` says:", *lines])
        )
    return {examination.case_id: examination for examination in examinations}


def _fill(
    pool: ThreadPoolExecutor,
    prepare: _Preparation,
    cases: Mapping[str, Case],
    keys: Mapping[str, str],
    examinations: Mapping[str, CaseExamination],
) -> dict[str, str]:
    """Make cases side by side and return the reasons of those that failed."""
    futures: dict[Future[None], str] = {
        pool.submit(prepare, case, examinations[case_id], keys[case_id]): case_id for case_id, case in cases.items()
    }
    failures = {}
    try:
        for future in track(as_completed(futures), "preprocess", len(futures)) if futures else ():
            try:
                future.result()
            except (PipelineError, OSError, MemoryError) as error:
                failures[futures[future]] = str(error) or type(error).__name__
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
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


def _say(store: CaseStore, states: Mapping[str, State]) -> None:
    """Log how many cases are fresh and what is to be done, and which others lie in the store."""
    counts = {state: sum(s == state for s in states.values()) for state in ("fresh", "new", "stale", "damaged")}
    log.info("%s: %s", store.folder, ", ".join(f"{n} {state}" for state, n in counts.items() if n))
    foreign = [case_id for case_id in store.case_ids() if case_id not in states]
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
    return int(MEMORY_SHARE * psutil.virtual_memory().available)
