"""Colours of runs, by which MLflow draws their curves: a hue a configuration, and its folds are shades of it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from functools import cache

# CIE L*C*h. Steps of 135 degrees visit eight hues, each far from the one before; a next round lies between them.
_FIRST_HUE, _HUE_STEP, _HUES = 255.0, 135.0, 8
# L*, seen on white and on black, and a turn of the hue: the configuration's own, then its folds'.
_SHADES = ((52.0, 0.0), (69.0, 14.0), (34.0, -12.0), (77.0, -14.0), (42.0, 14.0), (60.0, -14.0))
_CHROMA = 72.0
# Colours that lie nearer are taken for one; the shades of a family lie 8 apart.
_TOLD_APART = 5.0

Lab = tuple[float, float, float]


def colours_of(parents: Mapping[str, str | None]) -> dict[str, str]:
    """Return run -> #RRGGBB for the runs of an experiment.

    Args:
        parents: run -> its parent, None where it has none; in the order in which the runs were made.
    """
    families: dict[str, int] = {}
    members: dict[str, int] = {}
    colours = {}
    for run, parent in parents.items():
        root = run if parent is None or parent not in parents else parent
        family = families.setdefault(root, len(families))
        shade = members[root] = members.get(root, -1) + 1
        colours[run] = run_colour(family, shade)
    return colours


def wanting_colours(parents: Mapping[str, str | None], known: Mapping[str, str]) -> dict[str, str]:
    """Return run -> its colour to be, for runs that have none, or one that an earlier run has too.

    Args:
        parents: as of `colours_of`.
        known: run -> its colour; what is not #RRGGBB is left as it is.
    """
    used: list[str] = []
    wanting: dict[str, str] = {}
    for run in parents:
        colour = known.get(run)
        if colour is None or (_is_colour(colour) and _is_used(colour, used)):
            wanting[run] = ""
        elif _is_colour(colour):
            used.append(colour)
    own, places = colours_of(parents), itertools.product(range(2 * _HUES), range(len(_SHADES)))
    spare = [run_colour(*place) for place in places]
    for run in wanting:
        wanting[run] = next((one for one in (own[run], *spare) if not _is_used(one, used)), own[run])
        used.append(wanting[run])
    return wanting


def _is_colour(text: str) -> bool:
    """Tell whether a text is a colour #RRGGBB."""
    return re.fullmatch(r"#[0-9a-fA-F]{6}", text) is not None


def _is_used(colour: str, used: list[str]) -> bool:
    """Tell whether a colour is taken for another one."""
    return any(distance(colour, other) < _TOLD_APART for other in used)


def run_colour(family: int, shade: int) -> str:
    """Return the colour of a member of a family, as strong as sRGB has it: 0 is the configuration, from 1 its folds."""
    turns, place = divmod(family, _HUES)
    lightness, turn = _SHADES[shade % len(_SHADES)]
    hue = math.radians(_FIRST_HUE + _HUE_STEP * place + 180 / _HUES * turns + turn)
    chroma = _CHROMA
    rgb = _linear_rgb((lightness, chroma * math.cos(hue), chroma * math.sin(hue)))
    while not all(0 <= value <= 1 for value in rgb):  # sRGB has no such colour
        chroma -= 1
        rgb = _linear_rgb((lightness, chroma * math.cos(hue), chroma * math.sin(hue)))
    return "#" + "".join(f"{round(255 * _encoded(value)):02x}" for value in rgb)


def distance(first: str, second: str) -> float:
    """Return how far two colours #RRGGBB lie apart, in CIE L*a*b* (CIE 1976): 2 is hardly seen, 100 black and white."""
    return math.dist(_lab(first), _lab(second))


@cache
def _lab(colour: str) -> Lab:
    """Return a colour #RRGGBB in L*a*b* under D65 (IEC 61966-2-1, CIE 15)."""
    red, green, blue = (_decoded(value / 255) for value in bytes.fromhex(colour[1:]))
    x = (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    z = (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089
    f_x, f_y, f_z = (math.cbrt(t) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (x, y, z))
    return 116 * f_y - 16, 500 * (f_x - f_y), 200 * (f_y - f_z)


def _decoded(value: float) -> float:
    """Return a linear value of what sRGB encodes."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _linear_rgb(lab: Lab) -> tuple[float, float, float]:
    """Return linear sRGB of a colour in L*a*b* under D65 (IEC 61966-2-1, CIE 15)."""
    f_y = (lab[0] + 16) / 116
    f = (f_y + lab[1] / 500, f_y, f_y - lab[2] / 200)
    x, y, z = (
        white * (t**3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29))
        for white, t in zip((0.9505, 1.0, 1.089), f, strict=True)
    )
    return (
        3.2406 * x - 1.5372 * y - 0.4986 * z,
        -0.9689 * x + 1.8758 * y + 0.0415 * z,
        0.0557 * x - 0.2040 * y + 1.0570 * z,
    )


def _encoded(value: float) -> float:
    """Return a linear value as sRGB encodes it."""
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
