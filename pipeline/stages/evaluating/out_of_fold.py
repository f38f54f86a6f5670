"""Out-of-fold predictions: of each case the label map by the model that has not seen it, kept beside the folds.

EXPERIMENT/out_of_fold/CASE.nii.gz               as the network labelled it, before rules that were chosen afterwards
                       CASE.json                 by which model, from which files; its scores, and what it took
                       cases.csv                 all of them: a line for each class of each case, with its fold
                       probabilities/CASE.nii.gz of the foreground labels, where they were asked for
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from pipeline.evaluation.metrics import METRICS, Row, Status
from pipeline.evaluation.scored import ScoredCase, write_case_table
from pipeline.model import model_digest
from pipeline.records import Record, json_number, write_json
from pipeline.volumes.volume import Volume
from pipeline.volumes.writing import write_label

log = logging.getLogger(__name__)

FOLDER, TABLE, PROBABILITIES = "out_of_fold", "cases.csv", "probabilities"
KEPT_FORMAT_VERSION = 1


class KeptRow(Record):
    """One class of a kept case; a metric without a value is None."""

    class_name: str
    status: Status
    reference_ml: float | None
    prediction_ml: float
    values: dict[str, float | None]

    @classmethod
    def of(cls, row: Row) -> KeptRow:
        """Return a row as JSON knows it."""
        values = {name: json_number(value) for name, value in row.values.items()}
        return cls(
            class_name=row.class_name,
            status=row.status,
            reference_ml=json_number(row.reference_ml),
            prediction_ml=row.prediction_ml,
            values=values,
        )

    @property
    def row(self) -> Row:
        """The row as it was scored."""
        values = {name: _value(number) for name, number in self.values.items()}
        return Row(self.class_name, self.status, _value(self.reference_ml), self.prediction_ml, values)


class KeptCase(Record):
    """One case of an experiment, predicted by the model that has not seen it.

    Attributes:
        format_version: of the file.
        case, patient, fold: as the manifest has them.
        model: digest of the model, without rules that were chosen afterwards.
        key: digest of all that the prediction and its scores depend on.
        device: that predicted.
        tolerance_mm: of the normalised surface Dice.
        rows: a row a class, before rules that were chosen afterwards.
        seconds, peak_memory_bytes, predicted_dice, reliability: as of a ScoredCase.
        probabilities: labels whose probabilities are kept too.
    """

    format_version: int = KEPT_FORMAT_VERSION
    case: str
    patient: str
    fold: int
    model: str
    key: str
    device: str
    tolerance_mm: float
    rows: tuple[KeptRow, ...]
    seconds: float
    peak_memory_bytes: int | None
    predicted_dice: dict[str, float]
    reliability: dict[str, float]
    probabilities: tuple[str, ...] = ()

    @property
    def scored(self) -> ScoredCase:
        """The case as it was scored."""
        return ScoredCase(
            case_id=self.case,
            patient=self.patient,
            fold=self.fold,
            rows=tuple(kept.row for kept in self.rows),
            seconds=self.seconds,
            peak_memory_bytes=self.peak_memory_bytes,
            predicted_dice=self.predicted_dice,
            reliability=self.reliability,
        )


class OutOfFold:
    """The out-of-fold predictions of one experiment.

    Attributes:
        folder: that holds them.
    """

    def __init__(self, experiment: Path) -> None:
        self.folder = experiment / FOLDER

    def label_of(self, case_id: str) -> Path:
        """Return where a case's label map is kept."""
        return self.folder / f"{case_id}.nii.gz"

    def probabilities_of(self, case_id: str) -> Path:
        """Return where a case's probabilities are kept."""
        return self.folder / PROBABILITIES / f"{case_id}.nii.gz"

    def fresh(self, case_id: str, key: str, probabilities: Sequence[str] = ()) -> KeptCase | None:
        """Return what is kept of a case, where it was made of these very inputs, and with these probabilities."""
        kept = self._read(self._record_of(case_id))
        if kept is None or kept.key != key or not self.label_of(case_id).is_file():
            return None
        if any(kept.values.keys() != METRICS.keys() for kept in kept.rows):
            return None
        there = not probabilities or self.probabilities_of(case_id).is_file()
        return kept if there and set(probabilities) <= set(kept.probabilities) else None

    def keep(self, kept: KeptCase, label: Volume, header_of: Path, names: dict[str, int]) -> None:
        """Write a case's label map, then its record: where that is, the label map is whole and belongs to it."""
        self._record_of(kept.case).unlink(missing_ok=True)
        write_label(self.label_of(kept.case), label, header_of=header_of, names=names)
        self.note(kept)

    def note(self, kept: KeptCase) -> None:
        """Write a case's record, beside the label map that is there."""
        write_json(self._record_of(kept.case), kept.model_dump(mode="json"))

    def of_models(self, models: Iterable[Path]) -> list[KeptCase]:
        """Return what is kept of predictions by these very models, by fold and case."""
        digests = {model_digest(model) for model in models}
        return [kept for kept in self._all() if kept.model in digests]

    def write_table(self) -> None:
        """Write the table of all that is kept."""
        write_case_table(self.folder / TABLE, [kept.scored for kept in self._all()])

    def _record_of(self, case_id: str) -> Path:
        """Return where a case's record is kept."""
        return self.folder / f"{case_id}.json"

    def _all(self) -> list[KeptCase]:
        """Read every record, by fold and case."""
        found = (self._read(path) for path in self.folder.glob("*.json"))
        return sorted((kept for kept in found if kept is not None), key=lambda kept: (kept.fold, kept.case))

    def _read(self, path: Path) -> KeptCase | None:
        """Read a record; None where there is none that this version understands: the case is predicted anew."""
        try:
            content = json.loads(path.read_bytes())
            if content["format_version"] != KEPT_FORMAT_VERSION:
                return None
            return KeptCase.model_validate(content)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            log.warning("%s: cannot be read (%s), and is left out", path, type(error).__name__)
            return None


def _value(number: float | None) -> float:
    """Return a number read from JSON."""
    return math.nan if number is None else number
