"""Reports of a comparison: tables as CSV, Markdown and one self-contained page; boxes and a scatter as pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.evaluation.comparison.comparing import ComparisonResult, Pair
from pipeline.evaluation.comparison.members import Member
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.report import data_uri, draw_panel, format_estimate, heading, render
from pipeline.evaluation.scored import case_table, write_columns
from pipeline.evaluation.statistics import MEAN
from pipeline.pictures import COLOURS
from pipeline.records import atomic_path, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What pages and pictures show; the CSV files hold every metric.
SHOWN = ("dice", "hd95", "nsd")

UNKNOWN = "–"

# Written into every comparison, so that nobody has to look up how its numbers came about.
METHODS = (
    "Seeds are averaged case by case and cases patient by patient before anything else: a patient counts once, and a "
    "pair is a patient. The mean over classes is, per case, the mean over the classes that have a value.",
    "Where a member missed a structure, or found one where there is none, Dice and NSD count 0, and 1 for those who "
    "rightly found none there; a distance has no value: means leave it out, and pairs take what both members have.",
    "Intervals: 95 % bootstrap percentiles of the mean, or of the mean difference, patients drawn with replacement. "
    "They say how much would change with other patients, not with another training.",
    "p: Wilcoxon's signed-rank test, two-sided and exact, zeros ranked (Pratt), ties sharing their mean rank; with n "
    "patients that differ it cannot be below 2/2^n. p, Holm: corrected for all pairs in one metric and class, of which "
    "those with the baseline are shown here, and all stand in pairs.csv.",
    "Ranks: the share of bootstrap resamples of the patients in which a member has that rank by its mean; members that "
    "tie share the better one.",
    "Seconds a case: the median, from images in memory to the label map on the native grid. Peak memory: of any case; "
    "on a CPU the whole process with its libraries, on a GPU what torch had allocated there.",
)


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        title: above it.
        columns: headings.
        rows: a cell a column; the first says whose row it is.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(result: ComparisonResult, pairs_of: Sequence[str]) -> list[Table]:
    """Return what Markdown and the page show: members, classes, pairs in some classes, ranks and differing settings."""
    found = [_members(result), *(_classes(result, metric) for metric in SHOWN)]
    found += [_pairs(result, metric, pairs_of) for metric in SHOWN]
    found += [_ranks(result, metric) for metric in SHOWN]
    settings = result.differing_settings()
    rows = tuple((key, *values) for key, values in settings.items())
    return [*found, Table("Settings that differ", ("setting", *(m.name for m in result.members)), rows)]


def write_tables(folder: Path, result: ComparisonResult) -> None:
    """Write comparison.csv (a line a member), pairs.csv, ranks.csv and cases.csv, all metrics in them."""
    write_columns(folder / "comparison.csv", _columns([_member_line(result, member) for member in result.members]))
    write_columns(folder / "pairs.csv", _columns([_pair_line(pair) for pair in result.pairs]))
    write_columns(folder / "ranks.csv", _columns(_rank_lines(result)))
    write_columns(folder / "cases.csv", _columns([line for member in result.members for line in _case_lines(member)]))


def as_markdown(result: ComparisonResult) -> str:
    """Return the comparison as Markdown, pairs by the mean over classes only."""
    warnings = [f"> **Note:** {line}\n" for line in result.warnings]
    parts = [f"# {result.name}\n", _subject(result) + "\n", *warnings]
    for table in tables(result, [MEAN]):
        parts += [f"## {table.title}\n", _markdown_table(table, {}) + "\n"]
    return "\n".join([*parts, "## How to read this\n", "\n".join(f"- {line}" for line in METHODS)]) + "\n"


def as_note(result: ComparisonResult, links: Mapping[str, str]) -> str:
    """Return the members' table alone as Markdown, each name leading to its address.

    MLflow cuts what is long, so warnings come last.
    """
    return "\n\n".join([_subject(result), _markdown_table(_members(result), links), *result.warnings])


def as_text(result: ComparisonResult) -> str:
    """Return the members' table for a terminal."""
    table = _members(result)
    lines = [table.columns, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"{result.name}: {_subject(result)}", *rows, *(f"note: {line}" for line in result.warnings)])


def write_page(path: Path, result: ComparisonResult, pictures: Mapping[Path, str]) -> None:
    """Write one page that needs no other file; `pictures` are PNG -> caption."""
    shown = [(data_uri(picture), caption) for picture, caption in pictures.items()]
    page = render(
        "comparison.html.j2",
        title=result.name,
        result=result,
        subject=_subject(result),
        tables=tables(result, result.class_names),
        pictures=shown,
        methods=METHODS,
    )
    write_text(path, page)


def draw_boxes(path: Path, result: ComparisonResult) -> None:
    """Draw how the shown metrics' means over classes are distributed over the cases, a box a member, as a PNG."""
    from matplotlib.figure import Figure

    names = [member.name for member in result.members]
    figure = Figure(figsize=(3.6 * len(SHOWN) + 1.5, 1.1 + 0.42 * len(names)), dpi=110, layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(SHOWN), sharey=True), SHOWN, strict=True):
        draw_panel(panel, METRICS[metric], names, [result.scores[metric, name][-1].tolist() for name in names])
    _save(figure, path)


def draw_scatter(path: Path, result: ComparisonResult, metric: str = "dice") -> None:
    """Draw each other member's cases against the baseline's, a dot a case and class, as a PNG."""
    from matplotlib.figure import Figure

    others = [member.name for member in result.members if member.name != result.baseline]
    columns = min(4, len(others))
    rows = -(-len(others) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.2 * rows + 0.3), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    limits = _limits(np.stack([result.scores[metric, member.name][:-1] for member in result.members]))
    for panel, name in zip(panels, others, strict=False):
        for index, class_name in enumerate(result.class_names[:-1]):
            across, up = (result.scores[metric, member][index] for member in (result.baseline, name))
            panel.plot(across, up, "o", color=COLOURS[index % len(COLOURS)], ms=4, alpha=0.7, mew=0, label=class_name)
        panel.plot(limits, limits, color="#5d6b7a", linewidth=0.8)
        panel.set(xlim=limits, ylim=limits, aspect="equal")
        panel.set_xlabel(result.baseline, fontsize=8)
        panel.set_ylabel(name, fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.25)
    for panel in panels[len(others) :]:
        panel.set_axis_off()
    figure.suptitle(f"{heading(METRICS[metric])}, a dot a case and class", fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8, frameon=False
    )
    _save(figure, path)


def _subject(result: ComparisonResult) -> str:
    """Say what was compared on what, in one line."""
    run = result.members[0].runs[0]
    places = result.members[0].by_place
    folds = ", ".join(sorted({str(fold) for _, fold in places}))
    seeds = len({seed for seed, _ in places})
    budgets = sorted({run.budget for member in result.members for run in member.runs})
    return (
        f"{run.manifest.split('@')[0]}, fold {folds} (--cases {run.evaluated_on}): {len(result.cases)} cases of "
        f"{result.patients} patients; {seeds} seed{'s' if seeds > 1 else ''} a member; budget {' or '.join(budgets)}"
    )


def _members(result: ComparisonResult) -> Table:
    """Return the table of costs beside the means over classes."""
    columns = ("member", "network", "parameters", "steps", "training", "s/case", "peak memory")
    metrics = tuple(heading(METRICS[metric]) for metric in SHOWN)
    return Table(
        "Members",
        (*columns, *metrics, "missed, spurious"),
        tuple((*_costs(member), *_quality(result, member)) for member in result.members),
    )


def _costs(member: Member) -> tuple[str, ...]:
    """Return a member's name, network and costs, for people."""
    first, seconds, memory = member.runs[0], member.seconds_per_case, member.peak_memory_bytes
    steps = sorted({run.steps for run in member.runs if run.steps is not None})
    trained = [run.seconds for run in member.runs if run.seconds is not None]
    return (
        member.name,
        first.network,
        f"{first.parameters:,}",
        " to ".join(f"{step:,}" for step in {*steps[:1], *steps[-1:]}) or UNKNOWN,
        f"{np.mean(trained) / 60:.1f} min" if trained else UNKNOWN,
        UNKNOWN if math.isnan(seconds) else f"{seconds:.3g}",
        UNKNOWN if memory is None else f"{memory / 2**30:.2f} GiB, {first.device}",
    )


def _quality(result: ComparisonResult, member: Member) -> tuple[str, ...]:
    """Return a member's means over classes, and what they leave out."""
    means = [format_estimate(METRICS[metric], result.estimates[member.name, metric, MEAN]) for metric in SHOWN]
    return (*means, f"{member.count('missed', MEAN)}, {member.count('spurious', MEAN)}")


def _classes(result: ComparisonResult, metric: str) -> Table:
    """Return a metric's means class by class."""
    rows = tuple(
        (
            m.name,
            *(format_estimate(METRICS[metric], result.estimates[m.name, metric, name]) for name in result.class_names),
        )
        for m in result.members
    )
    return Table(heading(METRICS[metric]), ("member", *result.class_names), rows)


def _pairs(result: ComparisonResult, metric: str, class_names: Sequence[str]) -> Table:
    """Return a metric's pairs with the baseline, in some classes: of 16 members all would be 120."""
    pairs = [
        pair
        for pair in result.pairs
        if pair.metric == metric and pair.class_name in class_names and result.baseline in (pair.first, pair.second)
    ]
    columns = ("pair", "class", "patients", "difference", "better, tied, worse", "p", "p, Holm")
    return Table(f"{heading(METRICS[metric])}: pairs", columns, tuple(map(_pair_row, pairs)))


def _pair_row(pair: Pair) -> tuple[str, ...]:
    """Return a pair for people."""
    patients = pair.difference.cases
    return (
        f"{pair.first} − {pair.second}",
        pair.class_name,
        str(patients),
        format_estimate(METRICS[pair.metric], pair.difference),
        f"{pair.better}, {patients - pair.better - pair.worse}, {pair.worse}",
        _format_p(pair.p),
        _format_p(pair.p_holm),
    )


def _format_p(p: float) -> str:
    """Format a p-value; one without pairs is unknown."""
    if math.isnan(p):
        return UNKNOWN
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _ranks(result: ComparisonResult, metric: str) -> Table:
    """Return how stable the ranking by a metric's mean over classes is."""
    ranking = result.ranking(metric, MEAN)
    rows = tuple(
        (name, *(f"{100 * share:.0f} %" for share in shares), f"{ranking.mean_rank(name):.2f}")
        for name, shares in ranking.shares.items()
    )
    title = f"{heading(METRICS[metric])}: ranks over resamples of {ranking.patients} patients"
    return Table(title, ("member", *(f"rank {n + 1}" for n in range(len(rows))), "mean rank"), rows)


def _markdown_table(table: Table, links: Mapping[str, str]) -> str:
    """Return a table as Markdown."""
    rows = [(f"[{row[0]}]({links[row[0]]})" if row[0] in links else row[0], *row[1:]) for row in table.rows]
    lines = [table.columns, ("---",) * len(table.columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _member_line(result: ComparisonResult, member: Member) -> dict[str, Any]:
    """Return a member's line of comparison.csv."""
    first = member.runs[0]
    steps = [run.steps for run in member.runs if run.steps is not None]
    trained = [run.seconds for run in member.runs if run.seconds is not None]
    line: dict[str, Any] = {
        "member": member.name,
        "network": first.network,
        "parameters": first.parameters,
        "runs": len(member.runs),
        "budget": first.budget,
        "steps": float(np.mean(steps)) if steps else "",
        "training_seconds": float(np.mean(trained)) if trained else "",
        "seconds_per_case": member.seconds_per_case,
        "peak_memory_bytes": member.peak_memory_bytes or "",
        "device": first.device,
    }
    for class_name in result.class_names:
        line |= {f"{status}/{class_name}": member.count(status, class_name) for status in ("missed", "spurious")}
        for metric in METRICS:
            estimate = result.estimates[member.name, metric, class_name]
            ends = {"": estimate.mean, "/low": estimate.low, "/high": estimate.high}
            line |= {f"{metric}/{class_name}{end}": value for end, value in ends.items()}
    return line


def _pair_line(pair: Pair) -> dict[str, Any]:
    """Return a line of pairs.csv."""
    return {
        "metric": pair.metric,
        "class": pair.class_name,
        "first": pair.first,
        "second": pair.second,
        "patients": pair.difference.cases,
        "difference": pair.difference.mean,
        "low": pair.difference.low,
        "high": pair.difference.high,
        "first_better": pair.better,
        "first_worse": pair.worse,
        "p": pair.p,
        "p_holm": pair.p_holm,
    }


def _rank_lines(result: ComparisonResult) -> list[dict[str, Any]]:
    """Return the lines of ranks.csv."""
    return [
        {
            "metric": ranking.metric,
            "class": ranking.class_name,
            "patients": ranking.patients,
            "member": name,
            "mean_rank": ranking.mean_rank(name),
            **{f"rank_{place}": share for place, share in enumerate(shares, start=1)},
        }
        for ranking in result.rankings
        for name, shares in ranking.shares.items()
    ]


def _case_lines(member: Member) -> list[dict[str, Any]]:
    """Return a member's lines of cases.csv: a line a run, case and class."""
    lines = []
    for run in member.runs:
        columns = case_table(run.cases)
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        lines += [{"member": member.name, "seed": run.seed, **row} for row in rows]
    return lines


def _columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return lines of the same keys as columns."""
    return {key: [line[key] for line in lines] for key in lines[0]}


def _limits(values: Any) -> tuple[float, float]:
    """Return the range of all values with a margin; 0 to 1 where there is none."""
    known = values[~np.isnan(values)]
    if known.size == 0:
        return 0.0, 1.0
    margin = 0.03 * float(np.ptp(known)) + 1e-3
    return float(known.min()) - margin, float(known.max()) + margin


def _save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
