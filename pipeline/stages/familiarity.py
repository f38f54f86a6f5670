"""Is a volume like those the model was trained on? What is not is said in the report; it is segmented all the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pipeline.data.manifest import Modality
from pipeline.data.plan import Fingerprint, Plan
from pipeline.geometry import Geometry
from pipeline.preparation.body import is_body
from pipeline.preparation.examining import thinned
from pipeline.volumes.volume import Volume

# How far beyond the training cases' range is still like them: a quarter in voxel size, twice in extent.
SPACING_SLACK, EXTENT_SLACK = 1.25, 2.0
# The medians' range is widened by itself on both sides, and by a tenth of the largest where it is narrower than that.
LEAST_MEDIAN_SLACK = 0.1


def unfamiliar(
    images: Mapping[str, Volume], native: Geometry, prepared: Geometry, plan: Plan, fingerprint: Fingerprint
) -> tuple[str, ...]:
    """Return a warning for each respect in which a case is unlike the training cases.

    Args:
        images: channel -> volume in the file's units.
        native: the native grid.
        prepared: the plan's grid of the case.
        plan: the model's plan.
        fingerprint: what the training cases were like.
    """
    return (
        *_unlike_spacing(native.reoriented(plan.orientation), fingerprint),
        *_unlike_extent(prepared, fingerprint),
        *_unlike_intensity(images, plan, fingerprint),
    )


def _unlike_spacing(grid: Geometry, fingerprint: Fingerprint) -> Iterator[str]:
    """Compare the voxel size with the smallest and largest of training."""
    low, high = fingerprint.spacing_mm["0"], fingerprint.spacing_mm["100"]
    if _outside(grid.spacing_mm, low, high, SPACING_SLACK):
        yield f"voxels of {_by(grid.spacing_mm, 2)} mm; in training {_by(low, 2)} to {_by(high, 2)} mm"


def _unlike_extent(grid: Geometry, fingerprint: Fingerprint) -> Iterator[str]:
    """Compare the size of what the network sees with the smallest and largest of training."""
    low, high = fingerprint.extent_mm["0"], fingerprint.extent_mm["100"]
    extent = tuple(voxels * step for voxels, step in zip(grid.shape, grid.spacing_mm, strict=True))
    if _outside(extent, low, high, EXTENT_SLACK):
        yield f"an extent of {_by(extent, 0)} mm; in training {_by(low, 0)} to {_by(high, 0)} mm"


def _outside(values: Sequence[float], low: Sequence[float], high: Sequence[float], slack: float) -> bool:
    """Tell whether a value lies outside its axis' range, widened by a factor."""
    return any(not a / slack <= value <= b * slack for value, a, b in zip(values, low, high, strict=True))


def _by(values: Sequence[float], digits: int) -> str:
    """Format as 0.70x0.70x5.00."""
    return "x".join(f"{value:.{digits}f}" for value in values)


def _unlike_intensity(images: Mapping[str, Volume], plan: Plan, fingerprint: Fingerprint) -> Iterator[str]:
    """Compare the median intensity of each channel's body with the smallest and largest of training."""
    for channel, modality in plan.channels.items():
        if channel not in images:
            yield f"channel {channel} is missing: zeros stand in for it"
            continue
        median = _body_median(images[channel], modality)
        if median is None:
            yield f"channel {channel} is empty"
        elif channel in fingerprint.channels:
            low, high = fingerprint.channels[channel].case_medians
            slack = max(high - low, LEAST_MEDIAN_SLACK * max(abs(low), abs(high)))
            if not low - slack <= median <= high + slack:
                yield f"channel {channel} has a median of {median:.4g}; in training {low:.4g} to {high:.4g}"


def _body_median(image: Volume, modality: Modality) -> float | None:
    """Return the median of what is not air (CT) or not zero, as the fingerprint's; None where there is nothing."""
    sample = thinned(image.array.reshape(-1))
    body = sample[is_body(sample, modality)]
    return float(np.median(body)) if body.size else None
