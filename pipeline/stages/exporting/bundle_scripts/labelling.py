"""From the network's logits to a label map on the image's own grid: interpolate first, decide after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage

from .grids import Array, Grid, along_axes


@dataclass
class NativeLabeld:
    """A MONAI dictionary transform: logits on the network's grid become label values on the image's own.

    Attributes:
        values: label value of each class, the background's first.
        regions: whether each logit is of a region, above 0 where it is; else the largest logit has the voxel.
        thick_axis: of the network's grid, along which the nearest plane counts; None: none.
        largest_component: classes of which only the largest component stays.
        smallest_volume_ml: class -> volume below which a component goes.
        key: of the logits in the dictionary.
        image_key: of the image that they are of.
    """

    values: Sequence[int]
    regions: bool
    thick_axis: int | None
    largest_component: Sequence[int] = ()
    smallest_volume_ml: Mapping[str, float] = field(default_factory=dict)
    key: str = "pred"
    image_key: str = "image"

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Transform logits (K, X, Y, Z) to a MetaTensor (1, *native)."""
        import torch
        from monai.data.meta_tensor import MetaTensor

        image, logits = data[self.image_key], data[self.key]
        native = Grid(
            tuple(int(n) for n in np.asarray(image.meta["spatial_shape"]).reshape(-1)[:3]),
            np.asarray(image.meta["original_affine"], np.float64).reshape(4, 4),
        )
        grid = Grid(tuple(image.shape[1:]), np.asarray(image.affine.cpu(), np.float64))
        label = self.label(np.asarray(torch.as_tensor(logits).cpu().float()), grid, native)
        meta = {name: value for name, value in image.meta.items() if name != "affine"}
        voxels = torch.from_numpy(label[None].astype(np.int32))
        return {**data, self.key: MetaTensor(voxels, torch.from_numpy(native.affine), meta)}

    def label(self, logits: Array, grid: Grid, native: Grid) -> Array:
        """Return the label map on the native grid, plane by plane of its first axis."""
        maps = along_axes(grid, native)
        ordered = logits.transpose([0, *(1 + own.axis for own in maps)]).astype(np.float64)
        classes = np.zeros(native.shape, np.int32)
        steps = [own.neighbours(nearest=own.axis == self.thick_axis) for own in maps]
        for plane, lower, upper, weight, inside in zip(classes, *steps[0], maps[0].inside, strict=True):
            if inside:
                between = (1 - weight) * ordered[:, lower] + weight * ordered[:, upper]
                for axis in (1, 2):
                    between = _along(between, axis, *steps[axis])
                plane[...] = self._decided(between)
                plane[~(maps[1].inside[:, None] & maps[2].inside)] = 0
        self._drop_components(classes, native)
        return np.asarray(np.array(self.values)[classes])

    def _decided(self, logits: Array) -> Array:
        """Return the class of each voxel of (K, ...)."""
        if not self.regions:
            return np.asarray(logits.argmax(axis=0))
        ranks = np.arange(1, len(logits) + 1).reshape(-1, 1, 1)
        return np.asarray(((logits > 0) * ranks).max(axis=0))

    def _drop_components(self, classes: Array, native: Grid) -> None:
        """Turn components that the model's rules rule out into background."""
        voxel_ml = abs(float(np.linalg.det(native.affine[:3, :3]))) / 1000
        for index in range(1, len(self.values)):
            smallest = self.smallest_volume_ml.get(str(index), 0.0) / voxel_ml
            if index not in self.largest_component and not smallest:
                continue
            components, count = ndimage.label(classes == index, structure=np.ones((3, 3, 3)))
            if not count:
                continue
            sizes = np.bincount(components.ravel())[1:]
            stays = sizes >= smallest * (1 - 1e-6)
            if index in self.largest_component:
                stays &= np.arange(count) == sizes.argmax()
            classes[np.concatenate(([False], ~stays))[components]] = 0


def _along(values: Array, axis: int, lower: Array, upper: Array, weight: Array) -> Array:
    """Interpolate (K, A, B) along an axis."""
    w = weight[:, None] if axis == 1 else weight
    return np.asarray((1 - w) * values.take(lower, axis) + w * values.take(upper, axis))
