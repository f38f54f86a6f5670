"""Calibration: what validation taught about a model's confidence; kept as calibration.json in the model's folder.

The temperature makes the probabilities as likely as they can be (Guo et al. 2017). The Dice of a structure is predicted
from what can be measured without a label: its expected Dice, entropy and volume. A ridge regression learns by how much
the expected Dice misses the true one, so that, far from all that validation has seen, the expected Dice itself is what
remains. Labels do not depend on any of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.confidence.measuring import StructureConfidence
from pipeline.confidence.reliability import Reliability
from pipeline.errors import ModelError
from pipeline.records import Record, refuse_other_format, write_json

FloatArray = NDArray[np.float64]

CALIBRATION = "calibration.json"
CALIBRATION_FORMAT_VERSION = 1

# With fewer cases four numbers are not to be learnt.
FEWEST_CASES = 8

# Ridge penalties on standardised features, against a sum over cases: where Dice varies by little else than the
# reference's own noise, as in validation cases that all went well, only a strong one does no harm.
PENALTIES = (1.0, 10.0, 100.0)

# A structure is doubtful where less is predicted than this share of the validation cases had.
LOW_PERCENTILE = 5.0


@dataclass(frozen=True)
class Features:
    """What a structure's Dice is predicted from, all measured on the plan's grid at the model's temperature.

    Attributes:
        expected_dice: the Dice that the probabilities let expect.
        entropy: mean normalised entropy of the structure's voxels, 0 to 1.
        voxels: of the structure, at least 1.
    """

    expected_dice: float
    entropy: float
    voxels: int

    @classmethod
    def of(cls, structure: StructureConfidence) -> Self | None:
        """Take them from what was measured of a structure; None where it was not found."""
        if structure.expected_dice is None or structure.entropy is None:
            return None
        return cls(structure.expected_dice, structure.entropy, structure.voxels)

    @property
    def row(self) -> tuple[float, float, float]:
        """The numbers that are weighed: expected Dice, entropy, log of the volume."""
        return self.expected_dice, self.entropy, math.log(self.voxels)


class DiceRegression(Record):
    """How one structure's Dice on the native grid follows from its features.

    Attributes:
        intercept, expected_dice, entropy, log_volume: Dice = intercept + the weighted features, volume in voxels.
        cases: validation cases in which the structure was found; one that is not there has a Dice of 0.
        mae: mean absolute error of the prediction, each case left out in turn.
        low: 5th percentile of these cases' Dice.
    """

    intercept: float
    expected_dice: float
    entropy: float
    log_volume: float
    cases: int
    mae: float
    low: float

    def predict(self, features: Features) -> float:
        """Return the Dice to expect, 0 to 1."""
        weights = (self.expected_dice, self.entropy, self.log_volume)
        return float(np.clip(self.intercept + np.dot(weights, features.row), 0.0, 1.0))


class Calibration(Record):
    """What the validation cases taught about a model's confidence.

    Attributes:
        format_version: of the file.
        temperature: logits are divided by it before they become probabilities.
        cases: validation cases.
        before, after: reliability at temperature 1, and at the fitted one.
        labels: structure -> how its Dice is predicted; None where too few cases have it.
    """

    format_version: int = CALIBRATION_FORMAT_VERSION
    temperature: float = Field(gt=0)
    cases: int
    before: Reliability
    after: Reliability
    labels: dict[str, DiceRegression | None]

    def predict(self, label: str, features: Features) -> float | None:
        """Return the Dice to expect of a structure, 0 to 1; None where validation had too few cases of it."""
        regression = self.labels.get(label)
        return None if regression is None else regression.predict(features)

    def is_low(self, label: str, dice: float) -> bool:
        """Tell whether a predicted Dice is below what nearly all validation cases had."""
        regression = self.labels.get(label)
        return regression is not None and dice < regression.low


def fit_dice(features: Sequence[Features], dice: Sequence[float]) -> DiceRegression | None:
    """Learn how a structure's Dice follows from its features, one of each a case.

    Ridge regression of what the expected Dice misses (Dice less expected Dice) on the standardised features, the
    intercept not penalised; of PENALTIES that with the smallest squared error when each case is left out in turn.

    Returns:
        None with fewer than FEWEST_CASES.
    """
    if len(dice) < FEWEST_CASES:
        return None
    rows, target = np.array([f.row for f in features]), np.asarray(dice, np.float64)  # (cases, 3), (cases,)
    missed = target - rows[:, 0]
    centre, scale = rows.mean(axis=0), rows.std(axis=0)
    scale[scale < 1e-12] = 1.0
    fits = [_ridge((rows - centre) / scale, missed, penalty) for penalty in PENALTIES]
    standardised, error = min(fits, key=lambda fit: float(np.square(fit[1]).sum()))
    weights = standardised / scale
    left_out = np.clip(target - error, 0.0, 1.0)
    return DiceRegression(
        intercept=float(missed.mean() - centre @ weights),
        expected_dice=1 + float(weights[0]),
        entropy=float(weights[1]),
        log_volume=float(weights[2]),
        cases=len(target),
        mae=float(np.abs(left_out - target).mean()),
        low=float(np.percentile(target, LOW_PERCENTILE)),
    )


def _ridge(inputs: FloatArray, target: FloatArray, penalty: float) -> tuple[FloatArray, FloatArray]:
    """Return a ridge regression's weights (features,), and the errors (cases,) of leaving each case out.

    The hat matrix gives these errors without a second fit (Golub, Heath and Wahba, Technometrics 1979;21:215-223).

    Args:
        inputs: (cases, features), of mean 0.
        target: (cases,); its mean is the intercept.
        penalty: of the squared weights.
    """
    solve = np.linalg.solve(inputs.T @ inputs + penalty * np.eye(inputs.shape[1]), inputs.T)  # (features, cases)
    centred = target - target.mean()
    weights = solve @ centred
    own_share = 1 / len(target) + np.einsum("ij,ji->i", inputs, solve)
    return weights, (centred - inputs @ weights) / (1 - own_share)


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Write a calibration into a model's folder."""
    write_json(folder / CALIBRATION, calibration.model_dump(mode="json"))


def read_calibration(folder: Path) -> Calibration | None:
    """Read a model's calibration; None where it has none.

    Raises:
        ModelError: it is damaged, or of another format version.
    """
    path = folder / CALIBRATION
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        version = content.get("format_version")
        refuse_other_format(ModelError, path, version, CALIBRATION_FORMAT_VERSION, "train the model anew")
        return Calibration.model_validate(content)
    except (ValueError, AttributeError) as error:  # not JSON, not an object, or other fields
        what = str(error).partition("\n")[0]
        raise ModelError(f"{path}: is damaged ({what}); copy the model's folder again") from None
