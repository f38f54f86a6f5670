"""Reports of an evaluation: per-case table, summary, pictures, and one self-contained page."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup

from pipeline.evaluation.cross_validation import CrossValidation
from pipeline.evaluation.cross_validation import as_json as folds_as_json
from pipeline.evaluation.lesions.metrics import COUNTS, main_metrics, metric_grid
from pipeline.evaluation.lesions.scoring import LesionRules
from pipeline.evaluation.lesions.summary import LesionSummary
from pipeline.evaluation.metrics import METRICS, Metric
from pipeline.evaluation.scored import MEASURES, NAN, NO_LESIONS, RELIABILITY, UNCALIBRATED, ScoredCase
from pipeline.evaluation.self_assessment import DicePrediction, dice_pairs
from pipeline.evaluation.statistics import MEAN, ClassSummary, Estimate
from pipeline.pictures import COLOURS
from pipeline.records import atomic_path, json_number, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rank = Literal["worst", "median", "best"]

# What a terminal has room for; the files hold every metric.
_TEXT_METRICS = ("dice", "nsd", "hd95")
# More classes than this have no legend: it would hide the picture.
_MOST_NAMED = 12
NO_VIEWER = Markup("")
_PLOTTED_METRICS = ("dice", "nsd", "hd95", "volume_error_percent")


@dataclass(frozen=True)
class Evaluation:
    """All that was found about one model, or the models of one experiment's folds.

    Attributes:
        title: of the page.
        facts: what was evaluated on what, name -> value.
        device: that predicted: cpu, or the GPU's name.
        tolerance_mm: of the normalised surface Dice.
        cases: in the manifest's order.
        failures: case id -> why it has no score.
        summaries: a line a class, and their mean.
        reliability: name in RELIABILITY -> mean over the cases.
        dice_predictions: how well the model knew its Dice, a line a class, and their mean; empty where it said none.
        cross_validation: the folds beside each other; None where it is not of an experiment's folds.
        lesion_rules: which structures were counted lesion by lesion, and how.
        lesions: a summary for each of them.
    """

    title: str
    facts: dict[str, str]
    device: str
    tolerance_mm: float
    cases: tuple[ScoredCase, ...]
    failures: dict[str, str]
    summaries: tuple[ClassSummary, ...]
    reliability: Mapping[str, Estimate] = field(default_factory=dict)
    dice_predictions: tuple[DicePrediction, ...] = ()
    cross_validation: CrossValidation | None = None
    lesion_rules: LesionRules = NO_LESIONS
    lesions: tuple[LesionSummary, ...] = ()


def write_summary(path: Path, evaluation: Evaluation) -> None:
    """Write the summary as JSON; what has no value is null."""
    classes = {
        summary.class_name: {
            "scored": summary.scored,
            "missed": summary.missed,
            "spurious": summary.spurious,
            "not_annotated": summary.not_annotated,
            "metrics": {name: estimate.as_json() for name, estimate in summary.metrics.items()},
        }
        for summary in evaluation.summaries
    }
    content = {
        "title": evaluation.title,
        "facts": evaluation.facts,
        "device": evaluation.device,
        "surface_tolerance_mm": evaluation.tolerance_mm,
        "units": {name: metric.unit for name, metric in METRICS.items()},
        "cases": len(evaluation.cases),
        "failures": evaluation.failures,
        "classes": classes,
        "reliability": {name: estimate.as_json() for name, estimate in evaluation.reliability.items()},
        "predicted_dice": {one.class_name: _prediction_as_json(one) for one in evaluation.dice_predictions},
        "cross_validation": evaluation.cross_validation and folds_as_json(evaluation.cross_validation),
    }
    if evaluation.lesion_rules.structures:
        content["lesion_rules"] = vars(evaluation.lesion_rules)
        content["lesions"] = {one.class_name: one.as_json() for one in evaluation.lesions}
    write_json(path, content)


def as_text(evaluation: Evaluation) -> str:
    """Return the summary as a table for a terminal: means with 95 % intervals, missed and spurious beside them."""
    counts = counted(evaluation)
    header = ["", *(name.replace("_", " ") for name in counts), *(heading(METRICS[name]) for name in _TEXT_METRICS)]
    lines = [header] + [
        [summary.class_name, *(str(getattr(summary, name)) for name in counts)]
        + [format_estimate(METRICS[name], summary.metrics[name]) for name in _TEXT_METRICS]
        for summary in evaluation.summaries
    ]
    failures = [f"failed: {case}: {reason}" for case, reason in evaluation.failures.items()]
    title = f"{evaluation.title}: {len(evaluation.cases)} cases"
    folds = _folds_as_text(evaluation.cross_validation) if evaluation.cross_validation else []
    lesions = _lesions_as_text(evaluation) if evaluation.lesions else []
    return "\n".join([title, *_aligned(lines), *lesions, *folds, *_assessment_as_text(evaluation), *failures])


def counted(evaluation: Evaluation) -> tuple[str, ...]:
    """Return the names of the counts that stand beside means; cases without an annotation only where there are any."""
    partly = any(summary.not_annotated for summary in evaluation.summaries)
    return ("scored", "missed", "spurious", *(["not_annotated"] if partly else []))


def format_estimate(metric: Metric, estimate: Estimate) -> str:
    """Format a mean and its interval with the digits that mean something: 0.8951 [0.8890, 0.9011]."""
    if math.isnan(estimate.mean):
        return "no value"
    mean = f"{estimate.mean:.{metric.decimals}f}"
    if math.isnan(estimate.low):
        return mean
    return f"{mean} [{estimate.low:.{metric.decimals}f}, {estimate.high:.{metric.decimals}f}]"


def format_share(estimate: Estimate) -> str:
    """Format a share's mean and its interval."""
    return format_estimate(METRICS["dice"], estimate)


def pick_cases(cases: Sequence[ScoredCase], count: int) -> dict[str, Rank]:
    """Pick up to `count` worst, median and best cases by their mean Dice, no case twice.

    For this order alone a missed or spurious class counts as a Dice of 0; a case with neither reference nor prediction
    has no place in it.

    Returns:
        Case id -> where it stands, worst first.
    """
    places = {case.case_id: mean_dice(case) for case in cases}
    order = sorted((case for case, place in places.items() if not math.isnan(place)), key=lambda case: places[case])
    size = min(count, -(-len(order) // 3))
    middle = (len(order) - size) // 2
    ranks: dict[Rank, list[str]] = {"worst": order[:size], "best": order[len(order) - size :]}
    ranks["median"] = order[middle : middle + size]
    picked: dict[str, Rank] = {}
    for rank, chosen in ranks.items():
        picked |= {case: rank for case in chosen if case not in picked}
    return {case: picked[case] for case in order if case in picked}


def mean_dice(case: ScoredCase) -> float:
    """Return a case's mean Dice over classes, 0 for a missed or spurious one; nan where there is nothing to find."""
    found = [row for row in case.rows if row.status not in ("both_empty", "not_annotated")]
    return float(np.mean([row.values["dice"] if row.status == "scored" else 0.0 for row in found])) if found else NAN


def worst_first(cases: Sequence[ScoredCase]) -> list[ScoredCase]:
    """Return the cases by their mean Dice, those without one at the end."""
    places = [(math.isnan(mean_dice(case)), mean_dice(case), index) for index, case in enumerate(cases)]
    return [cases[index] for *_, index in sorted(places)]


def draw_distributions(path: Path, evaluation: Evaluation) -> None:
    """Draw how the main metrics are distributed over the cases, at least one, class by class, as a PNG."""
    # Imported here: matplotlib costs 0.5 s. A Figure by itself needs no display and no global state.
    from matplotlib.figure import Figure

    names = [summary.class_name for summary in evaluation.summaries if summary.class_name != MEAN]
    height = 1.1 + 0.42 * max(2, len(names))
    figure = Figure(figsize=(3.1 * len(_PLOTTED_METRICS), height), dpi=110, layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(_PLOTTED_METRICS), sharey=True), _PLOTTED_METRICS, strict=True):
        columns = [[case.rows[index].values[metric] for case in evaluation.cases] for index in range(len(names))]
        draw_panel(panel, METRICS[metric], names, columns)
    _save(figure, path)


def draw_predictions(path: Path, evaluation: Evaluation) -> None:
    """Draw predicted against true Dice, a dot for each class of each case, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.4), dpi=110, layout="constrained")
    panel = figure.subplots()
    predicted, true = (
        np.stack(table) for table in zip(*map(dice_pairs, evaluation.cases), strict=True)
    )  # (n, classes)
    for index, row in enumerate(evaluation.cases[0].rows):
        colour = COLOURS[index % len(COLOURS)]
        panel.plot(
            predicted[:, index], true[:, index], "o", color=colour, markersize=4, alpha=0.7, label=row.class_name
        )
    low = min(0.95, np.nanmin(predicted), np.nanmin(true))
    panel.plot([low, 1], [low, 1], color="#8a97a5", linewidth=1)
    panel.set_xlabel("predicted Dice")
    panel.set_ylabel("true Dice")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    if len(evaluation.cases[0].rows) <= _MOST_NAMED:
        panel.legend(fontsize=8)
    _save(figure, path)


def write_report(
    path: Path,
    evaluation: Evaluation,
    figures: Mapping[str, Path],
    pictures: Mapping[Path, str],
    viewer: Markup = NO_VIEWER,
) -> None:
    """Write one page that needs no other file and asks for none.

    Args:
        path: the HTML.
        evaluation: what it shows.
        figures: "distributions" and "predictions" -> the PNG of `draw_distributions` and of `draw_predictions`; those
            that there is nothing to draw of are left out.
        pictures: PNG -> caption.
        viewer: the part of the page in which cases can be looked at; empty: there is none.
    """
    page = render(
        "report.html.j2",
        title=evaluation.title,
        evaluation=evaluation,
        counts=counted(evaluation),
        figures={name: data_uri(figure) for name, figure in figures.items()},
        pictures=[(data_uri(picture), caption) for picture, caption in pictures.items()],
        viewer=viewer,
    )
    write_text(path, page)


def render(template: str, **values: Any) -> str:
    """Return a page made from a template of this folder, in which METRICS and the ways to format them are known."""
    # Imported here: only pages need it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals |= {
        "metrics": METRICS,
        "mean": MEAN,
        "format_estimate": format_estimate,
        "format_value": format_value,
        "format_share": format_share,
        "heading": heading,
        "lesion_counts": COUNTS,
        "lesion_grid": metric_grid,
        "reliability_names": RELIABILITY,
        "nan": NAN,
    }
    return environment.get_template(template).render(**values)


def heading(metric: Metric) -> str:
    """Return a column's heading: long name and unit."""
    return f"{metric.long_name}, {metric.unit}" if metric.unit else metric.long_name


def format_value(metric: Metric, value: float) -> str:
    """Format one case's value; nan stays nan."""
    return "nan" if math.isnan(value) else f"{value:.{metric.decimals}f}"


def data_uri(picture: Path) -> str:
    """Return a PNG as text that stands in the page itself."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, its first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(sized)).rstrip()
        for sized in (zip(line, widths, strict=True) for line in lines)
    ]


def _folds_as_text(folds: CrossValidation) -> list[str]:
    """Return the Dice of each fold in lines, and what is incomplete."""
    metric = METRICS["dice"]
    header = ["Dice by fold", *map(str, folds.folds), "SD"]
    lines = [
        [name, *(format_value(metric, value) for value in spread.by_fold.values()), format_value(metric, spread.sd)]
        for (name, of), spread in folds.spreads.items()
        if of == metric.name
    ]
    return [*_aligned([header, *lines]), *([folds.remark] if folds.remark else [])]


def _lesions_as_text(evaluation: Evaluation) -> list[str]:
    """Return a table of the lesions: counts over all cases, means over the cases."""
    shown = main_metrics(evaluation.lesion_rules)
    lines = [["lesions", *COUNTS.values(), *shown.values()]] + [
        [one.class_name, *(str(one.counts[name]) for name in COUNTS)]
        + [format_share(one.metrics[name]) for name in shown]
        for one in evaluation.lesions
    ]
    return _aligned(lines)


def _assessment_as_text(evaluation: Evaluation) -> list[str]:
    """Return what the model's confidence was worth, in two lines; none where nothing is known of it."""
    lines = []
    if evaluation.reliability:
        named = (_measure_as_text(evaluation.reliability, name) for name in MEASURES if name in evaluation.reliability)
        lines.append(f"confidence on the plan's grid: {'; '.join(named)}")
    if evaluation.dice_predictions:
        known = (one for one in evaluation.dice_predictions if one.cases)
        named = (f"{one.class_name} {one.mae:.3f} (rank correlation {one.spearman:.2f})" for one in known)
        lines.append(f"predicted Dice, mean absolute error: {', '.join(named)}")
    return lines


def _measure_as_text(reliability: Mapping[str, Estimate], name: str) -> str:
    """Return a measure's mean, and what it is without the calibration."""
    bare = reliability.get(f"{name}{UNCALIBRATED}")
    return f"{RELIABILITY[name]} {reliability[name].mean:.4f}" + (f" ({bare.mean:.4f} uncalibrated)" if bare else "")


def _prediction_as_json(one: DicePrediction) -> dict[str, float | int | None]:
    """Return as JSON how well the model knew its Dice."""
    known = {"mean_absolute_error": one.mae, "spearman": one.spearman}
    return {"cases": one.cases} | {name: json_number(value) for name, value in known.items()}


def draw_panel(panel: Axes, metric: Metric, names: Sequence[str], columns: Sequence[Sequence[float]]) -> None:
    """Draw a metric's values as a box and a dot a value for each name, the first name on top; nan are left out."""
    known = [[value for value in column if not math.isnan(value)] for column in columns]
    box = {"color": "#8a97a5", "linewidth": 1}
    panel.boxplot(
        known,
        orientation="horizontal",
        widths=0.55,
        showfliers=False,
        boxprops=box,
        whiskerprops=box,
        capprops=box,
        medianprops={"color": "#b3261e", "linewidth": 1.5},
    )
    for index, values in enumerate(known, start=1):
        # Spread by the golden ratio: even, and the same on each run.
        spread = [index + 0.36 * ((number * 0.618) % 1 - 0.5) for number in range(len(values))]
        panel.plot(values, spread, "o", color="#1f6391", markersize=4, alpha=0.55, markeredgewidth=0)
    panel.set_yticks(range(1, len(names) + 1), names)
    panel.set_ylim(len(names) + 0.5, 0.5)
    panel.set_title(heading(metric), fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(axis="x", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
