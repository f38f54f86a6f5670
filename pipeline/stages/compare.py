"""`medseg compare`: members trained and evaluated alike, beside each other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import EvaluationError, PipelineError
from pipeline.evaluation.comparison import report as report
from pipeline.evaluation.comparison.comparing import ComparisonResult, compare
from pipeline.evaluation.comparison.members import Member
from pipeline.evaluation.statistics import MEAN
from pipeline.records import write_text
from pipeline.stages.member_runs import names_of, read_runs, run_folders
from pipeline.stages.study import MADE_ON, load_study, make_missing, refuse_unequal_budgets, study_members, study_runs
from pipeline.stages.workspace import Workspace
from pipeline.tracking import RunLog, environment_tags, is_tracked, read_state, send_pending

log = logging.getLogger(__name__)

SEND_LIMIT_S = 60.0


@dataclass(frozen=True)
class ComparisonReport:
    """What a comparison found, and where it lies.

    Attributes:
        result: means, pairs and rankings.
        folder: of the results.
    """

    result: ComparisonResult
    folder: Path

    def as_text(self) -> str:
        """Return the members as a table, and where the rest lies."""
        return f"{report.as_text(self.result)}\nreport: {self.folder / 'comparison.html'}"


def run(
    targets: Sequence[str],
    *,
    make: bool = False,
    cases: str = "fold",
    baseline: str | None = None,
    out: Path | None = None,
    allow_different_budgets: bool = False,
    device: str = "auto",
    workspace: Path | None = None,
) -> ComparisonReport:
    """Compare runs, or the members of a study.

    Args:
        targets: run folders, experiment folders (all of their folds), evaluation folders or runs:/ID, each a member;
            or one study's YAML.
        make: run what is missing of a study.
        cases: fold, test, all, or a manifest's name, as the runs were evaluated; what is made is evaluated on fold.
        baseline: name of the member that the others are drawn against; None: the study's, else the first.
        out: folder of the results; None: comparisons/NAME in the workspace.
        allow_different_budgets: compare in spite of them; the result says so.
        device: auto, cpu, cuda or cuda:N, for what is made.
        workspace: of the study's runs, and of runs:/; None: the configurations', or ./work.

    Raises:
        ConfigError: the study or one of its configurations is wrong.
        EvaluationError: a member is missing or unfinished, or they cannot be compared; names every reason.
        PipelineError: runs are to be made without a study, or compared on other cases than they are made on.
    """
    if make and cases != MADE_ON:
        raise PipelineError(
            f"--run evaluates what it makes on --cases {MADE_ON}, got --cases {cases}; leave --cases out, run "
            f"`medseg evaluate RUN --cases {cases}` for each run, and compare again without --run"
        )
    if len(targets) == 1 and targets[0].endswith((".yaml", ".yml")):
        study = load_study(Path(targets[0]))
        runs = study_runs(study, workspace)
        if not allow_different_budgets:
            refuse_unequal_budgets(runs)
        if make:
            make_missing(runs, device)
        members, folders = study_members(runs, cases), [run.folder for run in runs]
        name, baseline, root = study.name, baseline or study.baseline, runs[0].config.workspace
    elif make:
        raise PipelineError("--run makes what is missing of a study; name its YAML")
    else:
        root = workspace or Path("work")
        members, folders = _named_members(targets, Workspace(root), cases)
        name = joined([member.name.partition(" ")[0] for member in members])
    result = compare(name, members, baseline=baseline, same_budget=not allow_different_budgets)
    folder = (out or Workspace(root).comparisons / name).resolve()
    publish(result, folders, folder, root)
    return ComparisonReport(result, folder)


def publish(result: ComparisonResult, runs: Sequence[Path], folder: Path, root: Path) -> None:
    """Write a comparison's tables and pages, and log them as a run beside those that are compared.

    Args:
        result: what was found.
        runs: folders of the runs that are compared.
        folder: of the results.
        root: of the workspace.
    """
    _write(result, folder)
    _track(result, runs, folder, root)


def _named_members(targets: Sequence[str], workspace: Workspace, cases: str) -> tuple[list[Member], list[Path]]:
    """Read the members that are named, and return them with all of their run folders."""
    chosen = [run_folders(target, workspace, cases) for target in targets]
    names = names_of(targets, [folders for folders, _ in chosen])
    members, problems = [], []
    for name, (folders, label) in zip(names, chosen, strict=True):
        try:
            members.append(Member(name, read_runs(folders, label)))
        except PipelineError as error:
            problems.append(str(error))
    if problems:
        raise EvaluationError("\n".join(problems))
    return members, [folder for folders, _ in chosen for folder in folders]


def joined(names: Sequence[str]) -> str:
    """Return a name for a comparison that has none."""
    return "_vs_".join(names) if len(names) < 4 else f"{names[0]}_vs_{len(names) - 1}_others"


def _write(result: ComparisonResult, folder: Path) -> None:
    """Write tables, pictures and pages, in place of those of an earlier comparison."""
    report.write_tables(folder, result)
    boxes, scatter = folder / "boxes.png", folder / "scatter.png"
    report.draw_boxes(boxes, result)
    report.draw_scatter(scatter, result)
    write_text(folder / "comparison.md", report.as_markdown(result))
    captions = {boxes: "Mean over classes, case by case", scatter: f"Each case against {result.baseline}"}
    report.write_page(folder / "comparison.html", result, captions)


def _track(result: ComparisonResult, folders: Sequence[Path], folder: Path, root: Path) -> None:
    """Log the comparison as a run of its own in the experiment of the first member that is tracked."""
    tracked = [run for run in folders if is_tracked(run)]
    if not tracked:
        log.info("no member is a tracked run: the results are in %s only", folder)
        return
    state = read_state(tracked[0])
    ids = {member.name: [run.run_id for run in member.runs if run.run_id] for member in result.members}
    links = {name: f"#/experiments/{state.experiment_id}/runs/{found[0]}" for name, found in ids.items() if found}
    run_log = RunLog.create(
        folder,
        uri=state.uri,
        workspace=root,
        experiment=state.experiment,
        name=f"compare {result.name}",
        tags={
            **environment_tags(),
            "medseg.compared_runs": " ".join(run_id for found in ids.values() for run_id in found),
            "mlflow.note.content": report.as_note(result, links),
        },
    )
    run_log.params({"baseline": result.baseline, "members": ids, "cases": len(result.cases)})
    run_log.metrics(_metrics(result), 0)
    for name in ("comparison.html", "comparison.md", "boxes.png", "scatter.png"):
        run_log.artifact(folder / name)
    for name in ("comparison.csv", "pairs.csv", "ranks.csv", "cases.csv"):
        run_log.artifact(folder / name, "tables")
    run_log.finish()
    run_log.close()
    send_pending(folder, limit_s=SEND_LIMIT_S)


def _metrics(result: ComparisonResult) -> dict[str, float]:
    """Return the members' means over classes and mean ranks, such as comparison/dice/hippocampus_unet."""
    values: dict[str, float] = {}
    for metric in report.SHOWN:
        ranking = result.ranking(metric, MEAN)
        for member in result.members:
            estimate = result.estimates[member.name, metric, MEAN]
            if estimate.cases:
                values[f"comparison/{metric}/{member.name}"] = estimate.mean
            if ranking.patients:
                values[f"comparison/mean_rank_{metric}/{member.name}"] = ranking.mean_rank(member.name)
    return values
