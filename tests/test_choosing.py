"""Choosing a treatment by a paired test, on tables worked out by hand."""

import numpy as np
import pytest

from pipeline.evaluation.comparison.choosing import choose

PATIENTS = [f"p{number:02d}" for number in range(12)]
FOLDS = [number % 3 for number in range(12)]


def table(*gains: list[float]) -> np.ndarray:
    """A (1 + treatments, 12) table: 0.5 everywhere, and each treatment's gains beside it."""
    return 0.5 + np.array([[0.0] * 12, *gains])


def test_what_helps_nearly_all_is_chosen_and_worth_as_much_on_the_other_folds() -> None:
    choice = choose(table([0.01] * 12, [0.03] * 12, [0.02] * 12), PATIENTS, FOLDS)
    assert choice.chosen == 1
    assert choice.untreated == pytest.approx(0.5)
    assert choice.cross_fitted.mean == pytest.approx(0.03)
    assert choice.by_fold == {0: 1, 1: 1, 2: 1}
    tried = choice.tried[1]
    assert (tried.better, tried.worse, tried.difference.cases) == (12, 0, 12)
    assert tried.p == pytest.approx(2 / 2**12)


def test_of_equal_treatments_the_first_is_chosen() -> None:
    assert choose(table([0.03] * 12, [0.03] * 12), PATIENTS, FOLDS).chosen == 0


def test_what_may_be_chance_is_left_alone() -> None:
    # Five of twelve gain, none loses: p is 2/2^5, and a mean alone proves nothing.
    choice = choose(table([0.2] * 5 + [0.0] * 7), PATIENTS, FOLDS)
    assert choice.tried[0].difference.mean > 0.08
    assert choice.tried[0].p == pytest.approx(2 / 2**5)
    assert choice.chosen is None
    assert choice.by_fold == {0: None, 1: None, 2: None}
    assert choice.cross_fitted.mean == 0


def test_what_harms_is_left_alone_however_sure_it_is() -> None:
    choice = choose(table([-0.01] * 12), PATIENTS, FOLDS)
    assert (choice.chosen, choice.tried[0].worse) == (None, 12)
    assert choice.tried[0].p < 0.05


def test_what_helps_its_own_folds_and_none_of_the_others_is_left_alone() -> None:
    # Fold 0 gains much by the first treatment; what folds 1 and 2 would choose for it, the second, harms it.
    first = [0.3 if fold == 0 else 0.001 for fold in [0, 1, 2] * 12]
    second = [-0.4 if fold == 0 else 0.01 for fold in [0, 1, 2] * 12]
    patients = [f"p{number}" for number in range(36)]
    scores = 0.5 + np.array([[0.0] * 36, first, second])
    choice = choose(scores, patients, [0, 1, 2] * 12)
    assert choice.by_fold == {0: 1, 1: 0, 2: 0}
    assert choice.cross_fitted.mean == pytest.approx((-0.4 + 0.001 + 0.001) / 3)
    assert choice.chosen is None


def test_two_visits_of_a_patient_are_one_pair() -> None:
    # Six visits gain, but of three patients: too few for any test.
    patients = ["a", "a", "b", "b", "c", "c", *PATIENTS[6:]]
    choice = choose(table([0.1] * 6 + [0.0] * 6), patients, FOLDS)
    assert (choice.tried[0].better, choice.tried[0].difference.cases) == (3, 9)
    assert choice.chosen is None


def test_a_case_without_a_score_takes_no_part() -> None:
    scores = table([0.03] * 12)
    scores[:, 0] = np.nan
    choice = choose(scores, PATIENTS, FOLDS)
    assert (choice.chosen, choice.tried[0].difference.cases, choice.cross_fitted.cases) == (0, 11, 11)


def test_one_fold_is_not_enough() -> None:
    with pytest.raises(ValueError, match="two folds"):
        choose(table([0.03] * 12), PATIENTS, [0] * 12)
