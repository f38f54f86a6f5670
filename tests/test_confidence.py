"""What is measured of a network's doubt, against hand-worked values and a slow reference in float64."""

from math import log

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.confidence.measuring import CERTAIN_LOGITS, ConfidenceSums, StructureConfidence, label_scores, last_region
from pipeline.config import Output

LABELS = ("background", "left", "right", "stone")


def random_logits(classes: int, scale: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(classes)
    return scale * torch.randn((classes, 5, 11, 7), generator=generator)


def measured(
    logits: torch.Tensor, output: Output = "softmax", temperature: float = 1.0
) -> dict[str, StructureConfidence]:
    sums = ConfidenceSums(LABELS, output, temperature)
    for planes in logits.split(2, 1):
        sums.add(planes)
    return sums.structures()


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max(0))
    return np.asarray(weights / weights.sum(0))


def reference(
    probabilities: NDArray[np.float64], labels: NDArray[np.intp], label: int
) -> tuple[int, float | None, float | None]:
    """Voxels, entropy and expected Dice of a label, one voxel after another."""
    entropies, own, mass = [], 0.0, 0.0
    for voxel in np.ndindex(labels.shape):
        p = probabilities[:, *voxel]
        mass += p[label]
        if labels[voxel] == label:
            own += p[label]
            entropies.append(-sum(q * log(q) for q in p if q > 0) / log(len(p)))
    if not entropies:
        return 0, None, None
    return len(entropies), float(np.mean(entropies)), 2 * own / (mass + len(entropies))


def test_two_voxels_by_hand() -> None:
    """One voxel is `left` with 3/4, the other background, `left` with 1/4 still."""
    sums = ConfidenceSums(("background", "left"))
    sums.add(torch.tensor([[0.0, log(3.0)], [log(3.0), 0.0]]).reshape(2, 1, 1, 2))
    (left,) = sums.structures({"left": 0.5}).values()
    assert left.voxels == 1
    assert left.entropy == pytest.approx((0.75 * log(4 / 3) + 0.25 * log(4)) / log(2))
    assert left.expected_dice == pytest.approx(2 * 0.75 / (0.75 + 0.25 + 1))
    assert (left.fold_dice, left.predicted_dice) == (0.5, None)


def test_regions_by_hand() -> None:
    """A voxel in the first region with 3/4 and in the second with 1/4: of the first label with 3/4 x 3/4."""
    regions = torch.tensor([[log(3.0)], [-log(3.0)]], dtype=torch.float64)
    torch.testing.assert_close(label_scores(regions).exp()[:, 0], torch.tensor([3, 9, 4], dtype=torch.float64) / 16)
    assert last_region(regions).tolist() == [1]
    assert last_region(torch.tensor([[1.0, -1.0, 1.0], [0.5, -1.0, 0.0]])).tolist() == [2, 0, 1]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("output", ["softmax", "regions"])
def test_sums_equal_a_slow_reference(output: Output, temperature: float) -> None:
    logits = random_logits(4 if output == "softmax" else 3)
    exact = logits.double().numpy() / temperature
    if output == "softmax":
        probabilities, labels = softmax(exact), exact.argmax(0)
    else:
        inside = 1 / (1 + np.exp(-exact))
        none_after = np.cumprod((1 - inside)[::-1], 0)[::-1]
        none_after = np.concatenate([none_after, np.ones_like(none_after[:1])])
        probabilities = np.concatenate([none_after[:1], inside * none_after[1:]])
        labels = np.zeros(exact.shape[1:], int)
        for region, values in enumerate(exact, start=1):
            labels[values > 0] = region
    found = measured(logits, output, temperature)
    assert list(found) == list(LABELS[1:])
    for index, structure in enumerate(found.values(), start=1):
        voxels, entropy, dice = reference(probabilities, labels, index)
        assert structure.voxels == voxels > 20
        assert structure.entropy == pytest.approx(entropy, rel=1e-5)
        assert structure.expected_dice == pytest.approx(dice, rel=1e-5)


def test_a_structure_that_is_not_found_has_no_confidence() -> None:
    logits = random_logits(4)
    logits[3] = -50
    assert measured(logits)["stone"] == StructureConfidence(voxels=0)


def test_a_sure_structure_expects_all_and_a_guess_little() -> None:
    sure, guess = random_logits(4, scale=1e4), random_logits(4, scale=1e-3)
    for structure in measured(sure).values():
        assert structure.entropy == pytest.approx(0, abs=1e-2)
        assert structure.expected_dice == pytest.approx(1, abs=1e-2)
    for structure in measured(guess).values():
        assert structure.entropy == pytest.approx(1, abs=1e-3)
        assert structure.expected_dice == pytest.approx(2 * 0.25 / 2, abs=0.02)  # p = 1/4 everywhere, found in 1/4


@pytest.mark.parametrize("output", ["softmax", "regions"])
def test_what_is_background_beyond_doubt_makes_no_difference(output: Output) -> None:
    """A frame around, as certain as is left out, changes nothing that float32 would show."""
    logits = random_logits(4 if output == "softmax" else 3)
    framed = torch.full((len(logits), 25, 31, 27), -CERTAIN_LOGITS - 0.01)
    if output == "softmax":
        framed[0] = 0
    framed[:, 10:15, 10:21, 10:17] = logits
    for bare, within in zip(measured(logits, output).values(), measured(framed, output).values(), strict=True):
        assert within == bare


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(4)
    before = logits.clone()
    measured(logits, temperature=2.0)
    assert torch.equal(logits, before)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        ConfidenceSums(LABELS, temperature=0)
