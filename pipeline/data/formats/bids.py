"""BIDS: sub-*/[ses-*/]anat/..., labels in derivatives, participants.tsv."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.data.formats.bids_names import (
    LABEL_SUFFIXES,
    NO_IMAGE_FOLDERS,
    NO_IMAGE_SUFFIXES,
    BidsFile,
    channel_names,
    parse_name,
)
from pipeline.data.formats.found import (
    Columns,
    Format,
    Found,
    Reading,
    collected,
    make_case,
    read_json_object,
    relative,
    volumes_below,
)
from pipeline.data.manifest import IGNORE, Case, Modality
from pipeline.errors import ManifestError

# What a table says where it says nothing.
_NOTHING = ("", "n/a")


def _is_bids(source: Path) -> bool:
    """Tell whether a folder says that it is BIDS, or holds subjects with a folder of anatomical or PET images."""
    if (source / "dataset_description.json").is_file():
        return True
    places = ("sub-*/anat", "sub-*/pet", "sub-*/ct", "sub-*/ses-*/anat", "sub-*/ses-*/pet", "sub-*/ses-*/ct")
    return source.is_dir() and any(any(source.glob(place)) for place in places)


def _find(source: Path, reading: Reading) -> Found:
    """Find an examination per subject and session: each kind of image a channel, the one kind of label its label."""
    files, strange = _files(source)
    images, labels = _images(files, reading), _labels(files, reading.labels)
    names = channel_names(images)
    by_case: dict[str, dict[str, BidsFile]] = defaultdict(dict)
    for image in images:
        other = by_case[image.case_id].setdefault(names[image.path], image)
        if other is not image:
            raise ManifestError(
                f"{image.case_id}: {other.path} and {image.path} are both channel {names[image.path]}; choose with "
                "--images 'PATTERN'"
            )
    columns = _columns(source, by_case, {image.case_id: image.subject for image in images})
    has_folds = any("fold" in said for said in columns.values())
    root = reading.root or source
    made = [
        partial(_case, case_id, own, labels.get(case_id), source, root, columns[case_id].get("fold", ""))
        for case_id, own in by_case.items()
    ]
    return Found(
        root=root,
        channels=_channels(images, names),
        cases=collected(made),
        split="the column fold of participants.tsv" if has_folds else "",
        columns=columns,
        notes=tuple(_notes(strange, labels, by_case)),
        **_label_fields(source, labels.values()),
        **_origin(source),
    )


def _files(source: Path) -> tuple[list[BidsFile], list[Path]]:
    """Return the volumes of all subjects, raw and derived, by path; and those whose name is none of BIDS."""
    folders = [*sorted(source.glob("sub-*/")), *sorted(source.glob("derivatives/*/sub-*/"))]
    files, strange = [], []
    for path in (path.relative_to(source) for folder in folders for path in volumes_below(folder)):
        parsed = parse_name(path)
        if parsed:
            files.append(parsed)
        else:
            strange.append(path)
    return files, strange


def _images(files: Iterable[BidsFile], reading: Reading) -> list[BidsFile]:
    """Return the images: those of the user's patterns, else the data set's own that are no series."""
    images = [file for file in files if file.suffix not in NO_IMAGE_SUFFIXES]
    if reading.images:
        return [file for file in images if any(_fits(file, pattern) for pattern in reading.images)]
    return [file for file in images if not file.pipeline and file.path.parent.name not in NO_IMAGE_FOLDERS]


def _labels(files: Iterable[BidsFile], pattern: str | None) -> dict[str, BidsFile]:
    """Return case id -> its label, of the pattern's or of the only kind there is.

    Raises:
        ManifestError: there are several kinds, or a case has several of one.
    """
    drawn = [file for file in files if file.suffix in LABEL_SUFFIXES and (pattern is None or _fits(file, pattern))]
    counts = Counter(file.label_kind for file in drawn)
    # A brain mask is what skull stripping leaves behind, not what people want to learn, where there is anything else.
    kinds = [kind for kind in counts if kind[2] != "brain"] or list(counts)
    if len(kinds) > 1:
        found = "\n".join(f"  {_shown(kind)}: {counts[kind]} files" for kind in sorted(kinds))
        raise ManifestError(f"labels of several kinds; choose with --labels 'PATTERN':\n{found}")
    labels: dict[str, BidsFile] = {}
    problems = []
    for file in (file for file in drawn if file.label_kind in kinds):
        other = labels.setdefault(file.case_id, file)
        if other is not file:
            problems.append(f"{file.case_id}: two labels, {other.path} and {file.path}; choose with --labels 'PATTERN'")
    if problems:
        raise ManifestError("\n".join(problems))
    return labels


def _fits(file: BidsFile, pattern: str) -> bool:
    """Tell whether a file's path below the data set matches a pattern, of which * spans folders too."""
    return fnmatchcase(file.path.as_posix(), pattern.removeprefix("./"))


def _shown(kind: tuple[str, str, str, str]) -> str:
    """Return a kind of label as the end of its files' names."""
    pipeline, label, desc, suffix = kind
    words = [f"label-{label}" if label else "", f"desc-{desc}" if desc else "", suffix]
    return f"{f'derivatives/{pipeline}' if pipeline else 'sub-*'}/...{'_'.join(filter(None, words))}"


def _channels(images: Iterable[BidsFile], names: Mapping[Path, str]) -> dict[str, Modality]:
    """Return channel -> modality, by name."""
    return dict(sorted((names[image.path], image.modality) for image in images))


def _case(
    case_id: str, images: Mapping[str, BidsFile], label: BidsFile | None, source: Path, root: Path, fold: str
) -> Case:
    """Return the case of an examination."""
    files = {channel: relative(source / image.path, root) for channel, image in images.items()}
    patient = next(iter(images.values())).subject
    case = make_case(case_id, files, relative(source / label.path, root) if label else None, patient)
    if fold not in _NOTHING and not fold.isdecimal():
        raise ManifestError(f"{case_id}: participants.tsv: fold: expected a whole number from 0, or n/a, got {fold!r}")
    return case if fold in _NOTHING else case.changed(fold=int(fold))


def _columns(source: Path, cases: Iterable[str], subjects: Mapping[str, str]) -> Columns:
    """Return what participants.tsv and the subjects' sessions.tsv say of each case."""
    participants = _table(source / "participants.tsv", "participant_id")
    said = {}
    for case_id in cases:
        subject = subjects[case_id]
        sessions = _table(source / subject / f"{subject}_sessions.tsv", "session_id")
        own = sessions.get(case_id.removeprefix(f"{subject}_"), {})
        said[case_id] = {**participants.get(subject, {}), **own}
    return said


def _table(path: Path, key: str) -> dict[str, dict[str, str]]:
    """Return a table's lines by their first column; none where there is no table."""
    if not path.is_file():
        return {}
    rows = list(_rows(path))
    if rows and key not in rows[0]:
        raise ManifestError(f"{path}: no column {key}; there are {', '.join(rows[0])}")
    return {row[key]: {name: value for name, value in row.items() if name != key} for row in rows}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the lines of a TSV.

    Raises:
        ManifestError: it cannot be read; names the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            for row in reader:
                if None in row or None in row.values():
                    raise ManifestError(
                        f"{path}:{reader.line_num}: more or fewer cells than the first line has columns"
                    )
                yield {name: value.strip() for name, value in row.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from error


def _label_fields(source: Path, labels: Iterable[BidsFile]) -> dict[str, Any]:
    """Return the labels' names: a dseg's by the tables beside it, a mask's by its label entity; none where unsaid."""
    files = list(labels)
    if not files:
        return {}
    if files[0].suffix != "dseg":
        name = files[0].entities.get("label") or files[0].entities.get("desc")
        return {"labels": {"background": 0, name: 1}} if name else {}
    names: dict[int, str] = {}
    for path in _dseg_tables(source, files):
        for row in _rows(path):
            if not row.get("index", "").lstrip("-").isdecimal() or not row.get("name"):
                raise ManifestError(f"{path}: expected the columns index and name, whole numbers and names, got {row}")
            first = names.setdefault(int(row["index"]), row["name"])
            if first != row["name"]:
                raise ManifestError(f"{path}: index {row['index']} is {row['name']}, elsewhere {first}")
    if not names:
        return {}
    values = {name: value for value, name in sorted({0: "background", **names}.items(), key=lambda p: (p[0] != 0, p))}
    ignored = values.pop(IGNORE, None)
    return {"labels": values, "ignore_label": ignored}


def _dseg_tables(source: Path, files: Sequence[BidsFile]) -> list[Path]:
    """Return the tables that name labels: of all files of these derivatives or of the data set, and of single files."""
    above = [source, *([source / "derivatives" / files[0].pipeline] if files[0].pipeline else [])]
    general = (path for folder in above for path in sorted(folder.glob("*dseg.tsv")))
    single = (source / file.path.parent / f"{file.path.name.split('.')[0]}.tsv" for file in files)
    return [path for path in (*general, *single) if path.is_file()]


def _origin(source: Path) -> dict[str, Any]:
    """Return what dataset_description.json says of where the data come from."""
    path = source / "dataset_description.json"
    content = read_json_object(path) if path.is_file() else {}
    references = content.get("ReferencesAndLinks") or [content.get("DatasetDOI", "")]
    return {
        "description": str(content.get("Name", "")),
        "licence": str(content.get("License", "")),
        "source": str(references[0]) if isinstance(references, list) else str(references),
    }


def _notes(strange: Sequence[Path], labels: Mapping[str, BidsFile], cases: Mapping[str, object]) -> Iterator[str]:
    """Yield what was left out."""
    if strange:
        yield f"{len(strange)} files are not named as BIDS names them and are left out, such as {strange[0]}"
    if lonely := sorted(labels.keys() - cases.keys()):
        yield f"{len(lonely)} labels have no image and are left out, such as that of {lonely[0]}"


FORMAT = Format(
    _is_bids,
    _find,
    "BIDS: sub-*/[ses-*/]anat/sub-*_T1w.nii.gz, labels as *_dseg or *_mask there or in derivatives/*/",
    takes=("--images", "--labels", "columns"),
)
