"""What a tilted gantry has sheared, resampled onto a rectangular grid: each slice is moved within its own plane."""

from __future__ import annotations

import numpy as np

from pipeline.geometry import Geometry
from pipeline.volumes.resampling import resample_image
from pipeline.volumes.volume import Volume


def untilted_geometry(sheared: Geometry) -> Geometry:
    """Return the rectangular grid that holds a sheared one: the same planes, one behind the other along their normal.

    Rows and columns keep their directions and spacing, and the planes their places; the grid is as much wider as the
    slices lie beside one another.
    """
    x, y, step = sheared.affine[:3, :3].T
    normal = np.cross(x, y) / np.linalg.norm(np.cross(x, y))
    across = step @ normal
    last = sheared.shape[2] - 1
    # How far the last slice lies beside the first, in voxels along rows and columns.
    aside = [float((step - across * normal) @ axis / (axis @ axis)) * last for axis in (x, y)]
    before = [int(np.floor(min(0.0, shift) + 1e-6)) for shift in aside]
    after = [int(np.ceil(max(0.0, shift) - 1e-6)) for shift in aside]
    affine = sheared.affine.copy()
    affine[:3, 2] = across * normal
    affine[:3, 3] += before[0] * x + before[1] * y
    columns, rows = (n + high - low for n, low, high in zip(sheared.shape, before, after, strict=False))
    return Geometry((columns, rows, sheared.shape[2]), affine)


def untilted(image: Volume) -> Volume:
    """Resample a sheared image (C, X, Y, Z) onto `untilted_geometry`; beyond its slices stands its lowest value."""
    sheared, onto = image.geometry, untilted_geometry(image.geometry)
    result = np.empty((len(image.array), *onto.shape), np.float32)
    outside = float(image.array.min())
    for number in range(onto.shape[2]):
        where = ((0, 0, number), (*onto.shape[:2], number + 1))
        plane = Volume(image.array[..., number : number + 1], _plane_of(sheared, onto, number))
        result[..., number] = resample_image(plane, onto.cropped(*where), order=3, outside=outside).array[..., 0]
    return Volume(result, onto)


def _plane_of(sheared: Geometry, onto: Geometry, number: int) -> Geometry:
    """Return the grid of one slice, as thick as a step of the rectangular grid."""
    affine = sheared.affine.copy()
    affine[:3, 2] = onto.affine[:3, 2]
    affine[:3, 3] = sheared.to_mm(np.array([0, 0, number]))
    return Geometry((*sheared.shape[:2], 1), affine)
