"""A CSV: a line a case, a column a channel."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline.data.formats.found import Format, Found, Reading, make_case, modality_of, ordered, relative
from pipeline.data.manifest import Case
from pipeline.errors import ManifestError

_OWN = ("case", "patient", "label", "annotated_classes", "group", "fold")
_COLUMNS = (
    "case, patient (optional), label (optional), annotated_classes (optional, a;b), group (optional), fold (optional,"
    " empty: held out) and one per channel, its cells paths relative to the CSV"
)


def _is_csv(source: Path) -> bool:
    """Tell whether a source is a CSV."""
    return source.suffix.lower() == ".csv"


def _find(source: Path, reading: Reading) -> Found:
    """Read a line per case: what the columns of ours say, and each further column a channel."""
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [(reader.line_num, row) for row in reader]
            columns = list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{source}: cannot be read: {error}") from error
    if missing := [name for name in reading.columns if name not in columns]:
        raise ManifestError(f"{source}: no column {', '.join(missing)}; there are {', '.join(columns)}")
    channels = [column for column in columns if column not in (*_OWN, *reading.columns)]
    if "case" not in columns or not channels:
        raise ManifestError(f"{source}: the first line names the columns {_COLUMNS}; got {', '.join(columns)}")
    cases, said, problems = [], {}, []
    root = reading.root or source.parent
    for line, row in rows:
        try:
            case = _case(row, channels, source.parent, root)
            cases.append(case)
            said[case.id] = {name: row[name].strip() for name in reading.columns}
        except (ManifestError, TypeError) as error:
            problems.append(f"{source}:{line}: {error}")
    if problems:
        raise ManifestError("\n".join(problems))
    return Found(
        root,
        {name: modality_of(name) for name in channels},
        ordered(cases),
        split=f"the column fold of {source.name}" if "fold" in columns else "",
        columns=said,
    )


def _case(row: Mapping[str, str], channels: Collection[str], folder: Path, root: Path) -> Case:
    """Return the case of a line; an empty cell says that the case lacks that channel or label."""
    if None in row or None in row.values():
        raise ManifestError("the line has more or fewer cells than the first line has columns")
    said = {name: row.get(name, "").strip() for name in _OWN}
    images = {name: _file(row[name], folder, root) for name in channels if row[name].strip()}
    label = _file(said["label"], folder, root) if said["label"] else None
    case = make_case(said["case"], images, label, said["patient"])
    if said["fold"] and not said["fold"].isdecimal():
        raise ManifestError(f"fold: expected a whole number from 0, or nothing for held out, got {said['fold']!r}")
    annotated = [name.strip() for name in said["annotated_classes"].split(";") if name.strip()]
    return case.changed(
        annotated_classes=annotated or None,
        group=said["group"] or None,
        fold=int(said["fold"]) if said["fold"] else None,
    )


def _file(cell: str, folder: Path, root: Path) -> dict[str, Any]:
    """Return a file and its index, which follows a #."""
    path, _, index = cell.strip().partition("#")
    return {**relative(folder / path, root), "index": index or None}


FORMAT = Format(_is_csv, _find, f"a CSV with columns {_COLUMNS}; path#2 is index 2 of a 4-D file", takes=("columns",))
