"""Options of the command line that several commands have, and those of `segment`, which has many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

DEFAULT_WORKSPACE = Path("work")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value of the YAML; repeatable."),
]
Workspace = Annotated[
    Path | None,
    typer.Option("--workspace", help="Folder of stores, runs and mlflow.db. Default: the configuration's, ./work."),
]
Jobs = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Processes; default: as many as cores and memory admit.")
]
TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow server or database of runs:/ and models:/ names.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Devices = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N; cuda:0,cuda:1: a process for each.")]

# Of `manifest`.
Layout = Annotated[
    str | None,
    typer.Option("--format", help="nnunet, decathlon, csv, monai, bids, patterns or folder; default: recognised."),
]
Root = Annotated[
    Path | None, typer.Option("--root", help="A folder above all files; of a datalist, what its paths are relative to.")
]
ImagePatterns = Annotated[
    list[str] | None,
    typer.Option(
        "--images",
        metavar="PATTERN",
        help="'scans/{case}_{channel}.nii.gz', or T1='{case}/t1.nii.gz'; repeatable. Of BIDS: which images.",
    ),
]
LabelPattern = Annotated[
    str | None, typer.Option("--labels", metavar="PATTERN", help="'masks/{case}.nii.gz'. Of BIDS: which labels.")
]
PatientPattern = Annotated[
    str | None, typer.Option("--patient", metavar="REGEX", help="What of a case's id, its first group, is the patient.")
]
LabelValues = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="NAME[:VALUE]=VALUES",
        help="Names values in the files: kidney=1,4; background=0,9 drops 9; ignore=255. Repeatable.",
    ),
]
Folds = Annotated[
    int | None, typer.Option("--folds", min=2, help="Split anew; default: the data set's own folds, else 5.")
]
Splits = Annotated[Path | None, typer.Option("--splits", help="Take the folds of nnU-Net's splits_final.json.")]
GroupBy = Annotated[
    str | None,
    typer.Option("--group-by", metavar="COLUMN", help="Of participants.tsv or the CSV: its values are not torn."),
]
StratifyBy = Annotated[
    str | None,
    typer.Option("--stratify-by", metavar="COLUMN", help="Of the same: its values are spread evenly over the folds."),
]
# Of `segment` and `preprocess`, over several machines; of `check`, --shard.
EngineChoice = Annotated[
    Literal["local", "ray"], typer.Option("--engine", help="ray: share the cases out over a Ray cluster.")
]
Address = Annotated[
    str | None, typer.Option("--address", metavar="HOST:PORT|auto", help="Of the Ray cluster; auto: this machine's.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Of the cluster, at most; default: as many as it has room for.")
]
WorkerCpus = Annotated[
    int | None,
    typer.Option(
        "--cpus-per-worker",
        min=1,
        help="Cores of each worker; default: an even share of a node's for each GPU, or all; of preprocess: 1.",
    ),
]
WaitMinutes = Annotated[
    float, typer.Option("--wait-minutes", min=0.01, help="How long to wait where the cluster has no room.")
]
ShardOf = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="This part of the cases only, 0/N to N-1/N; jobs share the folder."),
]
DEFAULT_WAIT_MINUTES = 10.0

# Of `train`.
Fold = Annotated[str, typer.Option("--fold", metavar="K|all", help="Fold to hold out, or all of them.")]
FoldJobs = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Folds at a time, with --fold all; default: one for each device.")
]
Processes = Annotated[
    int, typer.Option("--processes", min=1, help="Train each fold by so many processes here, one for each GPU.")
]

# Of `evaluate`.
KeepProbabilities = Annotated[
    bool, typer.Option("--probabilities", help="Keep those of out-of-fold predictions beside their label maps.")
]
PredictAnew = Annotated[
    bool, typer.Option("--overwrite", help="Predict anew what is kept of out-of-fold predictions and unchanged.")
]

# Of `find-best`.
Experiments = Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="YAMLs of trained experiments.")]
ChoosePostprocessing = Annotated[
    bool, typer.Option("--postprocessing/--no-postprocessing", help="Choose rules for the recommended one.")
]
ComparisonFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder of the results; default: comparisons/NAME in the workspace.")
]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be trained and what is missing; no more.")]

# Of `preprocess` and `plan`.
GpuMemory = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory",
        min=1,
        metavar="GB",
        help="Plan for a GPU of 8, 24, 80 ... GB, here or not; `train` takes it where the YAML says no memory.",
    ),
]

Replan = Annotated[bool, typer.Option("--replan", help="Plan anew, even where the plan was edited by hand.")]


def with_memory(overrides: list[str] | None, gpu_memory: float | None) -> list[str] | None:
    """Return the overrides with what `--gpu-memory` is short for."""
    if gpu_memory is None:
        return overrides
    return [*(overrides or ()), f"preprocessing.memory_gb={gpu_memory:g}"]


def names(text: str | None) -> list[str]:
    """Return the names that commas part."""
    return [name.strip() for name in text.split(",")] if text else []


# Of `new-config`.
Preset = Annotated[
    Literal["fast", "standard", "large"] | None,
    typer.Option("--preset", help="What it extends: minutes on two cores, a GPU of 8 GB, or one of 24 GB."),
]

# Of `segment`.
SegmentInputs = Annotated[
    list[str],
    typer.Argument(metavar="INPUT...", help="Volumes, folders, quoted patterns, a manifest, a CSV; -: a list."),
]
Models = Annotated[
    list[str],
    typer.Option("--model", help="A folder, runs:/ID or models:/NAME@ALIAS; several, or an experiment: ensemble."),
]
LabelFolder = Annotated[Path, typer.Option("--out", help="Folder of the label maps and the report.")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Say what the cases will take, and do nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Segment also what is done and unchanged.")]
SegmentJobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Processes; default: one for each device.")]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", metavar="SIZE", help="Such as 8GB, for all processes together.")
]
PrecisionChoice = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"] | None,
    typer.Option("--precision", help="Default: as the model was trained."),
]
CompileNetworks = Annotated[
    bool, typer.Option("--compile", help="By torch.compile: a minute at the start, then faster; for long batches.")
]
Probabilities = Annotated[
    str | None, typer.Option("--probabilities", metavar="LABEL,...|all", help="Write these labels' probabilities.")
]
ProbabilitiesType = Annotated[
    Literal["uint8", "uint16"], typer.Option("--probabilities-type", help="Steps of 1/255, or of 1/65,535.")
]
Instances = Annotated[
    str | None,
    typer.Option("--instances", metavar="LABEL,...|all", help="Number these labels' connected components too."),
]
Viewer = Annotated[
    bool, typer.Option("--viewer", help="Put the most doubtful cases into report.html, to look at in slices and 3-D.")
]
NoSkip = Annotated[bool, typer.Option("--no-skip", help="Run the network on windows without body too.")]
ModelWorkspace = Annotated[Path, typer.Option("--workspace", help="Where runs:/ and models:/ are looked up.")]

# Of DICOM folders, in `segment` and `dicom convert`.
SeriesUid = Annotated[
    str | None, typer.Option("--series", metavar="UID|KEY", help="Of DICOM folders: the series of this UID or key.")
]
SeriesModality = Annotated[
    str | None, typer.Option("--modality", metavar="CT|MR|PT|...", help="Of DICOM folders: series of this modality.")
]
SeriesDescription = Annotated[
    str | None,
    typer.Option("--description", metavar="TEXT", help="Of DICOM folders: series whose description has this, or a *."),
]
DicomFormats = Annotated[
    str | None, typer.Option("--dicom", metavar="seg,rtstruct", help="Write these too, of cases that are DICOM series.")
]
Codes = Annotated[
    Path | None, typer.Option("--codes", metavar="CSV", help="What labels are: label,scheme,value,meaning. See docs.")
]
Deidentify = Annotated[
    bool, typer.Option("--deidentify", help="In DICOM objects: a pseudonym in the place of patient and study.")
]
Untilt = Annotated[bool, typer.Option("--untilt", help="Resample DICOM series that a tilted gantry has sheared.")]
