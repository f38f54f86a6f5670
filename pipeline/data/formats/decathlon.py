"""The Medical Segmentation Decathlon: `dataset.json` lists image and label of each case; channels are one 4-D file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.data.formats.dataset_json import channels_of, fold_of, labels_of, origin_of
from pipeline.data.formats.found import Format, Found, Reading, collected, make_case, read_json_object, relative, slug
from pipeline.data.manifest import Case
from pipeline.errors import ManifestError
from pipeline.volumes.stored import stem_of


def _is_decathlon(source: Path) -> bool:
    """Tell whether a folder has a `dataset.json`."""
    return (source / "dataset.json").is_file()


def _find(source: Path, reading: Reading) -> Found:
    """Read `dataset.json`; channels of a 4-D file get their index, and `test` is held out where its files are there."""
    root = reading.root or source
    path = source / "dataset.json"
    content = read_json_object(path)
    channels, labels = channels_of(content, path), labels_of(content, path)
    training = content.get("training")
    if not isinstance(training, list):
        raise ManifestError(f'{path}: training: expected [{{"image": ..., "label": ...}}, ...], got {training!r}')
    for entry in training:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise ManifestError(f'{path}: training: expected {{"image": ..., "label": ...}}, got {entry!r}')
    tested = list(_test_entries(content, path))
    there = [entry for entry in tested if (source / str(entry["image"])).is_file()]
    missing = len(tested) - len(there)
    has_folds = any("fold" in entry for entry in training)
    return Found(
        root=root,
        channels=channels,
        cases=collected(partial(_case, entry, channels, path, root) for entry in [*training, *there]),
        split="the folds in dataset.json" if has_folds else "",
        held_out=frozenset(_id(entry) for entry in there),
        notes=(f"{missing} of {len(tested)} test cases in dataset.json have no file and are left out",)
        if missing
        else (),
        **labels.fields(),
        **origin_of(content),
    )


def _test_entries(content: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of `test`: names of images, or image and label where people have drawn one."""
    for entry in content.get("test") or ():
        if isinstance(entry, str):
            yield {"image": entry}
        elif isinstance(entry, dict) and "image" in entry:
            yield entry
        else:
            raise ManifestError(f'{path}: test: expected an image, or {{"image": ...}}, got {entry!r}')


def _id(entry: Mapping[str, Any]) -> str:
    """Return the id of an entry's case: the name of its image."""
    return slug(stem_of(Path(str(entry["image"]))))


def _case(entry: Mapping[str, Any], channels: Iterable[str], path: Path, root: Path) -> Case:
    """Return the case of an entry; several channels stand in one 4-D file, by their numbers.

    What is annotated in it, `annotated_classes`, is our own addition to the layout; `fold` is MONAI's.
    """
    names = list(channels)
    image = relative(path.parent / str(entry["image"]), root)
    label = relative(path.parent / str(entry["label"]), root) if "label" in entry else None
    indices = [None] if len(names) == 1 else list(range(len(names)))
    images = {name: {**image, "index": index} for name, index in zip(names, indices, strict=True)}
    case = make_case(_id(entry), images, label)
    fold, annotated = fold_of(entry, f"{path}: case {case.id!r}"), entry.get("annotated_classes")
    return case.changed(fold=fold, **({} if annotated is None else {"annotated_classes": annotated}))


FORMAT = Format(
    _is_decathlon,
    _find,
    "dataset.json with modality, labels and training, as the Medical Segmentation Decathlon writes it",
)
