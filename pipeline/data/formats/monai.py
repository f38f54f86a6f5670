"""MONAI's datalists: a JSON that lists image, label and fold of each case; Auto3DSeg's and those of its tutorials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.data.formats.dataset_json import channels_of, fold_of, labels_of, origin_of
from pipeline.data.formats.found import (
    Format,
    Found,
    Reading,
    collected,
    ids_of,
    make_case,
    modality_of,
    read_json_object,
    relative,
    slug,
)
from pipeline.data.manifest import Case, Modality
from pipeline.errors import ManifestError, VolumeError
from pipeline.volumes.stored import is_volume, read_header

_TRAINING, _VALIDATION, _TEST = "training", "validation", ("testing", "test")
# Fold of the cases of each list where entries say none: what is listed for validation is fold 0's to validate.
_FOLDS = {_VALIDATION: 0, _TRAINING: 1}

Entry = Mapping[str, Any]


def _is_datalist(source: Path) -> bool:
    """Tell whether a source is a JSON file."""
    return source.suffix.lower() == ".json"


def _find(source: Path, reading: Reading) -> Found:
    """Read the lists; paths are relative to `--root`, MONAI's base folder, else to the JSON's own folder."""
    content, root = read_json_object(source), reading.root or source.parent
    entries = list(_entries(content, source))
    if not entries:
        raise ManifestError(f"{source}: no case in {_TRAINING}, {_VALIDATION} or {' or '.join(_TEST)}")
    channels, is_stacked = _channels(content, [entry for _, entry in entries], source, root)
    names = ids_of(str(_first_image(entry)) for _, entry in entries)
    made = [
        partial(_case, names[str(_first_image(entry))], entry, list(channels), is_stacked, root) for _, entry in entries
    ]
    sides = [(_id(names, entry), side, entry) for side, entry in entries]
    has_lists = any(side == _VALIDATION for _, side, _ in sides)
    folds = {name: _fold(side, entry, has_lists, source) for name, side, entry in sides}
    is_split = has_lists or any("fold" in entry for _, entry in entries)
    return Found(
        root=root,
        channels=channels,
        cases=tuple(case.changed(fold=folds[case.id]) for case in collected(made)),
        split=f"the folds and lists of {source.name}" if is_split else "",
        held_out=frozenset(name for name, side, _ in sides if side in _TEST),
        notes=("validation is fold 0's, training fold 1's: train with --fold 0",) if has_lists else (),
        **(labels_of(content, source).fields() if isinstance(content.get("labels"), dict) else {}),
        **origin_of(content),
    )


def _entries(content: Mapping[str, Any], source: Path) -> Iterator[tuple[str, Entry]]:
    """Yield each case with the list that it stands in; a bare name in a list for testing is an image."""
    for side in (_TRAINING, _VALIDATION, *_TEST):
        listed = content.get(side, [])
        for number, entry in enumerate(listed if isinstance(listed, list) else [listed]):
            as_entry = {"image": entry} if isinstance(entry, str) else entry
            if not isinstance(as_entry, dict) or not _images(as_entry):
                raise ManifestError(
                    f'{source}: {side}[{number}]: expected {{"image": ..., "label": ...}}, got {entry!r}'
                )
            yield side, as_entry


def _images(entry: Entry) -> dict[str, str]:
    """Return key -> image: those of a list are numbered, and every further key that names a volume is a channel."""
    image = entry.get("image")
    if isinstance(image, list):
        return {f"channel_{number}": str(path) for number, path in enumerate(image)}
    return {
        slug(key): value
        for key, value in entry.items()
        if key == "image" or (key != "label" and isinstance(value, str) and is_volume(Path(value)))
        if isinstance(value, str)
    }


def _first_image(entry: Entry) -> str:
    """Return the file that names a case."""
    return next(iter(_images(entry).values()))


def _id(names: Mapping[str, str], entry: Entry) -> str:
    """Return a case's id."""
    return names[_first_image(entry)]


def _channels(
    content: Mapping[str, Any], entries: Sequence[Entry], source: Path, root: Path
) -> tuple[dict[str, Modality], bool]:
    """Return channel -> modality, and whether they are stacked in one 4-D file; named where the JSON names them."""
    keys = list(dict.fromkeys(key for entry in entries for key in _images(entry)))
    count = _volumes(root / _first_image(entries[0])) if keys == ["image"] else 1
    is_stacked = count > 1
    found = [f"channel_{number}" for number in range(count)] if is_stacked else keys
    has_own_names = not is_stacked and not {"image", "channel_0"} & {*keys}
    if not has_own_names and (content.get("modality") or content.get("channel_names")):
        named = channels_of(content, source)
        if len(named) != len(found):
            raise ManifestError(
                f"{source}: names {len(named)} channels, {', '.join(named)}, but images have {len(found)}"
            )
        return named, is_stacked
    return {name: modality_of(name) for name in found}, is_stacked


def _volumes(path: Path) -> int:
    """Return how many volumes a file holds; one where it cannot be read, which is said when it is hashed."""
    try:
        shape = read_header(path).shape
    except VolumeError:
        return 1
    return shape[3] if len(shape) == 4 else 1


def _case(name: str, entry: Entry, channels: Sequence[str], is_stacked: bool, root: Path) -> Case:
    """Return the case of an entry."""
    files, label = _images(entry), entry.get("label")
    if label is not None and not isinstance(label, str):
        raise ManifestError(f"case {name!r}: label: expected one file, got {label!r}")
    if is_stacked:
        images = {
            channel: {**relative(root / _first_image(entry), root), "index": index}
            for index, channel in enumerate(channels)
        }
    else:
        keys = list(files)
        by_key = dict(zip(keys, channels, strict=False)) if "channel_0" in files or keys == ["image"] else {}
        images = {by_key.get(key, key): relative(root / path, root) for key, path in files.items()}
    return make_case(name, images, relative(root / label, root) if label else None)


def _fold(side: str, entry: Entry, has_lists: bool, source: Path) -> int | None:
    """Return the fold of a case: what its entry says, else what its list does; None of those for testing."""
    if side in _TEST:
        return None
    said = fold_of(entry, f"{source}: {_first_image(entry)}")
    return said if said is not None or not has_lists else _FOLDS[side]


FORMAT = Format(
    _is_datalist,
    _find,
    "a MONAI datalist: a JSON with training, validation or testing, lists of image (or several), label and fold",
)
