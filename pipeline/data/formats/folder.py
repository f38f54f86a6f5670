"""Plain folders: images and labels in folders of their own, side by side, or a folder a case; by the files' names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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

_LABEL_WORDS = "labels?|seg|segmentation|masks?|gt|reference|annotation"
_IMAGE_WORDS = "image|img|volume|vol"
_PAIRED_FOLDERS = (("imagesTr", "images", "image"), ("labelsTr", "labels", "label", "masks", "mask"))


def _find(source: Path, reading: Reading) -> Found:
    """Find the cases of a plain folder in the first of three patterns that fits."""
    root = reading.root or source
    images, labels = (next((source / n for n in names if (source / n).is_dir()), None) for names in _PAIRED_FOLDERS)
    own = volumes_of(source)
    if images and labels:
        cases = _matched(root, volumes_of(images), {_without(_LABEL_WORDS, p): p for p in volumes_of(labels)})
    elif own:
        drawn = [path for path in own if _without(_LABEL_WORDS, path) != stem_of(path)]
        cases = _matched(root, [p for p in own if p not in drawn], {_without(_LABEL_WORDS, p): p for p in drawn})
    else:
        folders = (folder for folder in sorted(source.iterdir()) if folder.is_dir())
        cases = [_folder_case(root, folder) for folder in folders if volumes_of(folder)]
    return Found(root, modalities_of(cases), ordered(cases))


def _without(words: str, path: Path) -> str:
    """Return a file's name without its format's suffix and a last word of its role: CT of CT_image.nii.gz."""
    return re.sub(rf"(?:^|[_\-. ])(?:{words})$", "", stem_of(path), flags=re.IGNORECASE)


def _matched(root: Path, images: Iterable[Path], labels: Mapping[str, Path]) -> list[Case]:
    """Return the cases of images whose names start with a label's; the rest of an image's name is its channel."""
    files: dict[str, dict[str, Any]] = {case_id: {} for case_id in labels}
    for path in images:
        name = _without(_IMAGE_WORDS, path)
        owners = [case_id for case_id in labels if re.match(rf"{re.escape(case_id)}(?![A-Za-z0-9])", name)]
        case_id = max(owners, key=len, default=re.sub(r"_\d{4}$", "", name))
        files.setdefault(case_id, {})[_channel(name, case_id)] = relative(path, root)
    return [
        make_case(case_id, images, relative(labels[case_id], root) if case_id in labels else None)
        for case_id, images in files.items()
        if images
    ]


def _folder_case(root: Path, folder: Path) -> Case:
    """Return the case of a folder: each volume a channel but the label.

    Where each channel has a label of its own, on its own grid, the first channel's that is there is taken.
    """
    images: dict[str, dict[str, Any]] = {}
    labels: dict[str, dict[str, Any]] = {}
    for path in volumes_of(folder):
        bare = _without(_LABEL_WORDS, path)
        target, name = (images, _without(_IMAGE_WORDS, path)) if bare == stem_of(path) else (labels, bare)
        target[_channel(name, folder.name)] = relative(path, root)
    label = next((labels[name] for name in images if name in labels), None)
    if label is None and len(labels) > 1:
        raise ManifestError(f"{folder}: several labels, of no channel: {', '.join(labels)}; list the files in a CSV")
    return make_case(folder.name, images, label or next(iter(labels.values()), None))


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
