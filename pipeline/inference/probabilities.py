"""Probabilities on the native grid, for the classes that are asked for, a native plane at a time.

A probability is the softmax (or, of a region, the sigmoid) of the logits over the temperature, after these have been
interpolated: the label map is then, up to rounding, the decision on the probabilities. Every logit is needed at every
voxel, so it takes many times as long as the label map; in memory there is one native plane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import Output
from pipeline.geometry import FloatArray
from pipeline.inference.deciding import DECISIONS, Logits
from pipeline.volumes.axes import AxisMap

# Logits interpolated at once: 16 MB of float32.
_LOGITS_AT_ONCE = 1 << 22

ProbabilityType = Literal["uint8", "uint16"]


@dataclass(frozen=True)
class ProbabilityRequest:
    """Which probabilities are wanted, and where they go.

    Attributes:
        classes: indices of the classes wanted; of regions, background (0) has none.
        put: takes a native axis, an index on it, and the plane there: (classes, rows, columns) whole numbers from 0 to
            the type's largest, which is 1; rows and columns are the two other native axes, in order. Called once for
            each plane of that axis, in any order; the array is the caller's to keep.
        dtype: uint8 (steps of 0.004) or uint16 (0.00002); volume files have no float16.
        temperature: that the logits are divided by.
    """

    classes: tuple[int, ...]
    put: Callable[[int, int, NDArray[Any]], None]
    dtype: ProbabilityType = "uint8"
    temperature: float = 1.0


class ProbabilityPlanes:
    """Turns logits of the planes around native planes into the probabilities of these."""

    def __init__(self, request: ProbabilityRequest, output: Output, order: Sequence[int], maps: list[AxisMap]) -> None:
        """Hand on the planes that lie outside the plan's box, and stand ready for the others.

        Args:
            request: what is wanted.
            output: of the network.
            order: the native axes along the stream, the rows, the columns.
            maps: of these axes onto the plan's grid.
        """
        stream, rows, columns = maps
        self._request = request
        self._output = output
        self._order = order
        self._inside = np.ix_(rows.inside, columns.inside)
        self._rows, self._columns = (axis_map.at(np.flatnonzero(axis_map.inside)) for axis_map in (rows, columns))
        self._indices = [index - DECISIONS[output].first_class for index in request.classes]
        self._shape = (len(request.classes), rows.coordinates.size, columns.coordinates.size)
        self._one = int(np.iinfo(request.dtype).max)
        if min(self._indices, default=0) < 0:
            raise ValueError(f"classes {request.classes}: regions have no probability of background (0)")
        for index in np.flatnonzero(~stream.inside):
            self._hand_on(int(index), self._background())

    def put(self, start: int, weights: FloatArray, around: Sequence[Logits]) -> None:
        """Hand on the native planes from `start` on that lie between two planes of the plan's grid, or on one.

        Args:
            start: index of the first.
            weights: (n,) of the plane above.
            around: (A * B, K) logits of the plane below and of the plane above, or of the only one.
        """
        lower, upper = (torch.from_numpy(logits) for logits in (around[0], around[-1]))
        if max(self._indices, default=0) >= lower.shape[1]:
            raise ValueError(f"classes {self._request.classes}: the network has {lower.shape[1]} logits")
        for index, weight in enumerate(weights, start):
            plane = self._background()
            if self._rows.coordinates.size and self._columns.coordinates.size:
                logits = torch.lerp(lower, upper, float(weight)) / self._request.temperature
                plane[:, self._inside[0], self._inside[1]] = self._plane(
                    logits.view(-1, self._columns.length, logits.shape[1])
                )
            self._hand_on(index, plane)

    def _background(self) -> NDArray[Any]:
        """Return a plane of certain background."""
        plane = np.zeros(self._shape, self._request.dtype)
        plane[[index for index, wanted in enumerate(self._request.classes) if wanted == 0]] = self._one
        return plane

    def _plane(self, logits: Tensor) -> NDArray[Any]:
        """Return (classes, rows, columns) probabilities in the plan's box, from the (A, B, K) logits of their plane."""
        height, width = self._rows.coordinates.size, self._columns.coordinates.size
        plane = np.empty((len(self._indices), height, width), self._request.dtype)
        step = max(1, _LOGITS_AT_ONCE // (logits.shape[2] * width))
        for start in range(0, height, step):
            rows = self._rows.at(np.arange(start, min(start + step, height)))
            first = int(rows.lower.min())
            across = _interpolated(logits[first : int(rows.upper.max()) + 1], 1, self._columns)
            values = _interpolated(across, 0, rows, first)  # (rows, columns, K)
            values = values.softmax(dim=2) if self._output == "softmax" else values.sigmoid()
            chosen = values[..., self._indices].mul_(self._one).round_()
            plane[:, start : start + step] = chosen.permute(2, 0, 1).numpy()
        return plane

    def _hand_on(self, index: int, plane: NDArray[Any]) -> None:
        """Call the request's `put`, rows and columns in the order of the native axes."""
        stream, rows, columns = self._order
        self._request.put(stream, index, plane if rows < columns else plane.transpose(0, 2, 1))


def _interpolated(values: Tensor, dim: int, axis_map: AxisMap, first: int = 0) -> Tensor:
    """Interpolate along one dimension, whose first entry is the plan's voxel `first`."""
    lower, upper = (torch.from_numpy(indices - first) for indices in (axis_map.lower, axis_map.upper))
    weight = torch.from_numpy(axis_map.weight.astype(np.float32))
    shaped = weight.reshape([-1 if own == dim else 1 for own in range(values.ndim)])
    return torch.lerp(values.index_select(dim, lower), values.index_select(dim, upper), shaped)
