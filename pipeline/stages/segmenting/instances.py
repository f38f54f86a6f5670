"""Instance label maps of a batch: the connected components of some labels, each with a number, and a line for each.

OUT/instances/CASE.nii.gz   components in the case's own geometry; label by label, of each the largest first
             CASE.csv       number -> label, component within it, volume and centre
OUT/instances.csv           all cases of the batch
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.plan import Plan
from pipeline.evaluation.scored import write_columns
from pipeline.geometry import Geometry
from pipeline.records import write_text
from pipeline.stages.segmenting.inputs import INSTANCES, SUFFIX
from pipeline.stages.segmenting.report import CaseResult
from pipeline.volumes.components import Components
from pipeline.volumes.volume import Volume, smallest_type
from pipeline.volumes.writing import write_label

COLUMNS = ("case", "instance", "label", "component", "volume_ml", "x_mm", "y_mm", "z_mm")
TABLE = "instances.csv"


def instance_files(out: Path, name: str) -> tuple[Path, Path]:
    """Return where a case's instances lie: the label map, and the table."""
    return out / INSTANCES / f"{name}{SUFFIX}", out / INSTANCES / f"{name}.csv"


def write_instances(
    out: Path,
    name: str,
    classes: NDArray[Any],
    native: Geometry,
    plan: Plan,
    labels: Sequence[str],
    header_of: Path | None,
) -> dict[str, int]:
    """Number the components of some labels of a case, and write them.

    Args:
        out: the batch's folder.
        name: of the case.
        classes: (X, Y, Z) class indices.
        native: their grid.
        plan: names the labels, in the order of their class indices.
        labels: whose components are wanted; voxels that touch by a corner are of one.
        header_of: an image on the native grid, whose affines and codes the label map takes over; None: there is none.

    Returns:
        Label -> how many components it has.
    """
    names = list(plan.labels)
    found = {label: _within_box(classes, names.index(label)) for label in labels}
    counts = {label: components.voxels.size for label, (_, components) in found.items()}
    instances = np.zeros(classes.shape, smallest_type(0, sum(counts.values())))
    lines: list[tuple[Any, ...]] = []
    for label, (box, components) in found.items():
        own = components.numbers > 0
        instances[box][own] = (components.numbers[own] + len(lines)).astype(instances.dtype)
        centres = native.to_mm(components.centres + [part.start for part in box])
        for number, (voxels, centre) in enumerate(zip(components.voxels, centres, strict=True), start=1):
            volume_ml = int(voxels) * native.voxel_volume_ml
            lines.append((name, len(lines) + 1, label, number, volume_ml, *map(float, centre)))
    path, table = instance_files(out, name)
    write_columns(table, {column: [line[n] for line in lines] for n, column in enumerate(COLUMNS)})
    write_label(path, Volume(instances, native), header_of=header_of)
    return counts


def write_table(out: Path, results: Sequence[CaseResult]) -> None:
    """Write the instances of all cases of a batch that have any such table, one under the other."""
    tables = [instance_files(out, result.name)[1] for result in results if result.instances]
    if tables:
        bodies = (path.read_text(encoding="utf-8").partition("\n")[2] for path in tables if path.exists())
        write_text(out / TABLE, ",".join(COLUMNS) + "\n" + "".join(bodies))


def _within_box(classes: NDArray[Any], index: int) -> tuple[tuple[slice, ...], Components]:
    """Return the components of one class within the box around it, and that box."""
    from scipy.ndimage import find_objects

    boxes = find_objects(classes, max_label=index)
    box = boxes[index - 1] or (slice(0, 0),) * 3
    return box, Components.of(classes[box] == index)
