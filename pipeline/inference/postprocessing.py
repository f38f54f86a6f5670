"""What is known of a structure beforehand, applied to its prediction: it is one piece, or not smaller than so much."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.config import InferenceSection
from pipeline.data.plan import Plan
from pipeline.errors import ConfigError
from pipeline.geometry import Geometry

# Voxels that touch by a face, an edge or a corner are of one component (26-connectivity).
_TOUCHING = np.ones((3, 3, 3), bool)


def postprocess(classes: NDArray[Any], plan: Plan, native: Geometry, inference: InferenceSection) -> NDArray[Any]:
    """Turn components that cannot be of their structure into background.

    Of a label in `largest_component` only the largest 26-connected component stays (of equal ones the first in memory
    order of the axes); of a label in `smallest_volume_ml` only components of at least that volume do. Labels that no
    rule names are left as they are, and so is a label that is not there.

    Args:
        classes: (X, Y, Z) class indices; not changed.
        plan: names the labels, in the order of their class indices.
        native: the grid of `classes`.
        inference: the rules.

    Returns:
        (X, Y, Z) class indices of the same type; `classes` itself where there is no rule.

    Raises:
        ConfigError: a rule names a label that the plan does not.
    """
    names = list(plan.labels)
    ruled = {*inference.largest_component, *inference.smallest_volume_ml}
    if unknown := sorted(ruled - set(names[1:])):
        raise ConfigError(f"inference: rules for {', '.join(unknown)}; the plan's labels are {', '.join(names[1:])}")
    if not ruled:
        return classes
    result = classes.copy()
    boxes = ndimage.find_objects(classes, max_label=len(names) - 1)
    for index, name in enumerate(names):
        if name not in ruled or boxes[index - 1] is None:
            continue
        smallest_voxels = inference.smallest_volume_ml.get(name, 0.0) / native.voxel_volume_ml
        within = result[boxes[index - 1]]
        within[_unlikely(within == index, smallest_voxels, name in inference.largest_component)] = 0
    return result


def _unlikely(mask: NDArray[np.bool_], smallest_voxels: float, largest_only: bool) -> NDArray[np.bool_]:
    """Return the voxels of a mask whose component is too small, or not the largest."""
    components, _ = ndimage.label(mask, structure=_TOUCHING)
    sizes = np.bincount(components.ravel())[1:]
    keep = sizes >= smallest_voxels * (1 - 1e-9)  # a volume that is a whole number of voxels, whatever its rounding
    if largest_only:
        keep &= np.arange(sizes.size) == sizes.argmax()
    return np.asarray(np.concatenate(([False], ~keep))[components])
