"""Colours of runs: told apart, folds of one configuration alike, and what somebody chose is kept."""

import itertools
import math

import pytest

from pipeline.tracking.colours import colours_of, distance, run_colour, wanting_colours

OWN = [run_colour(family, 0) for family in range(16)]


def hue(colour: str) -> float:
    """Degrees, 0 is red, as in HSL."""
    red, green, blue = (value / 255 for value in bytes.fromhex(colour[1:]))
    return math.degrees(math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360


def test_distances_are_those_of_the_tables() -> None:
    # CIE L*a*b* of sRGB red and blue under D65: 53.24 80.09 67.20 and 32.30 79.19 -107.86.
    assert distance("#000000", "#FFFFFF") == pytest.approx(100, abs=0.01)
    assert distance("#FF0000", "#000000") == pytest.approx(math.hypot(53.24, 80.09, 67.20), abs=0.05)
    assert distance("#FF0000", "#0000FF") == pytest.approx(math.hypot(20.94, 0.90, 175.06), abs=0.05)
    assert distance("#123456", "#123456") == 0


@pytest.mark.parametrize(("count", "least"), [(3, 50), (8, 25), (16, 10)])
def test_configurations_are_told_apart_at_a_glance(count: int, least: float) -> None:
    assert min(distance(*pair) for pair in itertools.combinations(OWN[:count], 2)) > least


def test_the_folds_of_a_configuration_are_shades_of_its_colour_and_told_apart() -> None:
    families = [[run_colour(family, shade) for shade in range(6)] for family in range(8)]
    for family in families:
        assert all(abs((hue(one) - hue(family[0]) + 180) % 360 - 180) < 45 for one in family)
    everyone = list(itertools.chain.from_iterable(families))
    assert min(distance(*pair) for pair in itertools.combinations(everyone, 2)) > 8


def test_no_colour_is_lost_on_white_or_on_black() -> None:
    for colour in (run_colour(family, shade) for family in range(16) for shade in range(6)):
        assert min(distance(colour, "#FFFFFF"), distance(colour, "#000000")) > 30


def test_a_run_goes_by_its_parent_and_by_its_place_among_the_siblings() -> None:
    parents = {"a": None, "a0": "a", "b": None, "a1": "a", "b0": "b", "lost": "deleted"}
    colours = colours_of(parents)
    assert colours == {
        "a": run_colour(0, 0),
        "a0": run_colour(0, 1),
        "b": run_colour(1, 0),
        "a1": run_colour(0, 2),
        "b0": run_colour(1, 1),
        "lost": run_colour(2, 0),
    }
    # A further run changes none of those before.
    assert {**colours, "c": run_colour(3, 0)} == colours_of({**parents, "c": None})


def test_only_runs_without_a_colour_or_with_anothers_are_given_one() -> None:
    parents = dict.fromkeys("abcde")
    known = {"a": "#336699", "b": "#346699", "c": "hsl(0, 50%, 50%)", "e": run_colour(3, 0)}
    wanting = wanting_colours(parents, known)
    # b is as good as a's; d has none, and what it would have by itself somebody gave to e.
    assert wanting.keys() == {"b", "d"}
    given = [known["a"], known["e"], *wanting.values()]
    assert min(distance(*pair) for pair in itertools.combinations(given, 2)) > 8
    assert wanting_colours(parents, {**known, **wanting}) == {}
