"""`medseg segment`: new volumes in, one label map each in its input's own geometry, and a report."""

from __future__ import annotations

import logging
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TextIO

from pipeline.data.plan import Plan, read_plan
from pipeline.errors import PipelineError
from pipeline.hardware import Precision, pick_device, threads_per_worker
from pipeline.inference.postprocessing import common_rules
from pipeline.inference.probabilities import ProbabilityType
from pipeline.model import PLAN
from pipeline.predictor import Engine, Predictor
from pipeline.progress import track
from pipeline.stages.cluster.options import RayOptions
from pipeline.stages.cluster.segmenting import RayWorkers
from pipeline.stages.models import resolve_models
from pipeline.stages.segmenting.batch import Batch
from pipeline.stages.segmenting.case import CaseSteps, SegmentSettings
from pipeline.stages.segmenting.dicom_inputs import DicomOptions
from pipeline.stages.segmenting.dicom_objects import DicomOutput, refuse_cases
from pipeline.stages.segmenting.inputs import SegmentInput, find_inputs
from pipeline.stages.segmenting.instances import write_table
from pipeline.stages.segmenting.journal import one_report_at_a_time
from pipeline.stages.segmenting.page import write_page
from pipeline.stages.segmenting.plan import memory_share, plan_text
from pipeline.stages.segmenting.report import CaseResult, SegmentReport
from pipeline.stages.segmenting.viewing import refuse_viewer, viewer_of
from pipeline.stages.segmenting.workers import Workers
from pipeline.stages.shards import Shard
from pipeline.stages.worker_processes import shared_out
from pipeline.volumes.label_tables import write_label_tables

log = logging.getLogger(__name__)


def run(
    model: str | Sequence[str],
    inputs: Sequence[str | Path],
    out: Path,
    *,
    overwrite: bool = False,
    device: str = "auto",
    jobs: int | None = None,
    workspace: Path = Path("work"),
    precision: Precision | None = None,
    compile_networks: bool = False,
    skip_empty: bool = True,
    tracking_uri: str | None = None,
    max_memory: str | None = None,
    stdin: TextIO | None = None,
    probabilities: Sequence[str] = (),
    probabilities_type: ProbabilityType = "uint8",
    instances: Sequence[str] = (),
    dicom: DicomOptions | None = None,
    objects: DicomOutput | None = None,
    viewer: bool = False,
    ray: RayOptions | None = None,
    shard: Shard | None = None,
) -> SegmentReport:
    """Segment volumes: the next is read and the last written while one is predicted.

    Args:
        model: a folder, runs:/ID or models:/NAME@ALIAS; several, or an experiment's folder, are an ensemble.
        inputs: volumes, folders, patterns, manifests, CSVs, or "-"; `segmenting.inputs` says how they become cases.
        out: folder of the label maps NAME.nii.gz, report.json, report.csv, report.html with its pictures, and of what
            lets a batch go on, in .medseg. Several jobs may share it.
        overwrite: segment also what is done and unchanged, by the contents of inputs and models.
        device: auto, cpu, cuda or cuda:N; several with commas between them: a process for each.
        jobs: processes; None: one for each device.
        workspace: where runs:/ and models:/ are looked up.
        precision: auto, fp32, bf16 or fp16; None: as the model was trained.
        compile_networks: by torch.compile, where that works.
        skip_empty: leave windows out that hold no body.
        tracking_uri: server or database of runs:/ and models:/; None: MLFLOW_TRACKING_URI, else the workspace's.
        probabilities: labels whose probabilities are written too, to OUT/probabilities; "all" stands for each.
        probabilities_type: of their numbers, uint8 or uint16.
        instances: labels whose connected components are numbered too, in OUT/instances; "all" stands for each.
        dicom: how DICOM folders are read; None: every series of the model's modality, none resampled.
        objects: DICOM SEG and RTSTRUCT beside the label maps of DICOM series; None: none.
        viewer: put the most doubtful cases with their volumes into report.html, to look at in slices and 3-D.
        max_memory: of all processes together, such as 8GB, on a cluster of each; None: what is free.
        stdin: where the list that `-` stands for is read.
        ray: a cluster whose machines do the work; None: this one does.
        shard: of the cases, that are segmented; None: all. The report is of all.

    Returns:
        What became of each case; a case that cannot be read or segmented is listed with the reason, the rest go on.

    Raises:
        PipelineError: nothing can be done: no model, no input, or outputs that would fall on one another or on inputs;
            or nothing more: the disk is full. What is done is valid, and the same call goes on from it.
    """
    models = resolve_models([model] if isinstance(model, str) else model, workspace, tracking_uri)
    devices = [device] if ray else _devices_here(device, jobs)
    trained_plan = read_plan(models[0] / PLAN)
    background, *foreground = trained_plan.labels
    # Of regions, which may overlap, none is the background's.
    with_background = [] if trained_plan.output == "regions" else [background]
    if viewer:
        refuse_viewer(trained_plan, shard)
    settings = SegmentSettings(
        models=tuple(models),
        out=out.resolve(),
        run=secrets.token_hex(6),
        overwrite=overwrite,
        device=devices[0],
        precision=precision,
        max_memory_bytes=memory_share(max_memory, len(devices)),
        compile=compile_networks,
        skip_empty=skip_empty,
        probabilities=_wanted("--probabilities", probabilities, with_background, foreground),
        probabilities_type=probabilities_type,
        instances=_wanted("--instances", instances, (), foreground),
        objects=objects or DicomOutput(),
    )
    cases = find_inputs(inputs, tuple(trained_plan.channels), out, stdin, _for_model(dicom, trained_plan))
    refuse_cases(cases, settings.objects)
    try:
        write_label_tables(out, trained_plan.labels)
    except OSError as error:
        raise PipelineError(
            f"{out}: cannot be written: {error.strerror}; make room, or choose another --out"
        ) from error
    part = shard.of(cases) if shard else cases
    with stopped_by_signals() as stop:
        batch = _batch(settings, devices, ray, stop)
        report = _go_through(batch, part, out, models, of=cases if shard else None)
    if viewer and not report.not_reached:
        write_page(report, viewer_of(report, cases, trained_plan))
    return report


def plan(
    model: str | Sequence[str],
    inputs: Sequence[str | Path],
    out: Path,
    *,
    device: str = "auto",
    jobs: int | None = None,
    workspace: Path = Path("work"),
    precision: Precision | None = None,
    tracking_uri: str | None = None,
    max_memory: str | None = None,
    stdin: TextIO | None = None,
    dicom: DicomOptions | None = None,
) -> str:
    """Say what each case will take in memory, from headers alone, and how many windows; nothing is written.

    Args and raises: as `run`.
    """
    models = resolve_models([model] if isinstance(model, str) else model, workspace, tracking_uri)
    devices = shared_out(device, jobs)
    share = memory_share(max_memory, len(devices))
    predictor = Predictor.load(models, Engine(device=devices[0], precision=precision, limit_bytes=share))
    channels = tuple(predictor.plan.channels)
    return plan_text(predictor, find_inputs(inputs, channels, out, stdin, _for_model(dicom, predictor.plan)))


def _devices_here(device: str, jobs: int | None) -> list[str]:
    """Return the device of each process of this machine; one that is not there is refused once, not by each worker."""
    devices = shared_out(device, jobs)
    for one in devices:
        pick_device(one)
    return devices


def _batch(
    settings: SegmentSettings, devices: Sequence[str], ray: RayOptions | None, stop: threading.Event
) -> Batch | Workers | RayWorkers:
    """Return who goes through the cases: a cluster, this process, or several of this machine."""
    if ray:
        return RayWorkers(settings, ray, stop)
    if len(devices) == 1:
        return Batch(CaseSteps(settings), stop)
    return Workers(settings, devices, threads_per_worker(len(devices)), stop)


def _for_model(dicom: DicomOptions | None, plan: Plan) -> DicomOptions:
    """Return how DICOM folders are read for a model: series of its channels' modalities are taken."""
    return replace(dicom or DicomOptions(), modalities=plan.channels)


def _wanted(option: str, names: Sequence[str], background: Sequence[str], foreground: Sequence[str]) -> tuple[str, ...]:
    """Return the labels that an option names, in the model's order; "all" means each but the background.

    Raises:
        PipelineError: a label is none of them.
    """
    labels = [*background, *foreground]
    unknown = [name for name in names if name not in labels and name != "all"]
    if unknown:
        raise PipelineError(f"{option} {','.join(unknown)}: unknown; the labels are {', '.join(labels)}, or all")
    return tuple(label for label in labels if label in names or ("all" in names and label in foreground))


def _go_through(
    batch: Batch | Workers | RayWorkers,
    cases: Sequence[SegmentInput],
    out: Path,
    models: Sequence[Path],
    of: Sequence[SegmentInput] | None = None,
) -> SegmentReport:
    """Take the cases through a batch; however it ends, what became of them is reported, and of those they are part."""
    results: dict[str, CaseResult] = {}
    try:
        for result in track(batch.results(cases), "segment", len(cases)):
            results[result.name] = result
    except OSError as error:
        raise PipelineError(f"{out}: the batch cannot go on: {error}; give the same command again") from error
    finally:
        # An interrupt comes between what is written down and what is told.
        batch.journal.refresh()
        report = _reported({**batch.journal.of_run, **results}, cases, out, models)
        if of is None:
            _write(report)
        else:
            report = replace(report, of_all=_write_of_all(batch, report, of))
    if batch.disk_full:
        done = len(report.results) - len(report.failures)
        raise PipelineError(
            f"{out}: the disk is full; {done} of {len(cases)} cases are done and valid; "
            "free some space and give the same command again"
        )
    return report


def _reported(
    results: Mapping[str, CaseResult], cases: Sequence[SegmentInput], out: Path, models: Sequence[Path]
) -> SegmentReport:
    """Return the report of some cases, in their order."""
    ordered = tuple(results[case.name] for case in cases if case.name in results)
    left = len(cases) - len(ordered)
    return SegmentReport(out, tuple(models), ordered, not_reached=left, rules=common_rules(models))


def _write_of_all(batch: Batch | Workers | RayWorkers, own: SegmentReport, cases: Sequence[SegmentInput]) -> str:
    """Write the report of all shards, as far as they are by what the journal says, and return that in a line."""
    with one_report_at_a_time(own.folder):
        batch.journal.refresh()
        results = {**batch.journal.last, **{result.name: result for result in own.results}}
        whole = _reported(results, cases, own.folder, own.models)
        _write(whole)
    return f"of all {len(cases)} cases, other shards' too: {whole.counts()}"


def _write(report: SegmentReport) -> None:
    """Write the report and its page; where that fails, the label maps are none the worse for it."""
    try:
        report.write()
        write_table(report.folder, report.results)
        write_page(report)
    except OSError as error:
        log.error("the report could not be written: %s", error)


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Yield what Ctrl-C or SIGTERM sets the first time; the second time it is a KeyboardInterrupt.

    Signals reach the main thread alone: in another nothing is changed.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        log.warning("stopping: the cases in hand are finished; once more stops at once")
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
