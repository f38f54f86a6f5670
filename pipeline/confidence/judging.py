"""What a case's measures say together: the Dice to expect of each structure, how doubtful the case is, whether to look.

A structure's Dice is the one that the calibrations predict, by the mean over an ensemble's members; for a model without
a calibration, or a structure that validation saw too rarely, it is the expected Dice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from pipeline.confidence.calibration import Calibration, Features
from pipeline.confidence.measuring import StructureConfidence
from pipeline.records import Record

# Below it a structure wants a look, whatever the validation cases had: a third of the voxels may well be wrong.
LOW_DICE = 0.7


class Confidence(Record):
    """How far a case's label map can be trusted, before postprocessing.

    Attributes:
        labels: structure -> how sure the network is of it.
        entropy, expected_dice, fold_dice: means over the structures found that have one.
        predicted_dice: smallest of the structures'.
        doubt: by which cases are sorted: 1 less the smallest Dice to expect of a structure found; 1 where none is.
        doubtful: structures found of which a Dice is to be expected that is below LOW_DICE, or below the 5th percentile
            of the validation cases' own, by most of the members.
        low: whether to look at the case: a structure is doubtful, or none is found.
    """

    labels: dict[str, StructureConfidence]
    entropy: float | None
    expected_dice: float | None
    fold_dice: float | None
    predicted_dice: float | None
    doubt: float
    doubtful: tuple[str, ...]
    low: bool


def judge(measured: Mapping[str, StructureConfidence], calibrations: Sequence[Calibration] = ()) -> Confidence:
    """Join what was measured of a case to what its models' validation cases have taught.

    Args:
        measured: structure -> its confidence, without a predicted Dice.
        calibrations: of the models that have one.
    """
    labels = {label: _predicted(label, structure, calibrations) for label, structure in measured.items()}
    found = [structure for structure in labels.values() if structure.voxels]
    expected = {label: structure.dice_to_expect for label, structure in labels.items()}
    dice = {label: value for label, value in expected.items() if value is not None}
    doubtful = tuple(label for label, value in dice.items() if _is_low(label, value, calibrations))
    return Confidence(
        labels=labels,
        entropy=_mean(structure.entropy for structure in found),
        expected_dice=_mean(structure.expected_dice for structure in found),
        fold_dice=_mean(structure.fold_dice for structure in found),
        predicted_dice=min((s.predicted_dice for s in found if s.predicted_dice is not None), default=None),
        doubt=1 - min(dice.values(), default=0.0),
        doubtful=doubtful,
        low=bool(doubtful) or not found,
    )


def temperature_of(calibrations: Sequence[Calibration]) -> float:
    """Return the temperature of an ensemble's mean logits: its members' mean, 1 where none has one."""
    return fmean(calibration.temperature for calibration in calibrations) if calibrations else 1.0


def _predicted(label: str, structure: StructureConfidence, calibrations: Sequence[Calibration]) -> StructureConfidence:
    """Return a structure's confidence with the Dice that the calibrations predict."""
    features = Features.of(structure)
    if features is None:
        return structure
    predicted = _mean(calibration.predict(label, features) for calibration in calibrations)
    return structure.changed(predicted_dice=predicted)


def _is_low(label: str, dice: float, calibrations: Sequence[Calibration]) -> bool:
    """Tell whether a structure is doubtful."""
    votes = sum(calibration.is_low(label, dice) for calibration in calibrations)
    return dice < LOW_DICE or 2 * votes > len(calibrations)


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the numbers among some values; None where there is none."""
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else None
