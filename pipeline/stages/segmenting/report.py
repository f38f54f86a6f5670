"""What became of each case of a batch, and the report: report.json and report.csv."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.confidence.judging import Confidence
from pipeline.inference.postprocessing import Postprocessing
from pipeline.records import Record, write_json, write_text

REPORT_JSON, REPORT_CSV = "report.json", "report.csv"
# More would push the failures off the screen.
WARNINGS_SHOWN = 10
STEPS = ("read", "prepare", "predict", "write")


class CaseResult(Record):
    """What became of one case.

    Attributes:
        name: of the case.
        status: done; skipped: done before, and neither input nor models have changed; failed.
        inputs: the files that were read.
        output: the label map's file name in the report's folder; None where the case failed.
        probabilities: which were written beside the label map, how, and at what temperature; empty where none were.
        instances: label -> how many components were numbered beside the label map, of those that were asked for.
        objects: which DICOM objects were written beside the label map, and how; empty where none were.
        reason: why it failed.
        key: digest of the inputs' contents, the models, and the settings that the label map depends on.
        seconds: step -> seconds; of the run in which the case was done.
        peak_memory_bytes: while it was predicted, with the case read ahead; None where the system does not tell.
        windows_run, windows_skipped: of the network, and those left out for want of body.
        volumes_ml: label -> its volume in ml; the background is left out.
        warnings: in what the case is unlike the training cases.
        confidence: how far the label map can be trusted; None where that was not measured.
    """

    name: str
    status: Literal["done", "skipped", "failed"]
    inputs: tuple[str, ...]
    output: str | None = None
    probabilities: str = ""
    instances: dict[str, int] = {}
    objects: str = ""
    reason: str | None = None
    key: str | None = None
    seconds: dict[str, float] = {}
    peak_memory_bytes: int | None = None
    windows_run: int | None = None
    windows_skipped: int | None = None
    volumes_ml: dict[str, float] = {}
    warnings: tuple[str, ...] = ()
    confidence: Confidence | None = None

    @property
    def doubts(self) -> str:
        """Why the case wants a look, in a line; empty where it wants none or nothing was measured."""
        if self.confidence is None or not self.confidence.low:
            return ""
        dice = {name: self.confidence.labels[name].dice_to_expect for name in self.confidence.doubtful}
        return "doubtful: " + (
            ", ".join(f"{name} (Dice of {value:.2f} expected)" for name, value in dice.items()) or "nothing was found"
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """The doubts and the warnings."""
        return (*filter(None, [self.doubts]), *self.warnings)


@dataclass(frozen=True)
class SegmentReport:
    """What became of a batch.

    Attributes:
        folder: of the label maps and the report.
        models: their folders.
        results: in the order of the inputs; cases that were not reached are left out.
        not_reached: how many cases the batch was stopped before.
        rules: that were chosen for the models on out-of-fold predictions.
        of_all: where this is one shard of a list, how far all of them are; else empty.
    """

    folder: Path
    models: tuple[Path, ...]
    results: tuple[CaseResult, ...]
    not_reached: int = 0
    rules: Postprocessing = field(default_factory=Postprocessing)
    of_all: str = ""

    @property
    def failures(self) -> tuple[CaseResult, ...]:
        """The cases that failed."""
        return tuple(result for result in self.results if result.status == "failed")

    def as_json(self) -> dict[str, Any]:
        """Return the report for machines."""
        return {
            "models": [str(model) for model in self.models],
            "postprocessing": self.rules.model_dump(mode="json"),
            "not_reached": self.not_reached,
            "cases": [result.model_dump(mode="json") for result in self.results],
        }

    def as_csv(self) -> str:
        """Return a line a case; the columns of volumes and instances are the labels that occur in any case."""
        counted = list(dict.fromkeys(label for result in self.results for label in result.instances))
        labels = list(dict.fromkeys(label for result in self.results for label in result.volumes_ml))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        header = ["case", "status", "reason", "output", *(f"{step}_s" for step in STEPS)]
        header += ["peak_memory_mb", "windows_run", "windows_skipped", "doubt", "predicted_dice"]
        header += [*(f"{label}_ml" for label in labels), *(f"{label}_instances" for label in counted)]
        writer.writerow([*header, "warnings"])
        for result in self.results:
            row = [result.name, result.status, result.reason or "", result.output or ""]
            row += [f"{result.seconds[step]:.3f}" if step in result.seconds else "" for step in STEPS]
            row.append("" if result.peak_memory_bytes is None else f"{result.peak_memory_bytes / 1e6:.0f}")
            row += ["" if n is None else str(n) for n in (result.windows_run, result.windows_skipped)]
            sure = result.confidence
            row += [_decimals(sure.doubt), _decimals(sure.predicted_dice)] if sure else ["", ""]
            row += [f"{result.volumes_ml[label]:.4f}" if label in result.volumes_ml else "" for label in labels]
            row += [str(result.instances.get(label, "")) for label in counted]
            writer.writerow([*row, "; ".join(result.remarks)])
        return text.getvalue()

    def counts(self) -> str:
        """Say how many cases were done, skipped, failed and not reached."""
        counts = {status: sum(r.status == status for r in self.results) for status in ("done", "skipped", "failed")}
        counts["not reached"] = self.not_reached
        return ", ".join(f"{n} {status}" for status, n in counts.items() if n) or "no case"

    def as_text(self) -> str:
        """Return what a person wants to know: counts, times, what failed and what looks odd."""
        done = [result for result in self.results if result.status == "done"]
        spent = ", ".join(f"{step} {sum(r.seconds.get(step, 0.0) for r in done):.1f} s" for step in STEPS)
        lines = [self.counts() + (f" ({spent})" if done else "")]
        lines += [f"failed   {result.name}: {result.reason}" for result in self.failures]
        warnings = [f"warning  {result.name}: {text}" for result in self.results for text in result.remarks]
        lines += warnings[:WARNINGS_SHOWN]
        if len(warnings) > WARNINGS_SHOWN:
            lines.append(f"and {len(warnings) - WARNINGS_SHOWN} more warnings in {REPORT_CSV}")
        if self.rules.has_rules:
            lines.append(f"postprocessing: {self.rules.as_text()}")
        lines += filter(None, [self.of_all])
        return "\n".join([*lines, f"label maps and report: {self.folder}"])

    def write(self) -> None:
        """Write report.json and report.csv."""
        write_json(self.folder / REPORT_JSON, self.as_json())
        write_text(self.folder / REPORT_CSV, self.as_csv())


def _decimals(value: float | None) -> str:
    """Format a share; nothing where it is not known."""
    return "" if value is None else f"{value:.4f}"
