"""Formats: how a data set lies on disk -> its cases. A new layout is a function and its line in FORMATS.

A layout says where the files are; `medseg manifest` then hashes them, looks which labels occur, and splits. What a
layout cannot know (modalities, label names in a plain folder) is guessed, and stands in the manifest to be corrected.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.data.manifest import Case, Modality
from pipeline.data.regions import named_regions
from pipeline.errors import ManifestError
from pipeline.volumes.stored import is_volume, stem_of


@dataclass(frozen=True)
class Found:
    """A data set as its layout tells it: a manifest without hashes and folds.

    Attributes:
        root: folder that all paths are relative to.
        channels: channel name -> modality, in the network's order.
        cases: in the order of their ids.
        labels: label name -> value; None where the layout does not name them.
        regions: region name -> its labels, where the layout has any.
        ignore_label: value of the voxels of which nobody knows what they are, where the layout has it.
        description, licence, source: where the layout holds them.
    """

    root: Path
    channels: dict[str, Modality]
    cases: tuple[Case, ...]
    labels: dict[str, int] | None = None
    regions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ignore_label: int | None = None
    description: str = ""
    licence: str = ""
    source: str = ""


@dataclass(frozen=True)
class Format:
    """A layout.

    Attributes:
        recognise: tell whether a source is of this layout, by names alone.
        find: find its cases; raises ManifestError with every problem found.
        pattern: what it looks like, for people.
    """

    recognise: Callable[[Path], bool]
    find: Callable[[Path], Found]
    pattern: str


def find_cases(source: Path, layout: str | None = None) -> Found:
    """Find the cases of a data set.

    Args:
        source: a folder, or a CSV.
        layout: a name of FORMATS; None takes the first that recognises the source.

    Raises:
        ManifestError: the source is missing, of no known layout, or holds no case.
    """
    if not source.exists():
        raise ManifestError(f"{source}: does not exist")
    if layout is not None and layout not in FORMATS:
        raise ManifestError(f"format {layout!r}: unknown; one of {', '.join(FORMATS)}")
    chosen = FORMATS[layout] if layout else next((f for f in FORMATS.values() if f.recognise(source)), None)
    if chosen is None:
        known = "\n".join(f"  {name}: {known.pattern}" for name, known in FORMATS.items())
        raise ManifestError(f"{source}: no known layout; known are\n{known}")
    found = chosen.find(source.absolute())
    if not found.cases:
        raise ManifestError(f"{source}: no case found; expected {chosen.pattern}")
    return found


def modality_of(name: str) -> Modality:
    """Guess a modality from a channel's name: T1w, FLAIR, MRI are MR; CT; PET, SUV; US."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    for modality, pattern in _MODALITY_WORDS.items():
        if any(re.fullmatch(pattern, word) for word in words):
            return modality
    return "other"


def pairs_of(labels: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return the labels whose names differ only by left and right (also L and R, lh and rh as words of their own)."""
    names = {tuple(re.split(r"[\s_.-]+", name.lower())): name for name in labels}
    pairs = ((name, names.get(tuple(_OTHER_SIDE.get(word, word) for word in words))) for words, name in names.items())
    order = list(names.values())
    # Each pair once: swapped twice it would not be swapped.
    return tuple((name, other) for name, other in pairs if other is not None and order.index(name) < order.index(other))


def patient_of(case_id: str) -> str:
    """Return the patient in a case's name: what precedes a visit or session (sub-01_ses-2, P7_visit1), else all."""
    match = re.match(
        r"(.+?)[_-](?:ses|session|visit|timepoint|tp|scan|baseline|followup)[_-]?\d*(?:[_-].*)?$", case_id, re.I
    )
    return match[1] if match else case_id


_MODALITY_WORDS: dict[Modality, str] = {
    "MR": r"mri?|t1\w*|t2\w*|flair|dwi|adc|pd\w?|swi|dti|bold|mprage|dce",
    "CT": r"ct\w?|cbct|cta",
    "PET": r"pet|fdg|suv|spect",
    "US": r"us|ultrasound",
}
_SIDES = (("left", "right"), ("l", "r"), ("lh", "rh"))
_OTHER_SIDE = {a: b for side in _SIDES for a, b in (side, side[::-1])}


def _slug(name: str) -> str:
    """Return a name fit for a case id: other characters than letters, digits, _ . - become _."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.-")


def _is_decathlon(source: Path) -> bool:
    """Tell whether a folder has the Decathlon's `dataset.json`."""
    return (source / "dataset.json").is_file()


def _find_decathlon(source: Path) -> Found:
    """Read `dataset.json`; channels of a 4-D file get their index, nnU-Net's own flavour has a file per channel."""
    path = source / "dataset.json"
    content = _read_dataset_json(path)
    channels, (labels, regions, ignore_label) = _decathlon_channels(content, path), _decathlon_labels(content, path)
    if "training" in content:
        cases = [_decathlon_case(entry, channels, path) for entry in content["training"]]
    else:
        numbered = _find_folder(source)
        names = {f"channel_{number}": name for number, name in enumerate(channels)}
        cases = [_renamed(case, names) for case in numbered.cases]
    return Found(
        root=source,
        channels=channels,
        cases=_ordered(cases),
        labels=labels,
        regions=regions,
        ignore_label=ignore_label,
        description=str(content.get("description", "")),
        licence=str(content.get("licence") or content.get("license") or content.get("liscence") or ""),
        source=str(content.get("reference", "")),
    )


def _renamed(case: Case, names: Mapping[str, str]) -> Case:
    """Return a case with its channels renamed."""
    return case.changed(images={names.get(channel, channel): file for channel, file in case.images.items()})


def _read_dataset_json(path: Path) -> dict[str, Any]:
    """Return the content of a `dataset.json`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def _decathlon_channels(content: Mapping[str, Any], path: Path) -> dict[str, Modality]:
    """Return channel name -> modality; the Decathlon says `modality`, nnU-Net `channel_names`, both by number."""
    named = content.get("channel_names") or content.get("modality")
    if not isinstance(named, dict) or not all(str(number).isdigit() for number in named):
        raise ManifestError(f'{path}: modality: expected {{"0": "MRI", ...}}, got {named!r}')
    return {_slug(str(named[number])): modality_of(str(named[number])) for number in sorted(named, key=int)}


def _decathlon_labels(
    content: Mapping[str, Any], path: Path
) -> tuple[dict[str, int], dict[str, tuple[str, ...]], int | None]:
    """Return labels, regions and the ignored value; the Decathlon writes {"1": "liver"}, nnU-Net {"liver": 1}.

    nnU-Net's regions are lists of values, {"tumour": [1, 2]}, and its ignored value is a label of the name ignore.
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
    ignored = values.pop("ignore", (None,))[0]
    if all(len(several) == 1 for several in values.values()):
        return dict(sorted(((name, value) for name, (value,) in values.items()), key=lambda p: p[1])), {}, ignored
    try:
        return *named_regions(values, content.get("regions_class_order")), ignored
    except ValueError as error:
        raise ManifestError(f"{path}: {error}") from None


def _is_number(text: str) -> bool:
    """Tell whether a text is a whole number."""
    return re.fullmatch(r"-?\d+", text) is not None


def _decathlon_case(entry: object, channels: Iterable[str], path: Path) -> Case:
    """Return the case of an entry of `training`; several channels stand in one 4-D file, by their numbers.

    What is annotated in it, `annotated_classes`, is our own addition to the layout.
    """
    if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
        raise ManifestError(f'{path}: training: expected {{"image": ..., "label": ...}}, got {entry!r}')
    names = list(channels)
    image, label = (str(entry[key]).removeprefix("./") for key in ("image", "label"))
    indices = [None] if len(names) == 1 else list(range(len(names)))
    images = {name: {"path": image, "index": index} for name, index in zip(names, indices, strict=True)}
    case = _case(stem_of(Path(image)), images, {"path": label})
    annotated = entry.get("annotated_classes")
    return case if annotated is None else case.changed(annotated_classes=annotated)


def _is_csv(source: Path) -> bool:
    """Tell whether a source is a CSV."""
    return source.suffix.lower() == ".csv"


def _find_csv(source: Path) -> Found:
    """Read a line per case: case, patient and label where given, and each further column a channel."""
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [(reader.line_num, row) for row in reader]
            columns = list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{source}: cannot be read: {error}") from error
    channels = [column for column in columns if column not in ("case", "patient", "label", "annotated_classes")]
    if "case" not in columns or not channels:
        raise ManifestError(f"{source}: the first line names the columns {_CSV_PATTERN}; got {', '.join(columns)}")
    cases, problems = [], []
    for line, row in rows:
        try:
            cases.append(_csv_case(row, channels))
        except (ManifestError, TypeError) as error:
            problems.append(f"{source}:{line}: {error}")
    if problems:
        raise ManifestError("\n".join(problems))
    return Found(source.parent, {name: modality_of(name) for name in channels}, _ordered(cases))


def _csv_case(row: Mapping[str, str], channels: Iterable[str]) -> Case:
    """Return the case of a line; an empty cell says that the case lacks that channel or label."""
    if None in row or None in row.values():
        raise ManifestError("the line has more or fewer cells than the first line has columns")
    images = {name: _csv_file(row[name]) for name in channels if row[name].strip()}
    label = _csv_file(row["label"]) if row.get("label", "").strip() else None
    case = _case(row["case"].strip(), images, label, row.get("patient", "").strip())
    annotated = [name.strip() for name in row.get("annotated_classes", "").split(";") if name.strip()]
    return case.changed(annotated_classes=annotated or None)


def _csv_file(cell: str) -> dict[str, Any]:
    """Return a file and its index, which follows a #."""
    path, _, index = cell.strip().partition("#")
    return {"path": path, "index": index or None}


def _find_folder(source: Path) -> Found:
    """Find the cases of a plain folder in the first of three patterns that fits."""
    images, labels = (next((source / n for n in names if (source / n).is_dir()), None) for names in _PAIRED_FOLDERS)
    own = _volumes(source)
    if images and labels:
        cases = _matched(source, _volumes(images), {_without(_LABEL_WORDS, p): p for p in _volumes(labels)})
    elif own:
        drawn = [path for path in own if _without(_LABEL_WORDS, path) != stem_of(path)]
        cases = _matched(source, [p for p in own if p not in drawn], {_without(_LABEL_WORDS, p): p for p in drawn})
    else:
        folders = (folder for folder in sorted(source.iterdir()) if folder.is_dir())
        cases = [_folder_case(source, folder) for folder in folders if _volumes(folder)]
    channels = sorted({channel for case in cases for channel in case.images})
    return Found(source, {name: modality_of(name) for name in channels}, _ordered(cases))


def _volumes(folder: Path) -> list[Path]:
    """Return a folder's volumes by name; of a .hdr/.img pair the .img, which holds what differs."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        p for p in files if is_volume(p) and not p.name.startswith(".") and not p.name.endswith((".hdr", ".hdr.gz"))
    ]


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
        files.setdefault(case_id, {})[_channel(name, case_id)] = _relative(path, root)
    return [
        _case(case_id, images, _relative(labels[case_id], root) if case_id in labels else None)
        for case_id, images in files.items()
        if images
    ]


def _folder_case(root: Path, folder: Path) -> Case:
    """Return the case of a folder: each volume a channel but the label.

    Where each channel has a label of its own, on its own grid, the first channel's that is there is taken.
    """
    images: dict[str, dict[str, Any]] = {}
    labels: dict[str, dict[str, Any]] = {}
    for path in _volumes(folder):
        bare = _without(_LABEL_WORDS, path)
        target, name = (images, _without(_IMAGE_WORDS, path)) if bare == stem_of(path) else (labels, bare)
        target[_channel(name, folder.name)] = _relative(path, root)
    label = next((labels[name] for name in images if name in labels), None)
    if label is None and len(labels) > 1:
        raise ManifestError(f"{folder}: several labels, of no channel: {', '.join(labels)}; list the files in a CSV")
    return _case(folder.name, images, label or next(iter(labels.values()), None))


def _channel(name: str, case_id: str) -> str:
    """Return the channel in a file's name: what is left of it without the case's; nnU-Net numbers them."""
    rest = _slug(re.sub(rf"^{re.escape(case_id)}(?![A-Za-z0-9])", "", name))
    return f"channel_{int(rest)}" if re.fullmatch(r"\d{4}", rest) else rest or "image"


def _relative(path: Path, root: Path) -> dict[str, Any]:
    """Return a file as a manifest names it."""
    return {"path": path.relative_to(root).as_posix()}


def _case(case_id: str, images: Mapping[str, Any], label: Mapping[str, Any] | None, patient: str = "") -> Case:
    """Return a case; what the manifest would not take is an error that names the case."""
    fields = {"id": _slug(case_id), "patient": patient or patient_of(_slug(case_id)), "images": images, "label": label}
    try:
        return Case.model_validate(fields)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ManifestError(f"case {case_id!r}: {reasons}") from None


def _ordered(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Return the cases by id."""
    return tuple(sorted(cases, key=lambda case: case.id))


_LABEL_WORDS = "labels?|seg|segmentation|masks?|gt|reference|annotation"
_IMAGE_WORDS = "image|img|volume|vol"
_PAIRED_FOLDERS = (("imagesTr", "images", "image"), ("labelsTr", "labels", "label", "masks", "mask"))
_CSV_PATTERN = (
    "case, patient (optional), label (optional), annotated_classes (optional, a;b) and one per channel, its cells paths"
    " relative to the CSV"
)

FORMATS: dict[str, Format] = {
    "decathlon": Format(
        _is_decathlon,
        _find_decathlon,
        "dataset.json with modality, labels and training, as the Medical Segmentation Decathlon and nnU-Net write it",
    ),
    "csv": Format(_is_csv, _find_csv, f"a CSV with columns {_CSV_PATTERN}; path#2 is index 2 of a 4-D file"),
    "folder": Format(
        Path.is_dir,
        _find_folder,
        "images/CASE[_CHANNEL] and labels/CASE; or CASE[_CHANNEL][_image] and CASE_label (or _mask, _seg) side by side;"
        " or a folder per case that holds CHANNEL[_image] and label (or CHANNEL_mask, ...)",
    ),
}
