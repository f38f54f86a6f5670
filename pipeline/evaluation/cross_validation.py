"""Cross-validation: each case scored by the model that has not seen it, and how far the folds lie apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.scored import ScoredCase, write_columns
from pipeline.evaluation.statistics import MEAN, ClassSummary, FloatArray, mean_known, with_mean
from pipeline.records import json_number


@dataclass(frozen=True)
class FoldSpread:
    """One metric of one class, fold by fold.

    Attributes:
        by_fold: fold -> mean over its cases; nan where none has a value.
        sd: standard deviation of the folds' means (n - 1); nan with fewer than two. It holds what differs between
            the trainings and between the cases of the folds.
    """

    by_fold: Mapping[int, float]
    sd: float


@dataclass(frozen=True)
class CrossValidation:
    """An experiment's folds beside each other.

    Attributes:
        folds: that were evaluated.
        missing: folds of the manifest that are not trained.
        unfinished: evaluated by the best model so far of a training that has not ended.
        failed: ids of cases without a score.
        spreads: (class or MEAN, metric) -> its folds.
    """

    folds: tuple[int, ...]
    missing: tuple[int, ...]
    unfinished: tuple[int, ...]
    failed: tuple[str, ...]
    spreads: Mapping[tuple[str, str], FoldSpread]

    @property
    def is_complete(self) -> bool:
        """Whether every case of the development set has its score, by a model whose training has ended."""
        return not (self.missing or self.unfinished or self.failed)

    @property
    def remark(self) -> str:
        """What is incomplete, in a line; empty where nothing is."""
        total = len(self.folds) + len(self.missing)
        said = [f"{len(self.folds)} of {total} folds; not trained: {_listed(self.missing)}"] if self.missing else []
        said += [f"training has not ended: {_listed(self.unfinished)}"] if self.unfinished else []
        said += [f"cases that failed: {', '.join(self.failed)}"] if self.failed else []
        return f"incomplete cross-validation: {'; '.join(said)}" if said else ""


def cross_validate(
    cases: Sequence[ScoredCase],
    *,
    missing: Sequence[int] = (),
    unfinished: Sequence[int] = (),
    failed: Sequence[str] = (),
) -> CrossValidation:
    """Compare the folds of an experiment.

    Args:
        cases: each scored by the model of its fold, the same classes in the same order.
        missing: folds that are not trained.
        unfinished: folds whose training has not ended.
        failed: ids of cases without a score.
    """
    folds = sorted({case.fold for case in cases if case.fold is not None})
    spreads = {}
    names = [row.class_name for row in cases[0].rows] if cases else []
    for metric in METRICS:
        tables = {fold: _table([case for case in cases if case.fold == fold], metric) for fold in folds}
        for index, name in enumerate([*names, MEAN]):
            spreads[name, metric] = _spread({fold: table[index] for fold, table in tables.items()})
    return CrossValidation(tuple(folds), tuple(missing), tuple(unfinished), tuple(failed), spreads)


def cv_metrics(cross_validation: CrossValidation, summaries: Sequence[ClassSummary]) -> dict[str, float]:
    """Return the numbers of a complete cross-validation for MLflow: cv/dice/liver and cv/dice/liver_fold_sd.

    Of an incomplete one there are none, for they would stand beside those of complete ones.
    """
    if not cross_validation.is_complete:
        return {}
    values: dict[str, float] = {"cv/folds": len(cross_validation.folds)}
    for summary in summaries:
        for name, estimate in summary.metrics.items():
            if estimate.cases:
                values[f"cv/{name}/{summary.class_name}"] = estimate.mean
                sd = cross_validation.spreads[summary.class_name, name].sd
                values |= {} if np.isnan(sd) else {f"cv/{name}/{summary.class_name}_fold_sd": sd}
    return values


def write_folds(path: Path, cross_validation: CrossValidation, summaries: Sequence[ClassSummary]) -> None:
    """Write the cross-validated table as CSV: a line for each metric of each class."""
    lines = list(_lines(cross_validation, summaries))
    write_columns(path, {column: [line[column] for line in lines] for column in lines[0]})


def as_json(cross_validation: CrossValidation) -> dict[str, Any]:
    """Return the folds as JSON knows them; what has no value is null."""
    classes: dict[str, Any] = {}
    for (name, metric), spread in cross_validation.spreads.items():
        by_fold = {str(fold): json_number(value) for fold, value in spread.by_fold.items()}
        classes.setdefault(name, {})[metric] = {"by_fold": by_fold, "sd": json_number(spread.sd)}
    return {
        "folds": list(cross_validation.folds),
        "missing": list(cross_validation.missing),
        "unfinished": list(cross_validation.unfinished),
        "failed": list(cross_validation.failed),
        "classes": classes,
    }


def _lines(cross_validation: CrossValidation, summaries: Sequence[ClassSummary]) -> Iterator[dict[str, Any]]:
    """Yield the lines of the cross-validated table, column -> value."""
    for summary in summaries:
        for name, estimate in summary.metrics.items():
            spread = cross_validation.spreads[summary.class_name, name]
            yield {
                "class": summary.class_name,
                "metric": name,
                "unit": METRICS[name].unit,
                **vars(estimate),
                "fold_sd": spread.sd,
                **{f"fold_{fold}": value for fold, value in spread.by_fold.items()},
            }


def _table(cases: Sequence[ScoredCase], metric: str) -> FloatArray:
    """Return the (classes and MEAN, cases) values of a metric."""
    table = np.array([[row.values[metric] for row in case.rows] for case in cases]).T
    return with_mean(table)


def _spread(by_fold: Mapping[int, FloatArray]) -> FoldSpread:
    """Return the means of each fold's (cases,) values, and how far they lie apart."""
    means = {fold: float(mean_known(values[:, None])[0]) for fold, values in by_fold.items()}
    known = [mean for mean in means.values() if not np.isnan(mean)]
    return FoldSpread(means, float(np.std(known, ddof=1)) if len(known) > 1 else float("nan"))


def _listed(folds: Sequence[int]) -> str:
    """Name folds."""
    return ", ".join(map(str, folds))
