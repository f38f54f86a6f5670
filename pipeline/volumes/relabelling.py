"""Relabelling: the values of a label map become others, by a table that must know each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import VolumeError

Array = NDArray[Any]


def relabelled(label: Array, table: Mapping[int, int], kind: np.dtype[Any], expected: str) -> Array:
    """Return a label map with each value replaced.

    Args:
        label: (X, Y, Z) integers.
        table: value -> what replaces it.
        kind: type of the result; must hold all that replaces.
        expected: what the values should be of, for the message, such as "the plan's, {...}".

    Returns:
        (X, Y, Z) of `kind`.

    Raises:
        VolumeError: a value is not in the table.
    """
    values = np.array(sorted(table))
    replaced = np.array([table[value] for value in sorted(table)], dtype=kind)
    result: Array = np.empty(label.shape, kind)
    for plane, into in zip(label, result, strict=True):  # plane by plane: positions are 64-bit integers
        position = np.searchsorted(values, plane).clip(max=values.size - 1)
        unknown = values[position] != plane
        if unknown.any():
            raise VolumeError(
                f"the label holds the value {plane[unknown][0]}, which is not one of {expected}; "
                "name it in the manifest's labels"
            )
        into[...] = replaced[position]
    return result
