"""Lesions: worked out by hand, on a line of voxels, and against panoptica on random components and a real patient."""

import csv
import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.evaluation.lesions.matching import matched, overlapping
from pipeline.evaluation.lesions.metrics import case_columns, counts_of, main_metrics, matches_at, quotient, ratios
from pipeline.evaluation.lesions.scoring import LesionRules, LesionScore, score_lesions
from pipeline.evaluation.lesions.summary import lesion_table, summarise_lesions
from pipeline.evaluation.metrics import METRICS, Row
from pipeline.evaluation.report import Evaluation, as_text, write_report, write_summary
from pipeline.evaluation.scored import ScoredCase, read_case_table, write_case_table
from pipeline.evaluation.statistics import summarise
from pipeline.evaluation.structures import Structures
from pipeline.geometry import Geometry
from pipeline.volumes.components import Components, Connectivity
from pipeline.volumes.volume import read_label

Labels = NDArray[np.uint8]
LESION = Structures({"lesion": (1,)})
RULES = LesionRules(("lesion",))
PEER = Path(__file__).parents[1] / "benchmarks" / "peers" / "panoptica_scores.py"


def line(text: str) -> Labels:
    """A row of voxels along x: a digit is a class index, anything else background."""
    return np.array([int(letter) if letter.isdigit() else 0 for letter in text], np.uint8)[:, None, None]


def grid(shape: tuple[int, ...], spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Geometry:
    return Geometry(shape, np.diag([*spacing, 1.0]))  # type: ignore[arg-type]


def scored(prediction: Labels, reference: Labels, rules: LesionRules = RULES) -> LesionScore:
    (found,) = score_lesions(prediction, reference, grid(reference.shape), LESION, rules)
    return found


def values(score: LesionScore, rules: LesionRules = RULES) -> dict[str, float]:
    return {name: quotient(ratio) for name, ratio in ratios(score, rules).items()}


# One lesion is found but for a voxel, one by a single voxel of three, one not at all, and one is not there.
REFERENCE = line(" 1111  111   11       ")
PREDICTED = line(" 111     1111      11 ")


def test_metrics_by_hand() -> None:
    score = scored(PREDICTED, REFERENCE)
    # IoU 3/4; 1 common of 3 + 4 - 1 = 6.
    assert [lesion.iou for lesion in score.of("reference")] == pytest.approx([3 / 4, 1 / 6, 0])
    assert [lesion.dice for lesion in score.of("reference")] == pytest.approx([6 / 7, 2 / 7, 0])
    assert counts_of(score) == {
        "lesions": 3,
        "lesions_predicted": 3,
        "lesions_detected": 2,
        "lesions_missed": 1,
        "lesions_spurious": 1,
    }
    found = values(score)
    assert found["lesion_sensitivity"] == found["lesion_precision"] == pytest.approx(2 / 3)
    assert found["lesion_f1_iou10"] == pytest.approx(2 / 3)
    assert found["lesion_f1_iou25"] == found["lesion_f1_iou50"] == pytest.approx(1 / 3)
    assert found["lesion_recall_iou50"] == found["lesion_precision_iou50"] == pytest.approx(1 / 3)
    assert found["lesion_sq_iou10"] == pytest.approx((3 / 4 + 1 / 6) / 2)
    assert found["lesion_sq_iou50"] == pytest.approx(3 / 4)
    assert found["lesion_pq_iou10"] == pytest.approx((3 / 4 + 1 / 6) / 3)
    assert found["lesion_pq_iou50"] == pytest.approx(1 / 3 * 3 / 4)


def test_lesions_are_numbered_by_size_and_lie_where_they_are_in_millimetres() -> None:
    geometry = Geometry((22, 1, 1), np.array([[0, 2.0, 0, 5], [-0.5, 0, 0, 7], [0, 0, 3, -1], [0, 0, 0, 1]]))
    (score,) = score_lesions(PREDICTED, REFERENCE, geometry, LESION, RULES)
    reference, prediction = score.of("reference"), score.of("prediction")
    assert [lesion.number for lesion in reference] == [1, 2, 3]
    assert [lesion.volume_ml for lesion in reference] == pytest.approx([4 * 0.003, 3 * 0.003, 2 * 0.003])
    # Voxels 1 to 4, 7 to 9, 13 and 14 of an axis that runs to the back by half a millimetre a voxel.
    assert np.array([lesion.centre_mm for lesion in reference]) == pytest.approx(
        np.array([[5, 7 - 0.5 * at, -1] for at in (2.5, 8, 13.5)])
    )
    assert [(lesion.status, lesion.partner) for lesion in reference] == [
        ("matched", 2),
        ("matched", 1),
        ("missed", None),
    ]
    assert [(lesion.status, lesion.partner) for lesion in prediction] == [
        ("matched", 2),
        ("matched", 1),
        ("spurious", None),
    ]


def test_of_two_candidates_the_one_of_the_larger_iou_is_the_partner() -> None:
    # One prediction over two lesions: both are detected, one is matched.
    score = scored(line(" 11111111 "), line(" 11111 11 "))
    assert [(lesion.status, lesion.partner) for lesion in score.lesions] == [
        ("matched", 1),
        ("touched", None),
        ("matched", 1),
    ]
    assert counts_of(score)["lesions_missed"] == counts_of(score)["lesions_spurious"] == 0
    at = matches_at(score, 0.1)
    assert (at.true_positives, at.false_positives, at.false_negatives) == (1, 0, 1)
    # The other way round.
    score = scored(line(" 11111 11 "), line(" 11111111 "))
    assert [lesion.status for lesion in score.of("prediction")] == ["matched", "touched"]


def test_the_matching_at_a_threshold_is_the_beginning_of_that_at_a_smaller_one() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        reference, prediction = (Components.of(blobs(rng, (14, 14, 14))) for _ in range(2))
        pairs = overlapping(reference, prediction)
        everything = [*matched(pairs)]
        for threshold in (0.05, 0.1, 0.3):
            alone = [*matched([pair for pair in pairs if pair.iou >= threshold])]
            assert alone == [pair for pair in everything if pair.iou >= threshold]


def test_an_iou_of_exactly_the_threshold_counts() -> None:
    score = scored(line(" 11 "), line(" 1  "))
    assert matches_at(score, 0.5).true_positives == 1
    assert matches_at(score, 0.5001).true_positives == 0


def test_nothing_to_find_and_nothing_found_is_no_error() -> None:
    empty, full = line("    "), line(" 11 ")
    assert all(math.isnan(value) for value in values(scored(empty, empty)).values())
    missed, spurious = values(scored(empty, full)), values(scored(full, empty))
    for found in (missed, spurious):
        assert found["lesion_f1_iou10"] == found["lesion_pq_iou50"] == 0
        assert math.isnan(found["lesion_sq_iou50"])
    assert (missed["lesion_sensitivity"], missed["lesion_recall_iou50"]) == (0, 0)
    assert math.isnan(missed["lesion_precision"])
    assert (spurious["lesion_precision"], spurious["lesion_precision_iou50"]) == (0, 0)
    assert math.isnan(spurious["lesion_sensitivity"])


def test_small_lesions_are_left_out_of_both_sides() -> None:
    rules = replace(RULES, smallest_mm3=3.0)
    score = scored(PREDICTED, REFERENCE, rules)
    assert [lesion.volume_ml for lesion in score.lesions] == pytest.approx([0.004, 0.003, 0.004, 0.003])
    assert counts_of(score)["lesions_missed"] == counts_of(score)["lesions_spurious"] == 0


@pytest.mark.parametrize(("connectivity", "lesions"), [(6, 2), (18, 1), (26, 1)])
def test_the_connectivity_is_a_choice(connectivity: Connectivity, lesions: int) -> None:
    reference = np.zeros((3, 3, 1), np.uint8)
    reference[0, 0] = reference[1, 1] = 1
    score = scored(reference, reference, replace(RULES, connectivity=connectivity))
    assert counts_of(score)["lesions"] == lesions
    assert values(score)["lesion_pq_iou50"] == 1


def test_what_the_reference_ignores_is_of_no_lesion() -> None:
    ignoring = Structures({"lesion": (1,)}, ignored=2)
    reference, prediction = line(" 11 22 221 "), line(" 11 11  11 ")
    (score,) = score_lesions(prediction, reference, grid(reference.shape), ignoring, RULES)
    assert [lesion.status for lesion in score.lesions] == ["matched"] * 4
    assert values(score)["lesion_pq_iou50"] == 1


def test_regions_are_counted_and_what_nobody_looked_for_is_not() -> None:
    reference, prediction = line(" 12  2 11 "), line(" 12  2  11")
    regions = Structures({"whole": (1, 2), "core": (1,)}, unknown=frozenset({"core"}))
    found = score_lesions(prediction, reference, grid(reference.shape), regions, LesionRules(("core", "whole")))
    assert [score.class_name for score in found] == ["whole"]
    assert [lesion.iou for lesion in found[0].of("reference")] == pytest.approx([1, 1 / 3, 1])
    assert score_lesions(prediction, reference, grid(reference.shape), regions, LesionRules()) == ()


# --- over cases


def case(case_id: str, patient: str, prediction: Labels, reference: Labels) -> ScoredCase:
    row = Row("lesion", "scored", 1.0, 1.0, dict.fromkeys(METRICS, 0.5))
    other = Row("organ", "scored", 1.0, 1.0, dict.fromkeys(METRICS, 0.5))
    return ScoredCase(case_id, patient, None, (row, other), 0.1, None, lesions=(scored(prediction, reference),))


CASES = (
    case("a", "p", PREDICTED, REFERENCE),
    case("b", "p", line(" 1 "), line(" 1 ")),
    case("c", "q", line("   "), line("   ")),
    case("d", "r", line("   "), line("1 1")),
)


def test_the_mean_case_and_all_lesions_together_are_two_numbers() -> None:
    (summary,) = summarise_lesions(CASES, RULES, samples=200, seed=0)
    assert (summary.cases, summary.counts["lesions"], summary.counts["lesions_missed"]) == (4, 6, 3)
    f1 = summary.metrics["lesion_f1_iou10"]
    assert f1.mean == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert f1.cases == 3
    # 3 true positives, 1 false positive, 3 false negatives.
    assert summary.pooled["lesion_f1_iou10"].mean == pytest.approx(3 / 5)
    assert summary.pooled["lesion_pq_iou10"].mean == pytest.approx((3 / 4 + 1 / 6 + 1) / 5)
    # Of p alone, of r alone: those are the ends of what resampled patients can give.
    assert (summary.pooled["lesion_f1_iou10"].low, summary.pooled["lesion_f1_iou10"].high) == (0, pytest.approx(0.75))
    logged = summary.as_metrics("evaluation/fold")
    assert logged["evaluation/fold/lesions_spurious/lesion"] == 1
    assert logged["evaluation/fold/lesion_f1_iou10/lesion"] == f1.mean
    assert logged["evaluation/fold/pooled_lesion_f1_iou10/lesion"] == pytest.approx(3 / 5)
    nothing = summarise_lesions([CASES[2]], RULES, samples=10, seed=0)[0].as_metrics("x")
    assert not any(math.isnan(value) for value in nothing.values())
    assert "x/lesion_f1_iou10/lesion" not in nothing


def test_tables_hold_every_lesion_and_a_column_a_metric(tmp_path: Path) -> None:
    table = lesion_table(CASES)
    assert len(table["case"]) == 6 + 2 + 0 + 2
    first = {name: column[0] for name, column in table.items()}
    assert first["case"] == "a"
    assert (first["side"], first["lesion"], first["status"], first["partner"]) == ("reference", 1, "matched", 2)
    assert (first["x_mm"], first["iou"]) == (2.5, 0.75)
    write_case_table(tmp_path / "cases.csv", CASES, RULES)
    with (tmp_path / "cases.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [lines[n]["lesions_missed"] for n in (0, 1, 6)] == ["1", "", "2"]
    assert [lines[n]["lesion_f1_iou10"] for n in (0, 1, 4, 6)] == ["0.666667", "", "nan", "0"]
    assert [*case_columns([None], RULES)] == [name for name in lines[0] if name.startswith("lesion")]
    assert [case.rows for case in read_case_table(tmp_path / "cases.csv")] == [case.rows for case in CASES]


def test_the_report_shows_lesions_where_they_are_counted(tmp_path: Path) -> None:
    summaries = tuple(summarise({c.case_id: c.rows for c in CASES}, samples=10, seed=0))
    bare = Evaluation("x", {}, "cpu", 1.0, CASES, {}, summaries)
    found = replace(bare, lesion_rules=RULES, lesions=summarise_lesions(CASES, RULES, samples=10, seed=0))
    assert "F1" not in as_text(bare)
    header, counted = next(
        lines
        for lines in zip(as_text(found).splitlines(), as_text(found).splitlines()[1:], strict=False)
        if lines[0].startswith("lesions")
    )
    assert all(said in header for said in main_metrics(RULES).values())
    assert counted.split()[:6] == ["lesion", "6", "4", "3", "3", "1"]
    write_summary(tmp_path / "summary.json", found)
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["lesion_rules"]["iou_thresholds"] == [0.1, 0.25, 0.5]
    assert content["lesions"]["lesion"]["metrics"]["lesion_f1_iou10"]["mean"] == pytest.approx(5 / 9)
    assert content["lesions"]["lesion"]["pooled"]["lesion_f1_iou10"]["mean"] == pytest.approx(3 / 5)
    write_report(tmp_path / "report.html", found, {}, {})
    page = (tmp_path / "report.html").read_text()
    assert "Lesion by lesion" in page
    assert all(said in page for said in ("any overlap", "IoU 0.25", "Panoptic quality", "together 0.6000"))
    write_report(tmp_path / "report.html", bare, {}, {})
    assert "Lesion by lesion" not in (tmp_path / "report.html").read_text()


# --- beside panoptica


def blobs(rng: np.random.Generator, shape: tuple[int, int, int], share: float = 0.12) -> NDArray[np.bool_]:
    """Random components of all sizes."""
    field = ndimage.gaussian_filter(rng.normal(size=shape), 1.2)
    return np.asarray(field > np.quantile(field, 1 - share))


def perturbed(reference: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    """A lesion mask of which some lesions are gone, some are shrunk, some shifted, and to which some are added."""
    rng = np.random.default_rng(seed)
    components, number = ndimage.label(reference, np.ones((3, 3, 3)))
    fate = rng.integers(4, size=number + 1)
    fate[0] = -1
    of_voxel = fate[components]
    result = (of_voxel == 0) | ndimage.binary_erosion(of_voxel == 1) | np.roll(of_voxel == 2, (1, 1, 0), (0, 1, 2))
    for place in rng.integers(20, 160, size=(10, 3)):
        result[tuple(slice(at, at + 3) for at in place)] = True
    return np.asarray(result)


def panoptica(python: Path, folder: Path, pairs: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> dict:  # type: ignore[type-arg]
    """Return name -> threshold -> what panoptica says of (prediction, reference)."""
    for name, (prediction, reference) in pairs.items():
        np.save(folder / f"{name}_prediction.npy", prediction.astype(np.uint8))
        np.save(folder / f"{name}_reference.npy", reference.astype(np.uint8))
    thresholds = [str(threshold) for threshold in RULES.iou_thresholds]
    answer = subprocess.run([python, PEER, folder, *thresholds], capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)  # type: ignore[no-any-return]


def assert_panoptica_agrees(
    python: Path, folder: Path, pairs: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]
) -> None:
    theirs = panoptica(python, folder, pairs)
    assert theirs.keys() == pairs.keys()
    for name, (prediction, reference) in pairs.items():
        score = scored(prediction.astype(np.uint8), reference.astype(np.uint8))
        found = values(score)
        for threshold in RULES.iou_thresholds:
            said, at = theirs[name][f"{threshold:g}"], matches_at(score, threshold)
            counts = (at.true_positives, at.false_positives, at.false_negatives)
            assert counts == (said["tp"], said["fp"], said["fn"]), (name, threshold)
            for ours, other in (("f1", "rq"), ("sq", "sq"), ("pq", "pq")):
                value = found[f"lesion_{ours}_iou{100 * threshold:g}"]
                # Where there is no pair panoptica calls the quality 0, which we say is not known.
                expected = 0.0 if math.isnan(value) else value
                assert said[other] == pytest.approx(expected, abs=1e-9), (name, threshold, ours)


@pytest.mark.slow
def test_random_components_are_scored_as_panoptica_does(peer_python: Callable[[str], Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    shape = (24, 20, 16)
    pairs = {f"apart_{n}": (blobs(rng, shape), blobs(rng, shape)) for n in range(6)}
    for n in range(6):
        mask = blobs(rng, shape)
        pairs[f"shifted_{n}"] = (np.roll(mask, 1, axis=n % 3), mask)
        pairs[f"eroded_{n}"] = (ndimage.binary_erosion(mask), mask)
    pairs["missed"] = (np.zeros(shape, bool), blobs(rng, shape))
    pairs["spurious"] = (blobs(rng, shape), np.zeros(shape, bool))
    assert_panoptica_agrees(peer_python("panoptica"), tmp_path, pairs)


@pytest.mark.slow
def test_a_patients_lesions_are_scored_as_panoptica_does(
    peer_python: Callable[[str], Path], shared_data: Path, tmp_path: Path
) -> None:
    (path,) = (shared_data / "OpenMS").rglob("GOLD_STANDARD*.nii.gz")
    reference = read_label(path).array > 0
    pairs = {f"seed_{seed}": (perturbed(reference, seed), reference) for seed in range(3)}
    assert_panoptica_agrees(peer_python("panoptica"), tmp_path, pairs)
    counts = counts_of(scored(pairs["seed_0"][0].astype(np.uint8), reference.astype(np.uint8)))
    assert counts["lesions"] == 98
    assert 0 < counts["lesions_missed"] < 98
    assert counts["lesions_spurious"] > 0
