"""Splitting: which side of a split each case stands on; by patient, stratified, the same on every machine."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from pipeline.data.manifest import Case
from pipeline.errors import ManifestError


def assign_folds(
    cases: Sequence[Case],
    present: Mapping[str, Collection[str]],
    *,
    folds: int,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> tuple[Case, ...]:
    """Give each labelled case its fold, or None where it is held out.

    All cases of a patient stand on one side. Patients are stratified by the labels that occur in them, so that a rare
    structure is spread evenly; folds differ by as few cases as the patients allow.

    Args:
        cases: of a data set; those without a label get no fold: nothing can be learned from them or measured on them.
        present: case id -> names of the labels that occur in it.
        folds: number of folds, at least 2.
        test_fraction: share of the patients held out, from 0 to below 1.
        seed: another seed, another split.

    Returns:
        The cases in their order, with their fold.

    Raises:
        ManifestError: fewer patients are left for development than there are folds.
    """
    sizes: dict[str, int] = defaultdict(int)
    for case in cases:
        sizes[case.patient] += case.label is not None
    fold_of: dict[str, int] = {}
    totals = [0] * folds
    seen = held_out = 0
    for stratum in _strata(cases, present, seed):
        seen += len(stratum)
        # Rounded over the strata together: many small ones would each round their share away.
        take = round(seen * test_fraction) - held_out
        held_out += take
        _spread({patient: sizes[patient] for patient in stratum[take:]}, totals, fold_of)
    if len(fold_of) < folds:
        raise ManifestError(f"{len(fold_of)} labelled patients are left for {folds} folds; ask for fewer with --folds")
    return tuple(case.changed(fold=fold_of.get(case.patient) if case.label else None) for case in cases)


def _strata(cases: Sequence[Case], present: Mapping[str, Collection[str]], seed: int) -> list[list[str]]:
    """Return the patients that have a label, grouped by the labels that occur in them, each group in the seed's order.

    The order within a group is that of a hash of seed and patient: it depends on neither machine nor library, and a
    patient who joins the data set does not shuffle the others.
    """
    labels: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        if case.label:
            labels[case.patient].update(present.get(case.id, ()))
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for patient, names in labels.items():
        groups[tuple(sorted(names))].append(patient)
    return [sorted(groups[names], key=lambda patient: _draw(seed, patient)) for names in sorted(groups)]


def _draw(seed: int, patient: str) -> bytes:
    """Return a number for a patient that only the seed decides."""
    return hashlib.sha256(f"{seed}:{patient}".encode()).digest()


def _spread(sizes: Mapping[str, int], totals: list[int], fold_of: dict[str, int]) -> None:
    """Give each patient of a stratum, the largest first, to the fold with the fewest cases of it, then of all."""
    own = [0] * len(totals)
    for patient in sorted(sizes, key=lambda patient: -sizes[patient]):
        fold = min(range(len(totals)), key=lambda fold: (own[fold], totals[fold]))
        fold_of[patient] = fold
        own[fold] += sizes[patient]
        totals[fold] += sizes[patient]
