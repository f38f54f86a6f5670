"""What `medseg segment` is given: files, folders and manifests become a list of cases with a file a channel.

A model of one channel takes each file as a case of the file's name. For a model of several, a file is named
CASE_CHANNEL or CASE_0000, by the channel's name or its position in the model; files of one folder and one CASE belong
together. A manifest names cases and channels itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.manifest import load_manifest
from pipeline.errors import PipelineError
from pipeline.volumes.stored import is_volume, stem_of

SUFFIX = ".nii.gz"


@dataclass(frozen=True)
class ChannelFile:
    """One channel's file; the index is its position in a 4-D file."""

    path: Path
    index: int | None = None


@dataclass(frozen=True)
class SegmentInput:
    """One case to segment.

    Attributes:
        name: of its label map, without suffix.
        files: channel -> file, in the model's order of channels; at least one.
    """

    name: str
    files: dict[str, ChannelFile]


def find_inputs(paths: Sequence[Path], channels: Sequence[str], out: Path) -> list[SegmentInput]:
    """Find the cases to segment.

    Args:
        paths: volumes, folders of volumes (theirs, not those of folders within), or manifests.
        channels: the model's.
        out: folder of the label maps.

    Returns:
        The cases in the order in which they are given, folders by name.

    Raises:
        PipelineError: nothing is found, a file fits no channel, two cases would write one file, or the label maps would
            land beside an input.
        ManifestError: a manifest cannot be used.
    """
    found = [case for path in paths if path.suffix == ".json" for case in _of_manifest(path, channels)]
    files = [file for path in paths if path.suffix != ".json" for file in _files_of(path)]
    found += _of_files(list(dict.fromkeys(files)), channels)
    if not found:
        raise PipelineError("nothing to segment: no volume was given")
    _refuse_same_names(found)
    _refuse_beside_inputs(found, out)
    return found


def _of_manifest(path: Path, channels: Sequence[str]) -> Iterator[SegmentInput]:
    """Yield a manifest's cases."""
    manifest = load_manifest(path)
    unknown = [channel for channel in channels if channel not in manifest.channels]
    if unknown:
        raise PipelineError(
            f"{path}: lacks the model's channels {', '.join(unknown)}; it has {', '.join(manifest.channels)}"
        )
    for case in manifest.cases:
        named = {channel: case.images[channel] for channel in channels if channel in case.images}
        if not named:
            raise PipelineError(f"{path}: case {case.id!r} has none of the model's channels, {', '.join(channels)}")
        yield SegmentInput(case.id, {c: ChannelFile(manifest.path_of(file), file.index) for c, file in named.items()})


def _files_of(path: Path) -> list[Path]:
    """Return a folder's volumes, or the file itself; the second file of a pair is read through its header."""
    if not path.is_dir():
        return [path]
    names = {file.name for file in path.iterdir()}
    files = [
        file
        for file in sorted(path.iterdir())
        if file.is_file() and is_volume(file) and not file.name.startswith(".") and not _second_of_pair(file, names)
    ]
    if not files:
        raise PipelineError(f"{path}: the folder holds no volume (NIfTI, NRRD or MetaImage)")
    return files


def _second_of_pair(file: Path, names: set[str]) -> bool:
    """Tell whether a .img stands beside its .hdr."""
    stem, dot, _ = file.name.partition(".img")
    return bool(dot) and not names.isdisjoint({f"{stem}.hdr", f"{stem}.hdr.gz"})


def _of_files(files: Sequence[Path], channels: Sequence[str]) -> list[SegmentInput]:
    """Put the files together to cases."""
    if len(channels) == 1:
        return [SegmentInput(stem_of(file), {channels[0]: ChannelFile(file)}) for file in files]
    cases: dict[tuple[Path, str], dict[str, ChannelFile]] = {}
    for file in files:
        name, channel = _case_and_channel(file, channels)
        case = cases.setdefault((file.parent, name), {})
        if channel in case:
            raise PipelineError(f"{file} and {case[channel].path}: both are channel {channel!r} of case {name!r}")
        case[channel] = ChannelFile(file)
    return [SegmentInput(name, {c: case[c] for c in channels if c in case}) for (_, name), case in cases.items()]


def _case_and_channel(file: Path, channels: Sequence[str]) -> tuple[str, str]:
    """Split a file's name into case and channel."""
    stem = stem_of(file)
    # Longest first: of the channels T1 and POST_T1, case_POST_T1 is the second.
    for channel in sorted(channels, key=len, reverse=True):
        for ending in (f"_{channel}", f"_{list(channels).index(channel):04d}"):
            if stem.endswith(ending) and len(stem) > len(ending):
                return stem.removesuffix(ending), channel
    endings = ", ".join(f"CASE_{channel} or CASE_{index:04d}" for index, channel in enumerate(channels))
    raise PipelineError(f"{file}: the model has several channels, and the name says none; expected {endings}")


def _refuse_same_names(cases: Sequence[SegmentInput]) -> None:
    """Refuse cases whose label maps would have one name."""
    first: dict[str, SegmentInput] = {}
    clashes = []
    for case in cases:
        other = first.setdefault(case.name, case)
        if other is not case:
            one, two = (next(iter(c.files.values())).path for c in (other, case))
            clashes.append(f"{one} and {two} would both write {case.name}{SUFFIX}")
    if clashes:
        raise PipelineError("\n".join([*clashes, "segment them into two folders, or name the cases in a manifest"]))


def _refuse_beside_inputs(cases: Sequence[SegmentInput], out: Path) -> None:
    """Refuse to write where an input lies."""
    for case in cases:
        for file in case.files.values():
            if file.path.resolve().parent == out.resolve():
                raise PipelineError(
                    f"{out}: holds the input {file.path}; choose a folder of its own for the label maps"
                )
