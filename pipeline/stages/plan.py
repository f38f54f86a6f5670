"""`medseg plan`: how a configuration's images would be treated and its network trained, and what that will take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.data.plan import Fingerprint, Plan
from pipeline.data.store import CaseStore
from pipeline.errors import ConfigError, config_errors_of
from pipeline.hardware import device_name, pick_device
from pipeline.preparation.examination import CaseExamination
from pipeline.preparation.planning import fingerprint
from pipeline.records import write_json
from pipeline.stages.dataset import dataset_of
from pipeline.stages.fold.step_size import step_of
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.made_up import Measured, measured
from pipeline.stages.networks import aligned
from pipeline.stages.preprocess import CASES, examinations_of
from pipeline.stages.settling import plan_path, settle_plan
from pipeline.stages.step_memory import GPU_CONTEXT_BYTES, dtype_of, is_elsewhere, task_of
from pipeline.stages.store_size import planned_voxels, stored_bytes
from pipeline.stages.workspace import Workspace

log = logging.getLogger(__name__)

EXPECTED = ".expected.json"

# What takes disk, as people read it.
STORE, RUNS = "disk of the store", "disk of a fold's run"


@dataclass(frozen=True)
class Expected:
    """What a training will take.

    Attributes:
        device: where steps were measured; None: nowhere, for the GPU that is planned for is not here.
        training_bytes: of the GPU's memory, or on a CPU of the process's: measured where it was, else as computed.
        computed_bytes: what a step takes by the shapes of its tensors alone.
        cases_bytes: of the prepared cases at most, on disk or in memory.
        run_bytes: on disk of one fold's run: checkpoint, best and last model, and MLflow's copy of the best.
        is_gpu: whether the training's memory is a GPU's.
        step_s: seconds of a step.
        fold_hours: of one fold, by the configured budget.
        all_hours: of all folds, one after another.
        reasons: what people read -> what it was found from.
    """

    device: str | None
    training_bytes: int
    computed_bytes: int
    cases_bytes: int
    run_bytes: int
    is_gpu: bool
    step_s: float | None
    fold_hours: float | None
    all_hours: float | None
    reasons: dict[str, str]


@dataclass(frozen=True)
class PlanReport:
    """A plan, where it lies, and what is expected of it."""

    path: Path
    plan: Plan
    network: str
    expected: Expected

    def as_text(self) -> str:
        """Return plan and expectations with their reasons, a line each."""
        plan, expected = self.plan, self.expected
        values = {
            "spacing_mm": "x".join(f"{mm:.4g}" for mm in plan.spacing_mm) + " mm",
            "patch_size": "x".join(map(str, plan.patch_size)) + " voxels",
            "batch_size": f"{plan.batch_size} patches a step",
        }
        rows = [(name, value, plan.reasons.get(name, "")) for name, value in values.items()]
        rows.append(("network", self.network, "with the U-Net's sizes below where it takes any that are planned"))
        if plan.network:
            sizes = f"{len(plan.network.kernels)} levels of {plan.network.width} feature maps and more"
            rows.append(("U-Net", sizes, plan.reasons.get("network", "")))
        for name, value in _texts(expected).items():
            rows.append((name, value, expected.reasons.get(name, "")))
        return "\n".join([str(self.path), "", *aligned(rows)])


def run(config: Config, *, device: str = "auto", jobs: int | None = None, replan: bool = False) -> PlanReport:
    """Plan, measure some steps of training on made-up patches, and write both down.

    Args:
        config: the experiment; `preprocessing.memory_gb` says which GPU is planned for.
        device: auto, cpu, cuda or cuda:N; where steps are measured. auto measures none where a GPU is planned for that
            is not here.
        jobs: cases that are examined at once, where `medseg check` has not; None: as many as there are cores.
        replan: plan anew, even where plan.yaml was edited by hand.

    Raises:
        ManifestError: the check found errors; names them all.
        ConfigError: the network does not fit the plan, or the device is not there.
    """
    manifest = dataset_of(config)
    examinations = examinations_of(config, manifest, jobs)
    folder = Workspace(config.workspace).store(config, manifest.name)
    with CaseStore(folder / CASES).lock():
        facts = fingerprint(examinations.values(), manifest, config.preprocessing)
        plan = settle_plan(folder, facts, manifest, config, replan=replan, device=device)
        with config_errors_of(f"network {config.network.name}"):
            task = task_of(config, manifest, facts, plan)
            expected = _expected(task, facts, [examinations[case.id] for case in manifest.development_cases], device)
        path = plan_path(folder, config)
        write_json(path.with_suffix(EXPECTED), {"expected": asdict(expected)})
    return PlanReport(path, task.plan, config.network.name, expected)


def _expected(task: FoldTask, facts: Fingerprint, cases: Sequence[CaseExamination], device: str) -> Expected:
    """Measure and reckon what a training takes."""
    config, chosen = task.config, pick_device(device)
    elsewhere = is_elsewhere(config, chosen)
    step = step_of(task, dtype_of(config, chosen))
    found = None
    if not (elsewhere and device == "auto"):
        found = _measured_here(task, facts, chosen)
    hours = None if found is None else _fold_hours(task, cases, found)
    is_gpu = chosen.type == "cuda" or (elsewhere and found is None)
    context = GPU_CONTEXT_BYTES if is_gpu else 0
    is_measured = found is not None and found.peak_bytes is not None
    return Expected(
        device=None if found is None else device_name(chosen),
        training_bytes=(found.peak_bytes + context) if found and found.peak_bytes else step.peak_bytes + context,
        computed_bytes=step.peak_bytes,
        cases_bytes=sum(stored_bytes(case, task.plan) for case in cases),
        run_bytes=step.kept_bytes + 3 * step.weights_bytes,
        is_gpu=is_gpu,
        step_s=None if found is None else found.step_s,
        fold_hours=hours,
        all_hours=None if hours is None else hours * len(task.manifest.folds),
        reasons=_reasons(config, chosen, found, is_measured=is_measured, is_gpu=is_gpu),
    )


def _measured_here(task: FoldTask, facts: Fingerprint, device: torch.device) -> Measured:
    """Measure steps on a device.

    Raises:
        ConfigError: its memory does not hold one.
    """
    try:
        return measured(task.config, task.manifest, facts, task.plan, device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{device_name(device)}: does not hold a step of this plan ({error.args[0].splitlines()[0]}); plan for "
            "less, `medseg plan CONFIG --replan --gpu-memory GB`, or end what else uses it"
        ) from error


def _fold_hours(task: FoldTask, cases: Sequence[CaseExamination], found: Measured) -> float:
    """Return the hours of one fold: steps, validations of its share of the cases that are scored, and calibration."""
    section = task.config.training
    if section.budget.minutes is not None:
        return section.budget.minutes / 60
    steps = section.budgeted_steps or 0
    validations = ceil(steps / (section.validation_every_epochs * section.steps_per_epoch)) + task.calibration_passes
    scored = [planned_voxels(case, task.plan) for case in cases if case.label or not task.needs_labels]
    voxels = sum(scored) / max(1, len(task.manifest.folds))
    return (steps * found.step_s + validations * voxels * found.voxel_s) / 3600


def _reasons(
    config: Config, device: torch.device, found: Measured | None, *, is_measured: bool, is_gpu: bool
) -> dict[str, str]:
    """Say what each expectation was found from."""
    how = "by the shapes of a step's tensors, measured nowhere"
    if found is not None:
        how = f"the most that {found.steps} steps and a validation on made-up cases took on {device_name(device)}"
    minutes = config.training.budget.minutes is not None
    hours = "the configured minutes" if minutes else "the configured steps, and validations by one made-up case"
    return {
        _memory_name(is_gpu=is_gpu): how if is_measured or found is None else "by the shapes of a step's tensors",
        "memory of the cases": "besides, where a quarter of the free memory holds them and a step leaves as much; else "
        "they are read from disk",
        STORE: "at most: float16 images and labels, as if nothing were cropped or compressed",
        RUNS: "its checkpoint, best and last model, and MLflow's copy of the best; label maps and pictures besides",
        "step": "its batch drawn, augmented and learned from" if found else "the GPU that is planned for is not here",
        "time": hours if found else "the GPU that is planned for is not here",
    }


def _texts(expected: Expected) -> dict[str, str]:
    """Return each expectation as people read it."""
    times = "not measured"
    if expected.fold_hours is not None and expected.all_hours is not None:
        times = f"{_duration(expected.fold_hours)} a fold, {_duration(expected.all_hours)} for all folds"
    return {
        _memory_name(is_gpu=expected.is_gpu): _gigabytes(expected.training_bytes),
        "memory of the cases": _gigabytes(expected.cases_bytes),
        STORE: _gigabytes(expected.cases_bytes),
        RUNS: _gigabytes(expected.run_bytes),
        "step": "not measured" if expected.step_s is None else f"{expected.step_s:.3g} s",
        "time": times,
    }


def _memory_name(*, is_gpu: bool) -> str:
    """Return whose memory a training takes, as people read it."""
    return "GPU memory" if is_gpu else "memory of the process"


def _gigabytes(number: int) -> str:
    """Return bytes in GB, or in MB where that is little."""
    return f"{number / 2**30:.1f} GB" if number >= 2**30 else f"{number / 2**20:.0f} MB"


def _duration(hours: float) -> str:
    """Return a duration in hours, or in minutes where that is short."""
    return f"{hours:.1f} hours" if hours >= 2 else f"{60 * hours:.0f} minutes"
