"""A peer's training on a fold of a manifest, in its own environment, and the Dice of what it predicts.

What the comparisons of trainings share: peers get the same cases and the same machine, and are scored as medseg is.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from side_by_side import PEERS

from pipeline.data.manifest import Case, Manifest
from pipeline.evaluation.metrics import score_case
from pipeline.evaluation.structures import Structures
from pipeline.geometry import Geometry
from pipeline.volumes.resampling import resample_image
from pipeline.volumes.volume import Volume, read_image, read_label
from pipeline.volumes.writing import write_image

SCRIPTS = {"nnunet": "nnunet_training.py", "dynunet": "dynunet_training.py"}

# What `hardware.keep_freed_memory` does from within: memory once had is not given back to the kernel at each step.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647:glibc.malloc.top_pad=67108864"
    ":glibc.malloc.hugetlb=1"
}


@dataclass(frozen=True)
class Snapshot:
    """What a peer predicted with the weights that it had after so many minutes of its own steps."""

    minutes: float
    steps: int
    folder: str


def train_peer(party: str, python: Path, folder: Path, minutes: float, count: int) -> list[Snapshot]:
    """Train on the cases written into a folder, and predict the fold held out at `count` times of the training."""
    out = folder / f"{party}_{minutes:g}"
    shutil.rmtree(out, ignore_errors=True)
    command = [python, PEERS / SCRIPTS[party], folder, minutes, count, out]
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, **ALLOCATOR})
    return [Snapshot(**kept) for kept in json.loads((out / "snapshots.json").read_text())]


def write_cases(manifest: Manifest, fold: int, folder: Path) -> None:
    """Write down the fold's cases for the peers, who want all channels of a case on one grid: that of its label.

    A channel on another grid is resampled; one that the case lacks is zeros, for the peers have no rule for it.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def paths(cases: tuple[Case, ...]) -> list[dict[str, object]]:
        return [
            {
                "id": case.id,
                "images": [str(path.resolve()) for path in _on_one_grid(manifest, case, folder / "resampled")],
                "label": str(manifest.path_of(case.label).resolve()),
            }
            for case in cases
        ]

    content = {
        "channels": list(manifest.channels.values()),
        "labels": manifest.labels,
        "training": paths(manifest.training_cases(fold)),
        "validation": paths(manifest.validation_cases(fold)),
    }
    (folder / "cases.json").write_text(json.dumps(content, indent=1))


def _on_one_grid(manifest: Manifest, case: Case, folder: Path) -> list[Path]:
    """Return a file for each of the manifest's channels, on the label's grid."""
    grid = read_label(manifest.path_of(case.label)).geometry
    return [_on_grid(manifest, case, channel, grid, folder) for channel in manifest.channels]


def _on_grid(manifest: Manifest, case: Case, channel: str, grid: Geometry, folder: Path) -> Path:
    """Return the file of a channel on a grid: its own where it lies there, else one that is written unless it is."""
    image = Volume(np.zeros((1, *grid.shape), np.float32), grid)
    if file := case.images.get(channel):
        image = read_image(manifest.path_of(file), file.index)
        if image.geometry.matches(grid) and file.index is None:
            return manifest.path_of(file)
    path = folder / f"{case.id}_{channel}.nii.gz"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        # Beyond a CT's field of view is air, as medseg has it too; elsewhere air is zero.
        outside = float(image.array.min()) if manifest.channels[channel] == "CT" else 0.0
        write_image(path, resample_image(image, grid, outside=outside))
    return path


def case_dice(manifest: Manifest, cases: Iterable[Case], predicted: Path) -> dict[str, dict[str, float]]:
    """Return the Dice of each structure in each case, on its native grid.

    Args:
        manifest: labels whose values are the class indices, as the peers want them.
        cases: labelled ones of it.
        predicted: folder of a label map for each case.
    """
    structures = Structures({name: (value,) for name, value in manifest.labels.items() if value})
    return {case.id: _dice(manifest, case, predicted, structures) for case in cases}


def _dice(manifest: Manifest, case: Case, predicted: Path, structures: Structures) -> dict[str, float]:
    """Return a case's Dice of each structure; one that is missed, or found where there is none, counts as 0."""
    reference, found = (read_label(path) for path in (manifest.path_of(case.label), predicted / f"{case.id}.nii.gz"))
    if not reference.geometry.matches(found.geometry):
        raise SystemExit(f"{case.id}: the prediction has another grid")
    rows = score_case(found.array, reference.array, found.geometry.spacing_mm, structures, 1.0, metrics=("dice",))
    return {row.class_name: row.values["dice"] if row.status == "scored" else 0.0 for row in rows}


def mean_dice(cases: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the mean of each structure over cases."""
    return {name: float(np.mean([dice[name] for dice in cases.values()])) for name in next(iter(cases.values()))}
