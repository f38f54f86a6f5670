"""Reports: what is written is what was found, nan and failures included, and the page asks for nothing."""

import csv
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.errors import EvaluationError
from pipeline.evaluation.metrics import METRICS, Row, Status
from pipeline.evaluation.report import (
    Evaluation,
    ScoredCase,
    as_text,
    draw_distributions,
    pick_cases,
    read_case_table,
    write_case_table,
    write_report,
    write_summary,
)
from pipeline.evaluation.statistics import summarise

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


CASES = (case("a", 0.9, 0.8), case("b", 0.7, "missed"), case("<c>", "spurious", 0.6), case("d", "both_empty", 0.5))


@pytest.fixture
def evaluation() -> Evaluation:
    summaries = summarise({c.case_id: c.rows for c in CASES}, samples=200, seed=0)
    failures = {"e": "e.nii.gz: cut short <script>alert(1)</script>"}
    return Evaluation("phantoms, fold 0", {"model": "runs/x & y"}, "cpu", 1.5, CASES, failures, tuple(summaries))


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
    assert list(lines[0])[7:] == [*METRICS, "seconds", "peak_memory_bytes"]
    assert float(lines[0]["dice"]) == 0.9
    assert {lines[3][name] for name in METRICS} == {"nan"}
    assert lines[3]["reference_ml"] == "2"


def test_the_case_table_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_case_table(tmp_path / "cases.csv", CASES)
    # nan differs from itself, its text does not.
    assert list(map(str, read_case_table(tmp_path / "cases.csv"))) == list(map(str, CASES))
    with (tmp_path / "cases.csv").open(newline="") as file:
        lines = [line.rsplit(",", 2)[0] for line in file.read().splitlines()]
    (tmp_path / "older.csv").write_text("\n".join(lines) + "\n")
    (older, *_) = read_case_table(tmp_path / "older.csv")
    assert math.isnan(older.seconds)
    assert older.peak_memory_bytes is None
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
    picture = tmp_path / "a.png"
    picture.write_bytes(PNG)
    write_report(tmp_path / "report.html", evaluation, tmp_path / "distributions.png", {picture: "worst: <c>"})
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert len(page.fetched) == 2
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
    assert page.words.count("nan") >= 3 * len(METRICS)
