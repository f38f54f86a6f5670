"""`medseg demo`: the whole way on phantoms that medseg generates, from a folder of volumes to label maps of new ones.

Everything is done by the other stages, as on real data. Run again, it goes on from what is there.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipeline.config import Config, DataSection
from pipeline.config_loading import load_config, packaged
from pipeline.data.phantoms import LABELS, make_phantom, write_phantom_dataset
from pipeline.evaluation.metrics import Comparison, dice
from pipeline.model import load_model, save_model
from pipeline.networks.fitting import network_for
from pipeline.stages import manifest, segment
from pipeline.stages import run as run_stage
from pipeline.volumes.volume import read_label
from pipeline.volumes.writing import write_image, write_label

log = logging.getLogger(__name__)

CASES = 15
# Seeds of patients that the data set does not hold.
NEW_PATIENTS = {"new_patient_a": 9001, "new_patient_b": 9002}


def run(workspace: Path) -> Path:
    """Make a data set of phantoms, run every stage on it, and segment two new patients.

    Args:
        workspace: everything lands here.

    Returns:
        The run folder.
    """
    start = time.monotonic()
    # Phantoms are so small that threads wait for one another longer than they work: on a busy machine ten times longer.
    torch.set_num_threads(1)
    workspace = workspace.resolve()
    config = _prepare(workspace)
    (run_folder,) = run_stage.run(config).folders.values()
    trained = run_folder / "models" / "best"
    _save_untrained(trained, workspace / "untrained")
    learned = _segment_new(trained, workspace, "segmented")
    untrained = _segment_new(workspace / "untrained", workspace, "segmented_untrained")
    log.info("")
    log.info("The demo took %.0f s. On the two new patients the mean Dice is", time.monotonic() - start)
    log.info("  %.3f after training, %.3f with the same network untrained", learned, untrained)
    log.info("report      %s", run_folder / "evaluation" / "fold" / "report.html")
    log.info("label maps  %s", workspace / "segmented")
    log.info("model       %s", trained)
    log.info("MLflow      medseg ui --workspace %s", workspace)
    return run_folder


def _prepare(workspace: Path) -> Config:
    """Write data set, manifest and new patients where they are missing; return the configuration."""
    path = workspace / "phantom.json"
    if not path.exists():
        source = write_phantom_dataset(workspace / "phantoms", cases=CASES)
        for name, seed in NEW_PATIENTS.items():
            phantom = make_phantom(seed)
            write_image(workspace / "new" / f"{name}.nii.gz", phantom.images["T1"])
            write_label(workspace / "new_labels" / f"{name}.nii.gz", phantom.label)
        # Written last: once it is there, so is all that it stands for.
        manifest.run(source, path)
    return load_config(packaged("demo.yaml")).changed(workspace=workspace, data=DataSection(manifest=path))


def _save_untrained(trained: Path, folder: Path) -> None:
    """Save a trained model with its network as it might have been before training."""
    model = load_model(trained, torch.device("cpu"))
    torch.manual_seed(0)
    save_model(folder, replace(model, network=network_for(model.plan, model.description.network)))


def _segment_new(model: Path, workspace: Path, name: str) -> float:
    """Segment the new patients with a model and return the mean Dice over patients and structures."""
    segment.run(str(model), [workspace / "new"], workspace / name, workspace=workspace)
    scores = []
    for patient in NEW_PATIENTS:
        prediction = read_label(workspace / name / f"{patient}.nii.gz")
        reference = read_label(workspace / "new_labels" / f"{patient}.nii.gz")
        for value in list(LABELS.values())[1:]:
            found, there = prediction.array == value, reference.array == value
            scores.append(dice(Comparison(found, there, prediction.geometry.spacing_mm, tolerance_mm=1.0)))
    return float(np.mean(scores))
