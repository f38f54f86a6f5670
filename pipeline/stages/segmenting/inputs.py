"""What `medseg segment` is given becomes a list of cases with a file a channel.

An input is a volume, a folder of volumes, a quoted pattern (`'scans/**/*.nii.gz'`), a manifest (.json), a CSV (.csv),
or `-` for a list of all these on standard input, one a line. FILE#3 is the fourth volume of a 4-D file.

A model of one channel takes each file as a case of the file's name. For a model of several, a file is named
CASE_CHANNEL or CASE_0000, by the channel's name or its position in the model; files of one folder and one CASE belong
together. A pattern's files are named with the folders that its wildcards stand for: `'scans/*/*.nii.gz'` makes
p1_T1 of scans/p1/T1.nii.gz. So a name depends on nothing but its own input, and stays when others are added.

A manifest names cases and channels itself. A CSV has a column `case` and one a channel of the model, by its name
(`image` will do where there is one channel); an empty cell says that the case lacks the channel, other columns are left
alone; with the single column `image`, files name the cases. A cell may be a folder of one DICOM series, or FOLDER#KEY.
Its paths are relative to its own folder; it is the user's
list as much as the command line is, so they may be absolute and lead anywhere.

A folder without volumes is looked through for DICOM, with the folders within: each series that fits the model is a case
of a name that tells nothing of the patient, the modality and the series' key: CT_65b9607c04.
"""

from __future__ import annotations

import csv
import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from pipeline.data.manifest import load_manifest
from pipeline.errors import PipelineError
from pipeline.stages.segmenting.dicom_inputs import DicomFolders, DicomOptions, is_folder, without_key
from pipeline.stages.segmenting.sources import ChannelFile
from pipeline.stages.segmenting.sources import SegmentInput as SegmentInput
from pipeline.volumes.stored import is_volume, stem_of

SUFFIX = ".nii.gz"
# Folder of the probabilities, in that of the label maps; they have the same names.
PROBABILITIES = "probabilities"
# Folder of the instance label maps, likewise.
INSTANCES = "instances"
# Folder of what lets a batch go on, in that of the label maps: claims, journal, unfinished planes.
BOOKKEEPING = ".medseg"

_LONGEST_NAME = 200  # Bytes; file systems take 255 with the suffix and the temporary name's beginning.
_FILE_NAME = re.compile(r"[^/.\x00-\x1f\x7f][^/\x00-\x1f\x7f]*")
_SHOWN = 5  # Of the cases that an error is about.


def find_inputs(
    inputs: Sequence[str | Path],
    channels: Sequence[str],
    out: Path,
    stdin: TextIO | None = None,
    dicom: DicomOptions | None = None,
) -> list[SegmentInput]:
    """Find the cases to segment.

    Args:
        inputs: volumes, folders of volumes (theirs, not those of folders within) or of DICOM (those too), patterns,
            manifests, CSVs, or "-".
        channels: the model's.
        out: folder of the label maps.
        stdin: where the lines of "-" are read.
        dicom: how DICOM folders are read; None: every image series, none resampled.

    Returns:
        Those of manifests and CSVs, then the others, in the order in which they are given, folders and patterns by
        name; each once. A file that is missing is a case too: it fails by itself when it is read.

    Raises:
        PipelineError: nothing is found, a CSV cannot be used, a file fits no channel, two cases would write one file,
            or the label maps would land beside an input.
        ManifestError: a manifest cannot be used.
    """
    given = [line for one in map(str, inputs) for line in (_lines_of(stdin) if one == "-" else [one])]
    cases: list[SegmentInput] = []
    files: dict[tuple[Path, int | None, str], tuple[str, ChannelFile]] = {}
    folders = DicomFolders(dicom or DicomOptions())
    for one in given:
        kind = Path(one).suffix.lower()
        if kind == ".json":
            cases += _of_manifest(Path(one), channels)
        elif kind == ".csv":
            cases += _of_csv(Path(one), channels, folders)
        elif (series := _series_cases(one, channels, folders)) is not None:
            cases += series
        else:
            for stem, file in _named_files(one):
                files.setdefault(_place(file), (stem, file))
    cases += _of_files(files.values(), channels)
    kept = list({(case.name, *map(_place, case.files.values())): case for case in cases}.values())
    if not kept:
        raise PipelineError("\n".join(folders.without) or "nothing to segment: no volume was given")
    _refuse_names(kept)
    _refuse_same_names(kept)
    _refuse_beside_inputs(kept, out)
    return kept


def _series_cases(text: str, channels: Sequence[str], folders: DicomFolders) -> list[SegmentInput] | None:
    """Return the DICOM series that a folder stands for, a case each; None of what is no folder of DICOM."""
    folder = Path(text)
    if not is_folder(folder):
        found = folders.named(text, channels)
    else:
        found = None if _volumes_among(_listed(folder)) else folders.cases_of(folder, channels)
    if found is None:
        return None
    # Named by the folder that was given: those within may be called after patients.
    given = Path(without_key(text)[0])
    made = [ChannelFile(given, series=one, untilt=folders.options.untilt) for one in found]
    return [SegmentInput(_name_of(file), {channels[0]: file}) for file in made]


def _lines_of(stdin: TextIO | None) -> list[str]:
    """Return the paths on standard input."""
    if stdin is None:
        raise PipelineError("'-' stands for a list of paths on standard input, and there is none")
    try:
        return [line.rstrip("\r\n") for line in stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise PipelineError(f"standard input is no list of paths: {error}") from error


def _of_manifest(path: Path, channels: Sequence[str]) -> Iterator[SegmentInput]:
    """Yield a manifest's cases."""
    manifest = load_manifest(path)
    _refuse_missing_channels(path, channels, manifest.channels)
    for case in manifest.cases:
        named = {channel: case.images[channel] for channel in channels if channel in case.images}
        if not named:
            raise PipelineError(f"{path}: case {case.id!r} has none of the model's channels, {', '.join(channels)}")
        yield SegmentInput(case.id, {c: ChannelFile(manifest.path_of(file), file.index) for c, file in named.items()})


def _refuse_missing_channels(path: Path, channels: Iterable[str], declared: Iterable[str], more: str = "") -> None:
    """Refuse a list of cases that does not know a channel of the model: more likely misspelt than missing."""
    missing = [channel for channel in channels if channel not in declared]
    if missing:
        known = ", ".join(declared)
        raise PipelineError(f"{path}: lacks the model's channels {', '.join(missing)}; it has {known}{more}")


def _of_csv(path: Path, channels: Sequence[str], folders: DicomFolders) -> Iterator[SegmentInput]:
    """Yield a CSV's cases; report every line that cannot be used."""
    columns, rows = _table(path)
    if len(channels) == 1 and channels[0] not in columns:
        columns = [channels[0] if column == "image" else column for column in columns]
    _refuse_missing_channels(path, channels, columns, "; the first line names the columns, 'case' and the channels")
    if "case" not in columns and len(channels) > 1:
        raise PipelineError(f"{path}: the first line names the columns case,{','.join(channels)}; 'case' is missing")
    problems = []
    for line, cells in rows:
        row = {column: cell.strip() for column, cell in zip(columns, cells, strict=False)}
        files = {c: _cell_file(row[c], c, path.parent, folders) for c in channels if row.get(c)}
        named = bool(row.get("case", "unnamed"))
        if len(cells) != len(columns) or not files or not named:
            # What the cells hold is the user's, and no log's.
            got = f"{len(cells)}, {'a' if named else 'no'} case, {len(files)} files"
            problems.append(f"{path}:{line}: expected {len(columns)} cells, a case and a file among them; got {got}")
        else:
            yield SegmentInput(row.get("case") or _name_of(next(iter(files.values()))), files)
    if problems:
        raise PipelineError("\n".join(problems))


def _table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return a CSV's columns, and number and cells of each line; commas, semicolons or tabs part its cells."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PipelineError(f"{path}: cannot be read: {error}") from error
    if not rows:
        raise PipelineError(f"{path}: is empty; its first line names the columns")
    return [cell.strip() for cell in rows[0][1]], rows[1:]


def _cell_file(text: str, channel: str, folder: Path, folders: DicomFolders) -> ChannelFile:
    """Return the file or series that a cell names."""
    series = folders.one_of(text, channel, folder)
    if series is None:
        return _channel_file(text, folder)
    return ChannelFile(folder / without_key(text)[0], series=series, untilt=folders.options.untilt)


def _channel_file(text: str, folder: Path = Path()) -> ChannelFile:
    """Return the file that a text names, with the index that follows a # where no file has that very name."""
    if not text or "\0" in text:
        raise PipelineError(f"{text!r}: is no path: it is empty, or holds a null byte")
    numbered = re.fullmatch(r"(.+)#(\d{1,9})", text)
    if numbered and not os.path.lexists(folder / text):
        return ChannelFile(folder / numbered[1], int(numbered[2]))
    return ChannelFile(folder / text)


def _name_of(file: ChannelFile, stem: str | None = None) -> str:
    """Return the name of a case of one file, or series."""
    if file.series:
        return file.series.name
    stem = stem_of(file.path) if stem is None else stem
    return stem if file.index is None else f"{stem}_{file.index}"


def _named_files(text: str) -> Iterator[tuple[str, ChannelFile]]:
    """Yield the files of a path, folder or pattern, each with the stem that names its case and channel."""
    given = _channel_file(text)
    if is_folder(given.path):
        yield from ((stem_of(file), ChannelFile(file, given.index)) for file in _volumes_of(given.path))
    elif re.search(r"[*?[]", str(given.path)) and not os.path.lexists(given.path):
        yield from ((name, ChannelFile(file, given.index)) for name, file in _matches(given.path))
    else:
        yield stem_of(given.path), given


def _volumes_of(folder: Path) -> list[Path]:
    """Return a folder's volumes."""
    files = _volumes_among(_listed(folder))
    if not files:
        raise PipelineError(
            f"{folder}: the folder holds no volume (NIfTI, NRRD or MetaImage) and no DICOM series;"
            f" volumes of the folders within are '{folder}/**', in quotes"
        )
    return files


def _listed(folder: Path) -> list[Path]:
    """Return what a folder holds, by name."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise PipelineError(f"{folder}: cannot be read ({error.strerror})") from error


def _volumes_among(paths: Sequence[Path]) -> list[Path]:
    """Return the paths that are volumes; the second file of a pair is read through its header."""
    known = set(paths)
    return [
        path
        for path in paths
        if is_volume(path) and not path.is_dir() and not path.name.startswith(".") and not _second_of_pair(path, known)
    ]


def _second_of_pair(path: Path, known: set[Path]) -> bool:
    """Tell whether a .img stands beside its .hdr."""
    stem, dot, _ = path.name.partition(".img")
    return bool(dot) and not known.isdisjoint(path.with_name(stem + header) for header in (".hdr", ".hdr.gz"))


def _matches(pattern: Path) -> list[tuple[str, Path]]:
    """Return the volumes that a pattern matches, named with the folders that its wildcards stand for."""
    fixed = next(n for n, part in enumerate(pattern.parts) if re.search(r"[*?[]", part))
    root = Path(*pattern.parts[:fixed])
    # Not pathlib's: before Python 3.13 its ** matches no files, and it goes into hidden folders.
    matches = glob.glob(str(pattern), recursive=True)  # noqa: PTH207
    files = _volumes_among(sorted({Path(match) for match in matches}))
    if not files:
        raise PipelineError(f"{pattern}: matches no volume (NIfTI, NRRD or MetaImage)")
    return [("_".join([*file.relative_to(root).parts[:-1], stem_of(file)]), file) for file in files]


def _place(file: ChannelFile) -> tuple[Path, int | None, str]:
    """Return what tells one file from another: its folder without links, its name, its index or its series' key."""
    if file.series:
        return Path(os.path.realpath(file.series.folder)), None, file.series.key
    return Path(os.path.realpath(file.path.parent)) / file.path.name, file.index, ""


def _of_files(files: Iterable[tuple[str, ChannelFile]], channels: Sequence[str]) -> list[SegmentInput]:
    """Put files and their stems together to cases."""
    if len(channels) == 1:
        return [SegmentInput(_name_of(file, stem), {channels[0]: file}) for stem, file in files]
    cases: dict[tuple[Path, str], dict[str, ChannelFile]] = {}
    for stem, file in files:
        name, channel = _case_and_channel(stem, file.path, channels)
        case = cases.setdefault((file.path.parent, name), {})
        if channel in case:
            raise PipelineError(f"{file.path} and {case[channel].path}: both are channel {channel!r} of case {name!r}")
        case[channel] = file
    return [SegmentInput(name, {c: case[c] for c in channels if c in case}) for (_, name), case in cases.items()]


def _case_and_channel(stem: str, path: Path, channels: Sequence[str]) -> tuple[str, str]:
    """Split a file's stem into case and channel."""
    # Longest first: of the channels T1 and POST_T1, case_POST_T1 is the second.
    for channel in sorted(channels, key=len, reverse=True):
        for ending in (f"_{channel}", f"_{list(channels).index(channel):04d}"):
            if stem.endswith(ending) and len(stem) > len(ending):
                return stem.removesuffix(ending), channel
    endings = ", ".join(f"CASE_{channel} or CASE_{index:04d}" for index, channel in enumerate(channels))
    raise PipelineError(
        f"{path}: the model has several channels, and the name says none; expected {endings}, or a CSV that says"
    )


def _refuse_names(cases: Sequence[SegmentInput]) -> None:
    """Refuse names that could not be a file's, or would lead out of the folder of label maps."""
    wrong = [c.name for c in cases if not _FILE_NAME.fullmatch(c.name) or len(os.fsencode(c.name)) > _LONGEST_NAME]
    if wrong:
        raise PipelineError(
            f"{', '.join(map(repr, wrong[:_SHOWN]))}: cannot name a label map: a name has 1 to {_LONGEST_NAME} bytes,"
            " no / or control character, and begins with no dot; name the cases in a CSV"
        )


def _refuse_same_names(cases: Sequence[SegmentInput]) -> None:
    """Refuse cases whose label maps would have one name, and say what gives them different ones."""
    first: dict[str, SegmentInput] = {}
    clashes = [(other, case) for case in cases if (other := first.setdefault(case.name, case)) is not case]
    if not clashes:
        return
    pairs = [[next(iter(case.files.values())).path for case in pair] for pair in clashes]
    lines = [
        f"{one} and {two} would both write {case.name}{SUFFIX}"
        for (one, two), (_, case) in zip(pairs[:_SHOWN], clashes, strict=False)
    ]
    if len(clashes) > _SHOWN:
        lines.append(f"and {len(clashes) - _SHOWN} more")
    way_out = "name the cases in a CSV with the columns case and image (or one a channel)"
    one, two = pairs[0]
    if one.parent != two.parent:
        root = os.path.commonpath([one.parent.absolute(), two.parent.absolute()])
        way_out += f", or give them as a quoted pattern, '{root}/**/*', which puts their folders into their names"
    raise PipelineError("\n".join([*lines, way_out]))


def _refuse_beside_inputs(cases: Sequence[SegmentInput], out: Path) -> None:
    """Refuse to write where an input lies, or where a link leads to one."""
    taken = {Path(os.path.realpath(folder)) for folder in (out, out / PROBABILITIES, out / INSTANCES)}
    for case in cases:
        for path in (
            path for file in case.files.values() for path in (file.series.files if file.series else [file.path])
        ):
            if taken & {Path(os.path.realpath(path)).parent, Path(os.path.realpath(path.parent))}:
                raise PipelineError(f"{out}: holds the input {path}; choose a folder of its own for the label maps")
