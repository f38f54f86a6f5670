"""What the development cases are like (Fingerprint), and what is decided from it (Plan), each value with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.config import PreprocessingSection
from pipeline.data.manifest import Manifest
from pipeline.data.plan import ChannelFingerprint, Fingerprint, Millimetres, Normalisation, Plan
from pipeline.errors import ConfigError
from pipeline.geometry import Geometry
from pipeline.preparation.examination import CaseExamination, ChannelExamination, pooled
from pipeline.preparation.preprocessing import cropped_to
from pipeline.preparation.sizing import SET_HERE, Memory, sized

Scheme = Literal["ct", "zscore", "zscore_nonzero", "none"]
Triple = tuple[float, float, float]
Axis = Literal[0, 1, 2]

# An axis whose voxels are this much longer than the others' is thick (Isensee et al. 2021, Nature Methods 18).
THICK_RATIO = 3.0
# Images with more exact zeros than this were cut out of a frame of zeros (skull-stripped, ultrasound's cone).
FRAME_SHARE = 0.25

_QUANTILES = {"0": 0.0, "10": 0.1, "50": 0.5, "100": 1.0}
_FOREGROUND_LEVELS = {"0.5": 0.005, "5": 0.05, "50": 0.5, "95": 0.95, "99.5": 0.995}


def fingerprint(
    examinations: Iterable[CaseExamination], manifest: Manifest, section: PreprocessingSection
) -> Fingerprint:
    """Sum up what the development cases are like; no image is read.

    Args:
        examinations: of all cases or only the development ones; held-out cases are left aside.
        manifest: says which cases may be looked at.
        section: its orientation and crop say on which grid spacing and shape are measured.

    Raises:
        ConfigError: no development case could be examined.
    """
    development = {case.id for case in manifest.development_cases}
    seen = [examination for examination in examinations if examination.case_id in development]
    grids = [_oriented(examination, section) for examination in seen if examination.native]
    if not grids:
        raise ConfigError("no case with a fold could be read, so there is nothing to plan from; see `medseg check`")
    spacings = np.array([grid.spacing_mm for grid in grids])
    shapes = np.array([grid.shape for grid in grids])
    counts = {name: [e.label.voxels.get(name, 0) for e in seen if e.label] for name in manifest.labels}
    return Fingerprint(
        cases=len(grids),
        spacing_mm=_percentiles(spacings),
        shape=_percentiles(shapes),
        extent_mm=_percentiles(spacings * shapes),
        channels=_channels(seen, manifest),
        label_voxels={name: sum(voxels) for name, voxels in counts.items()},
        label_cases={name: sum(n > 0 for n in voxels) for name, voxels in counts.items()},
        label_volume_ml=_label_volumes(seen, manifest),
    )


def make_plan(
    fingerprint: Fingerprint, manifest: Manifest, section: PreprocessingSection, memory: Memory | None = None
) -> Plan:
    """Decide how images are treated; what the configuration sets wins, and its reason says so.

    A pure function: equal facts give an equal plan.

    Args:
        fingerprint: of the development cases.
        manifest: channels, labels and pairs.
        section: the configuration's wishes.
        memory: what a step of training may take, and what it would; None: only voxels are counted.

    Raises:
        ConfigError: a channel of `section.normalisation` is not in the manifest.
    """
    reasons = {"orientation": SET_HERE if section.orientation != "RAS" else "RAS, as world coordinates run"}
    reasons["crop"] = {"none": "nothing is cut away", "nonzero": "the frame that is zero in every channel is cut away"}[
        section.crop
    ]
    spacing, reasons["spacing_mm"] = (
        (section.spacing_mm, SET_HERE) if section.spacing_mm != "auto" else _spacing(fingerprint)
    )
    thick, reasons["thick_axis"] = _thick_axis(spacing)
    normalisation, reasons["normalisation"] = _normalisations(fingerprint, manifest, section.normalisation)
    plan = Plan(
        channels=manifest.channels,
        labels=manifest.labels,
        label_pairs=manifest.label_pairs,
        regions=manifest.regions,
        ignore_label=manifest.ignore_label,
        orientation=section.orientation,
        spacing_mm=spacing,
        thick_axis=thick,
        crop=section.crop,
        patch_size=(1, 1, 1),
        batch_size=1,
        normalisation=normalisation,
        reasons=reasons,
    )
    return sized(plan, fingerprint, section, memory)


def _oriented(examination: CaseExamination, section: PreprocessingSection) -> Geometry:
    """Return a case's native grid in the plan's orientation, cropped as preprocessing will crop it."""
    assert examination.native is not None  # the caller has left out those without
    grid = examination.native.reoriented(section.orientation)
    if section.crop == "none":
        return grid
    channels = examination.channels.values()
    return cropped_to(grid, [c.grid.geometry.cropped(*c.nonzero_box) for c in channels if c.nonzero_box])


def _channels(seen: Sequence[CaseExamination], manifest: Manifest) -> dict[str, ChannelFingerprint]:
    """Return what each channel is like; channels that no case has, or that are zero in all, are left out."""
    parts = {name: [e.channels[name] for e in seen if name in e.channels] for name in manifest.channels}
    return {name: _channel(own) for name, own in parts.items() if any(part.body for part in own)}


def _channel(parts: Sequence[ChannelExamination]) -> ChannelFingerprint:
    """Return what one channel is like over the cases that have it."""
    bodies = [part.body for part in parts if part.body]
    # Where no case has foreground the body has to stand in.
    foreground = pooled([part.foreground for part in parts if part.foreground] or bodies)
    medians = [body.at(0.5) for body in bodies]
    return ChannelFingerprint(
        mean=foreground.mean,
        std=foreground.std,
        percentiles={name: foreground.at(level) for name, level in _FOREGROUND_LEVELS.items()},
        case_medians=(min(medians), max(medians)),
        zero_share=float(np.median([_zero_share(part) for part in parts])),
    )


def _zero_share(channel: ChannelExamination) -> float:
    """Return the share of an image's voxels that are not body: of all but CT those that are exactly zero."""
    return 1 - (channel.body.voxels if channel.body else 0) / prod(channel.grid.shape)


def _label_volumes(seen: Sequence[CaseExamination], manifest: Manifest) -> dict[str, Triple]:
    """Return percentiles 1, 50 and 99 of each label's volume in ml, over the cases that have it."""
    volumes: dict[str, list[float]] = {name: [] for name in manifest.labels}
    for label in (examination.label for examination in seen if examination.label):
        for name, voxels in label.voxels.items():
            if voxels:
                volumes[name].append(voxels * label.grid.geometry.voxel_volume_ml)
    return {name: _triple(np.quantile(ml, (0.01, 0.5, 0.99))) for name, ml in volumes.items() if ml}


def _percentiles(values: NDArray[np.floating] | NDArray[np.integer]) -> dict[str, Triple]:
    """Return percentiles of (cases, 3) values, axis by axis."""
    return {name: _triple(np.quantile(values.astype(np.float64), level, axis=0)) for name, level in _QUANTILES.items()}


def _triple(values: NDArray[np.floating]) -> Triple:
    """Make three numbers a tuple; float32 headers leave noise in the seventh digit."""
    x, y, z = (round(float(value), 6) for value in values)
    return x, y, z


def _spacing(fingerprint: Fingerprint) -> tuple[Millimetres, str]:
    """Return the median spacing, or along a thick axis with few slices a fine one (nnU-Net's rule)."""
    median, shape = fingerprint.spacing_mm["50"], fingerprint.shape["50"]
    axis = int(np.argmax(median))
    others = [median[a] for a in range(3) if a != axis]
    short = shape[axis] * THICK_RATIO < min(shape[a] for a in range(3) if a != axis)
    if not (median[axis] > THICK_RATIO * max(others) and short):
        return median, f"median of {fingerprint.cases} cases"
    fine = list(median)
    # Not finer than the other axes: slices would be invented.
    fine[axis] = max(fingerprint.spacing_mm["10"][axis], max(others))
    return _triple(np.array(fine)), (
        f"median of {fingerprint.cases} cases; along axis {axis}, {median[axis]:g} mm thick and few slices, the 10th "
        "percentile, so that thinner cases keep their detail"
    )


def _thick_axis(spacing: Millimetres) -> tuple[Axis | None, str]:
    """Return the axis whose voxels are more than three times as long as the others'."""
    axes: tuple[Axis, ...] = (0, 1, 2)
    thick = max(axes, key=lambda axis: spacing[axis])
    ratio = spacing[thick] / max(spacing[axis] for axis in axes if axis != thick)
    if ratio > THICK_RATIO:
        return thick, f"voxels are {ratio:.1f} times as long along it: a cubic curve across slices would overshoot"
    return None, f"the longest axis of a voxel is {ratio:.1f} times the next, not more than {THICK_RATIO:g}"


def _normalisations(
    fingerprint: Fingerprint, manifest: Manifest, wishes: Mapping[str, Scheme]
) -> tuple[dict[str, Normalisation], str]:
    """Return each channel's normalisation and one reason for all."""
    unknown = [name for name in wishes if name not in manifest.channels]
    if unknown:
        raise ConfigError(
            f"preprocessing.normalisation.{unknown[0]}: not a channel of the manifest; channels are "
            f"{', '.join(manifest.channels)}"
        )
    chosen, reasons = {}, []
    for name, modality in manifest.channels.items():
        own = fingerprint.channels.get(name)
        scheme, reason = (wishes[name], "set in the configuration") if name in wishes else _scheme(modality, own)
        chosen[name] = _with_values(scheme, own)
        reasons.append(f"{name}: {reason}")
    return chosen, "; ".join(reasons)


def _scheme(modality: str, channel: ChannelFingerprint | None) -> tuple[Scheme, str]:
    """Return the normalisation that fits a modality."""
    if channel is None:
        return "zscore", "no development case has it"
    if modality == "CT":
        return "ct", "Hounsfield units mean the same in every case, so one scale from the foreground of all"
    if channel.zero_share > FRAME_SHARE:
        return "zscore_nonzero", f"no common unit; {channel.zero_share:.0%} of the voxels are an empty frame of zeros"
    return "zscore", f"{modality} has no common unit, so each case by its own mean and deviation"


def _with_values(scheme: Scheme, channel: ChannelFingerprint | None) -> Normalisation:
    """Return a normalisation with the fingerprint's values, which only ct needs."""
    if scheme != "ct" or channel is None:
        return Normalisation(scheme=scheme if scheme != "ct" else "zscore")
    low, high = channel.percentiles["0.5"], channel.percentiles["99.5"]
    return Normalisation(scheme="ct", low=low, high=high, mean=channel.mean, std=channel.std or 1.0)
