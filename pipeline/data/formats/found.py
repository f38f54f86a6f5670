"""What a layout tells of a data set, what it may be asked, and how its cases are made and named."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.data.manifest import Case, Modality
from pipeline.errors import ManifestError
from pipeline.volumes.stored import is_volume, stem_of

# case id -> column -> what a table says there.
Columns = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Found:
    """A data set as its layout tells it: a manifest without hashes.

    Attributes:
        root: folder that all paths are relative to.
        channels: channel name -> modality, in the network's order.
        cases: in the order of their ids.
        labels: label name -> value; None where the layout does not name them.
        file_values: label name -> the values that stand for it, where they are several.
        regions: region name -> its labels, where the layout has any.
        ignore_label: value of the voxels of which nobody knows what they are, where the layout has it.
        split: what says on which side each case stands, as the cases' folds then do; empty where nothing does.
        held_out: ids of the cases that the layout keeps for testing, where it says no more of the split.
        columns: what a table says of each case, for grouping and stratifying.
        description, licence, source: where the layout holds them.
        notes: what people should know of how the layout was read, a sentence each.
    """

    root: Path
    channels: dict[str, Modality]
    cases: tuple[Case, ...]
    labels: dict[str, int] | None = None
    file_values: dict[str, tuple[int, ...]] = field(default_factory=dict)
    regions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ignore_label: int | None = None
    split: str = ""
    held_out: frozenset[str] = frozenset()
    columns: Columns = field(default_factory=dict)
    description: str = ""
    licence: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What a layout may be asked.

    Attributes:
        root: folder that the manifest's paths shall be relative to; None: the layout's own.
        images, labels: patterns of files, one image pattern or several.
        patient: a regular expression in a case's id; its first group, else all of it, names the patient.
        splits: nnU-Net's `splits_final.json`.
        columns: of a table that say something of each case, and are no channels.
    """

    root: Path | None = None
    images: tuple[str, ...] = ()
    labels: str | None = None
    patient: str | None = None
    splits: Path | None = None
    columns: tuple[str, ...] = ()

    def asked(self) -> dict[str, bool]:
        """Return option -> whether it is given, of those that only some layouts know."""
        return {"--images": bool(self.images), "--labels": bool(self.labels), "columns": bool(self.columns)}


@dataclass(frozen=True)
class Format:
    """A layout.

    Attributes:
        recognise: tell whether a source is of this layout, by names and `dataset.json` alone.
        find: find its cases; raises ManifestError with every problem found.
        pattern: what it looks like, for people.
        takes: which of `Reading.asked` it knows.
    """

    recognise: Callable[[Path], bool]
    find: Callable[[Path, Reading], Found]
    pattern: str
    takes: Collection[str] = ()


def make_case(case_id: str, images: Mapping[str, Any], label: Mapping[str, Any] | None, patient: str = "") -> Case:
    """Return a case; what the manifest would not take is an error that names the case."""
    name = slug(case_id)
    fields = {"id": name, "patient": patient or patient_of(name), "images": images, "label": label}
    try:
        return Case.model_validate(fields)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ManifestError(f"case {case_id!r}: {reasons}") from None


def collected(made: Iterable[Callable[[], Case]]) -> tuple[Case, ...]:
    """Make cases, and return them by id.

    Raises:
        ManifestError: names every case that could not be made.
    """
    cases, problems = [], []
    for make in made:
        try:
            cases.append(make())
        except ManifestError as error:
            problems.append(str(error))
    if problems:
        raise ManifestError("\n".join(problems))
    return ordered(cases)


def ordered(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Return the cases by id."""
    return tuple(sorted(cases, key=lambda case: case.id))


def relative(path: Path, root: Path) -> dict[str, Any]:
    """Return a file as a manifest names it, by the text of its path alone; one outside the root is refused later."""
    return {"path": Path(os.path.relpath(path, root)).as_posix()}


def volumes_of(folder: Path) -> list[Path]:
    """Return a folder's volumes by name; of a .hdr/.img pair the .img, which holds what differs."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if _is_shown(path)]


def volumes_below(folder: Path) -> Iterator[Path]:
    """Yield the volumes of a folder and all folders below it, by path, hidden ones left out."""
    for path in sorted(folder.rglob("*")):
        if _is_shown(path) and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _is_shown(path: Path) -> bool:
    """Tell whether a path is a volume that a layout may hold."""
    return is_volume(path) and not path.name.startswith(".") and not path.name.endswith((".hdr", ".hdr.gz"))


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        ManifestError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def ids_of(paths: Iterable[str]) -> dict[str, str]:
    """Return path -> an id for it: its name where no other has the same, else with its folders' names before it."""
    names = {path: slug(stem_of(Path(path))) for path in paths}
    counts = Counter(names.values())
    return {
        path: name if counts[name] == 1 else slug("_".join([*Path(path).parent.parts, name]))
        for path, name in names.items()
    }


def slug(name: str) -> str:
    """Return a name fit for a case id: other characters than letters, digits, _ . - become _."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.-")


def modality_of(name: str) -> Modality:
    """Guess a modality from a channel's name: T1w, FLAIR, MRI are MR; CT; PET, SUV; US."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    for modality, pattern in _MODALITY_WORDS.items():
        if any(re.fullmatch(pattern, word) for word in words):
            return modality
    return "other"


def modalities_of(cases: Iterable[Case]) -> dict[str, Modality]:
    """Return the channels that occur in cases, by name, with the modality that each name tells."""
    return {name: modality_of(name) for name in sorted({name for case in cases for name in case.images})}


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
