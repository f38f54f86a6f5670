"""From an image as it is read to what the network sees: one grid, one resample, normalised intensities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from .grids import AlongAxis, Array, Grid, along_axes

# An axis that shrinks by more than this is smoothed first.
_ANTI_ALIAS_ABOVE = 1.5


@dataclass
class PlanGridd:
    """A MONAI dictionary transform: the image goes onto the grid that the network was trained on.

    Attributes:
        orientation: axis code of that grid.
        spacing_mm: its voxels.
        crop_to_nonzero: cut the frame away in which every channel is zero.
        thick_axis: interpolated linearly, the others by cubic splines; None: none.
        normalisation: of each channel: scheme, and for "ct" low, high, mean, std.
        key: of the image in the dictionary.
    """

    orientation: str
    spacing_mm: Sequence[float]
    crop_to_nonzero: bool
    thick_axis: int | None
    normalisation: Sequence[Mapping[str, Any]]
    key: str = "image"

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Transform a MetaTensor (C, X, Y, Z); the grid that it came from stays in its metadata."""
        from monai.data.meta_tensor import MetaTensor

        image = data[self.key]
        native = np.asarray(image.affine, np.float64)
        prepared, grid = self.prepare(np.asarray(image, np.float32), native)
        meta = {**image.meta, "original_affine": native, "spatial_shape": np.asarray(image.shape[1:])}
        meta.pop("affine", None)  # is of the image as it was read
        return {**data, self.key: MetaTensor(torch.from_numpy(prepared), torch.from_numpy(grid.affine), meta)}

    def prepare(self, image: Array, affine: Array) -> tuple[Array, Grid]:
        """Return an image (C, X, Y, Z) on the network's grid, float32, and the grid.

        Raises:
            ValueError: the image has another number of channels, or holds NaN or infinity.
        """
        if len(image) != len(self.normalisation) or not np.isfinite(image).all():
            raise ValueError(
                f"expected {len(self.normalisation)} channels of finite numbers, got {len(image)} channels"
            )
        native = Grid(image.shape[1:], affine)
        grid = self._grid(native, image)
        maps = along_axes(native, grid)
        result = np.empty((len(image), *grid.shape), np.float32)
        for channel, out, rule in zip(image, result, self.normalisation, strict=True):
            out[...] = _resampled(channel, maps, self.thick_axis)
            if rule["scheme"] == "zscore_nonzero":
                out[~_mostly_nonzero(channel != 0, maps, self.thick_axis)] = np.nan
            _normalise(out, rule)
        return result, grid

    def _grid(self, native: Grid, image: Array) -> Grid:
        """Return the network's grid of an image: oriented, cropped, respaced."""
        grid = native.reoriented(self.orientation)
        used = np.argwhere((image != 0).any(axis=0)) if self.crop_to_nonzero else np.empty((0, 3))
        if len(used):
            box = np.stack([used.min(axis=0) - 0.5, used.max(axis=0) + 0.5])  # faces of the outermost voxels
            corners = np.stack(np.meshgrid(*box.T, indexing="ij"), axis=-1).reshape(-1, 3)
            to_grid = np.linalg.inv(grid.affine) @ native.affine
            on_grid = corners @ to_grid[:3, :3].T + to_grid[:3, 3] + 0.5
            start = np.floor(on_grid.min(axis=0) + 1e-3).clip(0, np.array(grid.shape) - 1).astype(int)
            stop = np.ceil(on_grid.max(axis=0) - 1e-3).clip(start + 1, grid.shape).astype(int)
            grid = grid.cropped(start.tolist(), stop.tolist())
        return grid.respaced(self.spacing_mm)


def _resampled(channel: Array, maps: Sequence[AlongAxis], thick_axis: int | None) -> Array:
    """Interpolate (X, Y, Z) at another grid's voxels: one matrix an axis."""
    result = channel.transpose([own.axis for own in maps]).astype(np.float32)
    for axis, own in enumerate(maps):
        on_centres = not (own.clamped % 1).any()
        if on_centres and own.shrink <= _ANTI_ALIAS_ABOVE:
            result = result.take(own.clamped.astype(np.intp), axis)
            continue
        matrix = _matrix(own, 1 if axis == thick_axis else 3).astype(np.float32)
        result = np.moveaxis(np.tensordot(matrix, result, axes=(1, axis)), 0, axis)
    return result


def _matrix(own: AlongAxis, order: int) -> Array:
    """Return (n, length): what each voxel takes of each; smoothed where the axis shrinks, cubic B-splines or linear."""
    source = np.eye(own.length)
    if own.shrink > _ANTI_ALIAS_ABOVE:
        sigma = float(np.sqrt((own.shrink**2 - 1) / (8 * np.log(2))))
        source = ndimage.gaussian_filter1d(source, sigma, axis=0, mode="nearest", truncate=4)
    lower, upper, t = own.neighbours()
    last = own.length - 1
    if order == 1 or last == 0:
        return np.asarray((1 - t)[:, None] * source[lower] + t[:, None] * source[upper])
    source = ndimage.spline_filter1d(source, order=3, axis=0, mode="mirror")
    weights = ((1 - t) ** 3 / 6, 2 / 3 - t**2 + t**3 / 2, 2 / 3 - (1 - t) ** 2 + (1 - t) ** 3 / 2, t**3 / 6)
    taps = (np.abs(last - np.abs(last - np.abs(lower + step))) for step in (-1, 0, 1, 2))
    return np.asarray(sum(weight[:, None] * source[tap] for tap, weight in zip(taps, weights, strict=True)))


def _mostly_nonzero(nonzero: Array, maps: Sequence[AlongAxis], thick_axis: int | None) -> Array:
    """Tell at which voxels more than half of the linear weight is of voxels that are not zero."""
    share = nonzero.transpose([own.axis for own in maps]).astype(np.float64)
    for axis, own in enumerate(maps):
        lower, upper, weight = own.neighbours(nearest=axis == thick_axis)
        shape = [-1 if other == axis else 1 for other in range(3)]
        w = weight.reshape(shape)
        share = (1 - w) * share.take(lower, axis) + w * share.take(upper, axis)
    return np.asarray(share > 0.5)


def _normalise(image: Array, rule: Mapping[str, Any]) -> None:
    """Bring intensities to a common scale, in place; NaN marks voxels that do not count and become zero."""
    if rule["scheme"] == "none":
        return
    if rule["scheme"] == "ct":
        np.clip(image, rule["low"], rule["high"], out=image)
        image -= rule["mean"]
        image /= rule["std"]
        return
    values = image.astype(np.float64)
    counted = max(1, int(np.isfinite(values).sum()))
    mean = float(np.nansum(values)) / counted
    std = float(np.sqrt(np.nansum(np.square(image - mean, dtype=np.float64)) / counted))
    image -= mean
    image *= 1 / std if std > np.finfo(np.float32).eps * abs(mean) else 0.0
    image[np.isnan(image)] = 0.0
