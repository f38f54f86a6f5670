"""Statistics: means, intervals and counts, worked out by hand or against scipy's."""

import itertools
import math

import numpy as np
import pytest

from pipeline.evaluation.metrics import Row, Status
from pipeline.evaluation.statistics import MEAN, bootstrap_interval, estimate_ratio, mean_known, summarise

NAN = float("nan")


def row(class_name: str, dice: float, status: Status = "scored") -> Row:
    return Row(class_name, status, 1.0, 1.0, {"dice": dice})


def test_the_interval_of_three_values_equals_the_distribution_of_all_resamples() -> None:
    values = [0.2, 0.5, 0.9]
    every = sorted(np.mean(drawn) for drawn in itertools.product(values, repeat=3))
    # 27 equally likely resamples: the 2.5 % and 97.5 % points lie on the outermost ones, each of probability 1/27.
    low, high = bootstrap_interval(values, samples=20000, seed=1)
    assert (low, high) == pytest.approx((every[0], every[-1]))
    low, high = bootstrap_interval(values, samples=20000, seed=1, confidence=0.8)
    assert (low, high) == pytest.approx((np.quantile(every, 0.1), np.quantile(every, 0.9)), abs=0.02)


def test_the_interval_agrees_with_scipys() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(0).beta(8, 1, size=40)
    theirs = bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0))
    ours = bootstrap_interval(values, samples=9999, seed=0)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=2e-3)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for repeat in range(300):
        low, high = bootstrap_interval(rng.normal(0.8, 0.1, size=30), samples=400, seed=repeat)
        covered += low <= 0.8 <= high
    assert 0.90 < covered / 300 < 0.98


def test_the_interval_is_seeded() -> None:
    values = np.linspace(0, 1, 20)
    assert bootstrap_interval(values, samples=500, seed=3) == bootstrap_interval(values, samples=500, seed=3)
    assert bootstrap_interval(values, samples=500, seed=3) != bootstrap_interval(values, samples=500, seed=4)


def test_nan_is_left_out_and_too_few_values_have_no_interval() -> None:
    known = bootstrap_interval([0.5, 0.7, 0.9], samples=500, seed=0)
    assert bootstrap_interval([NAN, 0.5, 0.7, NAN, 0.9], samples=500, seed=0) == known
    for values in ([], [0.5], [NAN, 0.5], [NAN, NAN]):
        assert all(math.isnan(end) for end in bootstrap_interval(values, samples=10, seed=0))


def test_a_ratio_of_sums_and_its_interval_by_hand() -> None:
    # Of patient a 3 of 4, in two cases, of b 1 of 1, of c nothing of nothing: 4 of 5 in all.
    ratios, patients = [(1, 2), (2, 2), (1, 1), (0, 0)], ["a", "a", "b", "c"]
    found = estimate_ratio(ratios, samples=500, seed=0, patients=patients)
    assert found.mean == pytest.approx(4 / 5)
    assert found.cases == 3
    # The resamples are aaa, aab, ...: 3/4 where a is drawn and b is not, 1 where b is drawn and a is not.
    assert (found.low, found.high) == pytest.approx((0.75, 1.0))
    nothing = estimate_ratio([(0, 0), (0, 0)], samples=10, seed=0, patients=["a", "b"])
    assert all(math.isnan(value) for value in (nothing.mean, nothing.low, nothing.high))
    alone = estimate_ratio([(1, 2)], samples=10, seed=0, patients=["a"])
    assert alone.mean == 0.5
    assert math.isnan(alone.low)


def test_two_visits_of_a_patient_are_drawn_together() -> None:
    values = [0.1, 0.1, 0.9, 0.9, 0.4, 0.4]
    patients = ["a", "a", "b", "b", "c", "c"]
    alone = bootstrap_interval([0.1, 0.9, 0.4], samples=2000, seed=0)
    assert bootstrap_interval(values, samples=2000, seed=0, patients=patients) == pytest.approx(alone)
    apart = bootstrap_interval(values, samples=2000, seed=0)
    assert apart[1] - apart[0] < alone[1] - alone[0]
    assert all(math.isnan(end) for end in bootstrap_interval(values, samples=10, seed=0, patients=["a"] * 6))


def test_many_cases_are_drawn_in_blocks() -> None:
    # 5000 x 2000 draws are several blocks; the interval of so many is the normal one.
    values = np.random.default_rng(5).normal(0.8, 0.1, size=5000)
    half_width = 1.96 * values.std() / math.sqrt(values.size)
    low, high = bootstrap_interval(values, samples=2000, seed=3)
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=2e-4)


def test_means_over_what_is_known() -> None:
    table = np.array([[1.0, NAN, NAN, 4.0], [3.0, 5.0, NAN, NAN]])
    np.testing.assert_array_equal(mean_known(table), [2.0, 5.0, NAN, 4.0])


def test_a_summary_states_what_its_means_leave_out() -> None:
    table = {
        "a": [row("left", 0.9), row("right", 0.7)],
        "b": [row("left", 0.8), row("right", NAN, "missed")],
        "c": [row("left", NAN, "spurious"), row("right", 0.5)],
        "d": [row("left", NAN, "both_empty"), row("right", NAN, "missed")],
    }
    left, right, mean = summarise(table, samples=100, seed=0)
    assert (left.class_name, right.class_name, mean.class_name) == ("left", "right", MEAN)
    assert (left.scored, left.missed, left.spurious) == (2, 0, 1)
    assert (right.scored, right.missed, right.spurious) == (2, 2, 0)
    assert (mean.scored, mean.missed, mean.spurious) == (4, 2, 1)
    assert left.metrics["dice"].mean == pytest.approx(0.85)
    assert right.metrics["dice"].mean == pytest.approx(0.6)
    # Per case over its scored classes: 0.8, 0.8, 0.5; d has none.
    assert mean.metrics["dice"].mean == pytest.approx(0.7)
    assert mean.metrics["dice"].cases == 3
    assert left.metrics["dice"].low <= 0.85 <= left.metrics["dice"].high


def test_summaries_of_nothing() -> None:
    assert summarise({}, samples=10, seed=0) == []
    (_, mean) = summarise({"a": [row("left", NAN, "missed")]}, samples=10, seed=0)
    assert mean.missed == 1
    assert math.isnan(mean.metrics["dice"].mean)
    assert mean.metrics["dice"].cases == 0
