"""Examination: all that one read of a case tells, for `check`, the fingerprint and the plan.

What is learned is small, is kept as JSON, and can be merged over cases; problems are part of it, so that a case that
was read before needs no second read to be reported again.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.plan import Size
from pipeline.geometry import Geometry, Grid
from pipeline.records import Record

EXAMINATION_VERSION = 2

# The shares at which an intensity distribution is kept: each percent, and finer towards both ends.
LEVELS = (0.0, 0.001, 0.002, 0.005, *(n / 100 for n in range(1, 100)), 0.995, 0.998, 0.999, 1.0)

# Values at which distributions are merged: those of some 150 cases all, of more as many, evenly chosen.
MOST_POOLED_VALUES = 1 << 14

Box = tuple[Size, Size]


class Problem(Record):
    """Something wrong with a case.

    Attributes:
        severity: an error must be mended before anything else; a warning wants a look.
        kind: one word for what is wrong, see `check`.
        case_id: the case.
        message: what, where, got, expected, what to do.
    """

    severity: Literal["error", "warning"]
    kind: str
    case_id: str
    message: str


class Intensities(Record):
    """A distribution of intensities, in the file's units.

    Attributes:
        voxels: how many it is of.
        mean, std: of them.
        quantiles: the intensities at `LEVELS`.
    """

    voxels: int
    mean: float
    std: float
    quantiles: tuple[float, ...]

    def at(self, level: float) -> float:
        """Return the intensity below which a share `level` (0 to 1) of the voxels lies."""
        return float(np.interp(level, LEVELS, self.quantiles))


class ChannelExamination(Record):
    """One channel of a case.

    Attributes:
        grid: its own grid.
        content: SHA-256 of shape and voxels, equal for equal images however they are packed.
        nonzero_box: (start, stop) of the smallest box around the voxels that are not zero; None where all are.
        body: intensities of the voxels that are not air (CT: above -500 HU; else: not zero); None where there is none.
        foreground: intensities at the label's foreground voxels; None where there is none.
    """

    grid: Grid
    content: str
    nonzero_box: Box | None
    body: Intensities | None
    foreground: Intensities | None


class LabelExamination(Record):
    """The label of a case.

    Attributes:
        grid: its own grid; the first image's where the two differ by less than a tenth of a voxel.
        voxels: label name -> voxels, 0 included.
        ignored_voxels: of which nobody knows what they are.
    """

    grid: Grid
    voxels: dict[str, int]
    ignored_voxels: int = 0


class FileStamp(Record):
    """What tells that a file is unchanged without reading it, and the digest of what it holds.

    Attributes:
        size_bytes, mtime_ns: as the file system says.
        sha256: of the file's bytes.
    """

    size_bytes: int
    mtime_ns: int
    sha256: str


class CaseExamination(Record):
    """All that one read of a case tells.

    Attributes:
        case_id: the case.
        key: digest of all that the examination depends on beside the files.
        files: path in the manifest -> stamp; files that cannot be read are left out.
        channels: channel name -> what it is like, in the manifest's order; unusable channels are left out.
        label: what the label is like; None where there is none, or it is unusable.
        problems: errors and warnings of this case alone.
    """

    case_id: str
    key: str
    files: dict[str, FileStamp]
    channels: dict[str, ChannelExamination]
    label: LabelExamination | None
    problems: tuple[Problem, ...]

    @property
    def native(self) -> Geometry | None:
        """The native grid: the label's, else the first present channel's; None where nothing is usable."""
        grids = [self.label.grid] if self.label else [channel.grid for channel in self.channels.values()]
        return grids[0].geometry if grids else None

    @property
    def usable(self) -> bool:
        """Whether no error was found."""
        return not any(problem.severity == "error" for problem in self.problems)


def pooled(parts: list[Intensities]) -> Intensities:
    """Merge distributions: mean and deviation exactly, quantiles from the kept ones.

    Raises:
        ValueError: there is nothing to merge.
    """
    voxels = np.array([part.voxels for part in parts], dtype=np.float64)
    if not voxels.sum() > 0:
        raise ValueError("no voxels to merge")
    share = voxels / voxels.sum()
    means = np.array([part.mean for part in parts])
    mean = float(share @ means)
    variance = float(share @ (np.array([part.std for part in parts]) ** 2 + (means - mean) ** 2))
    values = np.unique([part.quantiles for part in parts])
    # Left of its smallest value a distribution has nothing, right of its largest everything.
    if len(values) <= MOST_POOLED_VALUES:
        below = share @ np.array([np.interp(values, part.quantiles, LEVELS) for part in parts])
    else:
        values = values[np.linspace(0, len(values) - 1, MOST_POOLED_VALUES).round().astype(int)]
        below = np.zeros(len(values))
        for part, own in zip(parts, share, strict=True):  # one by one: together they would take gigabytes
            below += own * np.interp(values, part.quantiles, LEVELS)
    return Intensities(
        voxels=int(voxels.sum()),
        mean=mean,
        std=variance**0.5,
        quantiles=tuple(float(value) for value in np.interp(LEVELS, below, values)),
    )


def nonzero_box(voxels: NDArray[Any]) -> Box | None:
    """Return (start, stop) of the smallest box around what is not zero in (X, Y, Z); None where all is.

    In the order in which the voxels lie in memory, a plane at a time: there is no mask of the whole volume.
    """
    order = sorted(range(3), key=lambda axis: -abs(voxels.strides[axis]))
    lines = [np.zeros(n, np.bool_) for n in voxels.shape]
    outer, rows, columns = (lines[axis] for axis in order)
    for index, plane in enumerate(voxels.transpose(order)):
        nonzero = plane != 0
        own = nonzero.any(axis=1)
        outer[index] = own.any()
        rows |= own
        columns |= nonzero.any(axis=0)
    if not outer.any():
        return None
    places = [np.flatnonzero(line) for line in lines]
    (x, u), (y, v), (z, w) = ((int(place[0]), int(place[-1]) + 1) for place in places)
    return (x, y, z), (u, v, w)
