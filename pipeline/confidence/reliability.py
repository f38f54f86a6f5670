"""How far a network's probabilities can be believed: likelihood, calibration error and Brier score, in one pass.

All is summed over voxels of the plan's grid as planes of logits come; no volume of K classes is kept. Probabilities are
those of labels, as in `measuring`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.confidence.measuring import doubtful_voxels, label_scores
from pipeline.config import Output
from pipeline.networks.outputs import classes_of
from pipeline.records import Record

FloatArray = NDArray[np.float64]

# Four temperatures an octave: between them the likelihood is a parabola of log T to well below one percent of T.
TEMPERATURES: tuple[float, ...] = tuple(2.0 ** (n / 4) for n in range(-8, 13))

# Equal bins of the confidence (Guo et al., On Calibration of Modern Neural Networks, ICML 2017).
BINS = 15

# Logits worked on at once: 2 MB of float32 stay in a processor's cache.
_LOGITS_AT_ONCE = 1 << 19


class Reliability(Record):
    """How probabilities fit what is so.

    In medical volumes easy background dominates, which makes every number over all voxels look good; foreground are
    the voxels that reference or prediction, on the plan's grid, call a structure.

    Attributes:
        ece: expected calibration error, 0 to 1: the mean distance between the probability of the predicted label and
            the share of voxels where it is right, over 15 equal bins of that probability (Guo et al. 2017).
        brier: mean over voxels of the sum over labels of squared differences, 0 to 2 (Brier 1950).
        ece_foreground, brier_foreground: the same over the foreground; None where there is none.
    """

    ece: float
    brier: float
    ece_foreground: float | None
    brier_foreground: float | None


@dataclass(eq=False)
class ReliabilitySums:
    """Sums over voxels, planes and cases, from which a Reliability is made.

    Attributes:
        confidence, right: (BINS,) sum of the predicted label's probability, and count of voxels where it is right.
        squares: sum of the squared differences.
        voxels: count.
    """

    confidence: FloatArray = field(default_factory=lambda: np.zeros(BINS))
    right: FloatArray = field(default_factory=lambda: np.zeros(BINS))
    squares: float = 0.0
    voxels: int = 0

    def add(self, confidence: Tensor, right: Tensor, squares: Tensor) -> None:
        """Add voxels: the predicted label's probability, whether it is right, and the squared difference, all (V,)."""
        bins = (confidence * BINS).long().clamp_(max=BINS - 1)
        for sums, values in ((self.confidence, confidence), (self.right, right)):
            sums += torch.bincount(bins, weights=values.double(), minlength=BINS).numpy()
        self.squares += float(squares.sum(dtype=torch.float64))
        self.voxels += len(squares)

    def __iadd__(self, other: ReliabilitySums) -> Self:
        """Add the voxels of others, such as another case's."""
        self.confidence += other.confidence
        self.right += other.right
        self.squares += other.squares
        self.voxels += other.voxels
        return self

    @property
    def ece(self) -> float | None:
        """The expected calibration error; None without voxels."""
        return float(np.abs(self.confidence - self.right).sum()) / self.voxels if self.voxels else None

    @property
    def brier(self) -> float | None:
        """The Brier score; None without voxels."""
        return self.squares / self.voxels if self.voxels else None


class ReliabilityMeter:
    """Reliability at one temperature, plane by plane.

    Attributes:
        everywhere, foreground: sums over the voxels that were added.
    """

    def __init__(self, output: Output, temperature: float = 1.0) -> None:
        self.everywhere, self.foreground = ReliabilitySums(), ReliabilitySums()
        self._output, self._temperature = output, temperature

    def add(self, logits: Tensor, reference: Tensor) -> None:
        """Add voxels.

        Args:
            logits: (K, *voxels) float32.
            reference: (*voxels) label indices, 0 the background.
        """
        flat, labels = logits.flatten(1), reference.flatten().long()
        doubtful = doubtful_voxels(flat, self._temperature, self._output)
        for voxels in torch.split(doubtful, max(1, _LOGITS_AT_ONCE // len(flat))):
            self._add_doubtful(flat.index_select(1, voxels), labels[voxels])
        structures = int((labels > 0).sum() - (labels[doubtful] > 0).sum())
        self._add_certain(len(labels) - len(doubtful), structures)

    def __iadd__(self, other: ReliabilityMeter) -> Self:
        """Add the voxels of another, such as another case's."""
        self.everywhere += other.everywhere
        self.foreground += other.foreground
        return self

    @property
    def result(self) -> Reliability:
        """What the sums say.

        Raises:
            ValueError: no voxel was added.
        """
        ece, brier = self.everywhere.ece, self.everywhere.brier
        if ece is None or brier is None:
            raise ValueError("no voxel was added")
        return Reliability(
            ece=ece, brier=brier, ece_foreground=self.foreground.ece, brier_foreground=self.foreground.brier
        )

    def _add_doubtful(self, logits: Tensor, labels: Tensor) -> None:
        """Add (K, M) logits and (M,) labels."""
        probabilities = log_probabilities(logits, self._temperature, self._output).exp_()  # (labels, M)
        predicted = classes_of(logits, self._output)
        confidence = probabilities.gather(0, predicted[None])[0]
        own = probabilities.gather(0, labels[None])[0]
        # The sum of (p - y)^2 over labels, y being 1 at the reference and 0 elsewhere.
        squares = probabilities.square_().sum(0) - 2 * own + 1
        right = predicted == labels
        self.everywhere.add(confidence, right, squares)
        inside = (predicted > 0) | (labels > 0)
        self.foreground.add(confidence[inside], right[inside], squares[inside])

    def _add_certain(self, voxels: int, structures: int) -> None:
        """Add voxels that are background with probability 1 for the network; in so many of them it is wrong."""
        for sums, count, right in (
            (self.everywhere, voxels, voxels - structures),
            (self.foreground, structures, 0),
        ):
            sums.confidence[-1] += count
            sums.right[-1] += right
            sums.squares += 2 * structures
            sums.voxels += count


class TemperatureFit:
    """The temperature at which logits are likeliest, found from one pass.

    The negative log-likelihood is summed at each of a grid of temperatures; a parabola in log T through the lowest and
    its neighbours gives the minimum.
    """

    def __init__(self, output: Output, temperatures: Sequence[float] = TEMPERATURES) -> None:
        self._output, self._temperatures = output, tuple(temperatures)
        self._sums = np.zeros(len(self._temperatures))
        self._voxels = 0

    def add(self, logits: Tensor, reference: Tensor) -> None:
        """Add voxels, as ReliabilityMeter does."""
        step = max(1, _LOGITS_AT_ONCE // len(logits))
        flat, every_label = logits.flatten(1), reference.flatten().long()
        self._voxels += len(every_label)
        for some, labels in zip(torch.split(flat, step, 1), torch.split(every_label, step), strict=True):
            for index, temperature in enumerate(self._temperatures):
                likely = log_probabilities(some, temperature, self._output).gather(0, labels[None])
                self._sums[index] -= float(likely.sum(dtype=torch.float64))

    @property
    def nll(self) -> FloatArray:
        """(temperatures,) mean negative log-likelihood of the reference."""
        return self._sums / max(1, self._voxels)

    @property
    def temperature(self) -> float:
        """The best temperature, within the grid; 1 without voxels."""
        if not self._voxels:
            return 1.0
        logs, best = np.log(self._temperatures), int(self._sums.argmin())
        if best in (0, len(logs) - 1):
            return self._temperatures[best]
        around = slice(best - 1, best + 2)
        a, b, _ = np.polyfit(logs[around] - logs[best], self._sums[around] / self._voxels, 2)
        return float(np.exp(logs[best] - b / (2 * a))) if a > 0 else self._temperatures[best]


def log_probabilities(logits: Tensor, temperature: float, output: Output) -> Tensor:
    """Return the logarithm of each label's probability, (labels, V), of (K, V) logits at a temperature."""
    scaled = logits / temperature
    return torch.log_softmax(scaled, 0) if output == "softmax" else label_scores(scaled)


def lattice_step(shape: Sequence[int], voxels: int) -> int:
    """Return the smallest step along all axes with which a lattice in a volume holds at most about so many voxels."""
    return max(1, math.ceil(math.cbrt(math.prod(shape) / voxels)))
