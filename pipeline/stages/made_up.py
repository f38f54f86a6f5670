"""A data set of noise, with patches of a plan's size: what a training of it takes, one of real cases takes too."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from pipeline.config import Config
from pipeline.data.manifest import Case, ImageFile, Manifest
from pipeline.data.plan import Fingerprint, Plan
from pipeline.data.store import CaseStore, Labels, PreparedCase
from pipeline.geometry import Geometry
from pipeline.hardware import give_freed_memory_back, keep_freed_memory, peak_memory_bytes, reset_peak_memory
from pipeline.preparation.preprocessing import sample_class_voxels
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.step_memory import task_of
from pipeline.training.loop import pace_of_training

# Steps that are measured; fewer where they take longer than a minute.
STEPS, LONGEST_S = 20, 60.0
# A made-up case is so many patches long along each axis, or as the median case is.
CASE_PATCHES = 1.5


@dataclass(frozen=True)
class Measured:
    """What steps of training and a validation took.

    Attributes:
        steps: how many were measured.
        step_s: seconds of one, its batch drawn and augmented.
        voxel_s: seconds that validation takes for a voxel.
        peak_bytes: most memory in use meanwhile: of a GPU, or of the process; None where the system does not tell.
    """

    steps: int
    step_s: float
    voxel_s: float
    peak_bytes: int | None


def measured(
    config: Config, manifest: Manifest, facts: Fingerprint, plan: Plan, device: torch.device, steps: int = STEPS
) -> Measured:
    """Train on made-up cases for some steps, validate on one, and keep nothing of it.

    Raises:
        ConfigError: an option of loss, optimiser or schedule is wrong.
        ValueError: the network does not fit the plan.
    """
    keep_freed_memory()
    with _made_up_task(config, manifest, facts, plan, device) as task:
        give_freed_memory_back()
        reset_peak_memory(device)
        state = task.new_state()
        rate = task.schedule(state)(0, 1)
        with closing(task.batches(state.network)) as batches:
            pace = pace_of_training(state, batches, rate, task.settings, most_steps=steps, within_s=LONGEST_S)
        cases = task.validation_cases
        start = time.monotonic()
        task.validation(state.network).scores(cases)
        voxels = sum(math.prod(task.store.open(case.id).shape[1:]) for case in cases)
        voxel_s = (time.monotonic() - start) / voxels
        return Measured(pace.steps, pace.step_s, voxel_s, peak_memory_bytes(device))


@contextmanager
def _made_up_task(
    config: Config, manifest: Manifest, facts: Fingerprint, plan: Plan, device: torch.device
) -> Iterator[FoldTask]:
    """Yield the training of a data set of two cases, which vanishes with its store."""
    cases = tuple(_case(manifest, fold) for fold in (0, 1))
    with TemporaryDirectory(prefix="medseg-plan-") as folder:
        task = task_of(config, manifest.model_copy(update={"cases": cases}), facts, plan, device)
        store = CaseStore(Path(folder) / "cases")
        size = [
            min(math.ceil(CASE_PATCHES * n), max(n, round(mm / step)))
            for n, mm, step in zip(task.plan.patch_size, facts.extent_mm["50"], plan.spacing_mm, strict=True)
        ]
        for number, case in enumerate(cases):
            store.write(case.id, _noise(task.plan, (size[0], size[1], size[2]), number), "made up")
        yield replace(task, store=store, folder=Path(folder) / "run")


def _case(manifest: Manifest, fold: int) -> Case:
    """Return a case of all channels and labels, whose files are nowhere."""
    file = ImageFile(path="made_up.nii.gz")
    name = f"made_up_{fold}"
    return Case(id=name, patient=name, images=dict.fromkeys(manifest.channels, file), label=file, fold=fold)


def _noise(plan: Plan, shape: tuple[int, int, int], seed: int) -> PreparedCase:
    """Return a prepared case of noise, every class in slabs of its own."""
    random = np.random.default_rng(seed)
    classes = np.broadcast_to((np.arange(shape[0]) * len(plan.labels) // shape[0])[:, None, None], shape)
    label: Labels = classes.astype(np.uint8) if len(plan.labels) < 256 else classes.astype(np.int16)
    geometry = Geometry(shape, np.diag([*plan.spacing_mm, 1.0]))
    return PreparedCase(
        image=random.standard_normal((len(plan.channels), *shape), dtype=np.float32).astype(np.float16),
        label=label,
        reference=label,
        geometry=geometry,
        native=geometry,
        class_voxels=sample_class_voxels(label, len(plan.labels)),
        channels_present=tuple(plan.channels),
    )
