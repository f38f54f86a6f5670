"""The dataset manifest: which files are a case, whose they are, and on which side of a split they stand.

A manifest is JSON, written once by `medseg manifest`, committed by the user, and the only way in to a data set. Its
paths are relative to its `root`, and the root is relative to the manifest's own folder; a path that leaves the root is
refused.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.data.regions import region_problems
from pipeline.errors import ManifestError
from pipeline.records import Record, digest_of, refuse_other_format, said, says_nothing, write_text

FORMAT_VERSION = 1
# The name, beside those of labels, of voxels of which nobody knows what they are; nnU-Net's own.
IGNORE = "ignore"

Modality = Literal["CT", "MR", "PET", "US", "other"]


class ImageFile(Record):
    """One channel's file.

    Attributes:
        path: relative to the manifest's root, with forward slashes.
        index: position on the fourth axis of a 4-D file; None for a 3-D file.
        sha256: digest of the file's bytes; None where it is not recorded.
    """

    path: str
    index: Annotated[int, Field(ge=0)] | None = None
    sha256: str | None = None

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        # By text, for a manifest may have a million of them, and a path object costs ten microseconds.
        parts = path.split("/")
        if path.startswith("/") or ".." in parts or "\\" in path or "\0" in path or not {*parts} - {"", "."}:
            raise ValueError(f"must be relative to the manifest's root and may not leave it, got {path!r}")
        return path


class Case(Record):
    """One patient's one examination: its channels, its label, its side of the split.

    Attributes:
        id: unique in the manifest; names its files in store and reports.
        patient: cases of one patient never stand on both sides of a split.
        images: channel name -> file; a channel that the case lacks is left out.
        label: the label drawn by people; None for an unlabelled case.
        fold: the fold in which the case is validated; None for a held-out test case.
        group: what the patient belongs to, such as a site or a family; cases of one group never stand on both sides of
            a split either. None: to nothing but itself.
        annotated_classes: names of the labels that people looked for in this case, the background aside; of the others
            nothing is known. None: all of them.
    """

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    patient: str
    images: dict[str, ImageFile]
    label: ImageFile | None = None
    fold: Annotated[int, Field(ge=0)] | None = None
    group: str | None = Field(default=None, exclude_if=says_nothing)
    annotated_classes: tuple[str, ...] | None = Field(default=None, exclude_if=says_nothing)

    def is_annotated(self, names: Iterable[str]) -> bool:
        """Tell whether people looked for all of some labels in this case."""
        return self.annotated_classes is None or set(names) <= set(self.annotated_classes)


class Manifest(Record):
    """A data set.

    Attributes:
        format_version: of the manifest's own format.
        name: of the data set; names its store and its experiment.
        description, licence, source: where the data come from and what may be done with them.
        root: folder of the images; absolute in memory, relative to the manifest's folder in the file.
        channels: channel name -> modality, in the order in which the network sees them.
        labels: label name -> value in label maps, any integers; the first is the background. The position is the class
            index.
        file_values: label name, or `ignore`, -> the values in this data set's files that stand for it, where that is
            not its own value alone: several of one class, or others than a model writes. The files stay as they are.
        label_pairs: names of labels that swap when left and right are flipped.
        regions: region name -> the labels that it is the union of, in the order in which they are painted, so that what
            lies within comes later; a network then learns regions, which overlap, in place of labels. Each region has
            one label that no later one has, and labels stand in the order of these regions. Empty: labels are learned.
        ignore_label: value in the files of voxels of which nobody knows what they are; None: there are none.
        cases: in the order of their ids.

    What came later (file_values, regions, ignore_label, group and annotated_classes) is left out of the file and of the
    digest where it says nothing: manifests that do without are what they were before there was any.
    """

    format_version: int = FORMAT_VERSION
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    description: str = ""
    licence: str = ""
    source: str = ""
    root: Path
    channels: dict[str, Modality]
    labels: dict[str, int]
    file_values: dict[str, tuple[int, ...]] = Field(default={}, exclude_if=says_nothing)
    label_pairs: tuple[tuple[str, str], ...] = ()
    regions: dict[str, tuple[str, ...]] = Field(default={}, exclude_if=says_nothing)
    ignore_label: int | None = Field(default=None, exclude_if=says_nothing)
    cases: tuple[Case, ...]

    @field_validator("root")
    @classmethod
    def _can_be_a_folder(cls, root: Path) -> Path:
        if "\0" in str(root):
            raise ValueError(f"is no path, it holds a null byte: {str(root)!r}")
        return root

    @model_validator(mode="after")
    def _holds_together(self) -> Manifest:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> list[str]:
        """Return what contradicts itself in the manifest, without reading any image."""
        problems = []
        if not self.channels:
            problems.append("channels: at least one is needed")
        if len(self.labels) < 2:
            problems.append("labels: the background and at least one structure are needed")
        if len(set(self.labels.values())) != len(self.labels):
            problems.append(f"labels: two names share a value: {self.labels}")
        problems += [
            f"label_pairs: {name!r} is not a label; labels are {', '.join(self.labels)}"
            for pair in self.label_pairs
            for name in pair
            if name not in self.labels
        ]
        taken = next((name for name, value in self.labels.items() if value == self.ignore_label), None)
        if taken is not None:
            problems.append(f"ignore_label: {self.ignore_label} is the value of label {taken!r}; one of them is wrong")
        problems += self._file_value_problems()
        problems += region_problems(self.regions, list(self.labels), self.label_pairs)
        seen: set[str] = set()
        for case in self.cases:
            if case.id in seen:
                problems.append(f"case {case.id!r}: the id occurs twice")
            seen.add(case.id)
            if not case.images:
                problems.append(f"case {case.id!r}: no image")
            problems += [
                f"case {case.id!r}: channel {channel!r} is not declared; channels are {', '.join(self.channels)}"
                for channel in case.images
                if channel not in self.channels
            ]
            problems += [f"case {case.id!r}: annotated_classes: {what}" for what in self._annotation_problems(case)]
        return problems

    def _file_value_problems(self) -> Iterator[str]:
        """Yield the values in the files that stand for nothing, or for two things."""
        if not self.file_values:
            return
        if IGNORE in self.labels and self.ignore_label is not None:
            yield f"file_values: {IGNORE!r} is a label here; rename it, for it stands for ignored voxels too"
        for name, values in self.file_values.items():
            if name not in self.own_values:
                yield f"file_values: {name!r} is not a label; labels are {', '.join(self.own_values)}"
            if not values:
                yield f"file_values: {name}: no value; leave the name out where it is its label's own"
        owners: dict[int, str] = {}
        for name, stored in self.stored_values.items():
            for value in stored:
                if (first := owners.setdefault(value, name)) != name:
                    yield f"file_values: {value} stands for both {first} and {name}; one of them is wrong"

    @property
    def own_values(self) -> dict[str, int]:
        """Each label's value, and that of `ignore` where there is one."""
        return {**self.labels, **({} if self.ignore_label is None else {IGNORE: self.ignore_label})}

    @property
    def stored_values(self) -> dict[str, tuple[int, ...]]:
        """Label name, or `ignore` -> the values in the files that stand for it."""
        return {name: self.file_values.get(name, (value,)) for name, value in self.own_values.items()}

    @property
    def value_table(self) -> dict[int, int]:
        """Value in the files -> value of its label, or `ignore_label`: by which label maps are read."""
        own = self.own_values
        return {value: own[name] for name, stored in self.stored_values.items() for value in stored}

    def _annotation_problems(self, case: Case) -> Iterator[str]:
        """Yield what is wrong with a case's annotated classes."""
        annotated = case.annotated_classes
        if annotated is None:
            return
        for name in annotated:
            if name not in self.labels:
                yield f"{name!r} is not a label; labels are {', '.join(self.labels)}"
        if case.label is None:
            yield "the case has no label; leave one of them out, or add the other"
        if not set(annotated) & set(list(self.labels)[1:]):
            yield "no structure is named, so nothing can be learned from the case; leave its label out"
        for pair in self.label_pairs:
            if len(set(pair) & set(annotated)) == 1:
                yield f"{' and '.join(pair)} swap when left and right are flipped; name both, or neither"

    @property
    def folds(self) -> tuple[int, ...]:
        """The fold numbers that occur, ascending."""
        return tuple(sorted({case.fold for case in self.cases if case.fold is not None}))

    @property
    def development_cases(self) -> tuple[Case, ...]:
        """The cases with a fold: all that training and planning may look at."""
        return tuple(case for case in self.cases if case.fold is not None)

    @property
    def test_cases(self) -> tuple[Case, ...]:
        """The held-out cases."""
        return tuple(case for case in self.cases if case.fold is None)

    def training_cases(self, fold: int, *, unlabelled: bool = False) -> tuple[Case, ...]:
        """Return the cases that `fold` trains on: the labelled ones, or all."""
        return tuple(case for case in self.development_cases if case.fold != fold and (case.label or unlabelled))

    def validation_cases(self, fold: int, *, unlabelled: bool = False) -> tuple[Case, ...]:
        """Return the cases that `fold` is validated on: the labelled ones, or all."""
        return tuple(case for case in self.development_cases if case.fold == fold and (case.label or unlabelled))

    def path_of(self, file: ImageFile) -> Path:
        """Return a file's absolute path.

        Raises:
            ManifestError: a symbolic link leads out of the root.
        """
        return path_inside(self.root, file.path)

    def digest(self) -> str:
        """Return a SHA-256 digest that does not depend on where the data lie."""
        order = unusual_order(self.channels, self.labels, self.regions)
        return digest_of({**self.model_dump(mode="json", exclude={"root"}), **order})


def unusual_order(
    channels: Mapping[str, Modality], labels: Mapping[str, int], regions: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return the names whose order a digest must say: it means something, and a digest sorts keys.

    What stands in the usual order (channels and regions by name, labels by value) says nothing.
    """
    usual = {
        "order of channels": (list(channels), sorted(channels)),
        "order of labels": (list(labels), sorted(labels, key=labels.__getitem__)),
        "order of regions": (list(regions), sorted(regions)),
    }
    return {name: order for name, (order, expected) in usual.items() if order != expected}


def path_inside(root: Path, file: str) -> Path:
    """Return the path of a file below a manifest's root.

    Raises:
        ManifestError: a symbolic link leads out of the root.
    """
    path = root / file
    # Links are followed only to be judged: what is opened is the path as the manifest gives it.
    # Not by pathlib, which raises where links lead round in a circle.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise ManifestError(
            f"{file}: leads out of the manifest's root, {root}; move the file below the root, or make the manifest with"
            " a root above both (`medseg manifest --root FOLDER`)"
        )
    return path


def load_manifest(path: Path, root: Path | None = None) -> Manifest:
    """Read a manifest.

    Args:
        path: the JSON file.
        root: folder of the images, in place of the manifest's own.

    Raises:
        ManifestError: the file is missing, is not JSON, is of another format version, or does not hold together;
            names every problem.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # JSON can say half a character, which no file can hold.
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); write one with `medseg manifest`") from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: a manifest is a JSON object, got {type(content).__name__}")
    remake = "write it anew with `medseg manifest SOURCE --out NAME.json`"
    refuse_other_format(ManifestError, path, content.get("format_version"), FORMAT_VERSION, remake)
    if isinstance(content.get("root"), str) and "\0" not in content["root"]:
        content["root"] = os.path.realpath(root or path.parent / content["root"])
    try:
        with _uncollected():
            return Manifest.model_validate(content)
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc'])) or 'manifest'}: {said(e)}" for e in error.errors()]
        raise ManifestError("\n".join(lines)) from None


@contextmanager
def _uncollected() -> Iterator[None]:
    """Let no garbage be looked for while many objects are made, none of which is garbage: it would take as long again.

    At 100,000 cases: 2.8 s in place of 6.8 s.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest: stable order, a line a field, the root relative to the file's folder."""
    content = manifest.model_dump(mode="json", exclude_none=True)
    content["root"] = Path(os.path.relpath(manifest.root, path.parent.resolve())).as_posix()
    # An explicit null says "held out"; leaving it out would say it only to those who know.
    for case, written in zip(manifest.cases, content["cases"], strict=True):
        written["fold"] = case.fold
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
