"""From native images and label to the plan's grid and intensities.

One target Geometry is computed for a case (oriented, cropped, respaced), each channel goes onto it by one resample from
its own grid, and only then are intensities normalised. `segment`, `evaluate` and the store all come through here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, SupportsInt

import numpy as np
from numpy.typing import NDArray

from pipeline.data.plan import Normalisation, Plan
from pipeline.data.store import Index, Labels, PreparedCase
from pipeline.errors import VolumeError
from pipeline.geometry import Geometry
from pipeline.preparation.body import body_of
from pipeline.preparation.examination import nonzero_box
from pipeline.volumes.body import Body
from pipeline.volumes.relabelling import relabelled
from pipeline.volumes.resampling import resample_image, resample_label
from pipeline.volumes.volume import Volume, smallest_type

# Coordinates kept per class: enough that patches centred on them look drawn from all voxels, small enough to keep.
CLASS_VOXELS = 10_000

# Boxes are compared across grids in millimetres: this much of a voxel is rounding, not another voxel.
_ROUNDING_VOXELS = 1e-3

# Planes of the plan's grid whose native voxels are looked at together.
SLAB_PLANES = 16


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the network sees it.

    Attributes:
        array: (C, X, Y, Z) float32, normalised, channels in the plan's order; zeros for a missing channel.
        geometry: the plan's grid.
        body: where the body may be; None where that is not known.
    """

    array: NDArray[np.float32]
    geometry: Geometry
    body: Body | None = None


def prepare_images(images: Mapping[str, Volume], plan: Plan, native: Geometry) -> PreparedImage:
    """Bring a case's channels to the plan's grid and intensities.

    Args:
        images: channel -> (1, X, Y, Z) float32, each on its own grid; channels may be missing, but not all.
        plan: the plan.
        native: the case's native grid; the plan's grid lies inside its box.

    Raises:
        VolumeError: a channel is not of the plan, none is there, or one holds NaN or infinity.
    """
    _refuse_unknown(images, plan)
    target = target_geometry(images, plan, native)
    body = body_of(images, plan.channels, target)
    array = np.zeros((len(plan.channels), *target.shape), np.float32)
    for index, channel in enumerate(plan.channels):
        if channel in images:
            _prepare_channel(channel, images[channel], target, plan, out=array[index])
    return PreparedImage(array, target, body)


def prepare_case(images: Mapping[str, Volume], label: Volume | None, plan: Plan, native: Geometry) -> PreparedCase:
    """Make of a case what the store keeps of it.

    Args:
        images: as for `prepare_images`.
        label: (X, Y, Z) values of `plan.labels`, or `plan.ignore_label`, on the native grid; None for an unlabelled
            case.
        plan: the plan.
        native: the native grid.

    Raises:
        VolumeError: as `prepare_images`; a label value is unknown; intensities that are not normalised exceed float16.
        ValueError: the label does not lie on the native grid.
    """
    prepared = prepare_images(images, plan, native)
    reference = drawn = None
    if label is not None:
        if label.geometry != native:
            raise ValueError(f"the label's grid, {label.geometry}, is not the native one, {native}")
        reference = class_indices(label.array, plan)
        drawn = prepared_label(Volume(reference, native), prepared.geometry, plan)
    return PreparedCase(
        image=_as_float16(prepared.array, plan),
        label=drawn,
        reference=reference,
        geometry=prepared.geometry,
        native=native,
        class_voxels={} if drawn is None else sample_class_voxels(drawn, plan.ignored_class),
        channels_present=tuple(channel for channel in plan.channels if channel in images),
        body=prepared.body,
    )


def prepared_label(reference: Volume, geometry: Geometry, plan: Plan) -> Labels:
    """Bring class indices (X, Y, Z) from the native grid onto the plan's."""
    return resample_label(reference, geometry, thick_axis=plan.thick_axis).array


def target_geometry(images: Mapping[str, Volume], plan: Plan, native: Geometry) -> Geometry:
    """Return the plan's grid of a case: the native one oriented, cropped to what is not zero, and respaced."""
    grid = native.reoriented(plan.orientation)
    if plan.crop == "nonzero":
        boxes = ((image.geometry, nonzero_box(image.array[0])) for image in images.values())
        grid = cropped_to(grid, [geometry.cropped(*box) for geometry, box in boxes if box])
    return grid.respaced(plan.spacing_mm)


def cropped_to(grid: Geometry, boxes: Sequence[Geometry]) -> Geometry:
    """Return the part of a grid, in whole voxels, that holds all of some boxes; the whole grid where there are none."""
    if not boxes:
        return grid
    faces = [box.to_mm(np.array(list(product(*((-0.5, n - 0.5) for n in box.shape))))) for box in boxes]
    corners = grid.to_index(np.concatenate(faces)) + 0.5  # (8 * boxes, 3), voxel 0 from 0 to 1
    start = np.floor(corners.min(axis=0) + _ROUNDING_VOXELS).clip(0, np.array(grid.shape) - 1)
    stop = np.ceil(corners.max(axis=0) - _ROUNDING_VOXELS).clip(start + 1, grid.shape)
    return grid.cropped(_as_index(start), _as_index(stop))


def class_indices(label: NDArray[Any], plan: Plan) -> Labels:
    """Turn label values into class indices, in the smallest type that holds them; the ignored value is one more class.

    Raises:
        VolumeError: a value is not one of the plan's.
    """
    values = [*plan.class_values, *([] if plan.ignore_label is None else [plan.ignore_label])]
    kind = np.dtype(np.uint8 if len(values) <= 256 else np.int16)
    table = {value: index for index, value in enumerate(values)}
    return relabelled(label, table, kind, f"the plan's, {plan.labels}")


def label_values(classes: NDArray[Any], plan: Plan) -> NDArray[Any]:
    """Turn class indices into the plan's label values, in the smallest type that holds them all."""
    values = plan.class_values
    table = np.array(values, dtype=smallest_type(min(values), max(values)))
    label = np.empty_like(classes, dtype=table.dtype)
    for plane, into in zip(classes, label, strict=True):  # plane by plane: numpy makes 64-bit integers of an index
        into[...] = table[plane]
    return label


def sample_class_voxels(label: Labels, classes: int, seed: int = 0) -> dict[int, NDArray[np.int32]]:
    """Return the voxels of each foreground class, at most CLASS_VOXELS drawn evenly of each.

    Args:
        label: (X, Y, Z) class indices.
        classes: how many there are, background included; the index after the last, ignored voxels, is left out.
        seed: of the draw; the same label and seed give the same voxels.

    Returns:
        class index -> (n, 3) int32 voxels in the order of the array; classes that do not occur are left out.
    """
    flat = label.ravel()
    foreground = np.flatnonzero(flat)  # (F,)
    drawn = flat[foreground]
    voxels = {}
    for index in np.flatnonzero(np.bincount(drawn)[:classes]).tolist():
        own = foreground[drawn == index]
        if own.size > CLASS_VOXELS:
            own = np.sort(np.random.default_rng((seed, index)).choice(own, CLASS_VOXELS, replace=False))
        voxels[index] = np.stack(np.unravel_index(own, label.shape), axis=1).astype(np.int32)
    return voxels


def _refuse_unknown(images: Mapping[str, Volume], plan: Plan) -> None:
    """Raise where the channels are not the plan's."""
    unknown = [channel for channel in images if channel not in plan.channels]
    if unknown or not images:
        raise VolumeError(f"channels {', '.join(images) or '(none)'}: the plan's are {', '.join(plan.channels)}")


def _as_index(numbers: Iterable[SupportsInt]) -> Index:
    """Make three whole numbers an index."""
    x, y, z = (int(number) for number in numbers)
    return x, y, z


def _prepare_channel(channel: str, image: Volume, target: Geometry, plan: Plan, *, out: NDArray[np.float32]) -> None:
    """Resample one channel onto the target and normalise it, into `out` (X, Y, Z)."""
    normalisation = plan.normalisation[channel]
    # Beyond a CT's field of view is air, and its lowest intensity says so; elsewhere air is zero.
    outside = (normalisation.low or 0.0) if normalisation.scheme == "ct" else 0.0
    resample_image(image, target, thick_axis=plan.thick_axis, outside=outside, out=out[None])
    if not np.isfinite(out.sum(dtype=np.float64)):
        raise VolumeError(f"channel {channel!r} holds NaN or infinity; mend or drop the image")
    if normalisation.scheme == "zscore_nonzero":
        _leave_out_zeros(out, image, target, plan)
    normalise(out, normalisation)


def _leave_out_zeros(out: NDArray[np.float32], image: Volume, target: Geometry, plan: Plan) -> None:
    """Make of a resampled image NaN where the native one is zero; interpolation itself leaves ripples around zeros."""
    for start in range(0, len(out), SLAB_PLANES):
        stop = min(start + SLAB_PLANES, len(out))
        slab = target.cropped((start, 0, 0), (stop, *target.shape[1:]))
        low, high = _reach(image.geometry, slab)
        x, y, z = (slice(a, b) for a, b in zip(low, high, strict=True))
        nonzero = Volume((image.array[0, x, y, z] != 0).view(np.uint8), image.geometry.cropped(low, high))
        out[start:stop][resample_label(nonzero, slab, thick_axis=plan.thick_axis).array == 0] = np.nan


def _reach(grid: Geometry, onto: Geometry) -> tuple[Index, Index]:
    """Return the box of a grid's voxels that interpolation at another's voxels looks at."""
    corners = grid.to_index(onto.corners_mm)
    start = np.floor(corners.min(axis=0)).clip(0, np.array(grid.shape) - 1)
    stop = (np.ceil(corners.max(axis=0)) + 1).clip(start + 1, grid.shape)
    return _as_index(start), _as_index(stop)


def normalise(image: NDArray[np.float32], normalisation: Normalisation) -> None:
    """Bring an image's intensities to a common scale, in place.

    Args:
        image: (X, Y, Z), finite; for zscore_nonzero NaN marks the voxels that do not count, which become zero.
        normalisation: how.
    """
    if normalisation.scheme == "ct":
        np.clip(image, normalisation.low, normalisation.high, out=image)
        image -= normalisation.mean or 0.0
        image /= normalisation.std or 1.0
    elif normalisation.scheme != "none":
        mean, std = _moments(image)
        image -= mean
        # A constant image carries nothing: rounding must not be blown up to noise of unit size.
        image *= 1 / std if std > np.finfo(np.float32).eps * abs(mean) else 0.0
        for plane in image:
            plane[np.isnan(plane)] = 0.0


def _moments(image: NDArray[np.float32]) -> tuple[float, float]:
    """Return mean and standard deviation in float64 of what is not NaN, plane by plane: no second volume in memory."""
    voxels = max(1, sum(plane.size - int(np.isnan(plane).sum()) for plane in image))
    mean = sum(float(np.nansum(plane, dtype=np.float64)) for plane in image) / voxels
    squares = sum(float(np.nansum(np.square(plane - mean, dtype=np.float64))) for plane in image)
    return mean, float(np.sqrt(squares / voxels))


def _as_float16(image: NDArray[np.float32], plan: Plan) -> NDArray[np.float16]:
    """Return the image as the store keeps it."""
    largest = np.finfo(np.float16).max
    for channel, array in zip(plan.channels, image, strict=True):
        if max(array.max(), -array.min()) > largest:
            raise VolumeError(
                f"channel {channel!r}: intensities up to {np.abs(array).max():g} exceed the store's {largest:g}; set "
                f"preprocessing.normalisation.{channel} to zscore"
            )
    return image.astype(np.float16)
