"""`medseg manifest`: find the cases of a data set, hash the files, split by patient, and write the manifest once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from pydantic import ValidationError

from pipeline.data.formats import Found, find_cases, pairs_of
from pipeline.data.manifest import Case, ImageFile, Manifest, save_manifest
from pipeline.data.splitting import assign_folds
from pipeline.errors import ManifestError, PipelineError
from pipeline.progress import track
from pipeline.volumes.stored import content_digest
from pipeline.volumes.volume import count_values, read_label

log = logging.getLogger(__name__)


def run(
    source: Path,
    out: Path,
    *,
    layout: str | None = None,
    folds: int = 5,
    test_fraction: float = 0.0,
    seed: int = 0,
    force: bool = False,
) -> Manifest:
    """Write the manifest of a data set.

    Args:
        source: a folder, or a CSV with a line per case.
        out: the JSON to write; its name without suffix becomes the data set's.
        layout: one of `FORMATS`; None recognises it.
        folds: number of folds.
        test_fraction: share of the patients held out.
        seed: of the split.
        force: replace a manifest that is there.

    Raises:
        ManifestError: the manifest is there already, or the data set cannot be used; names every problem found.
    """
    if out.exists() and not force:
        raise ManifestError(f"{out}: is there already, and results may rest on its split; --force replaces it")
    found = find_cases(source, layout)
    hashed, values = _read_all(found)
    labels = found.labels or named_labels(set().union(*values.values()) - {found.ignore_label})
    present = {case_id: {name for name, value in labels.items() if value in own} for case_id, own in values.items()}
    fields = {
        **{
            key: getattr(found, key)
            for key in ("description", "licence", "source", "channels", "regions", "ignore_label")
        },
        "name": out.name.removesuffix(".json"),
        "root": found.root.resolve(),
        "labels": labels,
        "label_pairs": pairs_of(labels),
        "cases": assign_folds(hashed, present, folds=folds, test_fraction=test_fraction, seed=seed),
    }
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        raise ManifestError("\n".join(f"{source}: {problem['msg']}" for problem in error.errors())) from None
    save_manifest(manifest, out)
    _log_summary(manifest, out)
    return manifest


def named_labels(values: Collection[int]) -> dict[str, int]:
    """Name labels by their values: 0 is the background, a single other the foreground, several label_1, label_2, ..."""
    others = sorted(set(values) - {0})
    names = ["foreground"] if len(others) == 1 else [f"label_{value}".replace("-", "minus_") for value in others]
    return {"background": 0, **dict(zip(names, others, strict=True))}


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
    return file.changed(sha256=content_digest(root / file.path))


def _label_values(root: Path, file: ImageFile) -> set[int]:
    """Return the values that occur in a label map."""
    return set(count_values(read_label(root / file.path, file.index).array))


def _log_summary(manifest: Manifest, out: Path) -> None:
    """Say what was found, and what was guessed and wants a look."""
    folds = Counter(case.fold for case in manifest.development_cases)
    patients = len({case.patient for case in manifest.cases})
    log.info("%s: %d cases of %d patients", out, len(manifest.cases), patients)
    log.info(
        "  folds: %s; held out: %d", ", ".join(str(folds[fold]) for fold in manifest.folds), len(manifest.test_cases)
    )
    log.info("  channels: %s", ", ".join(f"{name} ({modality})" for name, modality in manifest.channels.items()))
    log.info("  labels: %s", ", ".join(f"{name} = {value}" for name, value in manifest.labels.items()))
    for name, own in manifest.regions.items():
        log.info("  region %s: %s", name, ", ".join(own))
    if manifest.ignore_label is not None:
        log.info("  voxels of the value %d are ignored", manifest.ignore_label)
    if partly := sum(case.annotated_classes is not None for case in manifest.cases):
        log.info("  %d cases have only some of the labels annotated", partly)
    if manifest.label_pairs:
        log.info("  left and right: %s", ", ".join(" / ".join(pair) for pair in manifest.label_pairs))
    if not manifest.licence:
        log.info("  licence and source are not said in the data: add them to the manifest by hand")
