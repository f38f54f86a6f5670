"""Body: the coarse blocks of a grid that hold more than air, for all that would rather not look at air."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Voxels along each side of a block: 1/64 of a volume to keep, and finer than any window is stepped.
BLOCK = 4

Size = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Body:
    """Where a case's body may be, on the plan's grid; what is not marked is certainly air.

    Attributes:
        occupied: (ceil(X / BLOCK), ceil(Y / BLOCK), ceil(Z / BLOCK)) whether a block of BLOCK^3 voxels may hold body;
            the last block of an axis may reach beyond the grid.
    """

    occupied: NDArray[np.bool_]

    def any_in(self, start: Size, stop: Size) -> bool:
        """Tell whether body may lie in the box from `start` to `stop` (exclusive), in voxels of the plan's grid.

        Parts of the box that lie outside the grid hold none, and neither does an empty box.
        """
        if any(b <= max(a, 0) for a, b in zip(start, stop, strict=True)):
            return False
        box = (slice(max(a, 0) // BLOCK, -(-b // BLOCK)) for a, b in zip(start, stop, strict=True))
        return bool(self.occupied[tuple(box)].any())


def block_counts(shape: Size) -> Size:
    """Return how many blocks a grid of `shape` voxels has along each axis."""
    x, y, z = (-(-n // BLOCK) for n in shape)
    return x, y, z
