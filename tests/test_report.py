"""Reports: what is written is what was found, nan and failures included, and the page asks for nothing."""

import csv
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import EvaluationError
from pipeline.evaluation.metrics import METRICS, Row, Status
from pipeline.evaluation.report import (
    Evaluation,
    as_text,
    draw_distributions,
    draw_predictions,
    pick_cases,
    write_report,
    write_summary,
)
from pipeline.evaluation.scored import RELIABILITY, ScoredCase, read_case_table, write_case_table
from pipeline.evaluation.self_assessment import assess_dice, estimate_reliability, spearman
from pipeline.evaluation.statistics import MEAN, summarise

NAN = float("nan")
PNG = b"\x89PNG\r\n\x1a\n"


def case(case_id: str, *scores: float | Status) -> ScoredCase:
    """A case with one class a score; a status instead of a number is a class without one."""
    rows = []
    for index, score in enumerate(scores):
        value = score if isinstance(score, float) else NAN
        status: Status = "scored" if isinstance(score, float) else score
        rows.append(Row(("left", "right")[index], status, 2.0, 1.0, dict.fromkeys(METRICS, value)))
    return ScoredCase(case_id, case_id, 0, tuple(rows), 0.1, 2**20)


CASES = (
    replace(case("a", 0.9, 0.8), predicted_dice={"left": 0.85}, reliability={"ece": 0.02, "brier": 0.1}),
    replace(case("b", 0.7, "missed"), predicted_dice={"left": 0.8}, reliability={"ece": 0.04}),
    replace(case("<c>", "spurious", 0.6), predicted_dice={"left": 0.25, "right": 0.5}),
    case("d", "both_empty", 0.5),
)


@pytest.fixture
def evaluation() -> Evaluation:
    summaries = summarise({c.case_id: c.rows for c in CASES}, samples=200, seed=0)
    failures = {"e": "e.nii.gz: cut short <script>alert(1)</script>"}
    reliability = estimate_reliability(CASES, samples=200, seed=0)
    predictions = tuple(assess_dice(CASES))
    facts = {"model": "runs/x & y"}
    return Evaluation(
        "phantoms, fold 0", facts, "cpu", 1.5, CASES, failures, tuple(summaries), reliability, predictions
    )


def test_the_case_table_keeps_nan_and_says_why(tmp_path: Path) -> None:
    write_case_table(tmp_path / "cases.csv", CASES)
    with (tmp_path / "cases.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["case"], line["class"], line["status"]) for line in lines[:4]] == [
        ("a", "left", "scored"),
        ("a", "right", "scored"),
        ("b", "left", "scored"),
        ("b", "right", "missed"),
    ]
    assert len(lines) == 8
    assert list(lines[0])[7:] == [*METRICS, "predicted_dice", "seconds", "peak_memory_bytes", *RELIABILITY]
    assert [lines[0][name] for name in ("predicted_dice", "ece", "ece_uncalibrated")] == ["0.85", "0.02", "nan"]
    assert lines[1]["predicted_dice"] == "nan"
    assert float(lines[0]["dice"]) == 0.9
    assert {lines[3][name] for name in METRICS} == {"nan"}
    assert lines[3]["reference_ml"] == "2"


def test_the_case_table_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_case_table(tmp_path / "cases.csv", CASES)
    # nan differs from itself, its text does not.
    assert list(map(str, read_case_table(tmp_path / "cases.csv"))) == list(map(str, CASES))
    with (tmp_path / "cases.csv").open(newline="") as file:
        lines = [line.rsplit(",", 3 + len(RELIABILITY))[0] for line in file.read().splitlines()]
    (tmp_path / "older.csv").write_text("\n".join(lines) + "\n")
    (older, *_) = read_case_table(tmp_path / "older.csv")
    assert math.isnan(older.seconds)
    assert older.peak_memory_bytes is None
    assert older.predicted_dice == older.reliability == {}
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(EvaluationError, match=r"other\.csv: not a table of scored cases"):
        read_case_table(tmp_path / "other.csv")


def test_the_summary_is_strict_json(tmp_path: Path, evaluation: Evaluation) -> None:
    write_summary(tmp_path / "summary.json", evaluation)
    text = (tmp_path / "summary.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["surface_tolerance_mm"] == 1.5
    assert content["failures"].keys() == {"e"}
    assert list(content["classes"]) == ["left", "right", "mean"]
    left = content["classes"]["left"]
    assert (left["scored"], left["missed"], left["spurious"]) == (2, 0, 1)
    assert left["metrics"]["dice"]["mean"] == pytest.approx(0.8)
    assert left["metrics"]["dice"]["cases"] == 2
    assert content["classes"]["mean"]["missed"] == 1
    assert {name: (e["mean"], e["cases"]) for name, e in content["reliability"].items()} == {
        "ece": (pytest.approx(0.03), 2),
        "brier": (0.1, 1),
    }
    # a: 0.85 of 0.9; b: 0.8 of 0.7; c: 0.25 of a structure that is not there. Ranks: 3 2 1 against 3 2 1.
    left = content["predicted_dice"]["left"]
    assert left == {"cases": 3, "mean_absolute_error": pytest.approx(0.4 / 3), "spearman": pytest.approx(1.0)}
    assert content["predicted_dice"]["right"] == {
        "cases": 1,
        "mean_absolute_error": pytest.approx(0.1),
        "spearman": None,
    }
    # Of a the mean is over the left alone, of which it has both; of c over both: 0.375 of 0.3.
    assert content["predicted_dice"][MEAN]["mean_absolute_error"] == pytest.approx((0.05 + 0.1 + 0.075) / 3)


def test_a_mean_without_cases_is_null_and_no_value(tmp_path: Path) -> None:
    cases = (case("a", "missed"),)
    summaries = tuple(summarise({"a": cases[0].rows}, samples=10, seed=0))
    nothing = Evaluation("x", {}, "cpu", 1.0, cases, {}, summaries)
    write_summary(tmp_path / "summary.json", nothing)
    dice = json.loads((tmp_path / "summary.json").read_text())["classes"]["left"]["metrics"]["dice"]
    assert dice == {"mean": None, "low": None, "high": None, "cases": 0}
    assert "no value" in as_text(nothing)


def test_the_text_has_mean_interval_counts_and_failures(evaluation: Evaluation) -> None:
    lines = as_text(evaluation).splitlines()
    assert lines[0] == "phantoms, fold 0: 4 cases"
    assert lines[1].split()[:3] == ["scored", "missed", "spurious"]
    right = next(line for line in lines if line.startswith("right"))
    estimate = evaluation.summaries[1].metrics["dice"]
    assert right.split()[1:4] == ["3", "1", "0"]
    assert f"0.6333 [{estimate.low:.4f}, {estimate.high:.4f}]" in right
    assert lines[-1].startswith("failed: e: e.nii.gz: cut short")
    assert "confidence on the plan's grid: ECE 0.0300; Brier score 0.1000" in lines
    assert any(line.startswith("predicted Dice, mean absolute error: left 0.133 (rank") for line in lines)


def test_a_model_that_says_nothing_of_itself_has_no_such_lines() -> None:
    bare = case("a", 0.9, 0.8)
    assert assess_dice([bare]) == []
    assert assess_dice([]) == []
    assert estimate_reliability([bare], samples=10, seed=0) == {}
    summaries = tuple(summarise({"a": bare.rows}, samples=10, seed=0))
    text = as_text(Evaluation("x", {}, "cpu", 1.0, (bare,), {}, summaries))
    assert "confidence" not in text
    assert "predicted" not in text


def test_rank_correlation_by_hand() -> None:
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, 9.0])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1)
    # Ranks 1 2 3 4 and 1.5 1.5 3 4: 4.5 / sqrt(5 * 4.5).
    assert spearman(np.arange(4.0), np.array([5.0, 5.0, 6.0, 7.0])) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])))


def test_worst_median_and_best_are_picked_once_each() -> None:
    cases = [case(f"c{n}", n / 10) for n in (5, 1, 9, 3, 7, 2, 8, 4, 6)]
    assert pick_cases(cases, 1) == {"c1": "worst", "c5": "median", "c9": "best"}
    assert list(pick_cases(cases, 3)) == [f"c{n}" for n in range(1, 10)]
    assert list(pick_cases(cases, 3).values()) == ["worst"] * 3 + ["median"] * 3 + ["best"] * 3
    assert pick_cases(cases[:2], 3) == {"c1": "worst", "c5": "best"}
    assert pick_cases(cases[:1], 3) == {"c5": "worst"}
    assert pick_cases([], 3) == {}


def test_a_missed_class_is_worse_than_a_poor_one_and_an_empty_case_has_no_place() -> None:
    cases = [case("poor", 0.3, 0.3), case("missed", 0.5, "missed"), case("empty", "both_empty", "both_empty")]
    assert pick_cases([*cases, case("good", 0.9, 0.9)], 1) == {"missed": "worst", "poor": "median", "good": "best"}


class Page(HTMLParser):
    """Everything in a page that a browser would fetch, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_stands_alone(tmp_path: Path, evaluation: Evaluation) -> None:
    draw_distributions(tmp_path / "distributions.png", evaluation)
    assert (tmp_path / "distributions.png").read_bytes().startswith(PNG)
    draw_predictions(tmp_path / "predicted_dice.png", evaluation)
    assert (tmp_path / "predicted_dice.png").read_bytes().startswith(PNG)
    figures = {"distributions": tmp_path / "distributions.png", "predictions": tmp_path / "predicted_dice.png"}
    picture = tmp_path / "a.png"
    picture.write_bytes(PNG)
    write_report(tmp_path / "report.html", evaluation, figures, {picture: "worst: <c>"})
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert len(page.fetched) == 3
    assert all(address.startswith("data:image/png;base64,") for address in page.fetched)
    assert "http" not in text.replace("http-equiv", "")
    # What comes from file names and error messages is text, never markup.
    assert page.tags.count("script") == 1
    assert "<script>alert(1)</script>" in page.words
    assert "worst: <c>" in page.words
    for metric in METRICS.values():
        assert metric.long_name in page.words
        assert metric.source in page.words
    assert "1 missed, 0 spurious of 4" in page.words
    assert "within 1.5 mm" in page.words
    assert "ECE0.0300" in "".join(page.words.split())
    assert "0.1333" in page.words
    assert page.words.count("nan") >= 3 * len(METRICS)
