"""Writing the Decathlon's layout: `dataset.json`, imagesTr with all channels of a case in one file, labelsTr."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.exports.bringing import ENDING, CaseFiles
from pipeline.data.exports.layout import Export, is_training, labels_json, missing_channels, origin_json
from pipeline.data.manifest import Case, Manifest
from pipeline.records import write_json


def _case_problems(manifest: Manifest, files: CaseFiles) -> Iterator[str]:
    """Yield what keeps a case's channels from standing in one file."""
    yield from missing_channels(manifest, files.case)
    yield from files.problems(one_grid=True)


def _write_case(folder: Path, manifest: Manifest, files: CaseFiles) -> str:
    """Write a case's image and label, its values those of the manifest's labels."""
    case, side = files.case, _side(files.case)
    image = folder / f"images{side}" / f"{case.id}{ENDING}"
    if len(manifest.channels) == 1:
        files.bring_image(next(iter(manifest.channels)), image, one_grid=True)
    else:
        files.bring_stacked(image)
    if case.label:
        files.bring_label(folder / f"labels{side}" / image.name, manifest.value_table)
    return case.id


def _write_tables(folder: Path, manifest: Manifest, cases: Sequence[Case]) -> None:
    """Write `dataset.json`, each case with its fold, as MONAI takes it."""
    training, testing = ([_entry(case) for case in cases if is_training(case) is side] for side in (True, False))
    content = {
        **origin_json(manifest),
        "tensorImageSize": "3D" if len(manifest.channels) == 1 else "4D",
        "modality": {str(number): name for number, name in enumerate(manifest.channels)},
        **_labels(manifest),
        "numTraining": len(training),
        "numTest": len(testing),
        "training": training,
        "test": [entry if "label" in entry else entry["image"] for entry in testing],
    }
    write_json(folder / "dataset.json", content)


def _labels(manifest: Manifest) -> dict[str, Any]:
    """Return the labels by value, as the Decathlon has them; with regions, which it has not, as nnU-Net does."""
    if manifest.regions:
        return labels_json(manifest, manifest.own_values)
    (_, background), *others = manifest.own_values.items()
    return {"labels": {str(background): "background", **{str(value): name for name, value in others}}}


def _entry(case: Case) -> dict[str, Any]:
    """Return what `dataset.json` says of a case; fold is MONAI's word, annotated_classes ours."""
    side = _side(case)
    label = {"label": f"./labels{side}/{case.id}{ENDING}"} if case.label else {}
    fold = {"fold": case.fold} if case.label and case.fold is not None else {}
    annotated = {"annotated_classes": list(case.annotated_classes)} if case.annotated_classes is not None else {}
    return {"image": f"./images{side}/{case.id}{ENDING}", **label, **fold, **annotated}


def _side(case: Case) -> str:
    """Return the end of the folders' names that a case stands in."""
    return "Tr" if is_training(case) else "Ts"


EXPORT = Export(_case_problems, _write_case, _write_tables)
