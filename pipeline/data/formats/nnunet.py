"""nnU-Net's raw data: `dataset.json`, imagesTr/CASE_0000, labelsTr/CASE; a file a channel, by its number.

Source: nnU-Net's documentation, "nnU-Net dataset format" (version 2) and "Manual data splits".
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.data.formats.dataset_json import channels_of, labels_of, origin_of
from pipeline.data.formats.found import (
    Format,
    Found,
    Reading,
    collected,
    make_case,
    read_json_object,
    relative,
    slug,
    volumes_of,
)
from pipeline.data.manifest import Case
from pipeline.errors import ManifestError
from pipeline.volumes.stored import stem_of

SPLITS = "splits_final.json"

# Of each case: its image files by channel number, its label where there is one.
Files = dict[str, tuple[dict[int, Path], Path | None]]


def _is_nnunet(source: Path) -> bool:
    """Tell whether a folder's `dataset.json` is nnU-Net's: of version 2, or of version 1, which lists `training`."""
    if not (source / "dataset.json").is_file():
        return False
    try:
        content = read_json_object(source / "dataset.json")
    except ManifestError:
        return False
    if "training" not in content:
        return True
    first = next(iter(content["training"] or ()), None) if isinstance(content["training"], list) else None
    if not isinstance(first, dict) or "image" not in first or (source / str(first["image"])).exists():
        return False
    return any((source / "imagesTr").glob(f"{stem_of(Path(str(first['image'])))}_0000.*"))


def _find(source: Path, reading: Reading) -> Found:
    """Find the cases by `dataset.json` and the files' names; imagesTs is held out, labelled where labelsTs is there."""
    path, root = source / "dataset.json", reading.root or source
    content = read_json_object(path)
    channels = channels_of(content, path)
    ending = str(content.get("file_ending", ""))
    training = _listed(content["dataset"], source, path) if "dataset" in content else _paired(source, "Tr", ending)
    tested = _paired(source, "Ts", ending)
    if twice := sorted(training.keys() & tested.keys()):
        raise ManifestError(f"{source}: in imagesTr and imagesTs: {', '.join(twice)}; one of them is wrong")
    cases = collected(
        partial(_case, name, numbered, label, list(channels), root)
        for name, (numbered, label) in {**training, **tested}.items()
    )
    splits = reading.splits or _beside(source)
    return Found(
        root=root,
        channels=channels,
        cases=with_splits(cases, splits, training) if splits else cases,
        split=str(splits) if splits else "",
        held_out=frozenset(map(slug, tested)),
        **labels_of(content, path).fields(),
        **origin_of(content),
    )


def _paired(source: Path, side: str, ending: str) -> Files:
    """Return the cases of imagesTr or imagesTs; files of another ending than `dataset.json` says are none."""
    found: Files = {}
    labels = {stem_of(path): path for path in volumes_of(source / f"labels{side}") if path.name.endswith(ending)}
    for path in volumes_of(source / f"images{side}"):
        match = re.fullmatch(r"(.+)_(\d{4})", stem_of(path))
        if match is None:
            raise ManifestError(f"{path}: expected CASE_0000, the channel's number in four digits after the case's id")
        if path.name.endswith(ending):
            numbered, _ = found.setdefault(match[1], ({}, labels.get(match[1])))
            numbered[int(match[2])] = path
    return found


def _listed(entries: object, source: Path, path: Path) -> Files:
    """Return the cases that `dataset.json` lists: {case: {images: [...], label: ...}}, relative to its folder."""
    if not isinstance(entries, dict):
        raise ManifestError(f'{path}: dataset: expected {{"CASE": {{"images": [...], "label": ...}}}}, got {entries!r}')
    found: Files = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("images"), list) or "label" not in entry:
            raise ManifestError(f'{path}: dataset: {name}: expected {{"images": [...], "label": ...}}, got {entry!r}')
        images = {number: source / str(image) for number, image in enumerate(entry["images"])}
        found[str(name)] = (images, source / str(entry["label"]))
    return found


def _case(name: str, numbered: Mapping[int, Path], label: Path | None, channels: Sequence[str], root: Path) -> Case:
    """Return a case, its channels named; numbers beyond those of `dataset.json` are refused."""
    if beyond := [number for number in numbered if number >= len(channels)]:
        raise ManifestError(
            f"case {name!r}: channel {beyond[0]:04d} is not in dataset.json, which names {', '.join(channels)}"
        )
    images = {channels[number]: relative(numbered[number], root) for number in sorted(numbered)}
    return make_case(name, images, relative(label, root) if label else None)


def _beside(source: Path) -> Path | None:
    """Return the splits file in the data set's folder, or where nnU-Net keeps it: in nnUNet_preprocessed beside."""
    places = (source / SPLITS, source.parent.parent / "nnUNet_preprocessed" / source.name / SPLITS)
    return next((place for place in places if place.is_file()), None)


def with_splits(cases: Sequence[Case], path: Path, training: Collection[str]) -> tuple[Case, ...]:
    """Give cases the folds of nnU-Net's `splits_final.json`: fold K is what its split K validates.

    Cases that are in no split are held out; those that every split trains on get a fold more, which none validates.

    Args:
        cases: of the data set.
        path: of the splits.
        training: names of the cases that may stand in a split.

    Raises:
        ManifestError: the file cannot be read, or its splits are not folds: they name unknown cases, validate a case
            twice, or train on fewer than all others.
    """
    splits = _read_splits(path)
    fold_of: dict[str, int] = {}
    problems = []
    for fold, (_, validated) in enumerate(splits):
        problems += [
            f"case {name!r} is validated in splits {fold_of[name]} and {fold}" for name in validated if name in fold_of
        ]
        fold_of.update(dict.fromkeys(validated, fold))
    named = {name for trained, validated in splits for name in (*trained, *validated)}
    always = named - fold_of.keys()
    fold_of.update(dict.fromkeys(always, len(splits)))
    for fold, (trained, _) in enumerate(splits):
        others = {name for name in named if fold_of[name] != fold}
        if others != {*trained}:
            torn = sorted(others ^ {*trained})
            problems.append(f"split {fold} does not train on all cases that it does not validate: {_few(torn)}")
    if unknown := sorted(named - {*map(slug, training)}):
        problems.append(f"no case of the data set: {_few(unknown)}")
    if problems:
        lines = "\n".join(f"{path}: {problem}" for problem in problems)
        raise ManifestError(f"{lines}\nsuch splits are no folds; ask for new ones with --folds")
    return tuple(case.changed(fold=fold_of.get(case.id)) for case in cases)


def _read_splits(path: Path) -> list[tuple[list[str], list[str]]]:
    """Return the ids of the cases that each split trains on and validates."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        sides = [[[slug(str(name)) for name in split[side]] for side in ("train", "val")] for split in content]
        return [(trained, validated) for trained, validated in sides]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ManifestError(f'{path}: expected [{{"train": [...], "val": [...]}}, ...]: {error!r}') from error


def _few(names: Sequence[str]) -> str:
    """Return the first of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


FORMAT = Format(
    _is_nnunet,
    _find,
    "nnU-Net's raw data: dataset.json with channel_names and labels, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz",
)
