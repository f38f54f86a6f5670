import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import ndimage

from pipeline.data.axes import AxisMap, axis_maps
from pipeline.geometry import Geometry
from pipeline.inference.labelling import label_from_planes
from pipeline.inference.planes import LogitPlanes

ORDERS = list(itertools.product(itertools.permutations("RAS"), itertools.product((False, True), repeat=3)))
OPPOSITE = {"R": "L", "A": "P", "S": "I"}
CODES = ["".join(OPPOSITE[a] if flip else a for a, flip in zip(axes, flips, strict=True)) for axes, flips in ORDERS]


def stream(logits: np.ndarray, axis: int, planes: int = 1) -> Iterator[LogitPlanes]:
    """Hand out (K, X, Y, Z) logits some planes at a time, in memory that is overwritten by the next ones."""
    moved = np.moveaxis(logits, axis + 1, 1)
    for start in range(0, moved.shape[1], planes):
        handed = torch.from_numpy(np.ascontiguousarray(moved[:, start : start + planes]))
        yield LogitPlanes(start, handed)
        handed.fill_(float("nan"))


def interpolated(values: np.ndarray, axis: int, axis_map: AxisMap) -> np.ndarray:
    weight = axis_map.weight.reshape([-1 if own == axis else 1 for own in range(values.ndim)])
    return (1 - weight) * values.take(axis_map.lower, axis) + weight * values.take(axis_map.upper, axis)


def reference(logits: np.ndarray, axis: int, prepared: Geometry, native: Geometry, thick: int | None = None):
    """All K volumes interpolated in float64, then the argmax: slow and obvious."""
    maps = axis_maps(prepared, native)
    assert maps is not None
    by_source = {m.axis: m.rounded() if m.axis == thick else m for m in maps}
    volumes = logits.astype(np.float64)
    for own in (axis, *(own for own in range(3) if own != axis)):
        volumes = interpolated(volumes, own + 1, by_source[own])
    classes = volumes.argmax(axis=0).transpose([m.axis for m in maps])
    for own, axis_map in enumerate(maps):
        np.moveaxis(classes, own, 0)[~axis_map.inside] = 0
    return classes


def organs(rng: np.random.Generator, classes: int, shape: tuple[int, ...], smooth: float = 2.0) -> np.ndarray:
    fields = rng.normal(size=(classes, *shape))
    return ndimage.gaussian_filter(fields, (0, *[smooth] * 3)).astype(np.float32)


def grids(shape=(9, 8, 7), native=(11, 10, 13), code="RAS"):
    """A plan's grid, and a finer native one over about the same box, in another axis order, sticking out."""
    prepared = Geometry(shape, np.diag([1.5, 1.3, 2.0, 1.0]))
    affine = np.diag([1.1, 1.2, 0.9, 1.0])
    affine[:3, 3] = (-0.9, 0.4, -1.7)
    return prepared, Geometry(native, affine).reoriented(code)


@pytest.mark.parametrize("code", CODES)
def test_equals_interpolating_all_logits_in_every_axis_order(code):
    prepared, native = grids(code=code)
    logits = organs(np.random.default_rng(3), 5, prepared.shape, smooth=1.0)
    for axis in range(3):
        got = label_from_planes(stream(logits, axis, 2), axis=axis, prepared=prepared, native=native)
        np.testing.assert_array_equal(got, reference(logits, axis, prepared, native))
        assert got.shape == native.shape
        assert got.dtype == np.uint8
