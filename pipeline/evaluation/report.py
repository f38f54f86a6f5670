"""Reports of an evaluation: per-case table, summary, pictures, and one self-contained page."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import EvaluationError
from pipeline.evaluation.metrics import METRICS, Metric, Row
from pipeline.evaluation.statistics import MEAN, ClassSummary, Estimate
from pipeline.records import atomic_path, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rank = Literal["worst", "median", "best"]

# What a terminal has room for; the files hold every metric.
_TEXT_METRICS = ("dice", "nsd", "hd95")
_PLOTTED_METRICS = ("dice", "nsd", "hd95", "volume_error_percent")


@dataclass(frozen=True)
class ScoredCase:
    """One case of an evaluation.

    Attributes:
        case_id, patient: as the manifest has them.
        fold: of the model that predicted the case; None for a model of no fold.
        rows: a row a class.
        seconds: spent on predicting it; nan where that was not written down.
        peak_memory_bytes: while it was predicted; None where the system does not tell.
    """

    case_id: str
    patient: str
    fold: int | None
    rows: tuple[Row, ...]
    seconds: float
    peak_memory_bytes: int | None


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
    """

    title: str
    facts: dict[str, str]
    device: str
    tolerance_mm: float
    cases: tuple[ScoredCase, ...]
    failures: dict[str, str]
    summaries: tuple[ClassSummary, ...]


def case_table(cases: Sequence[ScoredCase]) -> dict[str, list[Any]]:
    """Return the per-case table as equally long columns: a line for each class of each case."""
    lines = [(case, row) for case in cases for row in case.rows]
    return {
        "case": [case.case_id for case, _ in lines],
        "patient": [case.patient for case, _ in lines],
        "fold": ["" if case.fold is None else case.fold for case, _ in lines],
        "class": [row.class_name for _, row in lines],
        "status": [row.status for _, row in lines],
        "reference_ml": [row.reference_ml for _, row in lines],
        "prediction_ml": [row.prediction_ml for _, row in lines],
        **{name: [row.values[name] for _, row in lines] for name in METRICS},
        "seconds": [case.seconds for case, _ in lines],
        "peak_memory_bytes": [case.peak_memory_bytes or "" for case, _ in lines],
    }


def write_case_table(path: Path, cases: Sequence[ScoredCase]) -> None:
    """Write the per-case table as CSV; a metric without a value is `nan`, its reason in `status`."""
    write_columns(path, case_table(cases))


def read_case_table(path: Path) -> list[ScoredCase]:
    """Read the per-case table back; what an older one does not say is nan or None.

    Raises:
        EvaluationError: it cannot be read, or holds no such columns.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        by_case = itertools.groupby(lines, key=lambda line: line["case"])
        return [_read_case([*group]) for _, group in by_case]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise EvaluationError(f"{path}: not a table of scored cases ({error!r}); run `medseg evaluate`") from error


def write_columns(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write equally long columns as CSV, numbers in six significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_shortest(value) for value in line] for line in zip(*columns.values(), strict=True))
    write_text(path, text.getvalue())


def write_summary(path: Path, evaluation: Evaluation) -> None:
    """Write the summary as JSON; what has no value is null."""
    classes = {
        summary.class_name: {
            "scored": summary.scored,
            "missed": summary.missed,
            "spurious": summary.spurious,
            "metrics": {name: _estimate_as_json(estimate) for name, estimate in summary.metrics.items()},
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
    }
    write_json(path, content)


def as_text(evaluation: Evaluation) -> str:
    """Return the summary as a table for a terminal: means with 95 % intervals, missed and spurious beside them."""
    header = ["", "scored", "missed", "spurious", *(heading(METRICS[name]) for name in _TEXT_METRICS)]
    lines = [header] + [
        [summary.class_name, str(summary.scored), str(summary.missed), str(summary.spurious)]
        + [format_estimate(METRICS[name], summary.metrics[name]) for name in _TEXT_METRICS]
        for summary in evaluation.summaries
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(sized)).rstrip()
        for sized in (zip(line, widths, strict=True) for line in lines)
    ]
    failures = [f"failed: {case}: {reason}" for case, reason in evaluation.failures.items()]
    return "\n".join([f"{evaluation.title}: {len(evaluation.cases)} cases", *table, *failures])


def format_estimate(metric: Metric, estimate: Estimate) -> str:
    """Format a mean and its interval with the digits that mean something: 0.8951 [0.8890, 0.9011]."""
    if math.isnan(estimate.mean):
        return "no value"
    mean = f"{estimate.mean:.{metric.decimals}f}"
    if math.isnan(estimate.low):
        return mean
    return f"{mean} [{estimate.low:.{metric.decimals}f}, {estimate.high:.{metric.decimals}f}]"


def pick_cases(cases: Sequence[ScoredCase], count: int) -> dict[str, Rank]:
    """Pick up to `count` worst, median and best cases by their mean Dice, no case twice.

    For this order alone a missed or spurious class counts as a Dice of 0; a case with neither reference nor prediction
    has no place in it.

    Returns:
        Case id -> where it stands, worst first.
    """
    places = {case.case_id: _place(case) for case in cases}
    order = sorted((case for case, place in places.items() if not math.isnan(place)), key=lambda case: places[case])
    size = min(count, -(-len(order) // 3))
    middle = (len(order) - size) // 2
    ranks: dict[Rank, list[str]] = {"worst": order[:size], "best": order[len(order) - size :]}
    ranks["median"] = order[middle : middle + size]
    picked: dict[str, Rank] = {}
    for rank, chosen in ranks.items():
        picked |= {case: rank for case in chosen if case not in picked}
    return {case: picked[case] for case in order if case in picked}


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
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def write_report(path: Path, evaluation: Evaluation, distributions: Path | None, pictures: Mapping[Path, str]) -> None:
    """Write one page that needs no other file and asks for none.

    Args:
        path: the HTML.
        evaluation: what it shows.
        distributions: the PNG of `draw_distributions`; None where no case is scored.
        pictures: PNG -> caption.
    """
    page = render(
        "report.html.j2",
        title=evaluation.title,
        evaluation=evaluation,
        distributions=distributions and data_uri(distributions),
        pictures=[(data_uri(picture), caption) for picture, caption in pictures.items()],
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
        "heading": heading,
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


def _read_case(lines: Sequence[Mapping[str, str]]) -> ScoredCase:
    """Return a case from its lines of the per-case table."""
    first = lines[0]
    rows = tuple(
        Row(
            line["class"],
            line["status"],  # type: ignore[arg-type]
            float(line["reference_ml"]),
            float(line["prediction_ml"]),
            {name: float(line[name]) for name in METRICS},
        )
        for line in lines
    )
    fold = int(first["fold"]) if first["fold"] else None
    seconds, memory = float(first.get("seconds") or "nan"), first.get("peak_memory_bytes")
    return ScoredCase(first["case"], first["patient"], fold, rows, seconds, int(memory) if memory else None)


def _place(case: ScoredCase) -> float:
    """Return the mean Dice over classes, 0 for a missed or spurious one; nan where there is nothing to find."""
    dice = [row.values["dice"] if row.status == "scored" else 0.0 for row in case.rows if row.status != "both_empty"]
    return float(np.mean(dice)) if dice else float("nan")


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


def _shortest(value: Any) -> Any:
    """Return a number in six significant digits, what else there is as it is."""
    return f"{value:.6g}" if isinstance(value, float) else value


def _estimate_as_json(estimate: Estimate) -> dict[str, float | int | None]:
    """Return an estimate as JSON knows it."""
    known = {name: None if math.isnan(value) else value for name, value in vars(estimate).items()}
    return known | {"cases": estimate.cases}
