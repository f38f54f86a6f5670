"""What is said of members beside each other: worked out by hand, by counting every case, or against scipy's."""

import itertools
import math

import numpy as np
import pytest

from pipeline.evaluation.comparison_statistics import by_patient, holm, rank_shares, signed_rank_p

NAN = float("nan")


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
