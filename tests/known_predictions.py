"""Experiments whose every prediction is known: each image spells out what the networks of all folds will say of it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_evaluate import predicted, structures, write_case, write_manifest, write_run
from tiny_models import NEAREST_MEAN, nearest_mean

from pipeline.config import BudgetSection, Config, DataSection, EvaluationSection, TrainingSection
from pipeline.networks import NETWORKS

Classes = NDArray[np.uint8]


def known_experiment(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    cases: Mapping[str, tuple[Classes, Classes, int | None]],
    *,
    trained: tuple[int, ...] | None = None,
) -> Config:
    """Write cases, id -> (reference, prediction, fold), and the runs of the folds that are trained; None: of all."""
    monkeypatch.setitem(NETWORKS, NEAREST_MEAN.name, nearest_mean)
    path = folder / "phantoms.json"
    manifest = write_manifest(path, [write_case(folder / "images", name, *of) for name, of in cases.items()])
    config = Config(
        name="tiny",
        workspace=folder / "work",
        data=DataSection(manifest=path),
        training=TrainingSection(budget=BudgetSection(steps=300)),
        evaluation=EvaluationSection(surface_tolerance_mm=0.5, bootstrap_samples=50, picture_cases=1),
    )
    for fold in manifest.folds if trained is None else trained:
        write_run(config, manifest, fold)
    return config


def shifted_cases() -> dict[str, tuple[Classes, Classes, int | None]]:
    """Four cases of two folds, and one held out, predicted one voxel beside their references."""
    folds = {"a": 0, "b": 0, "c": 1, "d": 1, "held_out": None}
    return {name: (structures(n), predicted(structures(n)), fold) for n, (name, fold) in enumerate(folds.items())}


def littered_cases(count: int = 12, folds: int = 3) -> dict[str, tuple[Classes, Classes, int | None]]:
    """Cases whose left structure is predicted right, but for crumbs elsewhere of 1 to 3 voxels in each."""
    found = {}
    for number in range(count):
        reference = structures(number % 10)
        prediction = reference.copy()
        prediction[0, 0, 15 : 16 + number % 3] = 1
        found[f"x{number:02d}"] = (reference, prediction, number % folds)
    return found


def experiment_of(config: Config) -> Path:
    """Return an experiment's folder."""
    return config.workspace / "runs" / config.name


def best_of(config: Config, fold: int) -> Path:
    """Return a fold's best model."""
    return experiment_of(config) / f"fold_{fold}" / "models" / "best"
