"""Writing nnU-Net's raw data: imagesTr/CASE_0000.nii.gz, labelsTr with values 0, 1, 2, ..., and our folds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.data.exports.bringing import ENDING, CaseFiles
from pipeline.data.exports.layout import (
    Export,
    is_training,
    labels_json,
    missing_channels,
    origin_json,
    partly_annotated,
)
from pipeline.data.formats.nnunet import SPLITS
from pipeline.data.manifest import IGNORE, Case, Manifest
from pipeline.records import write_json


def _problems(manifest: Manifest, out: Path) -> Iterator[str]:
    """Yield what keeps nnU-Net from finding the folder, or from reading the labels' names."""
    if not re.fullmatch(r"Dataset\d{3}_\w+", out.name):
        yield f"{out}: nnU-Net looks for folders called DatasetNNN_NAME; name it so, such as Dataset101_{manifest.name}"
    named = [*list(manifest.labels)[1:], *manifest.regions]
    if reserved := {"background", IGNORE} & {*named}:
        yield f"labels: {', '.join(sorted(reserved))} means something else to nnU-Net; rename it"
    if not any(is_training(case) for case in manifest.cases):
        yield f"manifest {manifest.name!r}: no labelled case has a fold, so there is nothing to train on"


def _case_problems(manifest: Manifest, files: CaseFiles) -> Iterator[str]:
    """Yield what keeps a case from being trained on."""
    yield from missing_channels(manifest, files.case)
    yield from partly_annotated(manifest, files.case)
    yield from files.problems(one_grid=True)


def _write_case(folder: Path, manifest: Manifest, files: CaseFiles) -> str:
    """Write a case's channels by their numbers, and its label; what is not trained on stands in imagesTs."""
    case, side = files.case, "Tr" if is_training(files.case) else "Ts"
    for number, channel in enumerate(manifest.channels):
        files.bring_image(channel, folder / f"images{side}" / f"{case.id}_{number:04d}{ENDING}", one_grid=True)
    if case.label:
        values = _values(manifest)
        table = {stored: values[name] for name, own in manifest.stored_values.items() for stored in own}
        files.bring_label(folder / f"labels{side}" / f"{case.id}{ENDING}", table)
    return case.id


def _write_tables(folder: Path, manifest: Manifest, cases: Sequence[Case]) -> None:
    """Write `dataset.json`, and the folds as nnU-Net's splits."""
    training = [case for case in cases if is_training(case)]
    # nnU-Net normalises by the channel's name: CT by the data set's own intensities, all others case by case.
    channels = ("CT" if modality == "CT" else name for name, modality in manifest.channels.items())
    content = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        **labels_json(manifest, _values(manifest)),
        "numTraining": len(training),
        "file_ending": ENDING,
        **origin_json(manifest),
    }
    write_json(folder / "dataset.json", content)
    folds = sorted({case.fold for case in training if case.fold is not None})
    splits = [
        {
            "train": [case.id for case in training if case.fold != fold],
            "val": [case.id for case in training if case.fold == fold],
        }
        for fold in folds
    ]
    write_json(folder / SPLITS, splits)


def _values(manifest: Manifest) -> dict[str, int]:
    """Return label name, or `ignore` -> the value that is written: nnU-Net wants 0, 1, 2, ..., the ignored one last."""
    return {name: index for index, name in enumerate(manifest.stored_values)}


def _notes(manifest: Manifest) -> Iterator[str]:
    """Yield what nnU-Net does not look for here."""
    yield f"nnU-Net looks for {SPLITS} in nnUNet_preprocessed/DatasetNNN_NAME: copy it there before training"


EXPORT = Export(_case_problems, _write_case, _write_tables, _problems, _notes)
