"""What is counted of lesions, and what follows from the counts.

Two questions are answered, which are not the same:

- **Is there anything where a lesion is?** A lesion of the reference is *detected* where one voxel of it is predicted,
  else *missed*; a predicted lesion is *spurious* where none of its voxels is in the reference. Lesions that run
  together in the prediction are all detected.
- **Is each found as itself?** Each lesion has one partner at most (`matching`). At a threshold, pairs of at least that
  IoU are true positives, lesions of the reference without one are false negatives, predicted ones false positives: F1,
  which is also called recognition quality, precision, recall; segmentation quality is the mean IoU of the true
  positives, and panoptic quality the product of F1 and segmentation quality (Kirillov et al., CVPR 2019:9396-9405).

Each is a ratio of two sums, so that it can be given for a case, and for all lesions of many cases together. Where a
denominator is 0 there is nothing to say, and the value is nan: with neither lesion nor prediction each of them is,
which is no error. Other than Dice, F1 has a value where all was missed or all is spurious: 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.lesions.scoring import LesionRules, LesionScore

Ratio = tuple[float, float]

COUNTS = {
    "lesions": "in the reference",
    "lesions_predicted": "predicted",
    "lesions_detected": "detected",
    "lesions_missed": "missed",
    "lesions_spurious": "spurious",
}


@dataclass(frozen=True)
class MatchCounts:
    """Lesions by whether they have a partner; `iou` is the sum over the pairs."""

    true_positives: int
    false_positives: int
    false_negatives: int
    iou: float

    @property
    def both_sides(self) -> float:
        """What F1 and panoptic quality are shares of."""
        return self.true_positives + (self.false_positives + self.false_negatives) / 2


# By any overlap: name -> the sums whose ratio it is.
_BY_OVERLAP: dict[str, Callable[[Mapping[str, int]], Ratio]] = {
    "lesion_sensitivity": lambda n: (n["lesions_detected"], n["lesions"]),
    "lesion_precision": lambda n: (n["lesions_predicted"] - n["lesions_spurious"], n["lesions_predicted"]),
}
# At a threshold: name -> what it is, and the sums.
_AT_THRESHOLD: dict[str, tuple[str, Callable[[MatchCounts], Ratio]]] = {
    "f1": ("F1", lambda n: (n.true_positives, n.both_sides)),
    "recall": ("Recall", lambda n: (n.true_positives, n.true_positives + n.false_negatives)),
    "precision": ("Precision", lambda n: (n.true_positives, n.true_positives + n.false_positives)),
    "sq": ("Segmentation quality", lambda n: (n.iou, n.true_positives)),
    "pq": ("Panoptic quality", lambda n: (n.iou, n.both_sides)),
}


def counts_of(score: LesionScore) -> dict[str, int]:
    """Return name in COUNTS -> how many, by any overlap."""
    reference, prediction = score.of("reference"), score.of("prediction")
    detected, touched = (sum(lesion.is_touched for lesion in own) for own in (reference, prediction))
    return {
        "lesions": len(reference),
        "lesions_predicted": len(prediction),
        "lesions_detected": detected,
        "lesions_missed": len(reference) - detected,
        "lesions_spurious": len(prediction) - touched,
    }


def matches_at(score: LesionScore, threshold: float) -> MatchCounts:
    """Return how many lesions have a partner of at least an IoU."""
    reference, prediction = score.of("reference"), score.of("prediction")
    ious = [lesion.iou for lesion in reference if lesion.partner is not None and lesion.iou >= threshold]
    return MatchCounts(len(ious), len(prediction) - len(ious), len(reference) - len(ious), sum(ious))


def metric_name(metric: str, threshold: float) -> str:
    """Return a metric's name at a threshold, as in tables and in MLflow: lesion_f1_iou50."""
    return f"lesion_{metric}_iou{100 * threshold:g}"


def metric_names(rules: LesionRules) -> list[str]:
    """Return the names of all metrics."""
    at_thresholds = (metric_name(metric, threshold) for threshold in rules.iou_thresholds for metric in _AT_THRESHOLD)
    return [*_BY_OVERLAP, *at_thresholds]


def metric_grid(rules: LesionRules) -> dict[str, dict[str, str]]:
    """Return what counts as found -> column -> metric name, for a page; empty where a column has none."""
    by_overlap = {"Recall": "lesion_sensitivity", "Precision": "lesion_precision"}
    grid = {"any overlap": {said: by_overlap.get(said, "") for said, _ in _AT_THRESHOLD.values()}}
    for threshold in rules.iou_thresholds:
        grid[f"IoU {threshold:g}"] = {said: metric_name(m, threshold) for m, (said, _) in _AT_THRESHOLD.items()}
    return grid


def main_metrics(rules: LesionRules) -> dict[str, str]:
    """Return the metrics that a terminal has room for: F1 at each threshold, panoptic quality at the largest."""
    wanted = {metric_name("f1", threshold): f"F1, IoU {threshold:g}" for threshold in rules.iou_thresholds}
    strictest = rules.iou_thresholds[-1]
    return wanted | {metric_name("pq", strictest): f"panoptic quality, IoU {strictest:g}"}


def ratios(score: LesionScore, rules: LesionRules) -> dict[str, Ratio]:
    """Return metric name -> the two sums whose ratio it is, of one structure of one case."""
    counts = counts_of(score)
    found = {name: of(counts) for name, of in _BY_OVERLAP.items()}
    for threshold in rules.iou_thresholds:
        at = matches_at(score, threshold)
        found |= {metric_name(metric, threshold): of(at) for metric, (_, of) in _AT_THRESHOLD.items()}
    return found


def quotient(ratio: Ratio) -> float:
    """Return a ratio's value; nan where there is nothing below the line."""
    above, below = ratio
    return above / below if below else float("nan")


def case_columns(scores: Sequence[LesionScore | None], rules: LesionRules) -> dict[str, list[Any]]:
    """Return columns beside those of a per-case table; a line that is not counted lesion by lesion is empty.

    Args:
        scores: a line each.
        rules: by which they were made.
    """
    counts = [{} if score is None else counts_of(score) for score in scores]
    values = [{} if score is None else ratios(score, rules) for score in scores]
    columns: dict[str, list[Any]] = {name: [line.get(name, "") for line in counts] for name in COUNTS}
    for name in metric_names(rules):
        columns[name] = [quotient(line[name]) if name in line else "" for line in values]
    return columns
