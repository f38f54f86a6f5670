"""The configuration: one YAML per experiment as frozen, documented sections.

The docstring below each field is what the JSON Schema shows in an editor. How a file is read, extended and overridden,
and how errors name their line, is `config_loading.py`'s part. Stages hand sections or plain values on; no module below
`stages/` sees a `Config`.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from pipeline.records import Record, says_nothing


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    """Refuse a range that runs downwards."""
    if limits[0] > limits[1]:
        raise ValueError(f"expected the smaller number first, got {list(limits)}")
    return limits


def _rising(thresholds: tuple[float, ...]) -> tuple[float, ...]:
    """Refuse thresholds that do not rise, or none."""
    if not thresholds or any(a >= b for a, b in itertools.pairwise(thresholds)):
        raise ValueError(f"expected one number or more, each larger than the one before, got {list(thresholds)}")
    return thresholds


def _axis_code(code: str) -> str:
    """Refuse what is no axis code such as RAS."""
    if len(code) != 3 or any(len(set(pair) & set(code)) != 1 for pair in ("RL", "AP", "SI")):
        raise ValueError(f"expected R or L, A or P, S or I, each pair once, got {code!r}")
    return code


def _none_as_empty(options: Any) -> Any:
    """Take null for no options, so that an extending file can drop those it extends."""
    return {} if options is None else options


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Range = Annotated[tuple[NonNegative, NonNegative], AfterValidator(_ascending)]
Factors = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
Options = Annotated[dict[str, Any], BeforeValidator(_none_as_empty)]
AxisCode = Annotated[str, AfterValidator(_axis_code)]
Triple = tuple[Positive, Positive, Positive]
Size = tuple[Count, Count, Count]
Auto = Literal["auto"]
Task = Literal["segment", "denoise"]
Output = Literal["softmax", "regions"]

LESION_THRESHOLDS = (0.1, 0.25, 0.5)


class Section(Record):
    """A part of the configuration."""

    model_config = ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False)
    merges: ClassVar[bool] = True
    """Whether what a file says of the section changes an extended file's key by key, or replaces it whole."""


class DataSection(Section):
    """Which cases."""

    manifest: Path
    """The data set's manifest, relative to this YAML."""
    root: Path | None = None
    """Folder of the images, where it is not the manifest's own `root`; relative to this YAML."""


class PreprocessingSection(Section):
    """What planning decides, unless it is said here."""

    orientation: AxisCode = "RAS"
    """Axis code of the plan's grid: R or L, A or P, S or I, each once."""
    spacing_mm: Auto | Triple = "auto"
    """Voxel size of the plan's grid in mm; auto: the median, and a fine percentile along a thick axis."""
    patch_size: Auto | Size = "auto"
    """Voxels of a training patch and of an inference window, as the network yields them; rounded up for it."""
    batch_size: Auto | Count = "auto"
    """Patches a step."""
    normalisation: dict[str, Literal["ct", "zscore", "zscore_nonzero", "none"]] = {}
    """Per channel; what is not named is decided by the channel's modality."""
    memory_gb: Auto | Positive = Field(default="auto", exclude_if=lambda value: value == "auto")
    """Memory of the GPU that trains, in GB as they are sold, whether it is here or not: patch, batch and width are
    chosen for it. auto: what the GPU here has; without one what a CPU has free, and steps are kept small besides."""
    missing_channels: Literal["zero", "skip"] = "zero"
    """A case that lacks a channel: zero takes part with zeros in its place, skip is left out of everything."""
    crop: Literal["none", "nonzero"] = "nonzero"
    """nonzero: cut away the frame in which every channel is zero."""


class NetworkSection(Section):
    """Which network; `options` are the keyword arguments of its builder."""

    name: str = "unet"
    """A name of the NETWORKS table; `medseg networks` lists them."""
    spatial_dims: Literal[2, 3] = 3
    """2: planes across the plan's thickest axis are seen one by one, in patches one voxel thick."""
    options: Options = {}
    """Options of that network; unknown ones are refused with the nearest right name."""


class BudgetSection(Section):
    """How long to train: exactly one of the three. The learning-rate schedule ends with it."""

    merges: ClassVar[bool] = False

    steps: Count | None = None
    """Optimiser steps."""
    epochs: Count | None = None
    """Epochs of `steps_per_epoch` steps."""
    minutes: Positive | None = None
    """Wall time, start-up and validation included; a probe turns it into steps, and the clock corrects them."""

    @model_validator(mode="after")
    def _exactly_one(self) -> BudgetSection:
        if sum(value is not None for value in (self.steps, self.epochs, self.minutes)) != 1:
            raise ValueError("give exactly one of steps, epochs, minutes")
        return self


class AugmentationSection(Section):
    """Random changes of a training patch: each with its probability and range. One draw serves image and label."""

    enabled: bool = True
    """False: patches as they are."""
    flip_axes: tuple[Literal["x", "y", "z"], ...] = ()
    """Axes of the plan's grid flipped with probability 0.5; the left-right one swaps the manifest's `label_pairs`."""
    affine_probability: Probability = 0.5
    """Rotation, scaling and shift together."""
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 15.0
    """Largest rotation about each axis, in space: of voxels that are not cubes it does not shear."""
    scale: Factors = (0.85, 1.18)
    """Range of the size of things, drawn log-uniformly; above 1 enlarges them."""
    scale_anisotropy: Annotated[float, Field(ge=0, lt=1)] = 0.08
    """Largest relative deviation of one axis' scale from the common one."""
    shift_voxels: NonNegative = 2.0
    """Largest shift along each axis, in the shortest side of a voxel."""
    elastic_probability: Probability = 0.2
    """A smooth random displacement."""
    elastic_voxels: NonNegative = 2.0
    """Standard deviation of the displacement at the control points, in the shortest side of a voxel."""
    elastic_spacing_voxels: Positive = 12.0
    """Distance of the control points."""
    noise_probability: Probability = 0.15
    """Gaussian noise."""
    noise_std: Range = (0.0, 0.15)
    """Its standard deviation, in units of the normalised image."""
    blur_probability: Probability = 0.1
    """Gaussian blur."""
    blur_sigma_voxels: Factors = (0.5, 1.0)
    """Its standard deviation."""
    brightness_probability: Probability = 0.15
    """Intensities times a factor."""
    brightness: Factors = (0.75, 1.25)
    """Range of the factor."""
    contrast_probability: Probability = 0.15
    """Stretching about the patch's mean, clipped to its own range."""
    contrast: Factors = (0.75, 1.25)
    """Range of the factor."""
    gamma_probability: Probability = 0.3
    """Power of the intensities rescaled to 0..1, mean and standard deviation kept."""
    gamma: Factors = (0.7, 1.5)
    """Range of the exponent."""
    low_resolution_probability: Probability = 0.1
    """Down- and upsampling, as of a coarser scan."""
    low_resolution: Factors = (0.5, 1.0)
    """Range of the factor."""
    channel_dropout_probability: Probability = 0.0
    """One channel set to zero, as if the case lacked it; never the only one that is there."""


class DenoisingSection(Section):
    """What a network learns to take away under `task: denoise`."""

    # Strong: against weak noise a network without long skips loses more by its blur than it gains.
    noise_std: Factors = (0.5, 1.0)
    """Standard deviation of the Gaussian noise added to a patch, in units of the normalised image; drawn for each."""


class TrainingSection(Section):
    """How the network learns."""

    init_from: str | None = None
    """Weights it begins with: a model's folder, a MONAI bundle's, or a state dict (.safetensors, .pt), relative to this
    YAML; runs:/ID or models:/NAME@ALIAS; {fold} in it stands for the fold. Other classes and channels are taken by
    their names; of a model of another task only the encoder is. null: random weights."""
    init_parts: Literal["all", "encoder"] = Field(default="all", exclude_if=lambda value: value == "all")
    """What of `init_from` is taken: all that fits, or the encoder alone."""

    budget: BudgetSection = BudgetSection(epochs=100)
    """How long."""
    steps_per_epoch: Count = 100
    """Steps between two lines of the log, and the unit of validation and checkpoints."""
    batch_size: Count | None = None
    """Patches a batch, over all processes that train together; null: the plan's."""
    accumulate: Count = 1
    """Batches whose gradients are averaged into one step. As good as one batch of so many more patches, but that a
    batch norm and the sums of a batch Dice see one batch at a time; and so does the mean over voxels of a
    cross-entropy, where some are to be ignored or `class_weights` are given."""
    activation_checkpointing: bool = False
    """Keep only what goes into each block of layers, and compute the rest again on the way back: less memory, about a
    third more time, the same gradients."""
    deterministic: bool = False
    """The same weights to the last bit each time, on one kind of device, torch and number of CPU threads, whatever
    `workers` is and however often the training is resumed; refused where an operator is not. A little slower."""
    compile: bool = False
    """Train through torch.compile, which takes a minute or more at the start; where it fails or gives another loss,
    training goes on without, with a warning."""
    sync_batch_norm: bool = False
    """Of several processes that train together: batch norms see the patches of all, as in one process; otherwise each
    process's own, but where those are fewer than four."""
    foreground_fraction: Probability = 0.34
    """Share of the patches centred on a foreground voxel of a class drawn evenly; labels count for nothing under
    `task: denoise`."""
    sampling_weights: dict[str, NonNegative] = {}
    """Per label: how often its voxels are drawn among those patches, relative to 1 for a label that is not named."""
    workers: Auto | Annotated[int, Field(ge=0)] = "auto"
    """Threads that read patches ahead, which changes none of them. auto: four for a GPU whose cases are on disk, one
    for a CPU whose cases are and for a GPU whose cases are nearer, else none."""
    loss: str = "dice_ce"
    """A name of the LOSSES table; `task: denoise` learns by the mean squared error instead."""
    loss_options: Options = {}
    """Options of that loss."""
    deep_supervision: bool = False
    """Add the loss at the coarser decoder levels, weights halved a level, normalised to one."""
    optimiser: str = "adamw"
    """A name of the OPTIMISERS table: adamw, or sgd with Nesterov momentum 0.99."""
    optimiser_options: Options = {}
    """Options of that optimiser: beta1 and beta2, or momentum and nesterov."""
    learning_rate: Positive | None = None
    """Largest learning rate; null: what suits the optimiser, 3e-3 for adamw, 1e-2 for sgd."""
    weight_decay: NonNegative | None = None
    """Decoupled for adamw; null: what suits the optimiser, 1e-2 for adamw, 3e-5 for sgd."""
    encoder_learning_rate_factor: Positive = 1.0
    """The encoder's learning rate is so many times that of the rest: below 1 it keeps more of `init_from`."""
    schedule: str = "cosine"
    """A name of the SCHEDULES table: the course of the learning rate to the end of the budget, cosine, poly, one_cycle
    or constant."""
    schedule_options: Options = {}
    """Options of that schedule: the power of poly, div_factor and final_div_factor of one_cycle."""
    warmup_fraction: Probability | None = None
    """Share of the budget in which the learning rate rises; null: what suits the schedule, 0.3 for one_cycle, else
    0.05."""
    gradient_clip: Positive | None = 12.0
    """Largest norm of the gradient; null: no clipping."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = 0.99
    """Validate and keep a running mean of the weights with this decay, a batch norm's statistics included; null: the
    weights as they are."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware has it, fp16 with a scaler on older GPUs, else fp32."""
    validation_every_epochs: Count = 10
    """Full-volume validation every so many epochs, and at the end."""
    early_stop_validations: Count | None = None
    """Stop after so many validations without a better one; null: train to the end of the budget."""
    checkpoint_minutes: Positive = 5.0
    """Write a checkpoint at least this often, besides the one at each epoch's end."""
    stall_minutes: Positive = 10.0
    """Warn when nothing has moved for so long, and say at which stage and case."""
    augmentation: AugmentationSection = AugmentationSection()
    """Random changes of the patches."""
    denoising: DenoisingSection = DenoisingSection()
    """What `task: denoise` takes away."""

    @property
    def budgeted_steps(self) -> int | None:
        """Optimiser steps of the budget, epochs counted in steps; None: of a budget in minutes the clock will tell."""
        if self.budget.minutes is not None:
            return None
        return self.budget.steps or (self.budget.epochs or 0) * self.steps_per_epoch

    @model_validator(mode="after")
    def _recomputes_once(self) -> TrainingSection:
        if self.compile and self.activation_checkpointing:
            raise ValueError("compile cannot take activation_checkpointing in; set one of them false")
        return self

    @model_validator(mode="after")
    def _repeats_itself(self) -> TrainingSection:
        if self.deterministic and self.compile:
            raise ValueError("deterministic cannot answer for what compile makes of operators; set one of them false")
        if self.deterministic and self.budget.minutes is not None:
            raise ValueError(
                "deterministic needs a budget in steps or epochs: how many steps fit into minutes is the machine's"
            )
        return self


class InferenceSection(Section):
    """How a whole volume is predicted; belongs to the model, for it changes the result."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a window that it has in common with the next."""
    blending: Literal["gaussian", "constant"] = "gaussian"
    """Weight of a window's voxels in the sum."""
    flip_axes: tuple[Literal["x", "y", "z"], ...] = ()
    """Average over all combinations of flips of these axes (test-time augmentation)."""
    largest_component: tuple[str, ...] = ()
    """Labels of which only the largest connected component is kept."""
    smallest_volume_ml: dict[str, Positive] = {}
    """Per label: components below this volume become background."""


class EvaluationSection(Section):
    """What is measured of predictions."""

    surface_tolerance_mm: Positive = 1.0
    """Tolerance of the normalised surface Dice."""
    bootstrap_samples: Count = 2000
    """Resamples of the cases for the 95 % intervals."""
    picture_cases: Count = 3
    """Overlay pictures of so many worst, median and best cases each."""
    lesions: tuple[str, ...] = Field(default=(), exclude_if=says_nothing)
    """Labels, or regions where they are trained on, that are also counted lesion by lesion: by connected components."""
    lesion_iou_thresholds: Annotated[tuple[Share, ...], AfterValidator(_rising)] = Field(
        default=LESION_THRESHOLDS, exclude_if=lambda value: value == LESION_THRESHOLDS
    )
    """IoU from which on a predicted lesion is the one of the reference."""
    lesion_connectivity: Literal[6, 18, 26] = Field(default=26, exclude_if=lambda value: value == 26)
    """Voxels of one lesion touch by a face (6), by a face or an edge (18), or by a corner too (26)."""
    smallest_lesion_mm3: NonNegative = Field(default=0.0, exclude_if=lambda value: value == 0)
    """Lesions below this volume are left out, of reference and prediction alike."""
    viewer: Literal["auto", "off"] = Field(default="auto", exclude_if=lambda value: value == "auto")
    """auto: report.html holds cases to look at in slices and 3-D, where NiiVue is installed; off: pictures only."""
    viewer_mb: Positive = Field(default=40.0, exclude_if=lambda value: value == 40.0)
    """Room for those cases in report.html, in MB; the worst, median and best come first."""


class TrackingSection(Section):
    """Where runs are tracked."""

    uri: str | None = None
    """MLflow tracking server or database; null: MLFLOW_TRACKING_URI, else mlflow.db in the workspace."""
    experiment: str | None = None
    """MLflow experiment; null: the manifest's name."""
    register_as: str | None = None
    """Register the best model under this name."""
    alias: str | None = None
    """Alias given to the registered version, as in models:/NAME@ALIAS."""


class Config(Section):
    """One experiment, from data to tracking."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the experiment: of its run folder, and of its runs in MLflow."""
    # As strictly read JSON a path is text, which this default is not.
    workspace: Path = Field(default=Path("work"), validate_default=False)
    """Folder of stores, runs and mlflow.db, relative to the current folder."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of every random draw."""
    task: Task = "segment"
    """segment, or denoise: learn on images alone, labelled or not, what `training.init_from` gives a segmentation."""
    data: DataSection
    preprocessing: PreprocessingSection = PreprocessingSection()
    network: NetworkSection = NetworkSection()
    training: TrainingSection = TrainingSection()
    inference: InferenceSection = InferenceSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrackingSection = TrackingSection()
