"""Scored cases, and the per-case table in which they are kept: a line for each class of each case."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import EvaluationError
from pipeline.evaluation.lesions.metrics import case_columns
from pipeline.evaluation.lesions.scoring import LesionRules, LesionScore
from pipeline.evaluation.metrics import METRICS, Row
from pipeline.records import write_text

NAN = float("nan")
NO_LESIONS = LesionRules()

# How far the model's probabilities can be believed, on the plan's grid: name -> what it is, for people. At temperature
# 1 they are given beside where the model has a calibration, whose temperature is then in the others.
MEASURES = {
    "ece": "ECE",
    "brier": "Brier score",
    "ece_foreground": "ECE, foreground",
    "brier_foreground": "Brier score, foreground",
}
UNCALIBRATED = "_uncalibrated"
RELIABILITY = MEASURES | {f"{name}{UNCALIBRATED}": f"{said}, temperature 1" for name, said in MEASURES.items()}


@dataclass(frozen=True)
class ScoredCase:
    """One case of an evaluation.

    Attributes:
        case_id, patient: as the manifest has them.
        fold: of the model that predicted the case; None for a model of no fold.
        rows: a row a class.
        seconds: spent on predicting it; nan where that was not written down.
        peak_memory_bytes: while it was predicted; None where the system does not tell.
        predicted_dice: class -> the Dice that the model expected of itself; without the classes of which it said none.
        reliability: name in RELIABILITY -> value; without those that have none.
        lesions: of the structures that are counted lesion by lesion; a table that is read back has none.
    """

    case_id: str
    patient: str
    fold: int | None
    rows: tuple[Row, ...]
    seconds: float
    peak_memory_bytes: int | None
    predicted_dice: Mapping[str, float] = field(default_factory=dict)
    reliability: Mapping[str, float] = field(default_factory=dict)
    lesions: tuple[LesionScore, ...] = ()

    def lesions_of(self, class_name: str) -> LesionScore | None:
        """Return a structure's lesions; None where they are not counted."""
        return next((score for score in self.lesions if score.class_name == class_name), None)


def case_table(cases: Sequence[ScoredCase], rules: LesionRules = NO_LESIONS) -> dict[str, list[Any]]:
    """Return the per-case table as equally long columns: a line for each class of each case.

    Args:
        cases: in the order of the lines.
        rules: by which lesions were counted; where none were there are no columns of them.
    """
    lines = [(case, row) for case in cases for row in case.rows]
    table: dict[str, list[Any]] = {
        "case": [case.case_id for case, _ in lines],
        "patient": [case.patient for case, _ in lines],
        "fold": ["" if case.fold is None else case.fold for case, _ in lines],
        "class": [row.class_name for _, row in lines],
        "status": [row.status for _, row in lines],
        "reference_ml": [row.reference_ml for _, row in lines],
        "prediction_ml": [row.prediction_ml for _, row in lines],
        **{name: [row.values[name] for _, row in lines] for name in METRICS},
        "predicted_dice": [case.predicted_dice.get(row.class_name, NAN) for case, row in lines],
        "seconds": [case.seconds for case, _ in lines],
        "peak_memory_bytes": [case.peak_memory_bytes or "" for case, _ in lines],
        **{name: [case.reliability.get(name, NAN) for case, _ in lines] for name in RELIABILITY},
    }
    if rules.structures:
        table |= case_columns([case.lesions_of(row.class_name) for case, row in lines], rules)
    return table


def write_case_table(path: Path, cases: Sequence[ScoredCase], rules: LesionRules = NO_LESIONS) -> None:
    """Write the per-case table as CSV; a metric without a value is `nan`, its reason in `status`."""
    write_columns(path, case_table(cases, rules))


def read_case_table(path: Path) -> list[ScoredCase]:
    """Read the per-case table back; what an older one does not say is nan or None.

    Raises:
        EvaluationError: it cannot be read, or holds no such columns.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        by_case = itertools.groupby(lines, key=lambda line: line["case"])
        return [_read_case([*group]) for _, group in by_case]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise EvaluationError(f"{path}: not a table of scored cases ({error!r}); run `medseg evaluate`") from error


def write_columns(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write equally long columns as CSV, numbers in six significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_shortest(value) for value in line] for line in zip(*columns.values(), strict=True))
    write_text(path, text.getvalue())


def _read_case(lines: Sequence[Mapping[str, str]]) -> ScoredCase:
    """Return a case from its lines of the per-case table."""
    first = lines[0]
    memory = first.get("peak_memory_bytes")
    return ScoredCase(
        case_id=first["case"],
        patient=first["patient"],
        fold=int(first["fold"]) if first["fold"] else None,
        rows=tuple(_read_row(line) for line in lines),
        seconds=_number(first, "seconds"),
        peak_memory_bytes=int(memory) if memory else None,
        predicted_dice=_known({line["class"]: _number(line, "predicted_dice") for line in lines}),
        reliability=_known({name: _number(first, name) for name in RELIABILITY}),
    )


def _read_row(line: Mapping[str, str]) -> Row:
    """Return a class's row from its line."""
    return Row(
        line["class"],
        line["status"],  # type: ignore[arg-type]
        float(line["reference_ml"]),
        float(line["prediction_ml"]),
        {name: float(line[name]) for name in METRICS},
    )


def _number(line: Mapping[str, str], column: str) -> float:
    """Return a number; nan where the table, an older one, has no such column."""
    return float(line.get(column) or NAN)


def _known(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values that are not nan."""
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _shortest(value: Any) -> Any:
    """Return a number in six significant digits, what else there is as it is."""
    return f"{value:.6g}" if isinstance(value, float) else value
