"""Metrics: how well a predicted mask matches its reference, on the native grid, in mm and ml.

Adding a metric is a function of a `Comparison` and a line of `METRICS`.

**Surfaces.** The surface of a mask runs between voxels. It is cut into elements, one in each 2x2x2 neighbourhood that
is neither all inside nor all outside; an element lies at the neighbourhood's centre and weighs the area (mm2) of its
marching-cubes triangles, from the table of DeepMind's surface-distance. A mask ends at the volume's border: what
touches the border has a surface there. All three surface metrics weigh elements by that area, so that neither an
oblique surface nor a thick slice counts for more than its size:

- HD95: the larger of the two directed 95th percentiles, prediction to reference and reference to prediction. A
  percentile is the smallest distance within which 95 % of the area lies. Libraries that count border voxels (MONAI,
  MedPy) or pool both directions get other numbers.
- ASSD: the mean distance over the elements of both surfaces.
- NSD: the share of both surfaces' area that lies within the tolerance of the other surface.

**Empty masks.** Where reference or prediction is empty no metric has a value: each is nan, and the row's status says
why: `missed` (there is a reference, nothing was predicted), `spurious` (predicted, but there is no reference) or
`both_empty`, which is no error. Every summary states the number of missed and spurious beside the mean, which is taken
over the scored rows.

**What nobody knows.** A structure that people did not look for in a case has the status `not_annotated` there and no
value: it is no error, and counts nowhere. Voxels that the reference ignores are taken out of prediction and reference:
both end where they begin, so that they add no distance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.structures import Mask, Structures

FloatArray = NDArray[np.float64]
Millimetres = tuple[float, float, float]

Status = Literal["scored", "missed", "spurious", "both_empty", "not_annotated"]

# A tolerance of whole voxels takes in what is so many voxels off, whichever way the grid's float32 affine was rounded.
_TOLERANCE_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """Distances between two surfaces, element by element.

    Attributes:
        prediction_mm: (P,) from each element of the prediction's surface to the nearest of the reference's, in mm.
        reference_mm: (R,) from each element of the reference's surface to the nearest of the prediction's, in mm.
        prediction_mm2: (P,) areas of the prediction's elements.
        reference_mm2: (R,) areas of the reference's elements.
    """

    prediction_mm: FloatArray
    reference_mm: FloatArray
    prediction_mm2: FloatArray
    reference_mm2: FloatArray


@dataclass(frozen=True, eq=False)
class Comparison:
    """A predicted mask beside its reference; what several metrics need is computed once, when first asked for.

    Attributes:
        prediction, reference: (X, Y, Z) masks on one grid, neither empty.
        spacing_mm: voxel size of that grid.
        tolerance_mm: of the normalised surface Dice.
    """

    prediction: Mask
    reference: Mask
    spacing_mm: Millimetres
    tolerance_mm: float

    @cached_property
    def prediction_voxels(self) -> int:
        """Voxels of the prediction."""
        return int(np.count_nonzero(self.prediction))

    @cached_property
    def reference_voxels(self) -> int:
        """Voxels of the reference."""
        return int(np.count_nonzero(self.reference))

    @cached_property
    def common_voxels(self) -> int:
        """Voxels that both have."""
        return int(np.count_nonzero(self.prediction & self.reference))

    @cached_property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in ml."""
        return float(np.prod(self.spacing_mm)) / 1000.0

    @cached_property
    def surfaces(self) -> SurfaceDistances:
        """Distances between both surfaces."""
        # Imported here: scipy.spatial costs 0.25 s, and Dice alone needs none of it.
        from scipy.spatial import cKDTree

        prediction_at, prediction_mm2 = _surface(self.prediction, self.spacing_mm)
        reference_at, reference_mm2 = _surface(self.reference, self.spacing_mm)
        # Exact; memory grows with the surfaces, not with the box around them as in a distance transform.
        to_reference, _ = cKDTree(reference_at, leafsize=32).query(prediction_at)
        to_prediction, _ = cKDTree(prediction_at, leafsize=32).query(reference_at)
        return SurfaceDistances(to_reference, to_prediction, prediction_mm2, reference_mm2)


def dice(masks: Comparison) -> float:
    """Return twice the common volume over the sum of both volumes, 0 to 1."""
    return 2 * masks.common_voxels / (masks.prediction_voxels + masks.reference_voxels)


def iou(masks: Comparison) -> float:
    """Return the common volume over the volume of the union, 0 to 1."""
    return masks.common_voxels / (masks.prediction_voxels + masks.reference_voxels - masks.common_voxels)


def hd95(masks: Comparison) -> float:
    """Return the larger of the two directed, area-weighted 95th percentiles of the surface distance, in mm."""
    surfaces = masks.surfaces
    return max(
        _percentile(surfaces.prediction_mm, surfaces.prediction_mm2, 95),
        _percentile(surfaces.reference_mm, surfaces.reference_mm2, 95),
    )


def assd(masks: Comparison) -> float:
    """Return the area-weighted mean distance of both surfaces from each other, in mm."""
    surfaces = masks.surfaces
    total = surfaces.prediction_mm @ surfaces.prediction_mm2 + surfaces.reference_mm @ surfaces.reference_mm2
    return float(total / (surfaces.prediction_mm2.sum() + surfaces.reference_mm2.sum()))


def nsd(masks: Comparison) -> float:
    """Return the share of both surfaces' area that lies within the tolerance of the other surface, 0 to 1."""
    surfaces, within_mm = masks.surfaces, masks.tolerance_mm * (1 + _TOLERANCE_SLACK)
    near = surfaces.prediction_mm2[surfaces.prediction_mm <= within_mm].sum()
    near += surfaces.reference_mm2[surfaces.reference_mm <= within_mm].sum()
    return float(near / (surfaces.prediction_mm2.sum() + surfaces.reference_mm2.sum()))


def volume_error_ml(masks: Comparison) -> float:
    """Return the absolute difference of the volumes, in ml."""
    return abs(masks.prediction_voxels - masks.reference_voxels) * masks.voxel_volume_ml


def volume_error_percent(masks: Comparison) -> float:
    """Return the absolute difference of the volumes, in % of the reference's."""
    return 100 * abs(masks.prediction_voxels - masks.reference_voxels) / masks.reference_voxels


def sensitivity(masks: Comparison) -> float:
    """Return the share of the reference that was predicted (recall), 0 to 1."""
    return masks.common_voxels / masks.reference_voxels


def precision(masks: Comparison) -> float:
    """Return the share of the prediction that is in the reference, 0 to 1."""
    return masks.common_voxels / masks.prediction_voxels


@dataclass(frozen=True)
class Metric:
    """One line of the table.

    Attributes:
        name: the key in tables and in MLflow.
        long_name: for people.
        unit: "" for a share, else mm, ml or %.
        higher_is_better: the direction.
        best: the value of a perfect prediction.
        decimals: digits after the point that mean something.
        function: from two masks to the value.
        source: the paper that defines it.
    """

    name: str
    long_name: str
    unit: str
    higher_is_better: bool
    best: float
    decimals: int
    function: Callable[[Comparison], float]
    source: str


_NIKOLOV = "Nikolov et al., J Med Internet Res 2021;23(7):e26151"
_TAHA = "Taha and Hanbury, BMC Med Imaging 2015;15:29"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("dice", "Dice", "", True, 1.0, 4, dice, "Dice, Ecology 1945;26(3):297-302"),
        Metric("iou", "Intersection over union", "", True, 1.0, 4, iou, "Jaccard, New Phytol 1912;11(2):37-50"),
        Metric("hd95", "Hausdorff distance, 95 %", "mm", False, 0.0, 2, hd95, _NIKOLOV),
        Metric("assd", "Average surface distance", "mm", False, 0.0, 3, assd, "Heimann et al., TMI 2009;28(8):1251-65"),
        Metric("nsd", "Normalised surface Dice", "", True, 1.0, 4, nsd, _NIKOLOV),
        Metric("volume_error_ml", "Absolute volume error", "ml", False, 0.0, 3, volume_error_ml, _TAHA),
        Metric("volume_error_percent", "Absolute volume error", "%", False, 0.0, 2, volume_error_percent, _TAHA),
        Metric("sensitivity", "Sensitivity", "", True, 1.0, 4, sensitivity, _TAHA),
        Metric("precision", "Precision", "", True, 1.0, 4, precision, _TAHA),
    )
}


@dataclass(frozen=True)
class Row:
    """One label or region of one case.

    Attributes:
        class_name: its name.
        status: scored, or which of the masks is empty, or that there is no reference.
        reference_ml, prediction_ml: both volumes; nan, the first, where there is no reference.
        values: metric name -> value; nan unless scored.
    """

    class_name: str
    status: Status
    reference_ml: float
    prediction_ml: float
    values: dict[str, float]


def score_case(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    spacing_mm: Millimetres,
    structures: Structures,
    tolerance_mm: float,
    *,
    metrics: Iterable[str] = tuple(METRICS),
) -> list[Row]:
    """Score each structure of one case.

    Args:
        prediction: (X, Y, Z) class indices on the native grid; 0 is the background.
        reference: the same of the label drawn by people.
        spacing_mm: voxel size of that grid.
        structures: what is scored: labels, or regions, which are unions of labels.
        tolerance_mm: of the normalised surface Dice; at least 0.
        metrics: names of METRICS; those without a surface cost almost nothing.

    Returns:
        A row for each structure, in their order.

    Raises:
        ValueError: the grids differ, or an array holds an index outside the classes.
    """
    chosen = [METRICS[name] for name in metrics]
    rows = []
    for found in structures.masks(prediction, reference):
        masks = Comparison(found.prediction, found.reference, spacing_mm, tolerance_mm)
        rows.append(_row(found.name, masks, chosen, annotated=found.name not in structures.unknown))
    return rows


def _row(class_name: str, masks: Comparison, metrics: Sequence[Metric], *, annotated: bool) -> Row:
    """Score one structure; nan for every metric where a mask is empty, or where there is no reference."""
    status = _status(masks) if annotated else "not_annotated"
    return Row(
        class_name=class_name,
        status=status,
        reference_ml=masks.reference_voxels * masks.voxel_volume_ml if annotated else float("nan"),
        prediction_ml=masks.prediction_voxels * masks.voxel_volume_ml,
        values={metric.name: metric.function(masks) if status == "scored" else float("nan") for metric in metrics},
    )


def _status(masks: Comparison) -> Status:
    """Tell whether both masks hold a voxel, or which does not."""
    if masks.reference_voxels:
        return "scored" if masks.prediction_voxels else "missed"
    return "spurious" if masks.prediction_voxels else "both_empty"


def _surface(mask: Mask, spacing_mm: Millimetres) -> tuple[FloatArray, FloatArray]:
    """Return a mask's surface elements: (N, 3) positions in mm from its first voxel, and (N,) areas in mm2."""
    padded = np.pad(mask, 1).astype(np.uint8)
    x, y, z = (size - 1 for size in padded.shape)
    codes = np.zeros((x, y, z), dtype=np.uint8)
    # The eight voxels of a neighbourhood are the bits of its code, in the order of the table of areas.
    for bit, (i, j, k) in enumerate(itertools.product((0, 1), repeat=3)):
        codes |= padded[i : i + x, j : j + y, k : k + z] << (7 - bit)
    elements = np.nonzero((codes != 0) & (codes != 255))
    # Neighbourhood (i, j, k) of the padded mask is centred half a voxel below voxel (i, j, k) of the mask.
    positions = (np.stack(elements, axis=1) - 0.5) * np.asarray(spacing_mm)
    return positions, _area_table(spacing_mm)[codes[elements]]


@lru_cache(maxsize=16)
def _area_table(spacing_mm: Millimetres) -> FloatArray:
    """Return (256,) areas in mm2 of a surface element by the code of its 2x2x2 neighbourhood."""
    # Imported here: monai costs 2.3 s, and only surface metrics need its copy of DeepMind's table.
    from monai.metrics.utils import create_table_neighbour_code_to_surface_area

    table, _ = create_table_neighbour_code_to_surface_area(spacing_mm)
    return np.asarray(table, dtype=np.float64)


def _percentile(distances: FloatArray, weights: FloatArray, percent: float) -> float:
    """Return the smallest distance within which `percent` of the weight lies."""
    order = np.argsort(distances)
    share = np.cumsum(weights[order]) / weights.sum()
    position = min(int(np.searchsorted(share, percent / 100)), len(order) - 1)
    return float(distances[order[position]])
