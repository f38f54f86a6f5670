"""What becomes of an evaluation: tables, pictures and the page in its folder, and its numbers in MLflow."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

from pipeline.config import EvaluationSection
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Plan
from pipeline.errors import ModelError
from pipeline.evaluation import report
from pipeline.evaluation.cross_validation import cv_metrics, write_folds
from pipeline.evaluation.lesions.summary import lesion_table
from pipeline.evaluation.report import Evaluation
from pipeline.evaluation.scored import case_table, write_case_table, write_columns
from pipeline.pictures import PICTURE_ORIENTATION, draw_overlay
from pipeline.preparation.preprocessing import class_indices
from pipeline.records import atomic_path
from pipeline.stages.evaluating.cases import LabelledCase, Task, descriptions_of, experiment_folder, read_labelled
from pipeline.stages.evaluating.viewing import ViewedCases
from pipeline.stages.workspace import Workspace
from pipeline.tracking import RunLog, run_of_fetched, send_pending
from pipeline.volumes.resampling import resample_image, resample_label
from pipeline.volumes.volume import Volume, read_label

log = logging.getLogger(__name__)

SEND_LIMIT_S = 60.0
# The cross-validated table, and that of lesions.
FOLDS, LESIONS = "folds.csv", "lesions.csv"
# The page, and what MLflow gets of it: the same without volumes, which stay on this machine.
PAGE, SUMMARY_PAGE = "report.html", "summary.html"


def write_results(
    evaluation: Evaluation, manifest: Manifest, plan: Plan, settings: EvaluationSection, folder: Path
) -> None:
    """Write tables, pictures and the page, in place of those of an earlier evaluation."""
    for earlier in (*folder.glob("*.png"), *(folder / "pictures").glob("[0-9][0-9]_*.png")):
        earlier.unlink(missing_ok=True)
    write_case_table(folder / "cases.csv", evaluation.cases, evaluation.lesion_rules)
    report.write_summary(folder / "summary.json", evaluation)
    for table in (FOLDS, LESIONS):
        (folder / table).unlink(missing_ok=True)
    if evaluation.lesion_rules.structures:
        write_columns(folder / LESIONS, lesion_table(evaluation.cases))
    if evaluation.cross_validation and evaluation.cases:
        write_folds(folder / FOLDS, evaluation.cross_validation, evaluation.summaries)
    figures = _draw_figures(evaluation, folder)
    by_id = {case.id: case for case in manifest.cases}

    def read(case_id: str) -> tuple[LabelledCase, Volume]:
        return read_labelled(manifest, by_id[case_id], plan), read_label(prediction_of(folder, case_id))

    viewed, pictures = ViewedCases(plan, settings), {}
    picked = report.pick_cases(evaluation.cases, settings.picture_cases)
    for number, (case_id, rank) in enumerate(picked.items()):
        path = folder / "pictures" / f"{number:02d}_{rank}_{case_id}.png"
        labelled, prediction = read(case_id)
        _draw(path, labelled, prediction, plan)
        viewed.take(case_id, labelled, prediction)
        pictures[path] = f"{rank}: {case_id}"
    for case_id in (case.case_id for case in report.worst_first(evaluation.cases) if case.case_id not in picked):
        if viewed.full:
            break
        viewed.take(case_id, *read(case_id))
    report.write_report(folder / SUMMARY_PAGE, evaluation, figures, pictures)
    report.write_report(folder / PAGE, evaluation, figures, pictures, viewed.part(evaluation.cases, picked))


def prediction_of(folder: Path, case_id: str) -> Path:
    """Return where a case's label map is kept."""
    return folder / "predictions" / f"{case_id}.nii.gz"


def _draw_figures(evaluation: Evaluation, folder: Path) -> dict[str, Path]:
    """Draw what there is to draw over all cases: name -> PNG."""
    drawn = {}
    if evaluation.cases:
        drawn["distributions"] = folder / "distributions.png"
        report.draw_distributions(drawn["distributions"], evaluation)
    if any(one.cases for one in evaluation.dice_predictions):
        drawn["predictions"] = folder / "predicted_dice.png"
        report.draw_predictions(drawn["predictions"], evaluation)
    return drawn


def _draw(path: Path, labelled: LabelledCase, prediction: Volume, plan: Plan) -> None:
    """Draw reference and prediction over the first channel, as a PNG."""
    native = labelled.reference.geometry
    grid = native.reoriented(PICTURE_ORIENTATION)
    image = resample_image(next(iter(labelled.images.values())), grid, order=1)
    predicted = Volume(class_indices(prediction.array, plan), native)
    outlines = {
        "reference": resample_label(labelled.reference, grid).array,
        "prediction": resample_label(predicted, grid).array,
    }
    figure = draw_overlay(image.array[0], grid.spacing_mm, outlines, plan.class_names)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def run_of(tasks: Sequence[Task], folder: Path, workspace: Workspace, uri: str | None) -> RunLog | None:
    """Open the run that the results belong to: that which trained the model, or the parent of several folds.

    Args:
        tasks: models and cases.
        folder: of the results, from which what belongs to a model out of MLflow is sent.
        workspace: where fetched models are.
        uri: server or database that they were fetched from; None: MLFLOW_TRACKING_URI, else the workspace's.

    Returns:
        None for a model from elsewhere.
    """
    run_folder = tasks[0].run if len(tasks) == 1 else experiment_folder(tasks)
    if run_folder is not None:
        with suppress(ModelError):
            return RunLog.open(run_folder)
    models = [model for task in tasks for model in task.models]
    run_id = run_of_fetched(models[0], workspace.fetched) if len(models) == 1 else None
    if run_id is None:
        return None
    return RunLog.attach(folder, uri=uri, workspace=workspace.root, run_id=run_id, name=f"evaluation of {run_id}")


def track_results(
    evaluation: Evaluation, tasks: Sequence[Task], manifest: Manifest, label: str, folder: Path, run_log: RunLog | None
) -> None:
    """Log the results to their run in MLflow; None: there is none."""
    if run_log is None:
        log.info("the model lies in no tracked run: the results are in %s only", folder)
        return
    step = max(description.step for description in descriptions_of(tasks))
    run_log.metrics(_metrics(evaluation, f"evaluation/{label}"), step)
    if evaluation.cross_validation and len(tasks) > 1:
        run_log.metrics(cv_metrics(evaluation.cross_validation, evaluation.summaries), step)
        run_log.tags({"medseg.cross_validation": evaluation.cross_validation.remark or "complete"})
    run_log.table(f"evaluation_{label}", case_table(evaluation.cases, evaluation.lesion_rules))
    ids = [case.case_id for case in evaluation.cases]
    run_log.dataset(manifest.name, manifest.digest(), manifest.source, ids, "evaluation")
    # The page that compares runs lists only what lies at the top of their artifacts.
    top = "" if label == "fold" else f"evaluation/{label}"
    for path in (folder / SUMMARY_PAGE, folder / "distributions.png", folder / "predicted_dice.png"):
        if path.exists():
            run_log.artifact(path, top)
    for name in ("cases.csv", "summary.json", FOLDS, LESIONS):
        if (folder / name).exists():
            run_log.artifact(folder / name, f"evaluation/{label}")
    if (folder / "pictures").is_dir():
        run_log.artifact(folder / "pictures", f"evaluation/{label}/pictures")
    run_log.close()
    send_pending(run_log.folder, limit_s=SEND_LIMIT_S)


def _metrics(evaluation: Evaluation, section: str) -> dict[str, float]:
    """Return means and counts as MLflow metrics, such as evaluation/fold/dice/anterior; a mean of no case is left out.

    Training's own val/dice/anterior is another number where a structure is missed: there it counts as 0.
    """
    values: dict[str, float] = {}
    for summary in evaluation.summaries:
        values[f"{section}/missed/{summary.class_name}"] = summary.missed
        values[f"{section}/spurious/{summary.class_name}"] = summary.spurious
        for name, estimate in summary.metrics.items():
            if estimate.cases:
                values[f"{section}/{name}/{summary.class_name}"] = estimate.mean
    for lesions in evaluation.lesions:
        values |= lesions.as_metrics(section)
    for name, estimate in evaluation.reliability.items():
        values[f"{section}/{name}"] = estimate.mean
    for one in evaluation.dice_predictions:
        known = {"predicted_dice_error": one.mae, "predicted_dice_spearman": one.spearman}
        values |= {f"{section}/{name}/{one.class_name}": v for name, v in known.items() if not math.isnan(v)}
    if evaluation.cases:
        values[f"{section}/seconds_per_case"] = median(case.seconds for case in evaluation.cases)
    memory = [case.peak_memory_bytes for case in evaluation.cases if case.peak_memory_bytes]
    return values | ({f"{section}/peak_memory_gib": max(memory) / 2**30} if memory else {})
