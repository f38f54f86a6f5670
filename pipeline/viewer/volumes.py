"""A case's volumes as a page carries them: cropped to the body, of few voxels, 8 bits, packed."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import Geometry
from pipeline.pictures import slices_of
from pipeline.volumes.resampling import resample_image, resample_label
from pipeline.volumes.volume import Volume
from pipeline.volumes.writing import packed_nifti

# Voxels of a case: 512x512x16, 256x256x64, 161 cubed. Noise packs badly, so that a CT of them is some 4 MB.
LARGEST_VOXELS = 2**22
# NiiVue's outlined layer holds 8 bits a voxel.
MOST_CLASSES = 255

# Percentiles of the intensities that become black and white.
_WINDOW = (0.5, 99.5)
# What is darker, as a share of the window, is taken for air.
_AIR = 0.05
# Of each axis so many voxels lie apart that are looked at for the window and the body.
_STEP = 4
# Voxels kept around the body.
_MARGIN = 4

Box = tuple[tuple[int, int, int], tuple[int, int, int]]


@dataclass(frozen=True)
class CaseVolumes:
    """A case's volumes on one grid, each a packed NIfTI file in base64.

    Attributes:
        image: 8 bits; black and white are the ends of `window`.
        prediction, reference: class indices; None where there is no reference.
        window: intensities of black and white.
        focus_mm: where the structures are largest, RAS+.
        grid: the grid in words, beside the case's own where it is another.
    """

    image: str
    prediction: str
    reference: str | None
    window: tuple[float, float]
    focus_mm: tuple[float, float, float]
    grid: str

    @property
    def size_bytes(self) -> int:
        """What the page grows by."""
        return len(self.image) + len(self.prediction) + len(self.reference or "")


def case_volumes(image: Volume, prediction: Volume, reference: Volume | None = None) -> CaseVolumes:
    """Make a case's volumes small.

    Args:
        image: (C, X, Y, Z), of which the first channel is shown; on any grid.
        prediction: (X, Y, Z) class indices, at most MOST_CLASSES, on the native grid.
        reference: the same on the same grid; None: there is none.
    """
    native = prediction.geometry
    window = _window(image.array[0])
    first = _finite(Volume(image.array[:1], image.geometry), window[0])
    if first.geometry != native:
        first = resample_image(first, native, order=1)
    maps = [prediction] if reference is None else [prediction, reference]
    start, stop = _body(first.array[0], [one.array for one in maps], window)
    shown = _with_fewer_voxels(native.cropped(start, stop))
    grey = _eight_bits(resample_image(first, shown, order=1).array[0], window)
    labels = [resample_label(one, shown).array.astype(np.uint8) for one in maps]
    middle = slices_of({"reference": labels[-1], "prediction": labels[0]}, shown.shape)
    x, y, z = shown.to_mm(np.array(middle)).tolist()
    scaling = ((window[1] - window[0]) / 255, window[0])
    return CaseVolumes(
        image=_as_text(packed_nifti(Volume(grey, shown), scaling)),
        prediction=_as_text(packed_nifti(Volume(labels[0], shown))),
        reference=_as_text(packed_nifti(Volume(labels[1], shown))) if reference else None,
        window=window,
        focus_mm=(x, y, z),
        grid=_in_words(native, shown),
    )


def _window(grey: NDArray[Any]) -> tuple[float, float]:
    """Return the intensities that become black and white."""
    sample = grey[::_STEP, ::_STEP, ::_STEP] if grey.size > 10 * _STEP**3 else grey
    finite = sample[np.isfinite(sample)]
    low, high = np.percentile(finite, _WINDOW) if finite.size else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6 * max(1.0, abs(low))))


def _body(grey: NDArray[Any], label_maps: list[NDArray[Any]], window: tuple[float, float]) -> Box:
    """Return the box, first and last voxel + 1, that holds all that is no air, and every structure."""
    limit = window[0] + _AIR * (window[1] - window[0])
    start, stop = [], []
    for axis in range(3):
        others = tuple(n for n in range(3) if n != axis)
        thinned = tuple(slice(None) if n == axis else slice(None, None, _STEP) for n in range(3))
        sections = [grey[thinned] > limit, *(label_map != 0 for label_map in label_maps)]
        inside = np.any([section.any(others) for section in sections], axis=0)
        found = np.flatnonzero(inside) if inside.any() else np.arange(inside.size)
        start.append(max(0, int(found[0]) - _MARGIN))
        stop.append(min(inside.size, int(found[-1]) + 1 + _MARGIN))
    return tuple(start), tuple(stop)  # type: ignore[return-value]


def _with_fewer_voxels(grid: Geometry) -> Geometry:
    """Return a grid of at most about LARGEST_VOXELS voxels over the same box; the finest axes are made coarser."""
    finest = min(grid.spacing_mm)
    while np.prod(grid.shape) > LARGEST_VOXELS:
        finest *= 1.05
        x, y, z = (max(step, finest) for step in grid.spacing_mm)
        grid = grid.respaced((x, y, z))
    return grid


def _finite(image: Volume, low: float) -> Volume:
    """Return an image in which what is no number is as dark as it can be."""
    if np.isfinite(image.array).all():
        return image
    return Volume(np.nan_to_num(image.array, nan=low, posinf=low, neginf=low), image.geometry)


def _eight_bits(grey: NDArray[Any], window: tuple[float, float]) -> NDArray[np.uint8]:
    """Return intensities (X, Y, Z) from 0, black, to 255, white."""
    share = (grey - window[0]) / (window[1] - window[0])
    eight_bits: NDArray[np.uint8] = np.rint(255 * share.clip(0, 1)).astype(np.uint8)
    return eight_bits


def _as_text(content: bytes) -> str:
    """Return bytes in base64."""
    return base64.b64encode(content).decode()


def _in_words(native: Geometry, shown: Geometry) -> str:
    """Say what grid is shown, and the case's own where it is another."""
    return str(shown) if shown == native else f"{shown}; the case's own grid is {native}"
