"""What became of each case of a batch: the journal that lets a batch go on, and the report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.records import Record, write_json, write_text

JOURNAL, REPORT_JSON, REPORT_CSV = "segmented.jsonl", "report.json", "report.csv"
# More would push the failures off the screen.
WARNINGS_SHOWN = 10
STEPS = ("read", "predict", "write")


class CaseResult(Record):
    """What became of one case.

    Attributes:
        name: of the case.
        status: done; skipped: done before, and neither input nor model has changed; failed.
        inputs: the files that were read.
        output: the label map's file name in the report's folder; None where the case failed.
        reason: why it failed.
        key: digest of the inputs' contents and the model.
        seconds: step -> seconds; of the run in which the case was done.
        volumes_ml: label -> its volume in ml; the background is left out.
        warnings: in what the case is unlike the training cases.
    """

    name: str
    status: Literal["done", "skipped", "failed"]
    inputs: tuple[str, ...]
    output: str | None = None
    reason: str | None = None
    key: str | None = None
    seconds: dict[str, float] = {}
    volumes_ml: dict[str, float] = {}
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SegmentReport:
    """What became of a batch.

    Attributes:
        folder: of the label maps and the report.
        model: the model's folder.
        results: in the order of the inputs; cases that were not reached are left out.
    """

    folder: Path
    model: Path
    results: tuple[CaseResult, ...]

    @property
    def failures(self) -> tuple[CaseResult, ...]:
        """The cases that failed."""
        return tuple(result for result in self.results if result.status == "failed")

    def as_json(self) -> dict[str, Any]:
        """Return the report for machines."""
        return {"model": str(self.model), "cases": [result.model_dump(mode="json") for result in self.results]}

    def as_csv(self) -> str:
        """Return a line a case; the columns of volumes are the labels that occur in any case."""
        labels = list(dict.fromkeys(label for result in self.results for label in result.volumes_ml))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        header = ["case", "status", "reason", "output", *(f"{step}_s" for step in STEPS)]
        writer.writerow([*header, *(f"{label}_ml" for label in labels), "warnings"])
        for result in self.results:
            row = [result.name, result.status, result.reason or "", result.output or ""]
            row += [f"{result.seconds[step]:.3f}" if step in result.seconds else "" for step in STEPS]
            row += [f"{result.volumes_ml[label]:.4f}" if label in result.volumes_ml else "" for label in labels]
            writer.writerow([*row, "; ".join(result.warnings)])
        return text.getvalue()

    def as_text(self) -> str:
        """Return what a person wants to know: counts, times, what failed and what looks odd."""
        counts = {status: sum(r.status == status for r in self.results) for status in ("done", "skipped", "failed")}
        done = [result for result in self.results if result.status == "done"]
        spent = ", ".join(f"{step} {sum(r.seconds.get(step, 0.0) for r in done):.1f} s" for step in STEPS)
        lines = [", ".join(f"{n} {status}" for status, n in counts.items() if n) + (f" ({spent})" if done else "")]
        lines += [f"failed   {result.name}: {result.reason}" for result in self.failures]
        warnings = [f"warning  {result.name}: {text}" for result in self.results for text in result.warnings]
        lines += warnings[:WARNINGS_SHOWN]
        if len(warnings) > WARNINGS_SHOWN:
            lines.append(f"and {len(warnings) - WARNINGS_SHOWN} more warnings in {REPORT_CSV}")
        return "\n".join([*lines, f"label maps and report: {self.folder}"])

    def write(self) -> None:
        """Write report.json and report.csv."""
        write_json(self.folder / REPORT_JSON, self.as_json())
        write_text(self.folder / REPORT_CSV, self.as_csv())


def read_journal(folder: Path) -> dict[str, CaseResult]:
    """Return the last result of each case done in a folder; a line that a killed run left half written is skipped."""
    path = folder / JOURNAL
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            result = CaseResult.model_validate(json.loads(line))
        except (ValueError, ValidationError):
            continue
        results[result.name] = result
    return results


def add_to_journal(folder: Path, results: Iterable[CaseResult]) -> None:
    """Append results, each a line, so that a killed run's cases need not be done again."""
    with (folder / JOURNAL).open("a", encoding="utf-8") as file:
        # A line of its own, whatever a killed run left of the last.
        file.writelines("\n" + json.dumps(result.model_dump(mode="json"), ensure_ascii=False) for result in results)
