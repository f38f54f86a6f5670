"""Labels as the user names them: which values in the files stand for which, in place of what a layout says."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.data.formats import Found
from pipeline.data.manifest import IGNORE
from pipeline.errors import ManifestError

BACKGROUND = "background"
_SYNTAX = (
    "expected NAME=VALUES or NAME:VALUE=VALUES, such as kidney=1,4 or kidney:1=500,501; background takes what shall be"
    f" dropped, {IGNORE} what nobody knows"
)


@dataclass(frozen=True)
class LabelOption:
    """A label of the user's.

    Attributes:
        name: of the label, `background` and `ignore` among them.
        value: in label maps that are written.
        stored: the values in the files that stand for it.
    """

    name: str
    value: int
    stored: tuple[int, ...] = field(default=())


def parse_label(text: str) -> LabelOption:
    """Read a label of the command line: NAME=VALUES or NAME:VALUE=VALUES.

    Raises:
        ManifestError: it is neither.
    """
    match = re.fullmatch(r"\s*([^=:]+?)\s*(?::\s*(-?\d+)\s*)?=\s*(-?\d+(?:\s*,\s*-?\d+)*)\s*", text)
    if match is None:
        raise ManifestError(f"--label {text!r}: {_SYNTAX}")
    stored = tuple(dict.fromkeys(int(value) for value in match[3].split(",")))
    return LabelOption(match[1], int(match[2]) if match[2] else stored[0], stored)


def with_labels(found: Found, options: Sequence[LabelOption]) -> Found:
    """Return a data set whose labels are the user's, in the user's order, the background first.

    The background and the ignored value stay what the layout says where the user says nothing of them. Regions stay
    where all their labels do.

    Raises:
        ManifestError: a name occurs twice, or nothing is left to be the background.
    """
    if not options:
        return found
    named = {option.name: option for option in options}
    if len(named) < len(options):
        raise ManifestError(f"--label: {', '.join(o.name for o in options)}: each name once, with all its values")
    taken = {value for option in options for value in option.stored}
    if BACKGROUND not in named:
        zero = next(iter((found.labels or {BACKGROUND: 0}).values()))
        if zero in taken:
            raise ManifestError(f"--label: {zero} is no background any more; add --label {BACKGROUND}=VALUES")
        named = {BACKGROUND: LabelOption(BACKGROUND, zero, (zero,)), **named}
    if IGNORE not in named and found.ignore_label is not None and found.ignore_label not in taken:
        named[IGNORE] = LabelOption(IGNORE, found.ignore_label, (found.ignore_label,))
    labels = {name: named[name].value for name in (BACKGROUND, *named) if name != IGNORE}
    stays = all(name in labels for own in found.regions.values() for name in own)
    dropped = () if stays else (f"regions {', '.join(found.regions)} are dropped: their labels are named anew",)
    return replace(
        found,
        labels=labels,
        file_values={name: o.stored for name, o in named.items() if o.stored != (o.value,)},
        ignore_label=named[IGNORE].value if IGNORE in named else None,
        regions=found.regions if stays else {},
        notes=(*found.notes, *dropped),
    )


def named_labels(values: Collection[int]) -> dict[str, int]:
    """Name labels by their values: 0 is the background, a single other the foreground, several label_1, label_2, ..."""
    others = sorted(set(values) - {0})
    names = ["foreground"] if len(others) == 1 else [f"label_{value}".replace("-", "minus_") for value in others]
    return {BACKGROUND: 0, **dict(zip(names, others, strict=True))}


def refuse_unnamed(values: Mapping[str, Collection[int]], known: Collection[int]) -> None:
    """Raise where labels hold values that the user's labels do not name.

    Args:
        values: case id -> values in its label.
        known: the values that stand for something.

    Raises:
        ManifestError: names each such value, and in how many cases it occurs.
    """
    strange = sorted(set().union(*values.values()) - {*known})
    if strange:
        counts = (f"{value} (in {sum(value in own for own in values.values())} cases)" for value in strange)
        raise ManifestError(
            f"--label: the files hold {', '.join(counts)} too; name them, or drop them with --label "
            f"{BACKGROUND}=0,{','.join(map(str, strange))}"
        )
