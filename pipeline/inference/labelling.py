"""Planes of logits on the plan's grid become a label map on the native grid: exactly, streaming, in little memory.

What is wanted is the class, at each native voxel, of all K logit volumes interpolated there; never made are those
volumes. Linear interpolation is a convex combination of eight corners: a class that all corners of non-zero weight have
is the class of every point between them (the uniform-corner rule; `deciding.py` says why). Only in the cells whose
corners disagree are logits interpolated, and there only those that can win. The winners are found in float64, so that
the label map equals that of interpolating all K volumes in float64; float32 logits that differ at all differ by far
more than float64 rounds, which is why leads of a few ulps need no special care.

Each gap between two planes is shared out among threads, in portions of rows; numpy lets go of the interpreter's lock in
all that takes time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import Output
from pipeline.geometry import FloatArray, Geometry
from pipeline.inference.deciding import DECISIONS, Classes, Decision, Logits
from pipeline.inference.planes import LogitPlanes
from pipeline.inference.probabilities import ProbabilityPlanes, ProbabilityRequest
from pipeline.volumes.axes import AxisMap, Indices, axis_maps
from pipeline.volumes.resampling import agreed

# Corner logits gathered at once by a thread, 8 x cells x K: 4 MB of float32, which caches hold.
_GATHERED_LOGITS = 1 << 20


@dataclass(frozen=True, eq=False)
class _Axis:
    """The voxels of one native axis that lie in the plan's box, and the cells of the plan's grid that they lie in.

    A cell is the gap between two neighbouring planes of the plan's grid, or one plane where voxels lie just on it.
    """

    voxels: slice
    weight: FloatArray  # (n,) of the cell's upper plane
    cell: Indices  # (n,) index into cells, never falling or never rising
    cells: AxisMap  # .lower and .upper of each cell, ascending

    def in_cells(self, cells: slice) -> slice:
        """Return which of the voxels lie in some neighbouring cells."""
        return _run(np.flatnonzero((self.cell >= cells.start) & (self.cell < cells.stop)))


@dataclass(frozen=True, eq=False)
class _Plane:
    """One plane of the plan's grid."""

    logits: Logits  # (A * B, K): a corner's logits are taken all at once
    classes: Classes  # (cells of A, cells of B): of all a cell's corners; where they disagree, the number of classes


@dataclass(frozen=True, eq=False)
class _Gap:
    """The n native planes between two planes of the plan's grid, or on one."""

    logits: tuple[Logits, ...]  # (A * B, K) of the plane below and the plane above, or the only one
    classes: Classes  # (cells of A, cells of B): as a _Plane's, for the corners on both
    disputed: NDArray[np.bool_]  # (cells of A, cells of B)
    weights: FloatArray  # (n,) of the plane above
    labels: Classes  # (n, rows, columns) in the plan's box


@dataclass(frozen=True, eq=False)
class _Candidates:
    """M cells whose corners disagree, and the P logits that can win in them: cell after cell, ascending."""

    first: Indices  # (M,) each cell's first candidate
    count: Indices  # (M,) each cell's number of candidates, at least 1
    logit: Indices  # (P,) which of the K
    corners: FloatArray  # (1 or 2 planes, 2 rows, 2 columns, P) logits


def label_from_planes(
    planes: Iterable[LogitPlanes],
    *,
    axis: int,
    prepared: Geometry,
    native: Geometry,
    thick_axis: int | None = None,
    output: Output = "softmax",
    probabilities: ProbabilityRequest | None = None,
) -> Classes:
    """Label the native grid from logits on the plan's grid, as they come.

    Equal, voxel for voxel, to interpolating all K logit volumes in float64, first along `axis`, then along the two
    others in order, and deciding there. Native voxels outside the plan's grid (a crop) are background; within it,
    coordinates beyond an outermost voxel's centre are moved onto it. Memory: the result, two planes of K logits, and a
    bounded number of cells. Runs on as many threads as torch does.

    Args:
        planes: all planes of (K, n, A, B) finite logits, in ascending order; they may be overwritten once the next are
            asked for.
        axis: axis of the plan's grid that the planes are stacked along; A and B are the two others, in order.
        prepared: the plan's grid of this case.
        native: the grid wanted, parallel to `prepared`.
        thick_axis: axis of the plan's grid along which the nearest plane counts, not the two around.
        output: softmax: the class of the largest logit, the first of equal ones; regions: that of the last logit above
            0, which is one more than its index, else background.
        probabilities: those wanted beside the label map.

    Returns:
        native.shape, class indices of the smallest unsigned type, in memory in the order of the planes.

    Raises:
        ValueError: the grids are not parallel, planes are missing or out of order, or a class asked for is not there.
    """
    maps = axis_maps(prepared, native)
    if maps is None:
        raise ValueError(f"the plan's grid ({prepared}) is not parallel to the native one ({native})")
    # Native axes in the order of the planes: along the stream, the rows, the columns.
    order = sorted(range(3), key=lambda own: (maps[own].axis != axis, maps[own].axis))
    across = [maps[own].rounded() if maps[own].axis == thick_axis else maps[own] for own in order]
    asked = ProbabilityPlanes(probabilities, output, order, across) if probabilities else None
    stream, rows, columns = map(_axis, across)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        labelling = _Labelling(DECISIONS[output], stream, rows, columns, threads)
        labels = labelling.run(planes, prepared.shape[axis], [native.shape[own] for own in order], asked)
    return labels.transpose(np.argsort(order))


def _axis(axis_map: AxisMap) -> _Axis:
    """Sort the voxels of one native axis that lie in the plan's box into cells."""
    inside = np.flatnonzero(axis_map.inside)
    within = axis_map.at(inside)
    _, first, cell = np.unique(within.lower + within.upper, return_index=True, return_inverse=True)
    return _Axis(_run(inside), within.weight, cell, within.at(first))


def _run(indices: Indices) -> slice:
    """Return neighbouring indices, ascending, as a slice."""
    return slice(int(indices[0]), int(indices[-1]) + 1) if indices.size else slice(0, 0)


@dataclass(frozen=True, eq=False)
class _Labelling:
    """What labels the native planes, one gap between two planes of the plan's grid after the other."""

    decision: Decision
    stream: _Axis
    rows: _Axis
    columns: _Axis
    threads: ThreadPoolExecutor

    def run(
        self, planes: Iterable[LogitPlanes], length: int, shape: Sequence[int], asked: ProbabilityPlanes | None
    ) -> Classes:
        """Label a grid of some shape, in the order of the planes, of which there must be `length`."""
        labels: Classes = np.zeros(0)
        lower: _Plane | None = None
        for index, upper in enumerate(self._planes(planes, length)):
            if lower is None:
                labels = np.zeros(shape, np.min_scalar_type(self.decision.count(upper.logits.shape[1]) - 1))
            for cell in np.flatnonzero(self.stream.cells.upper == index):
                around = (upper,) if lower is None or self.stream.cells.lower[cell] == index else (lower, upper)
                voxels = self.stream.in_cells(slice(cell, cell + 1))
                weights, first = self.stream.weight[voxels], self.stream.voxels.start + voxels.start
                inside = labels[first : first + len(weights), self.rows.voxels, self.columns.voxels]
                self._label(around, weights, inside)
                if asked:
                    asked.put(first, weights, [plane.logits for plane in around])
            lower = upper
        return labels

    def _planes(self, planes: Iterable[LogitPlanes], length: int) -> Iterator[_Plane]:
        """Yield plane by plane, each with the classes that its cells' corners agree on."""
        expected = 0
        for several in planes:
            if several.start != expected:
                raise ValueError(f"got planes of logits from {several.start} on, expected {expected}")
            expected += several.logits.shape[1]
            for logits in several.logits.unbind(1):
                yield self._plane(logits)
        if expected != length:
            raise ValueError(f"got {expected} planes of logits, expected {length}")

    def _plane(self, logits: Tensor) -> _Plane:
        """Find the classes that the corners of a plane's cells agree on, and copy its (K, A, B) logits."""
        disputed = self.decision.count(len(logits))
        classes = self.decision.classes(logits.flatten(1).numpy()).reshape(logits.shape[1:])
        for axis, across in enumerate((self.rows, self.columns)):
            classes = agreed(classes, axis, across.cells, np.asarray(disputed, classes.dtype))
        # A copy, since the next planes may overwrite it.
        return _Plane(logits.flatten(1).T.clone(memory_format=torch.contiguous_format).numpy(), classes)

    def _label(self, around: tuple[_Plane, ...], weights: FloatArray, labels: Classes) -> None:
        """Label the n native planes that lie between two planes of the plan's grid, or on one.

        Args:
            around: the plane below and the plane above, or the only one.
            weights: (n,) of the plane above.
            labels: (n, rows, columns) in the plan's box, to be filled.
        """
        if not labels.size:
            return
        lower, upper = around[0].classes, around[-1].classes
        num_logits = around[0].logits.shape[1]
        disputed = np.asarray(self.decision.count(num_logits), lower.dtype)
        classes = np.where(lower == upper, lower, disputed)
        gap = _Gap(tuple(plane.logits for plane in around), classes, classes == disputed, weights, labels)
        portions = _portions(gap.disputed, max(1, _GATHERED_LOGITS // (8 * num_logits)), torch.get_num_threads())
        for _ in self.threads.map(lambda cells: self._label_rows(gap, cells), portions):
            pass  # asked for, they raise what went wrong

    def _label_rows(self, gap: _Gap, cells: slice) -> None:
        """Label the voxels in some rows of a gap's cells."""
        voxels = self.rows.in_cells(cells)
        row_cell, row_weight = self.rows.cell[voxels] - cells.start, self.rows.weight[voxels]
        labels, disputed = gap.labels[:, voxels], gap.disputed[cells]
        labels[...] = gap.classes[cells].take(row_cell, axis=0).take(self.columns.cell, axis=1)
        open_voxels = disputed.take(row_cell, axis=0).take(self.columns.cell, axis=1)
        row, column = np.divmod(np.flatnonzero(open_voxels), len(self.columns.cell))
        numbers = np.cumsum(disputed).reshape(disputed.shape) - 1
        cell = numbers[row_cell[row], self.columns.cell[column]]
        candidates = self._candidates(gap.logits, cells.start * disputed.shape[1] + np.flatnonzero(disputed))
        for label, weight in zip(labels, gap.weights, strict=True):
            label[row, column] = self._winners(candidates, cell, weight, row_weight[row], self.columns.weight[column])

    def _candidates(self, around: tuple[Logits, ...], cells: Indices) -> _Candidates:
        """Find the logits that can win in some cells, given by their flat indices."""
        rows, columns = self.rows.cells, self.columns.cells
        row, column = np.divmod(cells, columns.coordinates.size)
        corners = [
            r[row] * columns.length + c[column]
            for r in (rows.lower, rows.upper)
            for c in (columns.lower, columns.upper)
        ]
        num_logits = around[0].shape[1]
        logits = np.empty((4 * len(around), cells.size, num_logits), np.float32)
        places = [(plane, corner) for plane in around for corner in corners]
        for into, (plane, corner) in zip(logits, places, strict=True):
            plane.take(corner, axis=0, out=into, mode="clip")  # the other modes make a copy first
        possible = self.decision.possible(logits.min(axis=0), logits.max(axis=0))
        cell, logit = np.divmod(np.flatnonzero(possible), num_logits)  # a tenth of the time of nonzero
        count = np.bincount(cell, minlength=cells.size)
        values = logits[:, cell, logit].astype(np.float64)
        return _Candidates(np.cumsum(count) - count, count, logit, values.reshape(len(around), 2, 2, -1))

    def _winners(
        self, candidates: _Candidates, cell: Indices, weight: float, row_weight: FloatArray, column_weight: FloatArray
    ) -> Indices:
        """Return the class decided by the interpolated logits at V voxels of one native plane.

        Args:
            candidates: of the cells.
            cell: (V,) the voxels' cells.
            weight: of the plane above, for this native plane.
            row_weight: (V,) of the row after.
            column_weight: (V,) of the column after.
        """
        corners = (1 - weight) * candidates.corners[0] + weight * candidates.corners[-1]  # (2 rows, 2 columns, P)
        bar = np.full(cell.size, self.decision.bar)
        winner = np.zeros(cell.size, np.intp)
        rivals = np.arange(cell.size)
        for rank in range(int(candidates.count[cell].max(initial=0))):
            rivals = rivals[candidates.count[cell[rivals]] > rank]
            candidate = candidates.first[cell[rivals]] + rank
            r, c = row_weight[rivals], column_weight[rivals]
            before, after = ((1 - r) * corners[0, side][candidate] + r * corners[1, side][candidate] for side in (0, 1))
            value = (1 - c) * before + c * after
            above = value > bar[rivals]
            winner[rivals[above]] = candidates.logit[candidate[above]] + self.decision.first_class
            if self.decision.rises:
                bar[rivals[above]] = value[above]
        return winner


def _portions(disputed: NDArray[np.bool_], most: int, parts: int) -> list[slice]:
    """Share rows of cells out in portions of about as many disputed cells each, a row more than `most` at most."""
    so_far = np.cumsum(np.count_nonzero(disputed, axis=1))
    count = max(parts, -(-int(so_far[-1]) // most))
    cuts = np.searchsorted(so_far, so_far[-1] * np.arange(1, count) / count)
    bounds = np.unique([0, *cuts, len(disputed)]).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
