"""What is said of members beside each other: worked out by hand, by counting every case, or against scipy's."""

import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import EvaluationError
from pipeline.evaluation.comparison.comparing import ComparisonResult, Pair, compare
from pipeline.evaluation.comparison.members import Member, MemberRun
from pipeline.evaluation.comparison.report import (
    as_markdown,
    as_text,
    draw_boxes,
    draw_scatter,
    write_page,
    write_tables,
)
from pipeline.evaluation.comparison.statistics import by_patient, holm, rank_shares, signed_rank_p
from pipeline.evaluation.metrics import METRICS, Row, Status
from pipeline.evaluation.scored import ScoredCase
from pipeline.evaluation.statistics import MEAN

NAN = float("nan")
NOTHING = dict.fromkeys(METRICS, NAN)


def slow_signed_rank_p(differences: list[float]) -> float:
    """The same by writing down every choice of signs."""
    from scipy.stats import rankdata

    ranks = [rank for rank, d in zip(rankdata(np.abs(differences)), differences, strict=True) if d]
    signs = [d > 0 for d in differences if d]
    sums = [sum(itertools.compress(ranks, chosen)) for chosen in itertools.product((0, 1), repeat=len(ranks))]
    found = sum(itertools.compress(ranks, signs))
    tails = np.mean([s <= found for s in sums]), np.mean([s >= found for s in sums])
    return float(min(1.0, 2 * min(tails)))


def test_signed_ranks_by_hand() -> None:
    # Ranks 1, 2, 3, the positive ones 2 + 3 = 5. Of the 8 sums 0 1 2 3 3 4 5 6 two are at least 5: p = 2 x 2/8.
    assert signed_rank_p([-0.1, 0.2, 0.3]) == 0.5
    # All of one sign: 2 x 1/2^n, whatever the sizes.
    assert signed_rank_p([1.0, 2.0, 4.0, 3.0, 9.0, 0.5]) == 2 / 2**6
    assert signed_rank_p([-1.0] * 5) == 2 / 2**5
    # |d| 0 0 1 2: both zeros have rank 1.5 and fall out of the sum; 3 and 4 stay, of whose 4 sums one is 7.
    assert signed_rank_p([0.0, 1.0, 0.0, 2.0]) == 0.5
    assert signed_rank_p([0.0, 0.0]) == 1.0
    assert math.isnan(signed_rank_p([NAN]))


@pytest.mark.parametrize("seed", range(4))
def test_signed_ranks_with_ties_and_zeros_equal_those_of_every_choice_of_signs(seed: int) -> None:
    differences = np.random.default_rng(seed).integers(-2, 4, size=9).astype(float)
    assert signed_rank_p([*differences, NAN]) == pytest.approx(slow_signed_rank_p(list(differences)), abs=1e-12)


@pytest.mark.parametrize("size", [6, 40])
def test_signed_ranks_without_ties_equal_scipys(size: int) -> None:
    from scipy.stats import wilcoxon

    differences = np.random.default_rng(1).normal(0.2, 1.0, size)
    assert signed_rank_p(differences) == pytest.approx(wilcoxon(differences, method="exact").pvalue, rel=1e-6)


def test_many_signed_ranks_with_ties_are_near_scipys_approximation() -> None:
    from scipy.stats import wilcoxon

    differences = np.random.default_rng(2).integers(-5, 7, 300).astype(float)
    theirs = wilcoxon(differences, zero_method="pratt", method="approx").pvalue
    assert signed_rank_p(differences) == pytest.approx(theirs, rel=0.05)


def test_holm_by_hand() -> None:
    # In order: 4 x 0.01, 3 x 0.02, 2 x 0.03, 1 x 0.5; none below the one before.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.2, 0.9]) == pytest.approx([0.4, 0.9])
    assert holm([0.4, 0.45]) == pytest.approx([0.8, 0.8])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    corrected = holm([NAN, 0.01, 0.04])
    assert math.isnan(corrected[0])
    assert corrected[1:] == pytest.approx([0.02, 0.04])


def test_rank_shares_by_hand() -> None:
    # Two patients: drawn twice the first (1/4) a wins, twice the second (1/4) b wins, one each (1/2) a wins by 3 to 2.
    values = np.array([[3.0, 0.0], [0.0, 2.0]])
    shares = rank_shares(values, higher_is_better=True, samples=20000, seed=0)
    np.testing.assert_allclose(shares, [[0.75, 0.25], [0.25, 0.75]], atol=0.02)
    lower = rank_shares(values, higher_is_better=False, samples=20000, seed=0)
    np.testing.assert_allclose(lower, shares[::-1])


def test_members_that_tie_share_the_better_rank() -> None:
    values = np.array([[0.5, 0.7], [0.5, 0.7], [0.1, 0.2]])
    shares = rank_shares(values, higher_is_better=True, samples=50, seed=0)
    np.testing.assert_array_equal(shares, [[1, 0, 0], [1, 0, 0], [0, 0, 1]])
    assert np.isnan(rank_shares(np.zeros((2, 0)), higher_is_better=True, samples=5, seed=0)).all()


def test_a_patients_cases_are_averaged() -> None:
    table = np.array([[1.0, 3.0, 5.0, NAN], [NAN, 2.0, NAN, NAN]])
    found = by_patient(table, ["b", "b", "a", "c"])
    np.testing.assert_array_equal(found, [[5.0, 2.0, NAN], [NAN, 2.0, NAN]])


def scored(case_id: str, *dice: float, patient: str | None = None, seconds: float = 0.5) -> ScoredCase:
    """A case with one class a value, left and right; nan is a structure that was missed."""
    rows = [
        Row(name, "missed" if math.isnan(value) else "scored", 2.0, 1.0, dict.fromkeys(METRICS, value))
        for name, value in zip(("left", "right"), dice, strict=True)
    ]
    return ScoredCase(case_id, patient or case_id, 0, tuple(rows), seconds, 2**30)


BASE = MemberRun(
    fold=0,
    seed=0,
    network="unet",
    parameters=1234,
    manifest="phantoms@abc",
    structures=("left", "right"),
    budget="10 minutes",
    steps=300,
    seconds=600.0,
    evaluated_on="fold",
    tolerance_mm=1.0,
    device="cpu",
    settings={"network.name": "unet", "seed": "0"},
    cases=(),
    failures={},
    run_id=None,
)


def member(name: str, *cases: ScoredCase, **changes: object) -> Member:
    return Member(name, (replace(BASE, cases=cases, **changes),))  # type: ignore[arg-type]


FIRST = member("first", scored("a", 0.9, 0.7), scored("b", 0.8, 0.6), scored("c", 0.7, 0.5))
SECOND = member("second", scored("a", 0.8, 0.7), scored("b", 0.5, 0.5), scored("c", 0.9, 0.5), settings={"seed": "1"})


def pair_of(result: ComparisonResult, metric: str, class_name: str) -> Pair:
    (found,) = (p for p in result.pairs if (p.metric, p.class_name) == (metric, class_name))
    return found


def test_means_and_differences_by_hand() -> None:
    result = compare("two", [FIRST, SECOND], samples=50)
    assert result.estimates["first", "dice", "left"].mean == pytest.approx(0.8)
    assert result.estimates["first", "dice", MEAN].mean == pytest.approx(0.7)
    # left: 0.1, 0.3, -0.2: ranks 1, 3, 2. Of the 8 sums 0 1 2 3 3 4 5 6 three are at least 4: p = 2 x 3/8.
    left = pair_of(result, "dice", "left")
    assert left.difference.mean == pytest.approx(0.2 / 3)
    assert (left.better, left.worse, left.p, left.p_holm) == (2, 1, 0.75, 0.75)
    # right: 0, 0.1, 0: the zeros share rank 1.5 and fall out, one sign is left.
    right = pair_of(result, "dice", "right")
    assert (right.better, right.worse, right.p) == (1, 0, 1.0)
    # A distance that is larger is worse: the same values count the other way.
    assert (pair_of(result, "hd95", "left").better, pair_of(result, "hd95", "left").worse) == (1, 2)


def test_holm_counts_the_pairs_of_one_metric_and_class() -> None:
    cases = [scored(str(n), 0.1 + n / 100, 0.5) for n in range(8)]
    better = [scored(str(n), 0.2 + n / 70, 0.5) for n in range(8)]
    result = compare("three", [member("a", *cases), member("b", *better), member("c", *cases)], samples=10)
    left = {(p.first, p.second): p for p in result.pairs if (p.metric, p.class_name) == ("dice", "left")}
    assert left["a", "b"].p == left["b", "c"].p == 2 / 2**8
    assert [left[pair].p_holm for pair in (("a", "b"), ("b", "c"))] == [3 * 2 / 2**8] * 2
    assert left["a", "c"].p_holm == 1.0


def test_two_cases_of_a_patient_are_one_pair_and_seeds_are_averaged_first() -> None:
    def two_seeds(name: str, shift: float) -> Member:
        runs = [
            replace(
                BASE,
                seed=seed,
                cases=(
                    scored("a1", 0.5 + shift + more, 0.5, patient="a"),
                    scored("a2", 0.7 + shift + more, 0.5, patient="a"),
                    scored("b", 0.2 + shift + more, 0.5),
                ),
            )
            for seed, more in ((3, 0.0), (4, 0.1))
        ]
        return Member(name, tuple(runs))

    result = compare("seeds", [two_seeds("x", 0.0), two_seeds("y", 0.1)], samples=20)
    # Case by case 0.55, 0.75 and 0.25; patients 0.65 and 0.25.
    assert result.estimates["x", "dice", "left"].mean == pytest.approx(0.45)
    found = pair_of(result, "dice", "left")
    assert (found.difference.cases, found.worse) == (2, 2)
    assert found.difference.mean == pytest.approx(-0.1)
    assert result.patients == 2


def test_a_missed_structure_counts_nothing_in_overlap_and_leaves_the_pairs_of_distances() -> None:
    missing = member("second", scored("a", 0.8, 0.7), scored("b", NAN, 0.5), scored("c", 0.9, 0.5))
    result = compare("missed", [FIRST, missing], samples=20)
    # Of b the left side is missed: 0.8 - 0 in Dice.
    left = np.mean([0.1, 0.8, -0.2])
    assert pair_of(result, "dice", "left").difference.mean == pytest.approx(left)
    assert result.estimates["second", "dice", "left"].mean == pytest.approx((0.8 + 0.0 + 0.9) / 3)
    assert result.ranking("dice", "left").patients == 3
    assert pair_of(result, "hd95", "left").difference.cases == 2
    assert result.estimates["second", "hd95", "left"].cases == 2
    assert result.ranking("hd95", "left").patients == 2
    # The mean over classes of the difference takes what both have: of b only the right side, 0.6 - 0.5.
    expected = np.mean([(0.1 + 0.0) / 2, 0.1, (-0.2 + 0.0) / 2])
    assert pair_of(result, "hd95", MEAN).difference.mean == pytest.approx(expected)
    assert any("second: 1 structures missed" in line for line in result.warnings)


def test_whoever_invents_a_structure_loses_to_whoever_does_not() -> None:
    def of(name: str, status: Status) -> Member:
        rows = [Row("left", "scored", 2.0, 1.0, dict.fromkeys(METRICS, 0.8)), Row("right", status, 0.0, 1.0, NOTHING)]
        invented = [ScoredCase(case_id, case_id, 0, tuple(rows), 0.5, None) for case_id in "ab"]
        empty = replace(invented[0], case_id="c", patient="c", rows=(rows[0], replace(rows[1], status="both_empty")))
        return member(name, *invented, empty)

    result = compare("invented", [of("good", "both_empty"), of("bad", "spurious")], samples=20)
    # Of c nobody says that there is a right side: it counts for neither.
    means = {name: result.estimates[name, "dice", "right"] for name in ("good", "bad")}
    assert [(means[name].mean, means[name].cases) for name in ("good", "bad")] == [(1.0, 2), (0.0, 2)]
    found = pair_of(result, "dice", "right")
    assert (found.difference.mean, found.better, found.difference.cases) == (1.0, 2, 2)
    assert result.ranking("dice", "right").shares == {"good": (1.0, 0.0), "bad": (0.0, 1.0)}
    assert pair_of(result, "dice", MEAN).difference.mean == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert pair_of(result, "hd95", "right").difference.cases == 0


def test_what_differs_by_rounding_alone_ties_for_the_test_and_for_the_count() -> None:
    first, second = (member(name, scored("a", dice, 0.5)) for name, dice in (("first", 0.1 + 0.2), ("second", 0.3)))
    found = pair_of(compare("rounded", [first, second], samples=20), "dice", "left")
    assert (found.better, found.worse, found.p) == (0, 0, 1.0)


def test_a_structure_that_nobody_looked_for_has_one_reference_unless_a_member_has_another() -> None:
    left = Row("left", "scored", 2.0, 1.0, dict.fromkeys(METRICS, 0.8))
    unknown = Row("right", "not_annotated", NAN, 1.0, NOTHING)
    case = ScoredCase("a", "a", 0, (left, unknown), 0.5, None)
    result = compare("partly", [member("first", case), member("second", case)], samples=20)
    assert [result.estimates["first", "dice", name].cases for name in ("left", "right")] == [1, 0]
    drawn = replace(case, rows=(left, replace(unknown, status="missed", reference_ml=2.0)))
    with pytest.raises(EvaluationError, match="case a, right: the reference has nan ml in first, 2 ml in second"):
        compare("drawn", [member("first", case), member("second", drawn)])


def test_members_that_cannot_be_compared_are_refused_with_every_reason() -> None:
    cases = FIRST.runs[0].cases
    other = Member(
        "other",
        (
            replace(
                BASE,
                budget="20 minutes",
                manifest="phantoms@def",
                tolerance_mm=2.0,
                cases=(cases[0], replace(cases[1], rows=(replace(cases[1].rows[0], reference_ml=9.0),))),
                failures={"d": "cut short"},
            ),
            replace(BASE, fold=1, cases=(scored("e", 0.5, 0.5),)),
        ),
    )
    with pytest.raises(EvaluationError) as error:
        compare("refused", [FIRST, other])
    assert str(error.value).splitlines() == [
        "different data sets: first: phantoms@abc; other: phantoms@abc and phantoms@def",
        "different folds: first: 0, 1 seed; other: 0 1, 1 seed",
        "different surface tolerances: first: 1 mm; other: 1 mm and 2 mm",
        "different budgets: first: 10 minutes; other: 10 minutes and 20 minutes",
        "other, fold 0: case d failed: cut short",
        "other, fold 0: without c",
        "case b, left: the reference has 2 ml in first, 9 ml in other",
    ]


def test_different_budgets_may_be_allowed_and_are_said() -> None:
    longer = Member("longer", (replace(SECOND.runs[0], budget="20 minutes"),))
    with pytest.raises(EvaluationError, match="different budgets: first: 10 minutes; longer: 20 minutes"):
        compare("budgets", [FIRST, longer])
    result = compare("budgets", [FIRST, longer], samples=10, same_budget=False)
    assert any(line.startswith("different budgets") for line in result.warnings)


def test_another_number_of_seeds_is_refused() -> None:
    twice = Member("twice", (*SECOND.runs, replace(SECOND.runs[0], seed=1)))
    with pytest.raises(EvaluationError, match="different folds: first: 0, 1 seed; twice: 0, 2 seeds"):
        compare("seeds", [FIRST, twice])


def test_one_member_two_names_alike_or_an_unknown_baseline_are_refused() -> None:
    with pytest.raises(EvaluationError, match="two or more members"):
        compare("one", [FIRST])
    with pytest.raises(EvaluationError, match="different names, got first, first"):
        compare("alike", [FIRST, FIRST])
    with pytest.raises(EvaluationError, match="--baseline third: is none of the members first, second"):
        compare("baseline", [FIRST, SECOND], baseline="third")


def test_the_tables_hold_every_metric(tmp_path: Path) -> None:
    result = compare("two", [FIRST, SECOND], samples=50)
    write_tables(tmp_path, result)
    lines = {path.stem: list(csv.DictReader(path.read_text().splitlines())) for path in tmp_path.glob("*.csv")}
    assert {name: len(rows) for name, rows in lines.items()} == {
        "comparison": 2,
        "pairs": len(METRICS) * 3,
        "ranks": len(METRICS) * 3 * 2,
        "cases": 2 * 3 * 2,
    }
    first = lines["comparison"][0]
    assert (first["member"], first["network"], first["parameters"], first["steps"]) == ("first", "unet", "1234", "300")
    assert (first["seconds_per_case"], first["peak_memory_bytes"], first["device"]) == ("0.5", str(2**30), "cpu")
    assert float(first["dice/left"]) == pytest.approx(0.8)
    assert float(first["dice/left/low"]) <= 0.8 <= float(first["dice/left/high"])
    assert [(row["member"], row["case"], row["class"], row["dice"]) for row in lines["cases"][:2]] == [
        ("first", "a", "left", "0.9"),
        ("first", "a", "right", "0.7"),
    ]
    assert [row["p"] for row in lines["pairs"] if (row["metric"], row["class"]) == ("dice", "left")] == ["0.75"]


def test_markdown_page_and_pictures_say_the_same(tmp_path: Path) -> None:
    odd = replace(SECOND, name="<b>second|")
    result = compare("two", [FIRST, odd], samples=50, baseline="<b>second|")
    text = as_markdown(result)
    assert "| first | unet | 1,234 | 300 | 10.0 min | 0.5 | 1.00 GiB, cpu | 0.7000 [" in text
    assert "| <b>second\\| | unet |" in text
    assert "| network.name | unet | – |" in text
    assert "3 cases of 3 patients" in text
    for path, draw in ((tmp_path / "boxes.png", draw_boxes), (tmp_path / "scatter.png", draw_scatter)):
        draw(path, result)
        assert path.read_bytes().startswith(b"\x89PNG")
    write_page(tmp_path / "c.html", result, {tmp_path / "boxes.png": "boxes", tmp_path / "scatter.png": "scatter"})
    page = (tmp_path / "c.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;b&gt;second|" in page
    assert "<b>second" not in page
    assert "Wilcoxon" in page
    assert "first" in as_text(result)


def test_what_an_old_evaluation_does_not_say_is_unknown() -> None:
    def old(case: ScoredCase) -> ScoredCase:
        return replace(case, seconds=NAN, peak_memory_bytes=None)

    run = replace(FIRST.runs[0], cases=tuple(map(old, FIRST.runs[0].cases)), steps=None, seconds=None, device="")
    text = as_markdown(compare("old", [Member("first", (run,)), SECOND], samples=10))
    assert "| first | unet | 1,234 | – | – | – | – | 0.7000 [" in text
