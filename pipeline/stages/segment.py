"""`medseg segment`: new volumes in, one label map each in its input's own geometry, and a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.plan import Fingerprint
from pipeline.errors import PipelineError
from pipeline.geometry import Geometry
from pipeline.hardware import Precision, keep_freed_memory
from pipeline.model import FINGERPRINT, model_digest
from pipeline.predictor import Predictor
from pipeline.preparation.preprocessing import PreparedImage
from pipeline.progress import track
from pipeline.records import digest_of
from pipeline.stages.familiarity import unfamiliar
from pipeline.stages.models import resolve_model
from pipeline.stages.segment_inputs import SUFFIX, SegmentInput, find_inputs
from pipeline.stages.segment_report import CaseResult, SegmentReport, add_to_journal, read_journal
from pipeline.volumes.stored import content_digest
from pipeline.volumes.volume import Volume, read_image
from pipeline.volumes.writing import write_label

log = logging.getLogger(__name__)


def run(
    model: str,
    inputs: Sequence[Path],
    out: Path,
    *,
    overwrite: bool = False,
    device: str = "auto",
    workspace: Path = Path("work"),
    precision: Precision | None = None,
    tracking_uri: str | None = None,
) -> SegmentReport:
    """Segment volumes: the next is read and the last written while one is predicted.

    Args:
        model: a folder, runs:/ID or models:/NAME@ALIAS.
        inputs: volumes, folders of volumes, or manifests; `segment_inputs` says how files become cases.
        out: folder of the label maps NAME.nii.gz, report.json, report.csv, and of the journal that lets a batch go on.
        overwrite: segment also what is done and unchanged, by the contents of inputs and model.
        device: auto, cpu, cuda or cuda:N.
        workspace: where runs:/ and models:/ are looked up.
        precision: auto, fp32, bf16 or fp16; None: as the model was trained.
        tracking_uri: server or database of runs:/ and models:/; None: MLFLOW_TRACKING_URI, else the workspace's.

    Returns:
        What became of each case; a case that cannot be read or segmented is listed with the reason, the rest go on.

    Raises:
        PipelineError: nothing can be done: no model, no input, or outputs that would fall on one another or on inputs.
    """
    folder = resolve_model(model, workspace, tracking_uri)
    keep_freed_memory()
    predictor = Predictor.load(folder, device, precision)
    cases = find_inputs(inputs, tuple(predictor.plan.channels), out)
    out.mkdir(parents=True, exist_ok=True)
    batch = _Batch(predictor, folder, out, overwrite)
    try:
        batch.run(cases)
    finally:
        order = {case.name: position for position, case in enumerate(cases)}
        results = tuple(sorted(batch.results, key=lambda result: order[result.name]))
        report = SegmentReport(out, folder, results)
        report.write()
    return report


@dataclass
class _CaseInHand:
    """A case on its way; `closed` once it has failed or needs nothing done."""

    source: SegmentInput
    result: CaseResult
    closed: bool = False
    native: Geometry | None = None
    prepared: PreparedImage | None = None
    classes: NDArray[Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class _Batch:
    """The cases of one run: three steps a case, each in its own thread, so that at most three cases are in memory."""

    def __init__(self, predictor: Predictor, model: Path, out: Path, overwrite: bool) -> None:
        self.results: list[CaseResult] = []
        self._predictor = predictor
        self._fingerprint = Fingerprint.model_validate_json((model / FINGERPRINT).read_bytes())
        self._model_digest = model_digest(model)
        self._out = out
        self._done_before = {} if overwrite else read_journal(out)

    def run(self, cases: Sequence[SegmentInput]) -> None:
        """Take all cases through the three steps; an interrupt lets a write that has begun end."""
        with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
            written: Future[None] | None = None
            ahead = reader.submit(self._read, cases[0])
            for following in track([*cases[1:], None], "segment", len(cases)):
                case = ahead.result()
                if following is not None:
                    ahead = reader.submit(self._read, following)
                self._step("predict", case, self._predict)
                if written is not None:
                    written.result()
                written = writer.submit(self._finish, case)
            if written is not None:
                written.result()

    def _step(self, name: str, case: _CaseInHand, action: Callable[[_CaseInHand], None]) -> None:
        """Do one step of a case unless it is closed; what goes wrong closes it and leaves the others alone."""
        if case.closed:
            return
        start = time.perf_counter()
        try:
            action(case)
        except (PipelineError, OSError) as error:
            self._fail(case, str(error))
        except Exception as error:
            # A bug, or memory at its end: the traceback is wanted, and so are the other cases.
            log.exception("%s: could not be segmented", case.source.name)
            self._fail(case, f"{type(error).__name__}: {error}")
        case.seconds[name] = time.perf_counter() - start

    def _fail(self, case: _CaseInHand, reason: str) -> None:
        """Close a case that cannot be segmented."""
        case.closed = True
        case.result = case.result.changed(status="failed", reason=reason, output=None)

    def _read(self, source: SegmentInput) -> _CaseInHand:
        """Read and prepare a case, in the reading thread."""
        files = tuple(str(file.path) for file in source.files.values())
        case = _CaseInHand(source, CaseResult(name=source.name, status="done", inputs=files))
        self._step("read", case, self._load)
        return case

    def _load(self, case: _CaseInHand) -> None:
        """Read a case's channels and bring them to the plan's grid, unless it is done and unchanged."""
        key = self._key(case.source)
        before = self._done_before.get(case.source.name)
        if before and before.key == key and before.output and (self._out / before.output).exists():
            case.result, case.closed = before.changed(status="skipped"), True
            return
        images = {channel: read_image(file.path, file.index) for channel, file in case.source.files.items()}
        case.native = self._predictor.native_of(images)
        case.prepared = self._predictor.prepare(images, case.native)
        plan = self._predictor.plan
        warnings = unfamiliar(images, case.native, case.prepared.geometry, plan, self._fingerprint)
        case.result = case.result.changed(key=key, warnings=warnings)

    def _key(self, source: SegmentInput) -> str:
        """Return a digest of the contents of a case's files and of the model."""
        contents = {channel: [content_digest(file.path), file.index] for channel, file in source.files.items()}
        return digest_of({"model": self._model_digest, "files": contents})

    def _predict(self, case: _CaseInHand) -> None:
        """Segment a prepared case."""
        assert case.prepared is not None and case.native is not None
        case.classes = self._predictor.predict_prepared(case.prepared.array, case.prepared.geometry, case.native)
        case.prepared = None

    def _finish(self, case: _CaseInHand) -> None:
        """Write a case's label map and take down what became of it, in the writing thread."""
        self._step("write", case, self._write)
        if case.result.status == "done":
            case.result = case.result.changed(seconds={k: round(v, 4) for k, v in case.seconds.items()})
            add_to_journal(self._out, [case.result])
        elif case.result.status == "failed":
            log.warning("%s: %s", case.source.name, case.result.reason)
        self.results.append(case.result)

    def _write(self, case: _CaseInHand) -> None:
        """Write a label map with its input's own geometry and header codes, and measure each label."""
        assert case.classes is not None and case.native is not None
        plan = self._predictor.plan
        output = case.source.name + SUFFIX
        label = Volume(self._predictor.values_of(case.classes), case.native)
        first = next(iter(case.source.files.values()))
        write_label(self._out / output, label, header_of=first.path, names=plan.labels)
        # Plane by plane: bincount makes 64-bit integers of what it counts.
        counts = [np.bincount(plane.ravel(), minlength=len(plan.labels)) for plane in case.classes]
        ml = np.sum(counts, axis=0) * case.native.voxel_volume_ml
        volumes = dict(list(zip(plan.labels, ml.round(6).tolist(), strict=True))[1:])
        case.result = case.result.changed(output=output, volumes_ml=volumes)
