"""`medseg manifest`: find the cases of a data set, hash the files, split by patient, and write the manifest once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from pipeline.data.formats import Found, Reading, find_cases, pairs_of
from pipeline.data.label_options import LabelOption, named_labels, refuse_unnamed, with_labels
from pipeline.data.manifest import Case, ImageFile, Manifest, path_inside, save_manifest
from pipeline.data.splitting import assign_folds
from pipeline.errors import ManifestError, PipelineError
from pipeline.progress import track
from pipeline.records import said
from pipeline.volumes.stored import content_digest
from pipeline.volumes.volume import count_values, read_label

log = logging.getLogger(__name__)

DEFAULT_FOLDS = 5
# Of one patient; where they are more than a fold has, too, the patient may be a word that all names begin with.
MANY_CASES = 10
# What a found data set and a manifest have in common.
_SHARED = ("description", "licence", "source", "channels", "file_values", "regions", "ignore_label")


def run(
    source: Path,
    out: Path,
    *,
    layout: str | None = None,
    reading: Reading | None = None,
    labels: Sequence[LabelOption] = (),
    folds: int | None = None,
    test_fraction: float = 0.0,
    seed: int = 0,
    group_by: str | None = None,
    stratify_by: str | None = None,
    force: bool = False,
) -> Manifest:
    """Write the manifest of a data set.

    Args:
        source: a folder, a CSV with a line per case, or a MONAI datalist.
        out: the JSON to write; its name without suffix becomes the data set's.
        layout: one of `FORMATS`; None recognises it.
        reading: what is asked of the layout.
        labels: the user's names for the values in the files; empty: the layout's, else made up.
        folds: number of folds; None: those that the data set brings, else five.
        test_fraction: share of the patients held out.
        seed: of the split.
        group_by: column of the data set's table; cases of one value stay on one side of the split.
        stratify_by: column of the data set's table; its values are spread evenly over the folds.
        force: replace a manifest that is there.

    Raises:
        ManifestError: the manifest is there already, or the data set cannot be used; names every problem found.
    """
    if out.exists() and not force:
        raise ManifestError(f"{out}: is there already, and results may rest on its split; --force replaces it")
    reading = reading or Reading()
    if reading.splits and (folds or test_fraction or stratify_by):
        raise ManifestError("--splits says on which side each case stands; leave --folds and the like out, or --splits")
    asked = tuple(column for column in (group_by, stratify_by) if column)
    found = find_cases(source, layout, replace(reading, columns=asked))
    found = with_labels(_grouped(found, group_by), labels)
    hashed, values = _read_all(found)
    if not values:
        raise ManifestError(f"{source}: no case has a label, so there are no labelled patients to learn from")
    if found.labels is None:
        found = replace(found, labels=named_labels(set().union(*values.values()) - {found.ignore_label}))
    unsplit = _manifest(source, out, found, hashed)
    if labels:
        refuse_unnamed(values, unsplit.value_table)
    if found.split and (reading.splits or not (folds or test_fraction or asked)):
        manifest = unsplit
        _refuse_one_fold(manifest, found)
    else:
        present = _present(unsplit, values, found, stratify_by)
        free = [case for case in hashed if case.id not in found.held_out]
        split = assign_folds(free, present, folds=folds or DEFAULT_FOLDS, test_fraction=test_fraction, seed=seed)
        fold_of = {case.id: case.fold for case in split}
        manifest = unsplit.changed(cases=tuple(case.changed(fold=fold_of.get(case.id)) for case in hashed))
        found = replace(found, split="")
    save_manifest(manifest, out)
    _log_summary(manifest, out, found)
    return manifest


def _manifest(source: Path, out: Path, found: Found, cases: Sequence[Case]) -> Manifest:
    """Return the manifest of a data set, before it is split."""
    fields = {
        **{key: getattr(found, key) for key in _SHARED},
        "name": out.name.removesuffix(".json"),
        "root": found.root.resolve(),
        "labels": found.labels,
        "label_pairs": pairs_of(found.labels or ()),
        "cases": tuple(cases),
    }
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        raise ManifestError("\n".join(f"{source}: {said(problem)}" for problem in error.errors())) from None


def _grouped(found: Found, column: str | None) -> Found:
    """Return the data set with each case's group, by a column of its table."""
    if column is None:
        return found
    groups = _column(found, column)
    cases = tuple(case.changed(group=groups[case.id] or None) for case in found.cases)
    return replace(found, cases=cases)


def _column(found: Found, column: str) -> dict[str, str]:
    """Return what a column says of each case; what it does not say is empty.

    Raises:
        ManifestError: there is no such column.
    """
    known = dict.fromkeys(name for row in found.columns.values() for name in row)
    if column not in known:
        raise ManifestError(f"{found.root}: no table has a column {column!r}; there are {', '.join(known) or 'none'}")
    cells = {case.id: found.columns.get(case.id, {}).get(column, "") for case in found.cases}
    return {case_id: "" if cell == "n/a" else cell for case_id, cell in cells.items()}


def _present(
    manifest: Manifest, values: Mapping[str, set[int]], found: Found, stratify_by: str | None
) -> dict[str, set[str]]:
    """Return case id -> what occurs in it and shall be spread evenly: labels, and a column's value."""
    names = {value: name for name, stored in manifest.stored_values.items() for value in stored}
    present = {case_id: {names[value] for value in own if value in names} for case_id, own in values.items()}
    if stratify_by:
        for case_id, cell in _column(found, stratify_by).items():
            present.setdefault(case_id, set()).add(f"{stratify_by}={cell}")
    return present


def _refuse_one_fold(manifest: Manifest, found: Found) -> None:
    """Raise where a split that the data set brings leaves nothing to validate, or to train on."""
    if len(manifest.folds) < 2:
        raise ManifestError(
            f"{found.split}: {len(manifest.folds)} folds, at least 2 are needed; ask for new ones with --folds"
        )


def _read_all(found: Found) -> tuple[list[Case], dict[str, set[int]]]:
    """Read each file once; return the cases with their hashes, and the values in the label of each that has one."""
    cases, values, problems = [], {}, []
    for case in track(found.cases, "manifest", len(found.cases)):
        try:
            hashed = {name: _hashed(found.root, file) for name, file in case.images.items()}
            label = case.label and _hashed(found.root, case.label)
            if label:
                values[case.id] = _label_values(found.root, label)
            cases.append(case.changed(images=hashed, label=label))
        except PipelineError as error:
            problems.append(f"case {case.id!r}: {error}")
    if problems:
        raise ManifestError("\n".join(problems))
    return cases, values


def _hashed(root: Path, file: ImageFile) -> ImageFile:
    """Return a file with the digest of its bytes."""
    return file.changed(sha256=content_digest(path_inside(root, file.path)))


def _label_values(root: Path, file: ImageFile) -> set[int]:
    """Return the values that occur in a label map."""
    return set(count_values(read_label(root / file.path, file.index).array))


def _log_summary(manifest: Manifest, out: Path, found: Found) -> None:
    """Say what was found, and what was guessed and wants a look."""
    folds = Counter(case.fold for case in manifest.development_cases)
    patients = len({case.patient for case in manifest.cases})
    groups = {case.group for case in manifest.cases if case.group}
    in_groups = f" in {len(groups)} groups" if groups else ""
    log.info("%s: %d cases of %d patients%s", out, len(manifest.cases), patients, in_groups)
    log.info(
        "  folds: %s; held out: %d%s",
        ", ".join(str(folds[fold]) for fold in manifest.folds),
        len(manifest.test_cases),
        f"; from {found.split}" if found.split else "",
    )
    log.info("  channels: %s", ", ".join(f"{name} ({modality})" for name, modality in manifest.channels.items()))
    log.info("  labels: %s", ", ".join(f"{name} = {value}" for name, value in manifest.labels.items()))
    for name, stored in manifest.file_values.items():
        log.info("  in the files %s is %s", name, ", ".join(map(str, stored)))
    for name, own in manifest.regions.items():
        log.info("  region %s: %s", name, ", ".join(own))
    if manifest.ignore_label is not None:
        log.info("  voxels of the value %d are ignored", manifest.ignore_label)
    if partly := sum(case.annotated_classes is not None for case in manifest.cases):
        log.info("  %d cases have only some of the labels annotated", partly)
    if manifest.label_pairs:
        log.info("  left and right: %s", ", ".join(" / ".join(pair) for pair in manifest.label_pairs))
    for note in found.notes:
        log.info("  %s", note)
    patient, number = Counter(case.patient for case in manifest.cases).most_common(1)[0]
    if number >= MANY_CASES and number > len(manifest.cases) / len(manifest.folds):
        log.warning(
            "  patient %s has %d cases: is it one? --patient says what of a case's id is the patient", patient, number
        )
    if unknown := [name for name, modality in manifest.channels.items() if modality == "other"]:
        log.warning(
            '  %s: the name tells no modality, and "other" is normalised case by case: write "CT" or the like at '
            '"channels" in %s, for else a CT loses its Hounsfield scale',
            *(", ".join(unknown), out),
        )
    if not manifest.licence:
        log.info("  licence and source are not said in the data: add them to the manifest by hand")
