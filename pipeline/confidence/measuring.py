"""How sure the network is of each structure: summed plane by plane on the plan's grid, from the labelling's logits.

Probabilities are those of the labels at a voxel, of logits divided by the model's temperature (Guo et al. 2017, "On
Calibration of Modern Neural Networks"). Of overlapping regions a voxel's label is the last region that holds it: taken
as independent, region k is that label with the probability that k holds the voxel and no later region does.

Voxels that are background beyond doubt, by CERTAIN_LOGITS, are left out: in most scans that is most of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.config import Output
from pipeline.networks.outputs import classes_of
from pipeline.records import Record

# By so much (after the temperature) every logit must lie below the background's, or in regions below 0, for a voxel to
# be left out: a structure then has a probability below 1e-6 there.
CERTAIN_LOGITS = 14.0

# Logits looked at together, K x voxels: 2 MB of float32 stay in a processor's cache through all passes over them.
_LOGITS_AT_ONCE = 1 << 19


class StructureConfidence(Record):
    """How sure the network is of one label in one case; measured on the plan's grid.

    Attributes:
        voxels: of the plan's grid that have the label; where there are none, all others are None.
        entropy: mean over these voxels of the labels' entropy, as a share of its largest value: 0 sure, 1 a guess.
        expected_dice: Dice that these voxels can expect against a label drawn from the probabilities:
            2 sum(p over these voxels) / (sum(p over all voxels) + voxels).
        fold_dice: mean Dice between the label maps of each two networks; None for a single network.
        predicted_dice: Dice that the validation cases let expect; None for a model without a calibration.
    """

    voxels: int
    entropy: float | None = None
    expected_dice: float | None = None
    fold_dice: float | None = None
    predicted_dice: float | None = None

    @property
    def dice_to_expect(self) -> float | None:
        """The predicted Dice where there is one, else the expected one; None of a structure that was not found."""
        return self.expected_dice if self.predicted_dice is None else self.predicted_dice


class ConfidenceSums:
    """The sums over one case's planes that its confidence is made of; 4 numbers a label, whatever the volume.

    Attributes:
        labels: names by class index, the background first.
        output: what the logits are of.
        temperature: they are divided by it.
    """

    def __init__(self, labels: Sequence[str], output: Output = "softmax", temperature: float = 1.0) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.labels, self.output, self.temperature = tuple(labels), output, temperature
        # Rows: voxels with the label, their own probabilities, their entropies, its probability at all voxels.
        self._sums = torch.zeros((4, len(self.labels)), dtype=torch.float64)

    def add(self, logits: Tensor) -> None:
        """Add some planes; the logits are left as they are.

        Args:
            logits: (K, ...) float32, finite, on the CPU; K labels, or with regions one fewer.
        """
        flat = logits.reshape(len(logits), -1)
        doubtful = doubtful_voxels(flat, self.temperature, self.output)
        for voxels in torch.split(doubtful, max(1, _LOGITS_AT_ONCE // len(self.labels))):
            self._add(flat.index_select(1, voxels).div_(self.temperature))

    def structures(self, fold_dice: Mapping[str, float | None] | None = None) -> dict[str, StructureConfidence]:
        """Return label -> what was measured, without the background.

        Args:
            fold_dice: label -> mean Dice between the networks of an ensemble.
        """
        largest = math.log(len(self.labels))
        found = {}
        for label, (voxels, own, entropy, mass) in zip(self.labels, self._sums.T.tolist(), strict=True):
            found[label] = StructureConfidence(voxels=0)
            if voxels:
                found[label] = StructureConfidence(
                    voxels=int(voxels),
                    entropy=entropy / voxels / largest,
                    expected_dice=2 * own / (mass + voxels),
                    fold_dice=(fold_dice or {}).get(label),
                )
        del found[self.labels[0]]
        return found

    def _add(self, scores: Tensor) -> None:
        """Add voxels by their logits after the temperature, (K, M), which are overwritten."""
        if self.output == "regions":
            scores, labels = label_scores(scores), classes_of(scores, "regions")
            best = scores.amax(0)
        else:
            best, labels = scores.max(0)
        scores -= best
        weights = scores.exp()
        total = weights.sum(0)
        own = weights.gather(0, labels[None])[0] / total
        entropy = total.log() - scores.mul_(weights).sum(0) / total
        count = len(self.labels)
        self._sums[0] += torch.bincount(labels, minlength=count)
        self._sums[1] += torch.bincount(labels, own, minlength=count)
        self._sums[2] += torch.bincount(labels, entropy, minlength=count)
        self._sums[3] += weights @ total.reciprocal()


def doubtful_voxels(logits: Tensor, temperature: float, output: Output) -> Tensor:
    """Return the indices (M,) of the voxels of (K, V) logits that are not background beyond doubt."""
    foreground = logits.amax(0) if output == "regions" else logits[1:].amax(0).sub_(logits[0])
    return foreground.gt(-CERTAIN_LOGITS * temperature).nonzero().squeeze(1)


def label_scores(regions: Tensor) -> Tensor:
    """Return the logarithms of the labels' probabilities, (K, M), of regions' logits, (K - 1, M)."""
    inside = logsigmoid(regions)
    # (K, M): that no region from this one on holds the voxel; after the last there is none.
    outside = torch.cat([(inside - regions).flip(0).cumsum(0).flip(0), torch.zeros_like(regions[:1])])
    outside[1:] += inside
    return outside
