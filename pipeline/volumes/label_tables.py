"""Names and colours of labels, and the tables by which ITK-SNAP and 3D Slicer show them.

A class has one colour everywhere, by its index: in the label map's header, in both tables, in pictures and reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import FloatArray
from pipeline.records import write_text

IntArray = NDArray[np.int64]

ITKSNAP_TABLE = "labels.itksnap.txt"
SLICER_TABLE = "labels.ctbl"

# Okabe and Ito (2008), told apart by colour-blind people too; black is left out, the background is.
OKABE_ITO = ("#E69F00", "#56B4E9", "#F0E442", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
# ITK-SNAP holds labels in 16 bits; 3D Slicer took ids up to 2^15 in its older versions and a million since.
_VIEWERS = {ITKSNAP_TABLE: ("ITK-SNAP", 2**16 - 1), SLICER_TABLE: ("3D Slicer", 2**15)}
_LEVELS = range(0, 256, 15)  # Of each of red, green and blue, among which the further colours are chosen.
_LIGHTNESS = (40, 92)  # CIE L*: seen on black and on white.

# As ITK-SNAP writes it above its own tables.
_ITKSNAP_HEAD = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
# Fields:
#    IDX:   Zero-based index
#    -R-:   Red color component (0..255)
#    -G-:   Green color component (0..255)
#    -B-:   Blue color component (0..255)
#    -A-:   Label transparency (0.00 .. 1.00)
#    VIS:   Label visibility (0 or 1)
#    IDX:   Label mesh visibility (0 or 1)
#  LABEL:   Label description
################################################
"""


def colour_of(class_index: int) -> str:
    """Return the colour of a class as #RRGGBB; it depends on the index alone.

    The first seven are Okabe and Ito's; each further one lies as far as it can from all before it, in CIE L*a*b*.
    After some thousand they begin again.

    Args:
        class_index: 1 or more; 0, the background, has no colour.

    Raises:
        ValueError: it is the background's.
    """
    if class_index < 1:
        raise ValueError(f"class {class_index} is the background, which has no colour")
    colours = _colours(max(128, 1 << (class_index - 1).bit_length()))
    return colours[(class_index - 1) % len(colours)]


def label_colours(labels: Mapping[str, int]) -> dict[str, str]:
    """Return label name -> #RRGGBB of all labels but the first, the background."""
    return {name: colour_of(index) for index, name in enumerate(labels) if index}


def itksnap_table(labels: Mapping[str, int]) -> str:
    """Return the labels as an ITK-SNAP label description file.

    Format: a line `IDX R G B A VIS MSH "LABEL"` a label, lines with # are comments; ITK-SNAP's manual, "Label
    Description Files", and the head of the files themselves. Label 0 is always its "Clear Label".

    Args:
        labels: label name -> value in the files, by class index; the first is the background. What ITK-SNAP cannot
            hold (below 0, above 65535) is named in a comment.
    """

    def line(name: str, value: int, red: int, green: int, blue: int) -> str:
        return f'{value:5} {red:5} {green:4} {blue:4}        1  1  1    "{_one_line(name)}"'

    clear = '    0     0    0    0        0  0  0    "Clear Label"'
    return _ITKSNAP_HEAD + "\n".join([clear, *_lines(labels, ITKSNAP_TABLE, line)]) + "\n"


def slicer_table(labels: Mapping[str, int]) -> str:
    """Return the labels as a colour table of 3D Slicer.

    Format: a line `index name red green blue opacity` a label, blanks in names written as _, lines with # are comments;
    3D Slicer's developer guide, "Color table file format (.txt, .ctbl)".

    Args:
        labels: as `itksnap_table`; what Slicer cannot hold (below 0, above 32768) is named in a comment.
    """

    def line(name: str, value: int, red: int, green: int, blue: int) -> str:
        return f"{value} {_one_word(name)} {red} {green} {blue} 255"

    background, value = next(iter(labels.items()))
    clear = f"0 {_one_word(background if value == 0 else 'background')} 0 0 0 0"
    return "\n".join(["# Color table file " + SLICER_TABLE, clear, *_lines(labels, SLICER_TABLE, line)]) + "\n"


def write_label_tables(folder: Path, labels: Mapping[str, int]) -> None:
    """Write both tables beside the label maps of a folder.

    Args:
        folder: of the label maps.
        labels: label name -> value in the files, by class index; the first is the background.
    """
    write_text(folder / ITKSNAP_TABLE, itksnap_table(labels))
    write_text(folder / SLICER_TABLE, slicer_table(labels))


def _lines(labels: Mapping[str, int], table: str, line: Callable[..., str]) -> Iterator[str]:
    """Yield a table's lines of the labels but the background: of name, value, red, green and blue.

    What the table cannot hold is a comment; 0 is taken by what the viewers call clear.
    """
    viewer, largest = _VIEWERS[table]
    for index, (name, value) in enumerate(labels.items()):
        if index and 0 < value <= largest:
            yield line(name, value, *bytes.fromhex(colour_of(index)[1:]))
        elif index:
            yield f"# {_one_line(name)}: {viewer} cannot hold its value, {value}"


def _one_line(name: str) -> str:
    """Return a name without what would end it in a table of lines and quotes."""
    return " ".join(name.replace('"', "'").split())


def _one_word(name: str) -> str:
    """Return a name as one word, which may not begin a comment."""
    return "_".join(name.split()).lstrip("#") or "unnamed"


@cache
def _colours(count: int) -> tuple[str, ...]:
    """Return the first colours, the same ones whatever the count."""
    candidates = _candidates()
    places = _lab(candidates)
    chosen = [*OKABE_ITO]
    start = _lab(np.array([list(bytes.fromhex(colour[1:])) for colour in OKABE_ITO]))
    nearest = np.linalg.norm(places[:, None] - start, axis=2).min(axis=1)
    while len(chosen) < min(count, len(candidates)):
        furthest = int(nearest.argmax())
        chosen.append("#{:02X}{:02X}{:02X}".format(*candidates[furthest]))
        nearest = np.minimum(nearest, np.linalg.norm(places - places[furthest], axis=1))
    return tuple(chosen)


@cache
def _candidates() -> IntArray:
    """Return colours (n, 3) that are neither dark, white nor grey."""
    colours: IntArray = np.stack(np.meshgrid(*[_LEVELS] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness, a, b = _lab(colours).T
    bright: IntArray = colours[(lightness > _LIGHTNESS[0]) & (lightness < _LIGHTNESS[1]) & (np.hypot(a, b) > 20)]
    return bright


def _lab(colours: IntArray) -> FloatArray:
    """Return sRGB colours (n, 3), 0 to 255, as CIE L*a*b* under D65 (IEC 61966-2-1, CIE 15)."""
    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / [0.9505, 1.0, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
