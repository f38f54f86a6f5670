"""Survey: the examinations of a whole data set; kept, made in parallel, and compared with one another."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from pipeline.data.manifest import Case, Manifest
from pipeline.errors import ManifestError
from pipeline.free_memory import available_bytes
from pipeline.geometry import FloatArray
from pipeline.preparation.examination import CaseExamination, ChannelExamination, Problem
from pipeline.preparation.examining import examination_key, examine_case, state_of
from pipeline.progress import track
from pipeline.records import exclusively, write_text

log = logging.getLogger(__name__)

# Peers are compared where there are so many, and a case is far from them where its nearest twentieth (at least two) is.
FEWEST_PEERS = 4
PEER_SHARE = 0.05
# CT has a unit: bone or a missing offset of 1000 HU is far. Elsewhere only the width of the range counts: five times.
FAR_HU = 800.0
FAR_FACTOR = 5.0

# Unpacked voxels, their type as float64 in samples, masks: bytes in memory for each byte on disk, packed or not.
_BYTES_PER_PACKED_BYTE, _BYTES_PER_BYTE = 12, 4


def examine_cases(
    manifest: Manifest,
    folder: Path,
    jobs: int | None = None,
    examine: Callable[[Sequence[Case]], Iterator[CaseExamination]] | None = None,
) -> list[CaseExamination]:
    """Examine all cases of a manifest, those again whose files have changed since the last time.

    Args:
        manifest: of the data set.
        folder: where examinations are kept, one line a case, added as soon as it is examined: a killed check goes on.
        jobs: threads; None: as many as cores and memory admit. The result does not depend on it.
        examine: yields the examinations of cases in any order; None: threads of this process make them.

    Returns:
        One examination a case, in the manifest's order.
    """
    kept_at = _kept_at(manifest, folder)
    known = known_examinations(manifest, folder)
    stale = [case for case in manifest.cases if case.id not in known]
    if stale:
        log.debug("%d of %d cases are examined, %d are known", len(stale), len(manifest.cases), len(known))
        folder.mkdir(parents=True, exist_ok=True)
        with kept_at.open("a", encoding="utf-8") as file:
            made = examine(stale) if examine else _examine(manifest, stale, jobs)
            for examination in track(made, "check", len(stale)):
                known[examination.case_id] = examination
                file.write(examination.model_dump_json() + "\n")
                file.flush()
    examinations = [known[case.id] for case in manifest.cases]
    if stale:
        write_text(kept_at, "".join(examination.model_dump_json() + "\n" for examination in examinations))
    return examinations


def examine_part(manifest: Manifest, cases: Sequence[Case], folder: Path, jobs: int | None = None) -> None:
    """Examine some cases of a manifest while other processes examine the others; what is learned is kept.

    Args:
        manifest: of the data set.
        cases: some of its.
        folder: where examinations are kept; lines are added under a lock, and none is taken away.
        jobs: threads; None: as many as cores and memory admit.
    """
    kept_at, known = _kept_at(manifest, folder), known_examinations(manifest, folder)
    stale = [case for case in cases if case.id not in known]
    for examination in track(_examine(manifest, stale, jobs), "check", len(stale)) if stale else ():
        with exclusively(kept_at.with_suffix(".lock")), kept_at.open("ab") as file:
            # The first line break ends what a killed process left of a line.
            file.write(f"\n{examination.model_dump_json()}\n".encode())


def known_examinations(manifest: Manifest, folder: Path) -> dict[str, CaseExamination]:
    """Return by case the kept examinations that still hold: sizes and times of all their files are what they were."""
    kept = _read_kept(_kept_at(manifest, folder))
    return {case.id: kept[case.id] for case in manifest.cases if _is_fresh(manifest, case, kept.get(case.id))}


def compare_cases(manifest: Manifest, examinations: Sequence[CaseExamination]) -> list[Problem]:
    """Return what shows only when cases are compared with the manifest and with one another.

    Hashes against the manifest's, one patient in two folds, equal images, intensities far from those of the peers.
    """
    return [
        *_changed_files(manifest, examinations),
        *_torn(manifest),
        *_duplicates(manifest, examinations),
        *_outliers(manifest, examinations),
    ]


def _kept_at(manifest: Manifest, folder: Path) -> Path:
    """Return the file in which a data set's examinations are kept."""
    return folder / f"{manifest.name}.jsonl"


def _read_kept(path: Path) -> dict[str, CaseExamination]:
    """Return kept examinations by case; a line cut short by a kill, or of another version, does not count."""
    kept = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            examination = CaseExamination.model_validate_json(line)
        except ValidationError:
            continue
        kept[examination.case_id] = examination
    return kept


def _is_fresh(manifest: Manifest, case: Case, kept: CaseExamination | None) -> bool:
    """Tell whether nothing that a kept examination depends on has changed; one with an unreadable file is made anew."""
    files = [*case.images.values(), *([case.label] if case.label else [])]
    if kept is None or kept.key != examination_key(manifest, case) or any(f.path not in kept.files for f in files):
        return False
    try:
        states = {file.path: state_of(manifest.path_of(file)) for file in files}
    except ManifestError:
        return False
    return all(states[path] == (stamp.size_bytes, stamp.mtime_ns) for path, stamp in kept.files.items())


def _examine(manifest: Manifest, cases: Sequence[Case], jobs: int | None) -> Iterator[CaseExamination]:
    """Yield the cases' examinations in order.

    Threads, not processes: unpacking, hashing and sorting release Python's lock, and threads start at once.
    """
    workers = min(jobs or _admitted(manifest, cases), len(cases))
    if workers == 1:
        yield from (examine_case(manifest, case) for case in cases)
        return
    executor = ThreadPoolExecutor(workers)
    try:
        yield from executor.map(lambda case: examine_case(manifest, case), cases)
    finally:
        executor.shutdown(cancel_futures=True)


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _admitted(manifest: Manifest, cases: Iterable[Case]) -> int:
    """Return how many cases can be examined at once with the cores and the free memory there are."""
    largest = max(memory_bytes(manifest, case) for case in cases)
    return max(1, min(cores(), available_bytes() // max(largest, 1)))


def memory_bytes(manifest: Manifest, case: Case) -> int:
    """Estimate what the examination of a case takes: its label and its largest image."""
    images = {file.path for file in case.images.values()}
    return max(map(_unpacked, ((manifest.root / path) for path in images))) + (
        _unpacked(manifest.root / case.label.path) if case.label else 0
    )


def _unpacked(path: Path) -> int:
    """Estimate the bytes in memory of a file while it is examined; none where it is missing."""
    state = state_of(path)
    return state[0] * (_BYTES_PER_PACKED_BYTE if path.suffix == ".gz" else _BYTES_PER_BYTE) if state else 0


def _changed_files(manifest: Manifest, examinations: Sequence[CaseExamination]) -> Iterator[Problem]:
    """Yield the files that are not those from which the manifest was made."""
    for case, examination in zip(manifest.cases, examinations, strict=True):
        for file in {file.path: file for file in (*case.images.values(), *filter(None, [case.label]))}.values():
            stamp = examination.files.get(file.path)
            if stamp and file.sha256 and stamp.sha256 != file.sha256:
                message = (
                    f"{manifest.root / file.path}: is not the file that the manifest was made from (SHA-256"
                    f" {stamp.sha256[:12]}..., expected {file.sha256[:12]}...); restore it, or write the manifest anew"
                )
                yield Problem(severity="error", kind="hash", case_id=case.id, message=message)


def _torn(manifest: Manifest) -> Iterator[Problem]:
    """Yield the cases whose patient, or group, stands on another side of the split too."""
    sides: dict[tuple[str, str], dict[int | None, str]] = defaultdict(dict)
    for case in manifest.cases:
        for unit in _units(case):
            sides[unit].setdefault(case.fold, case.id)
    for case in manifest.cases:
        for what, name in _units(case):
            others = [other for fold, other in sides[what, name].items() if fold != case.fold]
            if others:
                message = (
                    f"{what} {name!r} is in {_side(case.fold)} here, but elsewhere in case {others[0]!r}: what is"
                    f" measured there was learned from; put all cases of a {what} into one fold"
                )
                yield Problem(severity="error", kind="split", case_id=case.id, message=message)


def _units(case: Case) -> list[tuple[str, str]]:
    """Return what a labelled case belongs to that may not be torn by a split."""
    units = {"patient": case.patient, "group": case.group}
    return [(what, name) for what, name in units.items() if name is not None and case.label]


def _side(fold: int | None) -> str:
    """Name a side of the split."""
    return "the held-out cases" if fold is None else f"fold {fold}"


def _duplicates(manifest: Manifest, examinations: Sequence[CaseExamination]) -> Iterator[Problem]:
    """Yield the images that an earlier case or channel holds too: an error across the split, else a warning."""
    first: dict[str, tuple[Case, str]] = {}
    for case, examination in zip(manifest.cases, examinations, strict=True):
        for name, channel in examination.channels.items():
            if channel.nonzero_box is None:  # zeros, as some write for a channel that is missing
                continue
            earlier, earlier_name = first.setdefault(channel.content, (case, name))
            if (earlier, earlier_name) == (case, name):
                continue
            leaks = earlier.fold != case.fold
            message = (
                f"channel {name!r} is the same image as channel {earlier_name!r} of case {earlier.id!r}"
                f"{', on the other side of the split' if leaks else ''}; drop one of them"
            )
            yield Problem(severity="error" if leaks else "warning", kind="duplicate", case_id=case.id, message=message)


def _outliers(manifest: Manifest, examinations: Sequence[CaseExamination]) -> Iterator[Problem]:
    """Yield the images whose intensities are far from those of all but a few peers."""
    for name, modality in manifest.channels.items():
        having = [e for e in examinations if name in e.channels and e.channels[name].body]
        if len(having) <= FEWEST_PEERS:
            continue
        is_ct = modality == "CT"
        scales = np.array([_scale(examination.channels[name], is_ct) for examination in having])
        far = FAR_HU if is_ct else np.log(FAR_FACTOR)
        for examination, distance in zip(having, _distances(scales), strict=True):
            if distance > far:
                low, middle, high = _range(examination.channels[name])
                message = (
                    f"channel {name!r}: intensities of {low:g} to {high:g}, median {middle:g}, are far from those of"
                    " the other cases; see that it is the same kind of image, in the same unit"
                )
                yield Problem(severity="warning", kind="intensity", case_id=examination.case_id, message=message)


def _range(channel: ChannelExamination) -> tuple[float, float, float]:
    """Return the 0.5, 50 and 99.5 percentile of the body."""
    assert channel.body is not None  # the caller has left out those without
    return channel.body.at(0.005), channel.body.at(0.5), channel.body.at(0.995)


def _scale(channel: ChannelExamination, is_ct: bool) -> tuple[float, ...]:
    """Return the numbers that peers are compared by: percentiles in HU, else the logarithm of the range's width."""
    low, middle, high = _range(channel)
    return (low, middle, high) if is_ct else (float(np.log(max(high - low, 1e-12))),)


def _distances(scales: FloatArray) -> FloatArray:
    """Return for each row of (cases, n) how far its nearest twentieth of the others is, by the largest difference."""
    peers = max(2, round(PEER_SHARE * len(scales)))
    # A row at a time: the distances of all pairs would not fit for a large data set. A row is its own nearest.
    return np.array([np.partition(np.abs(scales - row).max(axis=1), peers)[peers] for row in scales])
