"""Data sets of phantoms, in each layout that `medseg manifest` reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.phantoms.making import (
    IGNORED,
    LABELS,
    NESTED_LABELS,
    NESTED_REGIONS,
    Modality,
    Phantom,
    made_sparse,
    make_phantom,
)
from pipeline.records import write_json, write_text
from pipeline.volumes.volume import Volume
from pipeline.volumes.writing import write_image, write_label

# Writes examinations by name into a folder, and returns what `medseg manifest` is to be given.
Writer = Callable[[Path, Mapping[str, Phantom]], Path]

_NESTED_JSON = {
    "labels": {
        "background": 0,
        **{region: [NESTED_LABELS[name] for name in own] for region, own in NESTED_REGIONS.items()},
        "ignore": IGNORED,
    },
    "regions_class_order": [1, 2, 3],
}
_BIDS_FILES = {"T1": ("anat", "T1w"), "T2": ("anat", "T2w"), "CT": ("ct", "ct"), "PET": ("pet", "pet")}


def write_phantom_dataset(
    folder: Path,
    *,
    cases: int = 8,
    seed: int = 0,
    channels: int = 1,
    layout: str = "decathlon",
    modality: Modality = "MR",
    nested: bool = False,
    sparse: bool = False,
) -> Path:
    """Write a labelled data set of phantoms in a layout that `medseg manifest` reads.

    From four cases on, the first two are two visits of one patient, as their names say, and the last one's label is
    empty.

    Args:
        folder: made where it is missing.
        cases: number of examinations.
        seed: of the first patient.
        channels: 1 or 2; where a layout wants them on one grid, they share it.
        layout: one of LAYOUTS.
        modality: of all cases.
        nested: write nested phantoms, their regions as nnU-Net says them; only in the Decathlon's layout.
        sparse: write only what `made_sparse` leaves of nested phantoms.

    Returns:
        What `medseg manifest` is to be given: the folder, or the file in it.

    Raises:
        ValueError: another layout than the Decathlon's cannot say what nested or sparse phantoms are.
    """
    if (sparse and not nested) or (nested and layout != "decathlon"):
        raise ValueError(f"nested={nested}, sparse={sparse} in layout {layout!r}: only nested ones in decathlon")
    phantoms = {}
    for number in range(cases):
        patient, visit = (0, number) if cases >= 4 and number < 2 else (number, 0)
        name = f"phantom_{patient:03d}" + (f"_visit{visit + 1}" if cases >= 4 and patient == 0 else "")
        phantom = make_phantom(
            seed * 1000 + patient,
            visit=visit,
            modality=modality,
            channels=channels,
            shared_grid=layout in ("decathlon", "nnunet"),
            empty=cases >= 4 and number == cases - 1,
            nested=nested,
        )
        phantoms[name] = made_sparse(phantom, number) if sparse else phantom
    return _write_nested(folder, phantoms) if nested else LAYOUTS[layout](folder, phantoms)


def _write_decathlon(folder: Path, phantoms: Mapping[str, Phantom], said: Mapping[str, Any] | None = None) -> Path:
    """Write `dataset.json`, `imagesTr` and `labelsTr`; several channels become the fourth axis of one file."""
    names = _channels(phantoms)
    for case, phantom in phantoms.items():
        stacked = np.concatenate([image.array for image in phantom.images.values()])
        write_image(folder / "imagesTr" / f"{case}.nii.gz", Volume(stacked, phantom.label.geometry))
        write_label(folder / "labelsTr" / f"{case}.nii.gz", phantom.label)
    content: dict[str, Any] = {
        "name": "Phantom",
        "description": "Synthetic patients with a pair of structures",
        "licence": "CC0",
        "tensorImageSize": "3D" if len(names) == 1 else "4D",
        "modality": {str(index): name for index, name in enumerate(names)},
        **(said or {"labels": {str(value): name for name, value in LABELS.items()}}),
        "numTraining": len(phantoms),
        "numTest": 0,
        "training": [_entry(case, phantom) for case, phantom in phantoms.items()],
        "test": [],
    }
    write_json(folder / "dataset.json", content)
    return folder


def _write_nested(folder: Path, phantoms: Mapping[str, Phantom]) -> Path:
    """Write nested phantoms: their regions as nnU-Net says them, in the Decathlon's layout."""
    return _write_decathlon(folder, phantoms, _NESTED_JSON)


def _entry(case: str, phantom: Phantom) -> dict[str, Any]:
    """Return what `dataset.json` says of a case; what is annotated is our own addition."""
    said = {"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"}
    annotated = phantom.annotated_classes
    return said if annotated is None else {**said, "annotated_classes": list(annotated)}


def _write_nnunet(folder: Path, phantoms: Mapping[str, Phantom]) -> Path:
    """Write `dataset.json`, a file a channel in `imagesTr`, and `labelsTr`."""
    names = _channels(phantoms)
    for case, phantom in phantoms.items():
        for number, image in enumerate(phantom.images.values()):
            write_image(folder / "imagesTr" / f"{case}_{number:04d}.nii.gz", image)
        write_label(folder / "labelsTr" / f"{case}.nii.gz", phantom.label)
    content = {
        "channel_names": {str(index): name for index, name in enumerate(names)},
        "labels": LABELS,
        "numTraining": len(phantoms),
        "file_ending": ".nii.gz",
    }
    write_json(folder / "dataset.json", content)
    return folder


def _write_folder(folder: Path, phantoms: Mapping[str, Phantom]) -> Path:
    """Write one folder per case: a file per channel, and the label."""
    for case, phantom in phantoms.items():
        for channel, image in phantom.images.items():
            write_image(folder / case / f"{channel}.nii.gz", image)
        write_label(folder / case / "label.nii.gz", phantom.label)
    return folder


def _write_csv(folder: Path, phantoms: Mapping[str, Phantom]) -> Path:
    """Write the folders and a CSV with a line per case, its patient named."""
    _write_folder(folder, phantoms)
    names = _channels(phantoms)
    lines = [["case", "patient", *names, "label"]]
    for case in phantoms:
        lines.append(
            [case, case.partition("_visit")[0], *(f"{case}/{name}.nii.gz" for name in names), f"{case}/label.nii.gz"]
        )
    write_text(folder / "cases.csv", "".join(",".join(line) + "\n" for line in lines))
    return folder / "cases.csv"


def _write_monai(folder: Path, phantoms: Mapping[str, Phantom]) -> Path:
    """Write scans and labels in two folders, and a datalist that lists each case's channels."""
    _write_patterns(folder, phantoms)
    names = _channels(phantoms)
    training = [
        {"image": [f"scans/{case}_{name}.nii.gz" for name in names], "label": f"masks/{case}.nii.gz"}
        for case in phantoms
    ]
    content = {"modality": {str(index): name for index, name in enumerate(names)}, "training": training}
    write_json(folder / "datalist.json", content)
    return folder / "datalist.json"


def _write_bids(folder: Path, phantoms: Mapping[str, Phantom]) -> Path:
    """Write raw images by subject and session, and the labels as derivatives, named by a table."""
    for case, phantom in phantoms.items():
        subject, _, visit = case.removeprefix("phantom_").partition("_visit")
        place = Path(f"sub-{subject}", *([f"ses-{visit}"] if visit else []))
        stem = "_".join(place.parts)
        for channel, image in phantom.images.items():
            kind, suffix = _BIDS_FILES[channel]
            write_image(folder / place / kind / f"{stem}_{suffix}.nii.gz", image)
        write_label(folder / "derivatives" / "manual" / place / "anat" / f"{stem}_dseg.nii.gz", phantom.label)
    write_json(folder / "dataset_description.json", {"Name": "Phantom", "BIDSVersion": "1.10.0", "License": "CC0"})
    lines = ["index\tname", *(f"{value}\t{name}" for name, value in LABELS.items())]
    write_text(folder / "derivatives" / "manual" / "dseg.tsv", "\n".join(lines) + "\n")
    return folder


def _write_patterns(folder: Path, phantoms: Mapping[str, Phantom]) -> Path:
    """Write scans/{case}_{channel} and masks/{case}."""
    for case, phantom in phantoms.items():
        for channel, image in phantom.images.items():
            write_image(folder / "scans" / f"{case}_{channel}.nii.gz", image)
        write_label(folder / "masks" / f"{case}.nii.gz", phantom.label)
    return folder


def _channels(phantoms: Mapping[str, Phantom]) -> list[str]:
    """Return the channels, in order."""
    return list(next(iter(phantoms.values())).images)


LAYOUTS: dict[str, Writer] = {
    "decathlon": _write_decathlon,
    "nnunet": _write_nnunet,
    "folder": _write_folder,
    "csv": _write_csv,
    "monai": _write_monai,
    "bids": _write_bids,
    "patterns": _write_patterns,
}
