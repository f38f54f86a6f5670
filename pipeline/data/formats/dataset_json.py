"""`dataset.json`, as the Decathlon, nnU-Net and MONAI write it: names of channels and labels, regions, folds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.formats.found import modality_of, slug
from pipeline.data.manifest import IGNORE, Modality
from pipeline.data.regions import named_regions
from pipeline.errors import ManifestError


@dataclass(frozen=True)
class Labels:
    """What `dataset.json` says of labels; the fields are those of `Found`."""

    labels: dict[str, int]
    file_values: dict[str, tuple[int, ...]] = field(default_factory=dict)
    regions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ignore_label: int | None = None

    def fields(self) -> dict[str, Any]:
        """Return them as `Found` takes them."""
        return vars(self)


def channels_of(content: Mapping[str, Any], path: Path) -> dict[str, Modality]:
    """Return channel name -> modality; the Decathlon says `modality`, nnU-Net `channel_names`, both by number.

    Raises:
        ManifestError: neither is there, or they are not named by numbers.
    """
    named = content.get("channel_names") or content.get("modality")
    if not isinstance(named, dict) or not all(str(number).isdigit() for number in named):
        raise ManifestError(f'{path}: modality: expected {{"0": "MRI", ...}}, got {named!r}')
    names = {int(number): slug(str(name)) or f"channel_{number}" for number, name in named.items()}
    by_number = dict(sorted(names.items()))
    if len(set(by_number.values())) < len(by_number):
        # Two channels of one name would be one: `"0": "MRI", "1": "MRI"` is what some data sets say.
        by_number = {number: f"{name}_{number}" for number, name in by_number.items()}
    return {name: modality_of(re.sub(r"_\d+$", "", name)) for name in by_number.values()}


def labels_of(content: Mapping[str, Any], path: Path) -> Labels:
    """Return labels, regions and the ignored value; the Decathlon writes {"1": "liver"}, nnU-Net {"liver": 1}.

    nnU-Net's regions are lists of values, {"tumour": [1, 2]}, and its ignored value is a label of the name ignore.

    Raises:
        ManifestError: there are none, or they cannot be made sense of.
    """
    pairs = content.get("labels")
    if not isinstance(pairs, dict):
        raise ManifestError(f'{path}: labels: expected {{"0": "background", ...}}, got {pairs!r}')
    turned = {str(name): value for value, name in pairs.items()} if all(map(_is_number, pairs)) else pairs
    try:
        values = {
            name.lower(): tuple(map(int, value if isinstance(value, list) else [value]))
            for name, value in turned.items()
        }
    except (TypeError, ValueError):
        raise ManifestError(
            f"{path}: labels: each name needs one whole number, or a list of them, got {pairs!r}"
        ) from None
    ignored = values.pop(IGNORE, (None,))[0]
    if all(len(several) == 1 for several in values.values()):
        return Labels(
            dict(sorted(((name, value) for name, (value,) in values.items()), key=lambda p: p[1])),
            ignore_label=ignored,
        )
    try:
        return Labels(*named_regions(values, content.get("regions_class_order")), ignored)
    except ValueError as error:
        raise ManifestError(f"{path}: {error}") from None


def origin_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said of where the data come from, as `Found` takes it."""
    return {
        "description": str(content.get("description", "")),
        "licence": str(content.get("licence") or content.get("license") or content.get("liscence") or ""),
        "source": str(content.get("reference", "")),
    }


def fold_of(entry: Mapping[str, Any], where: str) -> int | None:
    """Return the fold of a case's entry; None where it says none.

    Raises:
        ManifestError: it is no fold.
    """
    fold = entry.get("fold")
    if fold is None or (isinstance(fold, int) and not isinstance(fold, bool) and fold >= 0):
        return fold
    raise ManifestError(f"{where}: fold: expected a whole number from 0, got {fold!r}")


def _is_number(text: str) -> bool:
    """Tell whether a text is a whole number."""
    return re.fullmatch(r"-?\d+", text) is not None
