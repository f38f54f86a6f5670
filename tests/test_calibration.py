"""Reliability and temperature against slow float64 formulas on whole arrays; the Dice regression against refits."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.confidence.calibration import (
    CALIBRATION,
    FEWEST_CASES,
    PENALTIES,
    Calibration,
    Features,
    fit_dice,
    read_calibration,
    save_calibration,
)
from pipeline.confidence.reliability import (
    TEMPERATURES,
    Reliability,
    ReliabilityMeter,
    TemperatureFit,
    lattice_step,
)
from pipeline.config import Output
from pipeline.errors import ModelError

SHAPE = (9, 10, 11)
FloatArray = NDArray[np.float64]


def drawn(output: Output, labels: int = 4, *, scale: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits, a third of the voxels background beyond doubt, and a random reference."""
    rng = np.random.default_rng(seed)
    classes = labels if output == "softmax" else labels - 1
    logits = rng.normal(0, scale, (classes, *SHAPE))
    sure = rng.random(SHAPE) < 1 / 3
    logits[:, sure] = -30.0
    if output == "softmax":
        logits[0, sure] = 0.0
    reference = rng.integers(0, labels, SHAPE).astype(np.uint8)
    return torch.from_numpy(logits.astype(np.float32)), torch.from_numpy(reference)


def slow_probabilities(logits: torch.Tensor, temperature: float, output: Output) -> tuple[FloatArray, NDArray[np.intp]]:
    """(labels, V) probabilities, float64, and (V,) predicted labels, one label after another."""
    flat = logits.numpy().reshape(len(logits), -1).astype(np.float64)
    if output == "softmax":
        weights = np.exp(flat / temperature)
        return weights / weights.sum(axis=0), flat.argmax(axis=0)
    inside = 1 / (1 + np.exp(-flat / temperature))
    none = np.prod(1 - inside, axis=0)
    own = [inside[k] * np.prod(1 - inside[k + 1 :], axis=0) for k in range(len(flat))]
    predicted = np.zeros(flat.shape[1], np.intp)
    for k, region in enumerate(flat, start=1):
        predicted[region > 0] = k
    return np.stack([none, *own]), predicted


def slow_scores(probabilities: FloatArray, predicted: NDArray[np.intp], labels: NDArray[np.intp]) -> list[float]:
    """ECE and Brier over voxels, bin by bin and label by label."""
    confidence, right = probabilities[predicted, np.arange(len(labels))], predicted == labels
    bins = [(confidence >= b / 15) & ((confidence < (b + 1) / 15) | (b == 14)) for b in range(15)]
    gaps = [abs(confidence[one].mean() - right[one].mean()) * one.mean() for one in bins if one.any()]
    truth = np.arange(len(probabilities))[:, None] == labels
    return [float(np.sum(gaps)), float(((probabilities - truth) ** 2).sum(axis=0).mean())]


@pytest.mark.parametrize("output", ["softmax", "regions"])
@pytest.mark.parametrize("temperature", [1.0, 2.3])
def test_ece_and_brier_are_those_of_the_slow_formulas(output: Output, temperature: float) -> None:
    logits, reference = drawn(output)
    meter = ReliabilityMeter(output, temperature)
    for start in range(0, SHAPE[0], 4):  # plane by plane, unevenly
        meter.add(logits[:, start : start + 4], reference[start : start + 4])
    probabilities, predicted = slow_probabilities(logits, temperature, output)
    labels = reference.numpy().ravel().astype(np.intp)
    inside = (predicted > 0) | (labels > 0)
    assert 0 < inside.sum() < inside.size
    found = meter.result
    assert [found.ece, found.brier] == pytest.approx(slow_scores(probabilities, predicted, labels), abs=1e-5)
    expected = slow_scores(probabilities[:, inside], predicted[inside], labels[inside])
    assert [found.ece_foreground, found.brier_foreground] == pytest.approx(expected, abs=1e-5)
    assert abs(found.ece - expected[0]) > 0.01


def test_two_cases_together_are_their_voxels_together() -> None:
    (first, one), (second, two) = drawn("softmax", seed=1), drawn("softmax", seed=2)
    sums, whole = ReliabilityMeter("softmax"), ReliabilityMeter("softmax")
    for logits, reference in ((first, one), (second, two)):
        case = ReliabilityMeter("softmax")
        case.add(logits, reference)
        sums += case
        whole.add(logits, reference)
    assert sums.result.model_dump() == pytest.approx(whole.result.model_dump())


def test_a_perfect_network_has_no_error_and_a_case_without_structures_no_foreground() -> None:
    reference = torch.zeros(SHAPE, dtype=torch.uint8)
    logits = torch.full((3, *SHAPE), -30.0)
    logits[0] = 0
    meter = ReliabilityMeter("softmax")
    meter.add(logits, reference)
    assert meter.result == Reliability(ece=0.0, brier=0.0, ece_foreground=None, brier_foreground=None)
    reference[0] = 1  # beyond doubt, and wrong, in a ninth of the voxels
    wrong = ReliabilityMeter("softmax")
    wrong.add(logits, reference)
    assert wrong.result.model_dump() == pytest.approx(
        {"ece": 1 / 9, "brier": 2 / 9, "ece_foreground": 1, "brier_foreground": 2}
    )
    with pytest.raises(ValueError, match="no voxel"):
        _ = ReliabilityMeter("softmax").result


@pytest.mark.parametrize("output", ["softmax", "regions"])
def test_the_likelihood_is_that_of_the_slow_formula(output: Output) -> None:
    logits, reference = drawn(output, scale=2.0)
    fit = TemperatureFit(output)
    for plane, labels in zip(logits.unbind(1), reference, strict=True):
        fit.add(plane, labels)
    labels = reference.numpy().ravel().astype(np.intp)
    for nll, temperature in zip(fit.nll, TEMPERATURES, strict=True):
        probabilities, _ = slow_probabilities(logits, temperature, output)
        assert nll == pytest.approx(-np.log(probabilities[labels, np.arange(len(labels))]).mean(), rel=1e-5)


@pytest.mark.parametrize("output", ["softmax", "regions"])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.83, 5.1])
def test_a_known_temperature_is_found(output: Output, temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2.5, (3, 200_000)).astype(np.float32))
    probabilities, _ = slow_probabilities(logits, 1.0, output)
    bounds = probabilities.cumsum(axis=0)
    labels = (rng.random(200_000) > bounds[:-1]).sum(axis=0)
    fit = TemperatureFit(output)
    fit.add(logits * temperature, torch.from_numpy(labels))
    assert fit.temperature == pytest.approx(temperature, rel=0.02)


def test_a_temperature_stays_within_the_grid_and_is_one_without_voxels() -> None:
    assert TemperatureFit("softmax").temperature == 1.0
    fit = TemperatureFit("softmax")
    fit.add(torch.tensor([[5.0], [0.0]]), torch.tensor([0]))  # always right: the colder, the likelier
    assert fit.temperature == TEMPERATURES[0] == 0.25
    assert TEMPERATURES[-1] == 8.0


@pytest.mark.parametrize(
    ("shape", "voxels", "step"), [((10, 10, 10), 1000, 1), ((10, 10, 10), 999, 2), ((1, 1, 1), 9, 1)]
)
def test_a_lattice_holds_about_as_many_voxels_as_it_may(shape: tuple[int, int, int], voxels: int, step: int) -> None:
    assert lattice_step(shape, voxels) == step


def cases(count: int, seed: int = 0, noise: float = 0.01) -> tuple[list[Features], list[float]]:
    """Structures whose Dice is 0.1 below the expected one, and falls with entropy."""
    rng = np.random.default_rng(seed)
    found = [
        Features(float(e), float(h), int(v))
        for e, h, v in zip(
            rng.uniform(0.5, 0.99, count), rng.uniform(0, 0.3, count), rng.integers(50, 5000, count), strict=True
        )
    ]
    return found, [f.expected_dice - 0.1 - 0.5 * f.entropy + rng.normal(0, noise) for f in found]


def refitted(features: list[Features], dice: list[float], without: int, penalty: float) -> float:
    """Predict one case by a ridge regression on the others, solved as augmented least squares."""
    rows = np.array([[f.expected_dice, f.entropy, math.log(f.voxels)] for f in features])
    inputs = np.column_stack([(rows - rows.mean(axis=0)) / rows.std(axis=0), np.ones(len(rows))])
    missed = np.array(dice) - rows[:, 0]
    kept = np.arange(len(rows)) != without
    penalties = np.column_stack([math.sqrt(penalty) * np.eye(3), np.zeros(3)])
    stacked = np.concatenate([inputs[kept], penalties])
    weights = np.linalg.lstsq(stacked, np.concatenate([missed[kept], np.zeros(3)]), rcond=None)[0]
    return float(rows[without, 0] + inputs[without] @ weights)


@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_the_error_with_a_case_left_out_is_that_of_refits_with_the_best_penalty(noise: float) -> None:
    features, dice = cases(12, noise=noise)
    regression = fit_dice(features, dice)
    assert regression is not None
    errors = {p: np.array([refitted(features, dice, i, p) - dice[i] for i in range(12)]) for p in PENALTIES}
    best = min(errors, key=lambda penalty: float(np.square(errors[penalty]).sum()))
    assert best == (PENALTIES[0] if noise < 0.1 else PENALTIES[-1])
    left_out = np.clip(errors[best] + dice, 0, 1)
    assert regression.mae == pytest.approx(np.abs(left_out - dice).mean(), rel=1e-9)
    assert regression.cases == 12
    assert regression.low == pytest.approx(np.percentile(dice, 5))


def test_dice_is_predicted_for_cases_not_seen_and_clipped() -> None:
    regression = fit_dice(*cases(60))
    assert regression is not None
    features, dice = cases(20, seed=1)
    predicted = [regression.predict(f) for f in features]
    assert np.abs(np.array(predicted) - dice).mean() < 0.02
    assert regression.predict(Features(0.02, 0.9, 5)) == 0.0


def test_without_a_spread_in_validation_the_expected_dice_remains() -> None:
    regression = fit_dice([Features(0.9, 0.1, 100)] * 10, [0.85] * 10)
    assert regression is not None
    assert regression.predict(Features(0.9, 0.1, 100)) == pytest.approx(0.85)
    assert regression.predict(Features(0.5, 0.1, 100)) == pytest.approx(0.45)


def test_fewer_cases_than_needed_teach_nothing() -> None:
    features, dice = cases(FEWEST_CASES)
    assert fit_dice(features, dice) is not None
    assert fit_dice(features[1:], dice[1:]) is None


def make_calibration() -> Calibration:
    reliability = Reliability(ece=0.02, brier=0.1, ece_foreground=0.1, brier_foreground=None)
    labels = {"left": fit_dice(*cases(9)), "right": None}
    return Calibration(temperature=1.4, cases=9, before=reliability, after=reliability, labels=labels)


def test_a_calibration_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_calibration(tmp_path) is None
    calibration = make_calibration()
    save_calibration(tmp_path, calibration)
    assert read_calibration(tmp_path) == calibration
    features = Features(0.8, 0.1, 900)
    left = calibration.labels["left"]
    assert left is not None
    assert calibration.predict("left", features) == left.predict(features)
    assert calibration.predict("right", features) is None
    assert calibration.predict("unknown", features) is None
    assert [calibration.is_low("left", dice) for dice in (left.low - 0.01, left.low)] == [True, False]
    assert not calibration.is_low("right", 0.0)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"temperature": "warm"}, r"calibration\.json: is damaged"),
        ({"format_version": 2}, "format version 2.*update medseg"),
    ],
)
def test_a_damaged_calibration_is_named(tmp_path: Path, damage: dict[str, object], words: str) -> None:
    save_calibration(tmp_path, make_calibration())
    path = tmp_path / CALIBRATION
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ModelError, match=words):
        read_calibration(tmp_path)
