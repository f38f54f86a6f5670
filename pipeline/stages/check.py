"""`medseg check`: read each case once and report every problem of every case together."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.cases import read_case_label, read_file
from pipeline.data.manifest import Case, Manifest, load_manifest
from pipeline.errors import PipelineError
from pipeline.preparation.examination import CaseExamination, Problem
from pipeline.preparation.survey import compare_cases, examine_cases, examine_part, known_examinations
from pipeline.progress import track
from pipeline.records import atomic_path
from pipeline.stages.shards import Shard
from pipeline.stages.workspace import Workspace
from pipeline.volumes.formats.layout import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
        manifest: name of the data set.
        cases: how many were read.
        errors: what must be mended before anything else.
        warnings: what wants a look.
        known: how much of the labels is known, a line each, and of a shard how far all are; empty where every label is
            annotated everywhere.
        seconds: how long it took.
        examinations: what was learned, a case each in the manifest's order; not part of the written report.
    """

    manifest: str
    cases: int
    errors: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    known: tuple[str, ...]
    seconds: float
    examinations: tuple[CaseExamination, ...] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return the report for machines."""
        return {
            "manifest": self.manifest,
            "cases": self.cases,
            "errors": [problem.model_dump() for problem in self.errors],
            "warnings": [problem.model_dump() for problem in self.warnings],
            "known": list(self.known),
            "seconds": round(self.seconds, 3),
        }

    def as_text(self) -> str:
        """Return the report for people: a line a problem, errors first, and a summary."""
        lines = [f"{p.severity}: case {p.case_id!r}: {p.message}" for p in (*self.errors, *self.warnings)]
        found = f"{len(self.errors)} errors, {len(self.warnings)} warnings"
        return "\n".join([*lines, *self.known, f"{self.manifest}: {self.cases} cases, {found}, {self.seconds:.1f} s"])


def run(
    manifest: Path,
    *,
    root: Path | None = None,
    workspace: Path,
    jobs: int | None = None,
    pictures: Path | None = None,
    shard: Shard | None = None,
) -> CheckReport:
    """Check a data set.

    Args:
        manifest: its JSON.
        root: folder of the images, in place of the manifest's own.
        workspace: what is learned is kept in its `checks`; the fingerprint and the plan are made from that.
        jobs: threads; None: as many as cores and memory admit.
        pictures: a folder for an overlay of image and label per case; None: no pictures.
        shard: of the cases, that are read; the report is of what is read by now, by whatever shard.

    Raises:
        ManifestError: the manifest itself cannot be used.
    """
    start = time.monotonic()
    loaded = load_manifest(manifest, root)
    said = []
    if shard:
        cases = len(loaded.cases)
        loaded, examinations = _read_by_shards(loaded, Workspace(workspace).checks, jobs, shard)
        said = [f"shard {shard}: {len(examinations)} of {cases} cases are read and compared with one another by now"]
    else:
        examinations = examine_cases(loaded, Workspace(workspace).checks, jobs)
    problems = [problem for examination in examinations for problem in examination.problems]
    problems += compare_cases(loaded, examinations)
    order = {case.id: number for number, case in enumerate(loaded.cases)}
    problems.sort(key=lambda problem: order[problem.case_id])
    if pictures:
        _draw(loaded, examinations, pictures)
    return CheckReport(
        manifest=loaded.name,
        cases=len(examinations),
        errors=tuple(problem for problem in problems if problem.severity == "error"),
        warnings=tuple(problem for problem in problems if problem.severity == "warning"),
        known=(*_known(loaded, examinations), *said),
        seconds=time.monotonic() - start,
        examinations=tuple(examinations),
    )


def _read_by_shards(
    manifest: Manifest, folder: Path, jobs: int | None, shard: Shard
) -> tuple[Manifest, list[CaseExamination]]:
    """Read a shard's cases; return what all shards have read by now, and the manifest of these cases alone."""
    examine_part(manifest, shard.of(manifest.cases), folder, jobs)
    known = known_examinations(manifest, folder)
    read = tuple(case for case in manifest.cases if case.id in known)
    return manifest.model_copy(update={"cases": read}), [known[case.id] for case in read]


def _known(manifest: Manifest, examinations: Sequence[CaseExamination]) -> Iterator[str]:
    """Say in how many cases each label is annotated, and how much is ignored, where that is not all and nothing."""
    labelled = [case for case in manifest.cases if case.label]
    if any(case.annotated_classes is not None for case in labelled):
        counts = {name: sum(case.is_annotated([name]) for case in labelled) for name in list(manifest.labels)[1:]}
        said = ", ".join(f"{name} in {count}" for name, count in counts.items())
        yield f"annotated, of {len(labelled)} labelled cases: {said}"
    ignored = [e.label.ignored_voxels for e in examinations if e.label and e.label.ignored_voxels]
    if manifest.ignore_label is not None:
        yield f"ignored (value {manifest.ignore_label}): {sum(ignored)} voxels in {len(ignored)} cases"


def _draw(manifest: Manifest, examinations: Sequence[CaseExamination], folder: Path) -> None:
    """Write an overlay of each case whose first channel can be read, as a PNG."""
    pairs = zip(manifest.cases, examinations, strict=True)
    drawable = [case for case, examination in pairs if examination.channels]
    for case in track(drawable, "pictures", len(drawable)):
        try:
            figure = _picture(manifest, case)
        except PipelineError as error:
            log.warning("case %r: no picture: %s", case.id, error)
            continue
        with atomic_path(folder / f"{case.id}.png") as temporary:
            figure.savefig(temporary, format="png")


def _picture(manifest: Manifest, case: Case) -> Figure:
    """Draw a case's first channel and its label, in RAS order so that left is left in every picture."""
    # Not at the top: torch takes longer to start than most checks take.
    from pipeline.pictures import draw_overlay
    from pipeline.volumes.resampling import resample_image, resample_label

    channel = next(name for name in manifest.channels if name in case.images)
    image = read_file(manifest, case.images[channel])
    label = read_case_label(manifest, case, {channel: image})
    grid = (label or image).geometry.reoriented("RAS")
    outlines = {"label": _classes(resample_label(label, grid).array, manifest)} if label else {}
    shown = resample_image(image, grid, order=1).array[0]
    return draw_overlay(shown, grid.spacing_mm, outlines, tuple(manifest.labels), f"{case.id}, {channel}")


def _classes(values: Array, manifest: Manifest) -> Array:
    """Return the class index of each label value; unknown ones, reported already, as background."""
    classes = np.zeros(values.shape, np.min_scalar_type(len(manifest.labels)))
    for index, value in enumerate(manifest.labels.values()):
        classes[values == value] = index
    return classes
