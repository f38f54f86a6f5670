"""What is written of labels: a name, a number, a colour and a code each, and who drew them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pipeline.records import Record
from pipeline.volumes.dicom.annotations.coding import Coding, Codings, coding_of
from pipeline.volumes.label_tables import colour_of


class Structure(Record):
    """A label of a label map, as DICOM has it.

    Attributes:
        number: of its segment or ROI, from 1.
        name: the label's.
        value: in the label map.
        colour: red, green, blue, 0 to 255.
        coding: what it is.
    """

    number: int
    name: str
    value: int
    colour: tuple[int, int, int]
    coding: Coding


class Author(Record):
    """Who drew the labels.

    Attributes:
        kind: DICOM's word for how.
        name: of the model, or of the program; no person's.
        version: of the model.
    """

    kind: Literal["AUTOMATIC", "SEMIAUTOMATIC", "MANUAL"]
    name: str = ""
    version: str = ""


def structures_of(labels: Mapping[str, int], codes: Codings | None = None) -> tuple[Structure, ...]:
    """Return the structures of a label map; its colours are those of our other tables.

    Args:
        labels: label name -> value, by class index; the first is the background.
        codes: the user's, by label name.
    """
    return tuple(
        Structure(
            number=index,
            name=name,
            value=value,
            colour=tuple(bytes.fromhex(colour_of(index)[1:])),
            coding=coding_of(name, codes),
        )
        for index, (name, value) in enumerate(labels.items())
        if index
    )
