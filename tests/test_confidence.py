"""What is measured of a network's doubt, against hand-worked values and a slow reference in float64."""

from math import log

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.confidence.calibration import Calibration, DiceRegression
from pipeline.confidence.judging import LOW_DICE, judge, temperature_of
from pipeline.confidence.measuring import CERTAIN_LOGITS, ConfidenceSums, StructureConfidence, label_scores
from pipeline.confidence.reliability import Reliability
from pipeline.config import Output
from pipeline.networks.outputs import classes_of

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
    assert classes_of(regions, "regions").tolist() == [1]
    assert classes_of(torch.tensor([[1.0, -1.0, 1.0], [0.5, -1.0, 0.0]]), "regions").tolist() == [2, 0, 1]


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


def calibration(temperature: float = 1.0, low: float = 0.0, **intercepts: float) -> Calibration:
    """A calibration by which each structure's Dice is its expected Dice and an intercept."""
    unknown = Reliability(ece=0, brier=0, ece_foreground=None, brier_foreground=None)
    weights = {"expected_dice": 1, "entropy": 0, "log_volume": 0, "cases": 9, "mae": 0.1, "low": low}
    labels = {label: DiceRegression(intercept=intercept, **weights) for label, intercept in intercepts.items()}
    return Calibration(temperature=temperature, cases=9, before=unknown, after=unknown, labels=labels)


FOUND = StructureConfidence(voxels=100, entropy=0.1, expected_dice=0.9, fold_dice=0.8)
MISSING = StructureConfidence(voxels=0)


def test_predicted_dice_is_the_members_mean_and_doubt_that_of_the_worst_structure() -> None:
    members = [calibration(left=-0.1, right=-0.3), calibration(left=-0.2)]
    judged = judge({"left": FOUND, "right": FOUND, "stone": MISSING}, members)
    assert judged.labels["left"].predicted_dice == pytest.approx(0.75)
    assert judged.labels["right"].predicted_dice == pytest.approx(0.6)
    assert judged.labels["stone"] == MISSING
    assert judged.predicted_dice == pytest.approx(0.6)
    assert judged.doubt == pytest.approx(0.4)
    assert (judged.entropy, judged.expected_dice, judged.fold_dice) == pytest.approx((0.1, 0.9, 0.8))
    assert (judged.low, judged.doubtful) == (True, ("right",))


def test_without_a_calibration_the_expected_dice_stands_in() -> None:
    judged = judge({"left": FOUND, "right": FOUND.changed(expected_dice=LOW_DICE)})
    assert judged.predicted_dice is None
    assert judged.doubt == pytest.approx(1 - LOW_DICE)
    assert (judged.low, judged.doubtful) == (False, ())
    assert judge({"left": FOUND.changed(expected_dice=LOW_DICE - 0.01)}).doubtful == ("left",)


@pytest.mark.parametrize(("lows", "expected"), [((0.95,), True), ((0.85,), False), ((0.95, 0.85), False)])
def test_a_dice_below_what_most_members_saw_in_validation_is_doubtful(lows: tuple[float, ...], expected: bool) -> None:
    assert judge({"left": FOUND}, [calibration(low=low, left=0.0) for low in lows]).low == expected


def test_a_case_in_which_nothing_is_found_comes_first() -> None:
    judged = judge({"left": MISSING})
    assert (judged.doubt, judged.low, judged.doubtful) == (1.0, True, ())
    assert (judged.entropy, judged.expected_dice, judged.predicted_dice) == (None, None, None)


def test_an_ensembles_temperature_is_its_members_mean() -> None:
    assert temperature_of([calibration(1.5), calibration(2.5)]) == 2.0
    assert temperature_of([]) == 1.0
