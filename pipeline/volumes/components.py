"""Connected components of a mask: which voxels touch, how many they are, and where their middle is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Voxels that touch by a face; by a face or an edge; by a face, an edge or a corner.
Connectivity = Literal[6, 18, 26]
_STEPS: dict[Connectivity, int] = {6: 1, 18: 2, 26: 3}


def components_of(mask: NDArray[np.bool_], connectivity: Connectivity = 26) -> NDArray[Any]:
    """Number the connected components of a mask (X, Y, Z) from 1, in memory order of the axes; 0 elsewhere."""
    # Imported here: what reads volumes needs none of it. cc3d is faster, by 0.4 s on a whole brain: not worth having.
    from scipy import ndimage

    components, _ = ndimage.label(mask, structure=ndimage.generate_binary_structure(3, _STEPS[connectivity]))
    return np.asarray(components)


def component_sizes(components: NDArray[Any]) -> IntArray:
    """Return the voxels (n,) of each component, by its number in (X, Y, Z)."""
    # Plane by plane: bincount makes 64-bit integers of what it counts.
    sizes = np.zeros(components.max(initial=0) + 1, np.int64)
    for plane in components:
        sizes += np.bincount(plane.ravel(), minlength=sizes.size)
    return sizes[1:]


# A volume may be a whole number of voxels but for the rounding of the grid's float32 affine.
VOLUME_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class Components:
    """The components of a mask, the largest first; of equally large ones the first in memory order of the axes.

    Attributes:
        numbers: (X, Y, Z) from 1, the largest; 0 where none is.
        voxels: (n,) of each, falling.
        centres: (n, 3) mean index of each one's voxels.
    """

    numbers: NDArray[Any]
    voxels: IntArray
    centres: FloatArray

    @classmethod
    def of(cls, mask: NDArray[np.bool_], connectivity: Connectivity = 26, smallest_voxels: float = 0.0) -> Self:
        """Find the components of a mask (X, Y, Z); those of fewer than so many voxels are left out."""
        found = components_of(mask, connectivity)
        sizes = component_sizes(found)
        order = np.argsort(-sizes, kind="stable")
        order = order[sizes[order] >= smallest_voxels * (1 - VOLUME_SLACK)]
        new = np.zeros(sizes.size + 1, found.dtype)
        new[order + 1] = np.arange(1, order.size + 1)
        numbers = new[found]
        return cls(numbers, sizes[order], _centres(numbers, order.size))


def _centres(numbers: NDArray[Any], count: int) -> FloatArray:
    """Return (n, 3) mean indices of the voxels of each number from 1."""
    places = np.nonzero(numbers)
    own = numbers[places]
    voxels = np.bincount(own, minlength=count + 1)[1:]
    sums = [np.bincount(own, weights=axis, minlength=count + 1)[1:] for axis in places]
    return np.stack(sums, axis=1) / voxels[:, None]
