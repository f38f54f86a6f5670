"""Lesions over the cases of an evaluation: the mean case, all lesions together, and every lesion in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation.lesions.metrics import COUNTS, counts_of, metric_names, quotient, ratios
from pipeline.evaluation.lesions.scoring import LesionRules, LesionScore
from pipeline.evaluation.scored import ScoredCase
from pipeline.evaluation.statistics import Estimate, estimate, estimate_ratio


@dataclass(frozen=True)
class LesionSummary:
    """One structure's lesions over all cases in which people looked for it.

    Attributes:
        class_name: of the structure.
        cases: in how many.
        counts: name in COUNTS -> sum over the cases.
        metrics: metric name -> mean over the cases that have a value.
        pooled: metric name -> its value for all lesions of all cases together.
    """

    class_name: str
    cases: int
    counts: Mapping[str, int]
    metrics: Mapping[str, Estimate]
    pooled: Mapping[str, Estimate]

    def as_json(self) -> dict[str, Any]:
        """Return the summary as JSON knows it."""
        means, pooled = (
            {name: one.as_json() for name, one in estimates.items()} for estimates in (self.metrics, self.pooled)
        )
        return {"cases": self.cases, **self.counts, "metrics": means, "pooled": pooled}

    def as_metrics(self, section: str) -> dict[str, float]:
        """Return counts and values as MLflow metrics, such as evaluation/fold/lesion_f1_iou50/lesion."""
        values: dict[str, float] = {f"{section}/{name}/{self.class_name}": n for name, n in self.counts.items()}
        for prefix, estimates in (("", self.metrics), ("pooled_", self.pooled)):
            for name, one in estimates.items():
                if one.cases:
                    values[f"{section}/{prefix}{name}/{self.class_name}"] = one.mean
        return values


def summarise_lesions(
    cases: Sequence[ScoredCase], rules: LesionRules, *, samples: int, seed: int
) -> tuple[LesionSummary, ...]:
    """Summarise by structure, in the order of the rules; one that nobody looked for in any case is left out.

    Args:
        cases: of an evaluation.
        rules: by which they were scored.
        samples: resamples of the bootstrap, in which patients are drawn.
        seed: of the bootstrap.
    """
    found = []
    for name in rules.structures:
        own = [(case.patient, score) for case in cases for score in case.lesions if score.class_name == name]
        if own:
            patients, scores = zip(*own, strict=True)
            found.append(_summary(name, patients, scores, rules, {"samples": samples, "seed": seed}))
    return tuple(found)


def _summary(
    name: str, patients: Sequence[str], scores: Sequence[LesionScore], rules: LesionRules, bootstrap: dict[str, int]
) -> LesionSummary:
    """Summarise one structure."""
    by_case = [ratios(score, rules) for score in scores]
    columns = {metric: [ratio[metric] for ratio in by_case] for metric in metric_names(rules)}
    return LesionSummary(
        class_name=name,
        cases=len(scores),
        counts={count: sum(counts[count] for counts in map(counts_of, scores)) for count in COUNTS},
        metrics={
            metric: estimate(np.array([*map(quotient, column)]), patients=patients, **bootstrap)
            for metric, column in columns.items()
        },
        pooled={metric: estimate_ratio(column, patients=patients, **bootstrap) for metric, column in columns.items()},
    )


def lesion_table(cases: Sequence[ScoredCase]) -> dict[str, list[Any]]:
    """Return equally long columns, a line a lesion: those of the reference of a case's structure, then the predicted.

    `partner` is the number of the lesion on the other side; the numbers of predicted lesions are those of the instance
    label maps that `medseg segment` writes, where no lesion is left out for its size.
    """
    lines = [(case, score, lesion) for case in cases for score in case.lesions for lesion in score.lesions]
    return {
        "case": [case.case_id for case, _, _ in lines],
        "patient": [case.patient for case, _, _ in lines],
        "fold": ["" if case.fold is None else case.fold for case, _, _ in lines],
        "class": [score.class_name for _, score, _ in lines],
        "side": [lesion.side for _, _, lesion in lines],
        "lesion": [lesion.number for _, _, lesion in lines],
        "volume_ml": [lesion.volume_ml for _, _, lesion in lines],
        **{f"{axis}_mm": [lesion.centre_mm[n] for _, _, lesion in lines] for n, axis in enumerate("xyz")},
        "status": [lesion.status for _, _, lesion in lines],
        "partner": ["" if lesion.partner is None else lesion.partner for _, _, lesion in lines],
        "iou": [lesion.iou for _, _, lesion in lines],
        "dice": [lesion.dice for _, _, lesion in lines],
    }
