"""What a layout needs in order to be written, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.exports.bringing import CaseFiles
from pipeline.data.manifest import IGNORE, Case, Manifest

# What was written, beside it: by this a folder is known as one that may be replaced.
RECORD = "medseg_export.json"


@dataclass(frozen=True)
class Export:
    """A layout to write.

    Attributes:
        case_problems: yield what keeps one case from being written.
        write_case: write one case below a folder, and return the name it has there.
        write_tables: write what is said of all cases, those that were written.
        problems: yield what keeps a manifest from being written into a folder at all.
        notes: yield what people should know: what is lost, and what is left to do.
    """

    case_problems: Callable[[Manifest, CaseFiles], Iterator[str]]
    write_case: Callable[[Path, Manifest, CaseFiles], str]
    write_tables: Callable[[Path, Manifest, Sequence[Case]], None]
    problems: Callable[[Manifest, Path], Iterator[str]] = lambda manifest, out: iter(())
    notes: Callable[[Manifest], Iterator[str]] = lambda manifest: iter(())


def is_training(case: Case) -> bool:
    """Tell whether a case stands among those that are learned from; the others are for testing, or unlabelled."""
    return case.label is not None and case.fold is not None


def missing_channels(manifest: Manifest, case: Case) -> Iterator[str]:
    """Yield the channels that a layout wants of every case and this one lacks."""
    if missing := [name for name in manifest.channels if name not in case.images]:
        yield f"has no {', '.join(missing)}, and every case needs all channels"


def partly_annotated(manifest: Manifest, case: Case) -> Iterator[str]:
    """Yield what is lost where a layout cannot say that people looked for some labels only."""
    if not case.is_annotated(list(manifest.labels)[1:]):
        named = ", ".join(case.annotated_classes or ())
        yield f"only {named} are annotated, which the layout cannot say: the others would pass for background"


def labels_json(manifest: Manifest, values: Mapping[str, int]) -> dict[str, Any]:
    """Return `labels` as nnU-Net writes them, and `regions_class_order` where there are regions.

    Args:
        manifest: whose labels and regions they are.
        values: label name, or `ignore` -> value in the files that are written.
    """
    background, *structures = manifest.labels
    ignored = {IGNORE: values[IGNORE]} if manifest.ignore_label is not None else {}
    if not manifest.regions:
        return {"labels": {"background": values[background], **{n: values[n] for n in structures}, **ignored}}
    regions = {region: [values[name] for name in own] for region, own in manifest.regions.items()}
    labels = {name: own if len(own) > 1 else own[0] for name, own in regions.items()}
    return {
        "labels": {"background": values[background], **labels, **ignored},
        # Region number i owns label number i + 1.
        "regions_class_order": [values[name] for name in structures],
    }


def origin_json(manifest: Manifest) -> dict[str, str]:
    """Return what `dataset.json` says of where the data come from."""
    return {
        "name": manifest.name,
        "description": manifest.description,
        "reference": manifest.source,
        "licence": manifest.licence,
    }
