"""Fingerprint and Plan as records: what the development cases are like, and what was decided from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.data.manifest import Modality
from pipeline.records import Record

PLAN_FORMAT_VERSION = 1

Size = tuple[int, int, int]
Millimetres = tuple[float, float, float]


class ChannelFingerprint(Record):
    """Intensities of one channel over the development cases' foreground voxels.

    Attributes:
        mean, std: of the foreground.
        percentiles: "0.5", "5", "50", "95", "99.5" -> intensity.
        case_medians: smallest and largest median over the cases' bodies, in the file's units.
    """

    mean: float
    std: float
    percentiles: dict[str, float]
    case_medians: tuple[float, float]


class Fingerprint(Record):
    """What the development cases are like, from one read of each.

    Attributes:
        cases: number of cases.
        spacing_mm: 0, 10, 50 and 100 percentile of the spacing in the plan's orientation: name -> three axes in mm.
        shape: the same of the shape after cropping, in voxels.
        channels: channel name -> intensities.
        label_voxels: label name -> voxels over all cases.
        label_cases: label name -> cases in which it occurs.
        label_volume_ml: label name -> 1, 50 and 99 percentile of its volume over the cases that have it.
    """

    cases: int
    spacing_mm: dict[str, Millimetres]
    shape: dict[str, tuple[float, float, float]]
    channels: dict[str, ChannelFingerprint]
    label_voxels: dict[str, int]
    label_cases: dict[str, int]
    label_volume_ml: dict[str, tuple[float, float, float]]


class Normalisation(Record):
    """How one channel's intensities are brought to a common scale.

    Attributes:
        scheme: ct: clip to low..high, then subtract mean and divide by std, all four of the fingerprint; zscore: mean and standard
            deviation of the case's own voxels; zscore_nonzero: of its non-zero voxels, the rest stays zero; none: as they are.
        low, high, mean, std: in the file's units; for ct only.
    """

    scheme: Literal["ct", "zscore", "zscore_nonzero", "none"]
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    std: Annotated[float, Field(gt=0)] | None = None


class Plan(Record):
    """All that is needed to treat an unseen image as the training images were.

    Attributes:
        format_version: of the plan's own format.
        channels: channel name -> modality, in the network's order.
        labels: label name -> value in label files; the position is the class index, the first the background.
        label_pairs: labels that swap when left and right are flipped.
        orientation: axis code of the plan's grid.
        spacing_mm: voxel size of the plan's grid.
        thick_axis: axis of the plan's grid along which images are interpolated linearly and labels by nearest plane; None where
            voxels are nearly cubes.
        crop: "nonzero" cuts away the frame in which every channel is zero.
        patch_size: voxels of a patch and of a window.
        batch_size: patches a step.
        normalisation: channel name -> scheme.
        reasons: field name -> why it has its value.
    """

    format_version: int = PLAN_FORMAT_VERSION
    channels: dict[str, Modality]
    labels: dict[str, int]
    label_pairs: tuple[tuple[str, str], ...] = ()
    orientation: str
    spacing_mm: Millimetres
    thick_axis: Literal[0, 1, 2] | None = None
    crop: Literal["none", "nonzero"]
    patch_size: Size
    batch_size: int
    normalisation: dict[str, Normalisation]
    reasons: dict[str, str] = {}

    @property
    def class_values(self) -> tuple[int, ...]:
        """Value in label files of each class, by class index."""
        return tuple(self.labels.values())

    @property
    def paired_classes(self) -> tuple[tuple[int, int], ...]:
        """Class indices that swap when left and right are flipped."""
        names = list(self.labels)
        return tuple((names.index(a), names.index(b)) for a, b in self.label_pairs)

    @property
    def left_right_axis(self) -> int:
        """The axis of the plan's grid that runs between left and right."""
        return next(axis for axis, letter in enumerate(self.orientation) if letter in "RL")

    def preprocessing_digest(self) -> str:
        """Return a digest of what a stored case depends on; patch and batch size, and reasons, are not among it."""
        return self.model_copy(update={"patch_size": (1, 1, 1), "batch_size": 1, "reasons": {}}).digest()
