"""`medseg export-dataset`: write a manifest's cases as another tool wants them on disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import __version__
from pipeline.data.exports import EXPORTS, RECORD, Bringing, Export, Links
from pipeline.data.manifest import Case, Manifest, load_manifest
from pipeline.errors import ManifestError, PipelineError
from pipeline.progress import track
from pipeline.records import atomic_folder, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        folder: where it lies.
        cases: id of each case that was written -> its name there.
        left_out: id of each case that was not -> why.
        notes: what people should know of it.
    """

    folder: Path
    cases: dict[str, str]
    left_out: dict[str, str]
    notes: tuple[str, ...]

    def as_text(self) -> str:
        """Return the report for people."""
        lines = [f"left out: case {case_id!r}: {reason}" for case_id, reason in self.left_out.items()]
        return "\n".join([*lines, *self.notes, f"{self.folder}: {len(self.cases)} cases"])


def run(
    manifest: Path,
    out: Path,
    *,
    layout: str,
    root: Path | None = None,
    links: Links = "symbolic",
    resample: bool = False,
    skip: bool = False,
    force: bool = False,
) -> ExportReport:
    """Write a data set in another layout; all of it, or nothing.

    Args:
        manifest: its JSON.
        out: the folder to make.
        layout: one of `EXPORTS`.
        root: folder of the images, in place of the manifest's own.
        links: what stands for a file that can stay as it is; the others are converted.
        resample: bring channels onto their case's grid where the layout wants one, in place of refusing them.
        skip: leave out cases that cannot be written, in place of refusing all.
        force: replace a folder that this command has written.

    Raises:
        ManifestError: the manifest cannot be used, or not be written so; names every problem of every case.
        PipelineError: the folder is there already, or holds the data set itself; or files could not be converted.
    """
    if layout not in EXPORTS:
        raise ManifestError(f"format {layout!r}: cannot be written; one of {', '.join(EXPORTS)}")
    export, loaded = EXPORTS[layout], load_manifest(manifest, root)
    _refuse_folder(out, loaded, force)
    how = Bringing(loaded, links, resample)
    left_out = _unfit(export, how, out, skip)
    cases = [case for case in loaded.cases if case.id not in left_out]
    if not cases:
        raise ManifestError(f"manifest {loaded.name!r}: no case can be written; {next(iter(left_out.values()))}")
    with atomic_folder(out) as folder:
        names = _write(export, how, folder, cases)
        export.write_tables(folder, loaded, cases)
        record = {"medseg": __version__, "format": layout, "manifest": loaded.name, "digest": loaded.digest()}
        write_json(folder / RECORD, {**record, "cases": names})
    return ExportReport(out, names, left_out, tuple(export.notes(loaded)))


def _unfit(export: Export, how: Bringing, out: Path, skip: bool) -> dict[str, str]:
    """Return the cases that cannot be written, and why.

    Raises:
        ManifestError: there are some and they are not to be skipped, or nothing can be written at all.
    """
    manifest = how.manifest
    if general := list(export.problems(manifest, out)):
        raise ManifestError("\n".join(general))
    found = {case.id: "; ".join(export.case_problems(manifest, how.of(case))) for case in manifest.cases}
    unfit = {case_id: reason for case_id, reason in found.items() if reason}
    if unfit and not skip:
        lines = [f"case {case_id!r}: {reason}" for case_id, reason in unfit.items()]
        raise ManifestError("\n".join([*lines, f"{len(unfit)} cases cannot be written; --skip leaves them out"]))
    return unfit


def _write(export: Export, how: Bringing, folder: Path, cases: Sequence[Case]) -> dict[str, str]:
    """Write cases one by one, and return the name that each has.

    Raises:
        PipelineError: some could not be converted; names each.
    """
    names, problems = {}, []
    for case in track(cases, "export", len(cases)):
        try:
            names[case.id] = export.write_case(folder, how.manifest, how.of(case))
        except PipelineError as error:
            problems.append(f"case {case.id!r}: {error}")
    if problems:
        raise PipelineError("\n".join(problems))
    return names


def _refuse_folder(out: Path, manifest: Manifest, force: bool) -> None:
    """Raise where a folder is not to be written: it holds the data set, lies in it, or has something in it."""
    place, root = out.resolve(), manifest.root.resolve()
    if place.is_relative_to(root) or root.is_relative_to(place):
        raise PipelineError(f"{out}: holds the data set or lies in it, {root}; name a folder elsewhere with --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / RECORD).is_file():
        raise PipelineError(f"{out}: is there already and was not written by this command; name another with --out")
    if not force:
        raise PipelineError(f"{out}: is there already; --force replaces it")
