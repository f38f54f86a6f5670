"""Fingerprint and Plan as records: what the development cases are like, and what was decided from it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from pipeline.config import AxisCode, Count, Output, Triple
from pipeline.config import Size as Voxels
from pipeline.data.manifest import Modality, unusual_order
from pipeline.errors import ConfigError
from pipeline.records import Record, digest_of, refuse_other_format, said, says_nothing, write_text

PLAN_FORMAT_VERSION = 1
# Patches on one device whose statistics a batch norm may trust; fewer take an instance norm.
SMALLEST_NORM_BATCH = 4

Size = tuple[int, int, int]
Millimetres = tuple[float, float, float]


class ChannelFingerprint(Record):
    """Intensities of one channel over the development cases' foreground voxels.

    Attributes:
        mean, std: of the foreground.
        percentiles: "0.5", "5", "50", "95", "99.5" -> intensity.
        case_medians: smallest and largest median over the cases' bodies, in the file's units.
        zero_share: median over the cases of the share of voxels that are exactly zero.
    """

    mean: float
    std: float
    percentiles: dict[str, float]
    case_medians: tuple[float, float]
    zero_share: float


class Fingerprint(Record):
    """What the development cases are like, from one read of each.

    Attributes:
        cases: number of cases.
        spacing_mm: 0, 10, 50 and 100 percentile of the spacing in the plan's orientation: name -> three axes in mm.
        shape: the same of the shape after cropping, in voxels.
        extent_mm: the same of the size after cropping.
        channels: channel name -> intensities.
        label_voxels: label name -> voxels over all cases.
        label_cases: label name -> cases in which it occurs.
        label_volume_ml: label name -> 1, 50 and 99 percentile of its volume over the cases that have it.
    """

    cases: int
    spacing_mm: dict[str, Millimetres]
    shape: dict[str, tuple[float, float, float]]
    extent_mm: dict[str, Millimetres]
    channels: dict[str, ChannelFingerprint]
    label_voxels: dict[str, int]
    label_cases: dict[str, int]
    label_volume_ml: dict[str, tuple[float, float, float]]


class Normalisation(Record):
    """How one channel's intensities are brought to a common scale.

    Attributes:
        scheme: ct: clip to low..high, then subtract mean and divide by std, all four of the fingerprint; zscore: mean
            and standard deviation of the case's own voxels; zscore_nonzero: of its non-zero voxels, the rest stays
            zero; none: as they are.
        low, high, mean, std: in the file's units; for ct only.
    """

    scheme: Literal["ct", "zscore", "zscore_nonzero", "none"]
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    std: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _ct_is_complete(self) -> Normalisation:
        if self.scheme == "ct" and None in (self.low, self.high, self.mean, self.std):
            raise ValueError("ct needs low, high, mean and std")
        return self


class NetworkPlan(Record):
    """What planning decided of a U-Net, for the networks that ask; their own options win.

    Attributes:
        width: feature maps of the finest level.
        kernels: convolution kernel of each level, finest first.
        strides: downsampling into each level but the first.
        norm: batch, where enough patches of a step share its statistics, else instance.
    """

    width: Count
    kernels: tuple[Voxels, ...]
    strides: tuple[Voxels, ...]
    norm: Literal["batch", "instance"]

    @model_validator(mode="after")
    def _levels_agree(self) -> NetworkPlan:
        if len(self.kernels) != len(self.strides) + 1:
            raise ValueError(f"{len(self.kernels)} kernels and {len(self.strides)} strides; strides are one fewer")
        return self


def norm_for(batch_size: int) -> Literal["batch", "instance"]:
    """Return the norm that goes with a step's patches on one device."""
    return "batch" if batch_size >= SMALLEST_NORM_BATCH else "instance"


class Plan(Record):
    """All that is needed to treat an unseen image as the training images were.

    Attributes:
        format_version: of the plan's own format.
        channels: channel name -> modality, in the network's order.
        labels: label name -> value in label files; the position is the class index, the first the background.
        label_pairs: labels that swap when left and right are flipped.
        regions: region name -> its labels, in painting order, where regions are learned in place of labels; see the
            manifest. Region number i owns class i + 1.
        ignore_label: value in label files of voxels of which nobody knows what they are; None: there are none.
        orientation: axis code of the plan's grid.
        spacing_mm: voxel size of the plan's grid.
        thick_axis: axis of the plan's grid along which images are interpolated linearly and labels by nearest plane;
            None where voxels are nearly cubes.
        crop: "nonzero" cuts away the frame in which every channel is zero.
        patch_size: voxels of a patch and of a window.
        batch_size: patches a step.
        network: levels, width and norm of a U-Net; None in plans made before planning decided them.
        normalisation: channel name -> scheme.
        reasons: field name -> why it has its value.
    """

    format_version: int = PLAN_FORMAT_VERSION
    channels: dict[str, Modality]
    labels: dict[str, int]
    label_pairs: tuple[tuple[str, str], ...] = ()
    regions: dict[str, tuple[str, ...]] = Field(default={}, exclude_if=says_nothing)
    ignore_label: int | None = Field(default=None, exclude_if=says_nothing)
    orientation: AxisCode
    spacing_mm: Triple
    thick_axis: Literal[0, 1, 2] | None = None
    crop: Literal["none", "nonzero"]
    patch_size: Voxels
    batch_size: Count
    network: NetworkPlan | None = Field(default=None, exclude_if=says_nothing)
    normalisation: dict[str, Normalisation]
    reasons: dict[str, str] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class index, that of ignored voxels included: for pictures."""
        return (*self.labels, "ignored")

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
    def output(self) -> Output:
        """What the logits of a network that is trained by this plan are of."""
        return "regions" if self.regions else "softmax"

    @property
    def structures(self) -> dict[str, tuple[int, ...]]:
        """What is learned and scored: name -> its class indices; the regions, else each label but the background."""
        names = list(self.labels)
        of_labels = self.regions or {name: (name,) for name in names[1:]}
        return {structure: tuple(names.index(name) for name in own) for structure, own in of_labels.items()}

    @property
    def has_ignored(self) -> bool:
        """Whether labels hold voxels of which nobody knows what they are."""
        return self.ignore_label is not None

    @property
    def ignored_class(self) -> int:
        """The class index of such voxels, one beyond the last."""
        return len(self.labels)

    @property
    def left_right_axis(self) -> int:
        """The axis of the plan's grid that runs between left and right."""
        return next(axis for axis, letter in enumerate(self.orientation) if letter in "RL")

    def digest(self) -> str:
        """Return a SHA-256 digest of the fields, the order of channels, labels and regions included."""
        order = unusual_order(self.channels, self.labels, self.regions)
        return digest_of({**self.model_dump(mode="json"), **order})

    def preprocessing_digest(self) -> str:
        """Return a digest of what a stored case depends on: not of the patch, the batch, the regions or the reasons."""
        left_out = {"patch_size": (1, 1, 1), "batch_size": 1, "network": None, "regions": {}, "reasons": {}}
        return self.model_copy(update=left_out).digest()


class _PlanDumper(yaml.SafeDumper):
    """Mappings a line an entry, lists on one line: [1.0, 1.0, 3.0]."""


_PlanDumper.add_representer(list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan as YAML that a person can read and edit: each value below the reason for it.

    The reasons stand once more as a mapping at the end: comments are for people, and are lost when the file is read.
    """
    lines = [
        "# The plan: how every image is treated, in training and after. Edit a value, then run `medseg preprocess`."
    ]
    for name, value in plan.model_dump(mode="json").items():
        reason = plan.reasons.get(name)
        lines += ["", *textwrap.wrap(reason, 118, initial_indent="# ", subsequent_indent="# ")] if reason else [""]
        lines.append(
            yaml.dump({name: value}, Dumper=_PlanDumper, sort_keys=False, allow_unicode=True, width=120).rstrip()
        )
    write_text(path, "\n".join(lines) + "\n")


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        ConfigError: the file is missing, is not YAML, is of another format version, or a value is not what it must be;
            names every key with what was got and expected.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); `medseg preprocess` writes a plan") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a plan is a mapping of names to values, got {type(content).__name__}")
    remake = "plan anew with `medseg preprocess CONFIG --replan`"
    refuse_other_format(ConfigError, path, content.get("format_version"), PLAN_FORMAT_VERSION, remake)
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_problem(dict(e))}" for e in error.errors())) from None


def _problem(error: dict[str, Any]) -> str:
    """Say where a value is wrong, what was expected and what was got."""
    where = ".".join(map(str, error["loc"])) or "plan"
    if error["type"] == "missing":
        return f"{where}: is missing"
    return f"{where}: {said(error)}, got {error['input']!r}"
