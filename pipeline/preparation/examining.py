"""Examining: one read of a case's files -> all that `check`, the fingerprint and the plan want to know of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import Case, ImageFile, Manifest
from pipeline.errors import GeometryError, PipelineError, VolumeError
from pipeline.geometry import FloatArray, Geometry, Grid
from pipeline.preparation.body import is_body
from pipeline.preparation.examination import (
    EXAMINATION_VERSION,
    LEVELS,
    CaseExamination,
    ChannelExamination,
    FileStamp,
    Intensities,
    LabelExamination,
    Problem,
    nonzero_box,
)
from pipeline.records import digest_of
from pipeline.volumes.formats.header import Header
from pipeline.volumes.formats.streams import bytes_of
from pipeline.volumes.relabelling import relabelled
from pipeline.volumes.stored import content_digest, files_of, pick_channel, read_stored
from pipeline.volumes.volume import count_values, smallest_type, whole_numbers

Array = NDArray[Any]
Value = TypeVar("Value")

# Headers are rounded: grids whose corners lie closer than this share of a voxel are one.
GRID_TOLERANCE_VOXELS = 0.1
# Quantiles and moments are taken from at most about so many voxels, evenly spread: the error is a thousandth.
LARGEST_SAMPLE = 2**20

# What a manifest says of a case that is not looked for in its files, or only held against what was found there.
_NOT_EXAMINED: Any = {
    "patient": True,
    "fold": True,
    "group": True,
    "images": {"__all__": {"sha256"}},
    "label": {"sha256"},
}


def examine_case(manifest: Manifest, case: Case) -> CaseExamination:
    """Read a case's files, each once, and report what they hold and every problem found.

    Nothing is raised for what a file holds: a file that cannot be used is a problem of the case.
    """
    return _Examiner(manifest, case).examine()


def examination_key(manifest: Manifest, case: Case) -> str:
    """Return a digest of all that a case's examination depends on beside its files."""
    return digest_of(
        {
            "version": EXAMINATION_VERSION,
            "root": str(manifest.root),
            "labels": manifest.labels,
            **({} if manifest.ignore_label is None else {"ignore_label": manifest.ignore_label}),
            **({"file_values": manifest.file_values} if manifest.file_values else {}),
            "channels": manifest.channels,
            "case": case.model_dump(mode="json", exclude=_NOT_EXAMINED),
        }
    )


def state_of(path: Path) -> tuple[int, int] | None:
    """Return the size in bytes and the time of change in ns of a volume's files together; None where one is missing."""
    try:
        states = [file.stat() for file in files_of(path)]
    except (OSError, VolumeError):
        return None
    return sum(state.st_size for state in states), max(state.st_mtime_ns for state in states)


@dataclass(frozen=True)
class _Drawn:
    """A label that was read: the voxels' values, how often each occurs, and where it lies."""

    values: Array
    counts: dict[int, int]
    geometry: Geometry


@dataclass(frozen=True, eq=False)
class _Foreground:
    """Where people have drawn: (n, 3) centres of voxels in mm, each standing for as many."""

    points_mm: FloatArray
    voxels_each: float


@dataclass
class _Examiner:
    """One case's examination in the making: what it has gathered so far."""

    manifest: Manifest
    case: Case
    files: dict[str, FileStamp] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def examine(self) -> CaseExamination:
        """Examine the label, then each image file, one after the other, so that only two are ever in memory."""
        label = self._label()
        foreground = _foreground_of(label, self._no_structures) if label else None
        channels: dict[str, ChannelExamination] = {}
        by_path: dict[str, list[str]] = {}
        for name in (name for name in self.manifest.channels if name in self.case.images):
            by_path.setdefault(self.case.images[name].path, []).append(name)
        for names in by_path.values():
            channels.update(self._channels(names, foreground))
        return CaseExamination(
            case_id=self.case.id,
            key=examination_key(self.manifest, self.case),
            files=self.files,
            channels={name: channels[name] for name in self.manifest.channels if name in channels},
            label=self._placed(label, channels) if label else None,
            problems=tuple(self.problems),
        )

    def _add(self, severity: Literal["error", "warning"], kind: str, message: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(severity=severity, kind=kind, case_id=self.case.id, message=message))

    def _attempt(self, kind: str, action: Callable[[], Value]) -> Value | None:
        """Return what an action returns; None, and a problem noted, where it refuses."""
        try:
            return action()
        except PipelineError as error:
            self._add("error", kind, str(error))
            return None

    def _stored(self, file: ImageFile) -> tuple[Header, Array] | None:
        """Return a file's header and voxels; None, and a problem noted, where it cannot be read."""
        return self._attempt("file", lambda: self._read(file))

    def _read(self, file: ImageFile) -> tuple[Header, Array]:
        """Read a file's bytes, keep their stamp, and return what they mean."""
        path = self.manifest.path_of(file)
        state = state_of(path)
        content = bytes_of(path)
        if state:
            sha256 = content_digest(path, content)
            self.files[file.path] = FileStamp(size_bytes=state[0], mtime_ns=state[1], sha256=sha256)
        return read_stored(path, content)

    def _geometry(self, header: Header) -> Geometry | None:
        """Return a file's grid, after a look at what its header says twice or not at all."""
        geometry = self._attempt("affine", lambda: header.geometry)
        if geometry is None:
            return None
        for note in header.notes:
            self._add("warning", "orientation", f"{header.path}: {note}")
        if header.qform_code > 0 and header.sform_code > 0:
            apart = _apart_voxels(geometry, header.qform)
            if not apart < GRID_TOLERANCE_VOXELS:
                self._add(
                    "warning",
                    "qform_sform",
                    f"{header.path}: its qform and sform are {apart:.2f} voxels apart; the sform is used, other"
                    " programs may take the qform",
                )
        return geometry

    def _label(self) -> _Drawn | None:
        """Read the label and judge its values."""
        file = self.case.label
        stored = self._stored(file) if file else None
        if file is None or stored is None:
            return None
        header, voxels = stored
        geometry = self._geometry(header)
        picked = self._attempt("voxels", lambda: pick_channel(header, voxels, file.index))
        if picked is None:
            return None
        values = self._attempt("label_values", lambda: whole_numbers(header, picked))
        if values is None:
            return None
        counts = count_values(values)
        self._judge_values(header.path, counts)
        if self.manifest.file_values:
            values, counts = self._as_labels(values, counts)
        self._judge_label(header.path, counts)
        return _Drawn(values, counts, geometry) if geometry else None

    def _as_labels(self, values: Array, counts: Mapping[int, int]) -> tuple[Array, dict[int, int]]:
        """Return voxels and counts by the labels' own values; what stands for none, and is noted, is background."""
        background = next(iter(self.manifest.labels.values()))
        table = {value: self.manifest.value_table.get(value, background) for value in counts}
        summed: dict[int, int] = {}
        for value, voxels in counts.items():
            summed[table[value]] = summed.get(table[value], 0) + voxels
        kind = smallest_type(min(summed), max(summed))
        return relabelled(values, table, kind, "its own"), summed

    @property
    def _no_structures(self) -> set[int]:
        """The values that are no structure's: the background's, and that of voxels of which nobody knows."""
        ignored = self.manifest.ignore_label
        return {next(iter(self.manifest.labels.values())), *([] if ignored is None else [ignored])}

    def _judge_values(self, path: Path, counts: Mapping[int, int]) -> None:
        """Note the values in a file that stand for no label."""
        known = self.manifest.value_table
        unknown = [f"{value} ({voxels} voxels)" for value, voxels in counts.items() if value not in known]
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            declared = ", ".join(
                f"{name} = {', '.join(map(str, own))}" for name, own in self.manifest.stored_values.items()
            )
            self._add(
                "error",
                "label_values",
                f"{path}: holds {', '.join(unknown[:5])}{more}, but the labels are {declared}; mend it or declare them",
            )

    def _judge_label(self, path: Path, counts: Mapping[int, int]) -> None:
        """Note structures that are not to be there, and a label map without any."""
        known = self.manifest.labels
        if counts.keys() <= self._no_structures:
            self._add(
                "warning", "empty_label", f"{path}: no structure is drawn; drop the case unless that is the truth"
            )
        for name, value in known.items():
            if value in counts.keys() - self._no_structures and not self.case.is_annotated([name]):
                self._add(
                    "error",
                    "annotated",
                    f"{path}: holds {counts[value]} voxels of {name!r}, but the case's annotated_classes are "
                    f"{', '.join(self.case.annotated_classes or ())}; add it where all of it is drawn, else give these "
                    "voxels the manifest's ignore_label",
                )

    def _channels(self, names: list[str], foreground: _Foreground | None) -> dict[str, ChannelExamination]:
        """Examine the channels that stand in one file."""
        stored = self._stored(self.case.images[names[0]])
        if stored is None:
            return {}
        header, voxels = stored
        geometry = self._geometry(header)
        examined = {}
        for name in names:
            picked = self._attempt("voxels", partial(pick_channel, header, voxels, self.case.images[name].index))
            if picked is not None:
                self._judge_image(header.path, name, picked)
            if picked is not None and geometry is not None:
                examined[name] = _examine_channel(picked, geometry, self.manifest.channels[name], foreground)
        return examined

    def _judge_image(self, path: Path, channel: str, voxels: Array) -> None:
        """Note voxels that are not finite in float32, and an image of one value."""
        wrong = 0
        if voxels.dtype.kind == "f":
            with np.errstate(over="ignore"):
                wrong = voxels.size - int(np.isfinite(voxels.astype(np.float32, copy=False)).sum())
        if wrong:
            self._add(
                "error", "not_finite", f"{path}: {wrong} voxels of channel {channel!r} are NaN or infinite; mend them"
            )
        elif voxels.min() == voxels.max():
            self._add("warning", "constant", f"{path}: channel {channel!r} is {voxels.flat[0]} everywhere")

    def _placed(self, label: _Drawn, channels: dict[str, ChannelExamination]) -> LabelExamination:
        """Put the label on the grid of an image that is its own but for rounding; note where there is none."""
        grids = {name: channel.grid.geometry for name, channel in channels.items()}
        fitting = (grid for grid in grids.values() if grid.matches(label.geometry, GRID_TOLERANCE_VOXELS))
        geometry = next(fitting, None)
        if geometry is None and grids:
            images = "; ".join(
                f"{name} {grid}, {grid.displacement_voxels(label.geometry):.2f} voxels away"
                for name, grid in grids.items()
            )
            self._add(
                "error",
                "grid",
                f"the label's grid, {label.geometry}, is not that of an image: {images}; resample it or drop the case",
            )
        voxels = {name: label.counts.get(value, 0) for name, value in self.manifest.labels.items()}
        ignored = self.manifest.ignore_label
        unknown = 0 if ignored is None else label.counts.get(ignored, 0)
        return LabelExamination(grid=Grid.of(geometry or label.geometry), voxels=voxels, ignored_voxels=unknown)


def _apart_voxels(geometry: Geometry, affine: FloatArray | None) -> float:
    """Return how far another affine displaces a grid's corners, in voxels; infinite where it makes no grid."""
    try:
        return geometry.displacement_voxels(Geometry(geometry.shape, affine))  # type: ignore[arg-type]
    except GeometryError:
        return float("inf")


def _foreground_of(label: _Drawn, no_structures: Iterable[int]) -> _Foreground:
    """Return where the label's foreground voxels are, at most about LARGEST_SAMPLE of them."""
    drawn = np.flatnonzero(np.logical_and.reduce([label.values.ravel() != value for value in no_structures]))
    sample = thinned(drawn)
    points = label.geometry.to_mm(np.stack(np.unravel_index(sample, label.values.shape), axis=-1))
    return _Foreground(points, drawn.size / max(1, sample.size))


def _examine_channel(
    voxels: Array, geometry: Geometry, modality: str, foreground: _Foreground | None
) -> ChannelExamination:
    """Describe a channel's voxels (X, Y, Z)."""
    sample = thinned(voxels.ravel(order="K"))
    body = sample[is_body(sample, modality)]
    return ChannelExamination(
        grid=Grid.of(geometry),
        content=_content_digest(voxels),
        nonzero_box=nonzero_box(voxels),
        body=_intensities(body, voxels.size / sample.size),
        foreground=_intensities(_values_at(voxels, geometry, foreground.points_mm), foreground.voxels_each)
        if foreground
        else None,
    )


def thinned(flat: Array) -> Array:
    """Return every n-th of many values, n odd so that it keeps in step with no row."""
    step = -(-flat.size // LARGEST_SAMPLE)
    return flat[:: step | 1] if step > 1 else flat


def _values_at(voxels: Array, geometry: Geometry, points: FloatArray) -> Array:
    """Return the voxels nearest to points in mm, those outside left out."""
    indices = np.rint(geometry.to_index(points)).astype(np.intp)
    inside = ((indices >= 0) & (indices < geometry.shape)).all(axis=1)
    return np.asarray(voxels[tuple(indices[inside].T)])


def _intensities(sample: Array, weight: float) -> Intensities | None:
    """Describe values, each standing for `weight` voxels; None where there are none."""
    ordered = np.sort(sample[np.isfinite(sample)].astype(np.float64))
    if not ordered.size:
        return None
    places = np.array(LEVELS) * (ordered.size - 1)
    below, above = ordered[np.floor(places).astype(int)], ordered[np.ceil(places).astype(int)]
    return Intensities(
        voxels=round(ordered.size * weight),
        mean=float(ordered.mean()),
        std=float(ordered.std()),
        quantiles=tuple((below + (places % 1) * (above - below)).tolist()),
    )


def _content_digest(voxels: Array) -> str:
    """Return the SHA-256 of shape and voxels, whatever the file around them."""
    digest = hashlib.sha256(str(voxels.shape).encode())
    digest.update(np.ascontiguousarray(voxels.T).data)
    return digest.hexdigest()
