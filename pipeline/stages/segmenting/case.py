"""One case's way through `medseg segment`: read and prepare, predict, write. What goes wrong closes the case alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.plan import Fingerprint
from pipeline.errors import PipelineError
from pipeline.free_memory import available_bytes, resident_bytes
from pipeline.geometry import Geometry
from pipeline.hardware import (
    Precision,
    keep_freed_memory,
    peak_memory_bytes,
    reset_peak_memory,
)
from pipeline.inference.postprocessing import common_rules
from pipeline.inference.probabilities import ProbabilityType
from pipeline.model import FINGERPRINT, model_digest
from pipeline.predictor import Engine, Predictor, Segmentation
from pipeline.preparation.preprocessing import PreparedImage, class_indices
from pipeline.records import Record, digest_of
from pipeline.stages.familiarity import unfamiliar
from pipeline.stages.segmenting.claims import Claim
from pipeline.stages.segmenting.dicom_objects import (
    DicomOutput,
    are_written,
    author_of,
    remove_objects,
    write_objects,
)
from pipeline.stages.segmenting.inputs import BOOKKEEPING, PROBABILITIES, SUFFIX, SegmentInput
from pipeline.stages.segmenting.instances import instance_files, write_instances
from pipeline.stages.segmenting.page import Preview
from pipeline.stages.segmenting.plan import case_memory, wanted_bytes
from pipeline.stages.segmenting.probability_files import probabilities_into
from pipeline.stages.segmenting.report import CaseResult
from pipeline.volumes.volume import Volume, read_label
from pipeline.volumes.writing import write_label

log = logging.getLogger(__name__)


class SegmentSettings(Record):
    """How a batch is segmented; what its worker processes are told.

    Attributes:
        models: their folders; several are an ensemble.
        out: folder of the label maps.
        run: names this run in the claims and the journal; its workers share it.
        overwrite: segment also what is done and unchanged.
        device: auto, cpu, cuda or cuda:N.
        precision: auto, fp32, bf16 or fp16; None: as the models were trained.
        compile: the networks, by torch.compile.
        skip_empty: leave windows out that hold no body.
        max_memory_bytes: what a process may take; None: what is free.
        probabilities: labels whose probabilities are written too.
        probabilities_type: of their numbers.
        instances: labels whose components are numbered in a label map of their own.
        objects: DICOM objects that are written too.
        pictures: draw each case for the page.
    """

    models: tuple[Path, ...]
    out: Path
    run: str
    overwrite: bool = False
    device: str = "auto"
    precision: Precision | None = None
    compile: bool = False
    skip_empty: bool = True
    max_memory_bytes: int | None = None
    probabilities: tuple[str, ...] = ()
    probabilities_type: ProbabilityType = "uint8"
    instances: tuple[str, ...] = ()
    objects: DicomOutput = DicomOutput()
    pictures: bool = True

    def probabilities_at(self, temperature: float) -> str:
        """Say all that the probabilities wanted depend on beside the key; empty where none are."""
        if not self.probabilities:
            return ""
        return f"{', '.join(self.probabilities)} as {self.probabilities_type} at a temperature of {temperature:g}"

    @property
    def engine(self) -> Engine:
        """How the predictor uses the machine."""
        return Engine(
            device=self.device,
            precision=self.precision,
            skip_empty=self.skip_empty,
            limit_bytes=self.max_memory_bytes,
            scratch=self.out / BOOKKEEPING,
            compile=self.compile,
        )


@dataclass
class CaseInHand:
    """A case on its way; `closed` once it has failed, with its `error`, or needs nothing done; `before`: how it was.

    `claim`: this process's hold on it, where others work on the same batch.
    """

    source: SegmentInput
    claim: Claim | None
    result: CaseResult
    before: CaseResult | None = None
    memory_bytes: float = 0.0
    closed: bool = False
    error: Exception | None = None
    native: Geometry | None = None
    prepared: PreparedImage | None = None
    preview: Preview | None = None
    classes: NDArray[Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, source: SegmentInput, claim: Claim | None = None) -> CaseInHand:
        """Begin a case."""
        files = tuple(str(file) for file in source.files.values())
        return cls(source, claim, CaseResult(name=source.name, status="done", inputs=files))

    @property
    def header_source(self) -> Path | None:
        """The file of the first channel that is there: the label map takes over its header; None: a DICOM series."""
        return next(iter(self.source.files.values())).header_source

    def close(self, result: CaseResult) -> None:
        """Let nothing more be done."""
        self.result, self.closed = result, True
        self.prepared = self.preview = self.classes = None

    def fail(self, reason: str, error: Exception | None = None) -> None:
        """Close a case that cannot be segmented."""
        self.error = error
        self.close(self.result.changed(status="failed", reason=reason, output=None))

    def attempt(self, action: Callable[[CaseInHand], None]) -> None:
        """Do a step of the case unless it is closed; what goes wrong closes it and leaves the others alone."""
        if self.closed:
            return
        try:
            action(self)
        except (PipelineError, OSError) as error:
            self.fail(str(error), error)
        except MemoryError as error:
            self.fail(f"not enough memory{f': {error}' if str(error) else ''}")
        except Exception as error:
            # A bug: the traceback is wanted, and so are the other cases.
            log.exception("%s: could not be segmented", self.source.name)
            self.fail(f"{type(error).__name__}: {error}")

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Take down the seconds of a step."""
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 4)


class CaseSteps:
    """The steps of every case of a batch, by one predictor.

    Attributes:
        settings: of the batch; the folder may change between cases.
        predictor: with the models loaded.
        room_bytes: what the cases in hand may take together.
    """

    def __init__(self, settings: SegmentSettings) -> None:
        keep_freed_memory()
        first = settings.models[0]
        self.settings = settings
        self.predictor = Predictor.load(settings.models, settings.engine)
        self._fingerprint = Fingerprint.model_validate_json((first / FINGERPRINT).read_bytes())
        self._models = [model_digest(folder) for folder in settings.models]
        if (rules := common_rules(settings.models)).has_rules:
            self._models.append(rules.digest())
        self._author = author_of(settings.models, self._models)
        self._probabilities = settings.probabilities_at(self.predictor.temperature)
        self._process_bytes = resident_bytes()
        limit = settings.max_memory_bytes
        self.room_bytes = available_bytes() if limit is None else max(0, limit - self._process_bytes)

    def measure(self, case: CaseInHand) -> None:
        """Find what a case takes at most, by its headers; infinite where it is too large."""
        case.memory_bytes = wanted_bytes(self.predictor, case.source, self._process_bytes)

    def read(self, case: CaseInHand) -> None:
        """Read a case's channels and bring them to the plan's grid, unless it is done and unchanged."""
        before = case.before
        with case.timed("read"):
            key = self._key(case.source)
            if before and self._is_done(before, key):
                case.close(self._as_done(case, before))
                return
            # Asked before the voxels are read: what does not fit is refused, and the process not killed.
            memory = case_memory(self.predictor, case.source, self._process_bytes)
            log.debug("%s: %s", case.source.name, memory.as_text())
            images = {channel: file.read_image() for channel, file in case.source.files.items()}
        with case.timed("prepare"):
            case.native = self.predictor.native_of(images)
            case.prepared = self.predictor.prepare(images, case.native)
            if self.settings.pictures:
                case.preview = Preview.of(next(image for image in images.values() if image.geometry == case.native))
            plan = self.predictor.plan
            warnings = unfamiliar(images, case.native, case.prepared.geometry, plan, self._fingerprint)
            case.result = case.result.changed(key=key, warnings=warnings)

    def predict(self, case: CaseInHand) -> None:
        """Segment a prepared case."""
        assert case.prepared is not None and case.native is not None
        reset_peak_memory(self.predictor.device)
        with case.timed("predict"):
            segmentation = self._segmented(case, case.prepared, case.native)
        case.prepared, case.classes = None, segmentation.classes
        case.result = case.result.changed(
            peak_memory_bytes=peak_memory_bytes(self.predictor.device),
            windows_run=segmentation.windows_run,
            windows_skipped=segmentation.windows_skipped,
            confidence=segmentation.confidence,
        )

    def write(self, case: CaseInHand) -> None:
        """Write a label map with its input's own geometry and header codes, measure each label, draw the case."""
        assert case.classes is not None and case.native is not None
        plan = self.predictor.plan
        output = case.source.name + SUFFIX
        with case.timed("write"):
            if not self._probabilities:  # Those of an earlier label map would be taken for this one's.
                (self.settings.out / PROBABILITIES / output).unlink(missing_ok=True)
            for file in instance_files(self.settings.out, case.source.name):  # Likewise.
                file.unlink(missing_ok=True)
            remove_objects(self.settings.out, case.source.name)
            label = Volume(self.predictor.values_of(case.classes), case.native)
            write_label(self.settings.out / output, label, header_of=case.header_source, names=plan.labels)
            if case.preview is not None:
                self._draw(case, case.preview, case.classes)
            instances = self._instances(case, case.classes, case.native)
            objects = self._objects(case, label)
            volumes = _volumes_ml(case.classes, case.native, tuple(plan.labels))
        done = case.result.changed(output=output, volumes_ml=volumes, instances=instances, objects=objects)
        case.result = done.changed(seconds=case.seconds)
        case.classes = case.preview = None

    def _instances(self, case: CaseInHand, classes: NDArray[Any], native: Geometry) -> dict[str, int]:
        """Number the components that are wanted, and return how many there are of each label."""
        wanted, plan = self.settings.instances, self.predictor.plan
        if not wanted:
            return {}
        return write_instances(self.settings.out, case.source.name, classes, native, plan, wanted, case.header_source)

    def _objects(self, case: CaseInHand, label: Volume) -> str:
        """Write the DICOM objects that are wanted of a label map, and say which."""
        settings = self.settings
        return write_objects(
            settings.out, case.source, label, self.predictor.plan.labels, self._author, settings.objects
        )

    def _as_done(self, case: CaseInHand, before: CaseResult) -> CaseResult:
        """Return what becomes of a case that is done and unchanged; what lacks beside its labels is made of them."""
        out, wanted = self.settings.out, self.settings
        counted = all(file.exists() for file in instance_files(out, before.name))
        counted = not wanted.instances or (counted and tuple(before.instances) == wanted.instances)
        written = not wanted.objects.formats or are_written(out, before.name, before.objects, wanted.objects)
        if counted and written:
            return before.changed(status="skipped", inputs=case.result.inputs)
        assert before.output is not None
        label = read_label(out / before.output)
        result = before.changed(status="done", inputs=case.result.inputs)
        if not counted:
            classes = class_indices(label.array, self.predictor.plan)
            result = result.changed(instances=self._instances(case, classes, label.geometry))
        return result if written else result.changed(objects=self._objects(case, label))

    def _draw(self, case: CaseInHand, preview: Preview, classes: NDArray[Any]) -> None:
        """Draw a case; a picture that fails, unless the disk is full, is no reason to do without the label map."""
        try:
            preview.write(self.settings.out, case.source.name, classes)
        except OSError:
            raise
        except Exception:
            log.exception("%s: could not be drawn", case.source.name)

    def _segmented(self, case: CaseInHand, prepared: PreparedImage, native: Geometry) -> Segmentation:
        """Segment a prepared case, and write the probabilities that are wanted."""
        settings, predictor = self.settings, self.predictor
        if not settings.probabilities:
            return predictor.segment(prepared, native)
        wanted = probabilities_into(
            settings.out / PROBABILITIES / (case.source.name + SUFFIX),
            native,
            predictor.plan,
            settings.probabilities,
            dtype=settings.probabilities_type,
            temperature=predictor.temperature,
            header_of=case.header_source,
        )
        with wanted as request:
            segmentation = predictor.segment(prepared, native, probabilities=request)
        case.result = case.result.changed(probabilities=self._probabilities)
        return segmentation

    def _is_done(self, before: CaseResult, key: str) -> bool:
        """Tell whether a case was done, of these files by these models, and what was written is still there."""
        if before.key != key or before.output is None:
            return False
        files = [self.settings.out / before.output]
        files += [self.settings.out / PROBABILITIES / before.output] if self._probabilities else []
        return self._probabilities in ("", before.probabilities) and all(file.exists() for file in files)

    def _key(self, source: SegmentInput) -> str:
        """Return a digest of all that a case's label map depends on."""
        contents = {channel: [file.content_digest(), file.index] for channel, file in source.files.items()}
        # The precision as it was asked for: where machines of two kinds share a folder, auto is as good on both.
        settings = {"precision": self.settings.precision, "skip_empty": self.settings.skip_empty}
        return digest_of({"models": self._models, "files": contents, **settings})


def _volumes_ml(classes: NDArray[Any], native: Geometry, labels: tuple[str, ...]) -> dict[str, float]:
    """Return label -> ml, without the background."""
    # Plane by plane: bincount makes 64-bit integers of what it counts.
    counts = np.sum([np.bincount(plane.ravel(), minlength=len(labels)) for plane in classes], axis=0)
    ml = (counts * native.voxel_volume_ml).round(6).tolist()
    return dict(list(zip(labels, ml, strict=True))[1:])
