"""Where a case's body is: found once from the native voxels, before normalisation makes air a number like any other.

The rule (voxels that are not air in any channel, holes filled, dilated) is taken on coarse blocks of the plan's grid:
they are marked where the fine rule marks any of their voxels, and more generously than it, never less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.geometry import Geometry
from pipeline.volumes.axes import AxisMap, AxisMaps, axis_maps
from pipeline.volumes.body import BLOCK, Body, block_counts
from pipeline.volumes.volume import Volume

AIR_HU = -500.0

Mask = NDArray[np.bool_]


def is_body(voxels: NDArray[Any], modality: str) -> Mask:
    """Tell which native voxels are no air: above AIR_HU in CT, not zero elsewhere."""
    return np.asarray(voxels > AIR_HU if modality == "CT" else voxels != 0)


def body_of(images: Mapping[str, Volume], modalities: Mapping[str, str], target: Geometry) -> Body | None:
    """Find the blocks of a grid that may hold body.

    A block is marked where linear interpolation at one of its voxels, or at a neighbour of one, touches a body voxel of
    any channel; then holes of each plane are filled (so that a lung that the scan cuts in two is filled too), and one
    more block on all sides is marked. In memory it takes a few native planes.

    Args:
        images: channel -> (1, X, Y, Z), not normalised, each on its own grid.
        modalities: channel -> modality.
        target: the plan's grid.

    Returns:
        The blocks; None where a channel's grid is not parallel to the target, for then nothing is known.
    """
    occupied = np.zeros(block_counts(target.shape), np.bool_)
    for channel, image in images.items():
        maps = axis_maps(image.geometry, target)
        if maps is None:
            return None
        occupied |= _occupied(image.array[0], modalities[channel], maps)
    occupied = np.logical_or.reduce([_without_holes(occupied, axis) for axis in range(3)])
    return Body(np.asarray(ndimage.binary_dilation(occupied, np.ones((3, 3, 3)))))


def _occupied(voxels: NDArray[Any], modality: str, maps: AxisMaps) -> Mask:
    """Mark the blocks of the target that a channel's body touches; a slab of native planes at a time."""
    x, y, z = (list(_spans(axis_map)) for axis_map in sorted(maps, key=lambda axis_map: axis_map.axis))
    occupied = np.zeros((len(x), len(y), len(z)), np.bool_)  # in the order of the native axes
    for block, span in zip(occupied, x, strict=True):
        touched: Mask = np.any(is_body(voxels[span], modality), axis=0)
        rows = np.stack([touched[span].any(axis=0) for span in y])
        block[...] = np.stack([rows[:, span].any(axis=1) for span in z], axis=1)
    return occupied.transpose([axis_map.axis for axis_map in maps])


def _spans(axis_map: AxisMap) -> Iterator[slice]:
    """Yield for each block of a target's axis the source's voxels that it touches; none outside the source's box.

    A block reaches one voxel of the target into its neighbours, so that where the target is coarser than the source no
    voxel between two blocks is left out.
    """
    for start in range(0, axis_map.coordinates.size, BLOCK):
        own = slice(max(start - 1, 0), start + BLOCK + 1)
        inside = axis_map.inside[own]
        lower, upper = axis_map.lower[own][inside], axis_map.upper[own][inside]
        yield slice(int(lower.min()), int(upper.max()) + 1) if inside.any() else slice(0, 0)


def _without_holes(occupied: Mask, axis: int) -> Mask:
    """Fill what the marked blocks enclose within each plane across an axis.

    A hole in space is enclosed in every plane that it meets, so that filling planes fills it as well.
    """
    within_plane = ndimage.generate_binary_structure(3, 1)
    within_plane[tuple(slice(None) if own != axis else [0, 2] for own in range(3))] = False
    empty, _ = ndimage.label(~occupied, within_plane)
    rims = (empty.take(side, own) for own in range(3) if own != axis for side in (0, -1))
    outside = np.unique(np.concatenate([rim.ravel() for rim in rims]))
    return ~np.isin(empty, outside[outside > 0])
