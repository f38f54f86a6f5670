"""Splitting: which side of a split each case stands on; by patient or group, stratified, the same on every machine."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from pipeline.data.manifest import Case
from pipeline.errors import ManifestError

# Told apart by a mark, for a patient may have the name of a group; patients alone are what they always were.
_GROUP = "group\n"


def assign_folds(
    cases: Sequence[Case],
    present: Mapping[str, Collection[str]],
    *,
    folds: int,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> tuple[Case, ...]:
    """Give each labelled case its fold, or None where it is held out.

    All cases of a patient stand on one side, and all of a group where cases say theirs; below, "patient" is the larger
    of the two. Patients are stratified by what occurs in them, so that a rare structure is spread evenly; folds differ
    by as few cases as the patients allow.

    Args:
        cases: of a data set; those without a label get no fold: nothing can be learned from them or measured on them.
        present: case id -> names of the labels that occur in it, and of whatever else shall be spread evenly.
        folds: number of folds, at least 2.
        test_fraction: share of the patients held out, from 0 to below 1.
        seed: another seed, another split.

    Returns:
        The cases in their order, with their fold.

    Raises:
        ManifestError: fewer patients are left for development than there are folds, or a patient is in two groups.
    """
    units = _units(cases)
    sizes: dict[str, int] = defaultdict(int)
    for case in cases:
        sizes[units[case.id]] += case.label is not None
    fold_of: dict[str, int] = {}
    totals = [0] * folds
    seen = held_out = 0
    for stratum in _strata(cases, units, present, seed):
        seen += len(stratum)
        # Rounded over the strata together: many small ones would each round their share away.
        take = round(seen * test_fraction) - held_out
        held_out += take
        _spread({patient: sizes[patient] for patient in stratum[take:]}, totals, fold_of)
    if len(fold_of) < folds:
        what = "groups" if any(case.group for case in cases) else "patients"
        largest, number = Counter(units.values()).most_common(1)[0]
        hint = ", or say with --patient what of a case's id is the patient" if what == "patients" else ""
        raise ManifestError(
            f"{len(fold_of)} labelled {what} are left for {folds} folds, {number} of {len(cases)} cases being of "
            f"{largest.removeprefix(_GROUP)!r}; ask for fewer with --folds{hint}"
        )
    return tuple(case.changed(fold=fold_of.get(units[case.id]) if case.label else None) for case in cases)


def _units(cases: Sequence[Case]) -> dict[str, str]:
    """Return case id -> what stands on one side of a split as a whole: its group, else its patient."""
    groups: dict[str, str | None] = {}
    for case in cases:
        first = groups.setdefault(case.patient, case.group)
        if first != case.group:
            raise ManifestError(f"patient {case.patient!r}: is in group {first} and in {case.group}; name one for all")
    return {case.id: case.patient if case.group is None else f"{_GROUP}{case.group}" for case in cases}


def _strata(
    cases: Sequence[Case], units: Mapping[str, str], present: Mapping[str, Collection[str]], seed: int
) -> list[list[str]]:
    """Return the patients that have a label, grouped by the labels that occur in them, each group in the seed's order.

    The order within a group is that of a hash of seed and patient: it depends on neither machine nor library, and a
    patient who joins the data set does not shuffle the others.
    """
    labels: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        if case.label:
            labels[units[case.id]].update(present.get(case.id, ()))
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
