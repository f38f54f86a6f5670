"""Calibrating a model whose every prediction is known, from cases in a store."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import NearestMean, make_model, make_plan

from pipeline.config import InferenceSection
from pipeline.data.manifest import Case, ImageFile
from pipeline.data.store import CaseStore, PreparedCase
from pipeline.errors import ResourceError
from pipeline.geometry import Geometry
from pipeline.inference.planes import LogitPlanes
from pipeline.model import save_model
from pipeline.predictor import Engine, Predictor
from pipeline.stages.fold.calibrating import TEMPERATURE_CASES, VoxelJudge, beside, calibrate, calibration_of

# Logits are a thousandth of NearestMean's for intensities of 100 a class: a voxel is right by 5 or 20 of them.
MEANS = (0.0, 100.0, 200.0)
GRID = Geometry((16, 16, 12), np.eye(4))


class Doubtful(NearestMean):
    """Says the same as NearestMean with less conviction."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return (N, K, X, Y, Z) logits."""
        return super().forward(image) / 1000


def stored(store: CaseStore, case_id: str, said: NDArray[np.uint8], drawn: NDArray[np.uint8]) -> Case:
    """Write a case of which the network says one thing and people have drawn another."""
    image = (100 * said[None]).astype(np.float16)
    store.write(case_id, PreparedCase(image, drawn, drawn, GRID, GRID, {}, ("T1",)), key="k")
    return Case(id=case_id, patient=case_id, images={"T1": ImageFile(path="none")}, label=None, fold=0)


def box(width: int, label: int = 1) -> NDArray[np.uint8]:
    """Class indices with one box."""
    classes = np.zeros(GRID.shape, np.uint8)
    classes[2 : 2 + width, 2:10, 2:10] = label
    return classes


@pytest.fixture
def predictor() -> Predictor:
    """The network at temperature 1, on the CPU."""
    engine = Engine("cpu", "fp32")
    return Predictor(Doubtful(*MEANS), make_plan(), InferenceSection(), engine)


def test_what_validation_teaches_is_what_the_cases_say(tmp_path: Path, predictor: Predictor) -> None:
    store = CaseStore(tmp_path)
    widths = range(2, 2 + TEMPERATURE_CASES + 1)  # one case more than the temperature is fitted on
    cases = [stored(store, f"c{width}", box(width), box(width + 1)) for width in widths]
    # What is not there is found in one of them: its Dice is 0; right is in too few cases.
    cases.append(stored(store, "invented", box(9), box(9, label=2)))
    found = calibrate(predictor, store, cases)
    assert found.cases == len(cases)
    left, right = found.labels["left"], found.labels["right"]
    assert right is None
    assert left is not None
    assert left.cases == len(cases)
    dice = [2 * width / (2 * width + 1) for width in widths] + [0.0]
    assert left.low == pytest.approx(np.percentile(dice, 5))
    # The network is wrong more often than it says: it is to be less sure, which makes it more reliable.
    assert found.temperature > 1.5
    assert predictor.temperature == found.temperature
    assert found.after.ece < found.before.ece
    assert found.after.brier < found.before.brier
    # Of all voxels, by hand: the strip that was missed, and the box that was invented.
    wrong = (64 * len(widths) + 64 * 9) / (len(cases) * math.prod(GRID.shape))
    sure = 1 / (1 + math.exp(-5) + math.exp(-20))
    assert found.before.ece == pytest.approx(sure - (1 - wrong), abs=1e-3)


def test_a_model_stays_whole_where_memory_does_not_suffice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(tmp_path / "model", make_model())
    store = CaseStore(tmp_path / "store")
    cases = [stored(store, "c", box(3), box(4))]
    assert calibration_of(tmp_path / "model", store, cases, Engine("cpu", "fp32")) is not None
    assert calibration_of(tmp_path / "model", store, cases, Engine("cpu", "fp32", limit_bytes=1)) is None
    assert "without a calibration" in caplog.text


def test_the_first_case_that_does_not_fit_is_refused_before_its_windows(tmp_path: Path, predictor: Predictor) -> None:
    store = CaseStore(tmp_path)
    cases = [stored(store, name, box(3), box(4)) for name in ("first", "second")]
    predictor.engine = replace(predictor.engine, limit_bytes=1)
    reached: list[str] = []
    with pytest.raises(ResourceError, match="does not fit"):
        calibrate(predictor, store, cases, reached.append)
    assert reached == ["first"]


@pytest.mark.parametrize(("most", "step"), [(None, 1), (384, 2), (128, 3)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_are_laid_beside_the_labels_on_a_lattice_of_the_whole_volume(
    most: int | None, step: int, axis: int
) -> None:
    # Of the voxels of class 4 nobody knows what they are: they are not handed on.
    label = np.random.default_rng(0).integers(0, 9, GRID.shape).astype(np.uint8)
    logits = torch.from_numpy(np.moveaxis(label, axis, 0)[None].astype(np.float32))  # (1, n, A, B)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    watch = beside(label, lambda some, labels: seen.append((some, labels)), ignored=4, most_voxels=most)
    for start in range(0, logits.shape[1], 5):
        watch(LogitPlanes(start, logits[:, start : start + 5]), axis)
    expected = np.moveaxis(label, axis, 0)[::step, ::step, ::step]
    expected = expected[expected != 4]
    np.testing.assert_array_equal(torch.cat([labels for _, labels in seen]), expected)
    np.testing.assert_array_equal(torch.cat([some[0] for some, _ in seen]), expected)


def test_a_judge_without_calibration_says_everything_once(predictor: Predictor) -> None:
    judge = VoxelJudge(predictor, box(3))
    logits = torch.from_numpy(np.stack([box(3) == k for k in range(3)]).astype(np.float32))
    judge(LogitPlanes(0, logits), 0)
    assert list(judge.measures()) == ["ece", "brier", "ece_foreground", "brier_foreground"]
    predictor.temperature = 0.5
    surer = VoxelJudge(predictor, box(3))
    surer(LogitPlanes(0, logits), 0)
    measures = surer.measures()
    assert len(measures) == 8
    assert measures["brier"] < measures["brier_uncalibrated"] == judge.measures()["brier"]
    assert surer.seconds > 0
