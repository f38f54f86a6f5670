"""Plain folders: images and labels in folders of their own, side by side, or a folder a case; by the files' names."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.data.formats.found import (
    Format,
    Found,
    Reading,
    make_case,
    modalities_of,
    ordered,
    relative,
    slug,
    volumes_of,
)
from pipeline.data.manifest import Case
from pipeline.errors import ManifestError
from pipeline.volumes.stored import stem_of

log = logging.getLogger(__name__)

_LABEL_WORDS = "labels?|seg|segmentation|masks?|gt|reference|annotation"
_IMAGE_WORDS = "image|img|volume|vol"
_PAIRED_FOLDERS = (("imagesTr", "images", "image"), ("labelsTr", "labels", "label", "masks", "mask"))


def _find(source: Path, reading: Reading) -> Found:
    """Find the cases of a plain folder in the first of three patterns that fits."""
    root = reading.root or source
    images, labels = (next((source / n for n in names if (source / n).is_dir()), None) for names in _PAIRED_FOLDERS)
    own = volumes_of(source)
    if images and labels:
        cases = _matched(root, volumes_of(images), _labels_of(volumes_of(labels)))
    elif own:
        drawn = [path for path in own if _without(_LABEL_WORDS, path) != stem_of(path)]
        cases = _matched(root, [path for path in own if path not in drawn], _labels_of(drawn))
    else:
        folders = (folder for folder in sorted(source.iterdir()) if folder.is_dir())
        cases = [_folder_case(root, folder) for folder in folders if volumes_of(folder)]
    return Found(root, modalities_of(cases), ordered(cases))


def _without(words: str, path: Path) -> str:
    """Return a file's name without its format's suffix and a last word of its role: CT of CT_image.nii.gz."""
    return re.sub(rf"(?:^|[_\-. ])(?:{words})$", "", stem_of(path), flags=re.IGNORECASE)


def _labels_of(drawn: Iterable[Path]) -> dict[str, Path]:
    """Return case id -> its label."""
    found: dict[str, Path] = {}
    for path in drawn:
        _put(found, _without(_LABEL_WORDS, path), path, "labels")
    return found


def _put(found: dict[str, Path], name: str, path: Path, what: str) -> None:
    """Note a file by the name that it goes by.

    Raises:
        ManifestError: another file goes by the same: which of them is meant cannot be told.
    """
    if (other := found.setdefault(name, path)) != path:
        raise ManifestError(
            f"{path.parent}: {other.name} and {path.name} are two {what} of one name; list the files in a CSV, or say "
            "which are meant by --images and --labels"
        )


def _matched(root: Path, images: Iterable[Path], labels: Mapping[str, Path]) -> list[Case]:
    """Return the cases of images whose names start with a label's; the rest of an image's name is its channel.

    Labels to which no image belongs are left out, and named in a warning.
    """
    files: dict[str, dict[str, Path]] = {case_id: {} for case_id in labels}
    for path in images:
        name = _without(_IMAGE_WORDS, path)
        case_id = _owner(name, labels)
        _put(files.setdefault(case_id, {}), _channel(name, case_id), path, "images")
    if alone := [labels[case_id].name for case_id, own in files.items() if not own]:
        log.warning("%s: %d labels to which no image belongs, left out: %s", root, len(alone), ", ".join(alone[:10]))
    return [
        make_case(case_id, _relative(own, root), relative(labels[case_id], root) if case_id in labels else None)
        for case_id, own in files.items()
        if own
    ]


def _owner(name: str, labels: Collection[str]) -> str:
    """Return the longest name of a label with which an image's name begins; else its own without a channel's number."""
    ends = (end for end in range(len(name), -1, -1) if not re.match("[A-Za-z0-9]", name[end:]))
    return next((name[:end] for end in ends if name[:end] in labels), re.sub(r"_\d{4}$", "", name))


def _relative(files: Mapping[str, Path], root: Path) -> dict[str, Any]:
    """Return files as a manifest names them."""
    return {name: relative(path, root) for name, path in files.items()}


def _folder_case(root: Path, folder: Path) -> Case:
    """Return the case of a folder: each volume a channel but the label.

    Where each channel has a label of its own, on its own grid, the first channel's that is there is taken.
    """
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    for path in volumes_of(folder):
        bare = _without(_LABEL_WORDS, path)
        if bare == stem_of(path):
            _put(images, _channel(_without(_IMAGE_WORDS, path), folder.name), path, "images")
        else:
            _put(labels, _channel(bare, folder.name), path, "labels")
    label = next((labels[name] for name in images if name in labels), None)
    if label is None and len(labels) > 1:
        raise ManifestError(f"{folder}: several labels, of no channel: {', '.join(labels)}; list the files in a CSV")
    label = label or next(iter(labels.values()), None)
    return make_case(folder.name, _relative(images, root), relative(label, root) if label else None)


def _channel(name: str, case_id: str) -> str:
    """Return the channel in a file's name: what is left of it without the case's; nnU-Net numbers them."""
    rest = slug(re.sub(rf"^{re.escape(case_id)}(?![A-Za-z0-9])", "", name))
    return f"channel_{int(rest)}" if re.fullmatch(r"\d{4}", rest) else rest or "image"


FORMAT = Format(
    Path.is_dir,
    _find,
    "images/CASE[_CHANNEL] and labels/CASE; or CASE[_CHANNEL][_image] and CASE_label (or _mask, _seg) side by side;"
    " or a folder per case that holds CHANNEL[_image] and label (or CHANNEL_mask, ...)",
)
