"""`medseg export`: a trained model for other software, and how near it comes to the model itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch

from pipeline.errors import ModelError, PipelineError
from pipeline.model import DESCRIPTION, PLAN, WEIGHTS, Model, load_model, refuse_other_task, weights_sha256
from pipeline.predictor import Engine, Predictor
from pipeline.records import atomic_folder, write_json, write_text
from pipeline.stages.exporting.bundle import bundle_parity, write_bundle
from pipeline.stages.exporting.images import ParityImages, parity_images
from pipeline.stages.exporting.onnx_file import onnx_run, refuse_without_onnx, write_onnx
from pipeline.stages.exporting.parity import LEAST_EQUAL, Parity, Run, compare_windows, program_run
from pipeline.stages.exporting.program import Program, export_program
from pipeline.stages.model_card import CARD, card_of, read_facts
from pipeline.stages.models import resolve_model

log = logging.getLogger(__name__)

PARITY, PT2, ONNX = "parity.json", "network.pt2", "network.onnx"


@dataclass(frozen=True, eq=False)
class Job:
    """A model to export.

    Attributes:
        source: its folder.
        model: on the CPU.
        images: on which the export is held against it.
    """

    source: Path
    model: Model
    images: ParityImages

    @cached_property
    def program(self) -> Program:
        """The network, exported.

        Raises:
            ModelError: it cannot be.
        """
        plan = self.model.plan
        try:
            return export_program(self.model.network, len(plan.channels), plan.patch_size)
        except ValueError as error:
            raise ModelError(f"{self.source}: {self.model.description.network.name}: {error}") from error

    @cached_property
    def predictor(self) -> Predictor:
        """What `medseg segment` makes label maps with, in float32, no window left out."""
        return Predictor.load(self.source, Engine("cpu", "fp32", skip_empty=False))

    def window_parity(self, name: str, run: Run, versions: Sequence[str]) -> Parity:
        """Compare the logits and labels of windows."""
        predictor, model, sizes = self.predictor, self.model, self.program.some_sizes
        prepared = [predictor.prepare(one, predictor.native_of(one)).array for one in self.images.cases]
        found = compare_windows(model.network, run, prepared, model.plan, model.description.output, sizes)
        legal = ", ".join(f"{axis} {own}" for axis, own in zip("xyz", self.program.sizes, strict=True))
        return Parity(
            format=name,
            images=f"windows of {self.images.source}",
            sizes=tuple(sizes),
            voxels=found.labels.voxels,
            logit_difference=found.logits,
            logit_tolerance=found.tolerance,
            equal_labels=found.labels.share,
            least_equal=LEAST_EQUAL,
            equal_in_structures=found.labels.share_in_structures,
            versions={package: version(package) for package in versions},
            remarks=(f"legal inputs: any batch, {legal} voxels", *self.program.remarks),
        )


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how near it comes."""

    folder: Path
    parity: Parity

    def as_text(self) -> str:
        """Return the parity and the folder, a line each."""
        return f"{self.parity.as_text()}\n{self.parity.format}: {self.folder}"


def run(
    model: str,
    kind: str,
    out: Path,
    *,
    images: Sequence[Path] = (),
    overwrite: bool = False,
    workspace: Path = Path("work"),
    tracking_uri: str | None = None,
) -> ExportReport:
    """Export a model, and compare what came out with it.

    Args:
        model: its folder, a run's folder, runs:/ID or models:/NAME@ALIAS.
        kind: bundle, onnx or pt2.
        out: folder to write.
        images: to compare on; none: validation cases of the model's run, else phantoms.
        overwrite: replace an earlier export there.
        workspace: where runs:/ and models:/ are looked up.
        tracking_uri: server or database of these names.

    Raises:
        PipelineError: the format is unknown or its libraries are missing, or `out` is not an earlier export.
        ModelError: there is no such model, it does not segment, its network cannot be exported, or the export does not
            come near enough: then nothing is written.
    """
    if kind not in FORMATS:
        raise PipelineError(f"--format {kind}: unknown; use {', '.join(FORMATS)}")
    _refuse_taken(out, overwrite)
    if kind == "onnx":
        refuse_without_onnx()
    source = resolve_model(model, workspace, tracking_uri)
    loaded = load_model(source, torch.device("cpu"))
    refuse_other_task(source, loaded.description)
    job = Job(source, loaded, parity_images(source, loaded.description, loaded.plan, images))
    with atomic_folder(out) as temporary:
        parity = FORMATS[kind](temporary, job)
        if not parity.holds:
            raise ModelError(
                f"{source}: the {kind} export differs from the model, and was not kept; {parity.as_text()}"
            )
        write_json(temporary / PARITY, parity.model_dump(mode="json"))
    return ExportReport(out, parity)


def _pt2(folder: Path, job: Job) -> Parity:
    """Write a program for torch.export.load, and read it back."""
    torch.export.save(job.program.exported, folder / PT2)
    _write_companions(folder, job)
    return job.window_parity("pt2", program_run(torch.export.load(folder / PT2).module()), ("torch",))


def _onnx(folder: Path, job: Job) -> Parity:
    """Write an ONNX file."""
    description, plan = job.model.description, job.model.plan
    facts = {
        "name": description.name,
        "channels": ", ".join(plan.channels),
        "outputs": ", ".join(plan.regions or plan.labels),
        "weights_sha256": weights_sha256(job.source / WEIGHTS),
    }
    write_onnx(folder / ONNX, job.program, facts)
    _write_companions(folder, job)
    return job.window_parity("onnx", onnx_run(folder / ONNX), ("torch", "onnx", "onnxscript", "onnxruntime"))


def _bundle(folder: Path, job: Job) -> Parity:
    """Write a MONAI bundle."""
    write_bundle(folder, job.model, job.program, job.predictor, card_of(job.source), read_facts(job.source))
    return bundle_parity(folder, job.model, job.program, job.predictor, job.images)


FORMATS: dict[str, Callable[[Path, Job], Parity]] = {"bundle": _bundle, "onnx": _onnx, "pt2": _pt2}


def _write_companions(folder: Path, job: Job) -> None:
    """Write what says how an image is treated before the network, and the card."""
    for name in (PLAN, DESCRIPTION):
        write_text(folder / name, (job.source / name).read_text(encoding="utf-8"))
    write_text(folder / CARD, card_of(job.source))


def _refuse_taken(out: Path, overwrite: bool) -> None:
    """Raise where a folder would be replaced that is no earlier export, or that was not to be.

    Raises:
        PipelineError: it would.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / PARITY).is_file():
        raise PipelineError(f"--out {out}: is there and is no earlier export; name another folder")
    if not overwrite:
        raise PipelineError(f"--out {out}: holds an earlier export; name another folder, or say --overwrite")
