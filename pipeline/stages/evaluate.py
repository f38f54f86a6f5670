"""`medseg evaluate`: segment labelled cases by the road that `segment` takes, and score them on their native grids."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pipeline.config import Config, EvaluationSection
from pipeline.config_loading import load_config
from pipeline.data.cases import read_case_images, read_case_label
from pipeline.data.manifest import Case, Manifest, load_manifest
from pipeline.data.plan import Plan
from pipeline.errors import ModelError, PipelineError, VolumeError
from pipeline.evaluation import report
from pipeline.evaluation.metrics import score_case
from pipeline.evaluation.report import Evaluation, ScoredCase
from pipeline.evaluation.statistics import summarise
from pipeline.hardware import (
    device_name,
    give_freed_memory_back,
    keep_freed_memory,
    peak_memory_bytes,
    pick_device,
    reset_peak_memory,
)
from pipeline.model import CONFIG
from pipeline.pictures import draw_overlay
from pipeline.predictor import Predictor
from pipeline.preparation.preprocessing import class_indices
from pipeline.progress import track
from pipeline.records import atomic_path
from pipeline.stages.dataset import taking_part
from pipeline.stages.evaluation_cases import Task, choose, is_own, models_of, own_manifest
from pipeline.stages.workspace import Workspace
from pipeline.tracking import RunLog, send_pending
from pipeline.volumes.resampling import resample_image, resample_label
from pipeline.volumes.volume import Volume, read_label
from pipeline.volumes.writing import write_label

log = logging.getLogger(__name__)

CHOICES = ("fold", "test", "all")

# To the patient's left, front and head: a picture's right is the patient's left, as radiologists look at it.
PICTURE_ORIENTATION = "LAS"

SEND_LIMIT_S = 60.0


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found, and where it lies.

    Attributes:
        evaluation: scores, summaries and failures.
        folder: of the results.
    """

    evaluation: Evaluation
    folder: Path

    @property
    def failures(self) -> dict[str, str]:
        """Case id -> why it has no score."""
        return self.evaluation.failures

    def as_text(self) -> str:
        """Return the summary as a table, and where the rest lies."""
        return f"{report.as_text(self.evaluation)}\nreport: {self.folder / 'report.html'}"


@dataclass(frozen=True, eq=False)
class LabelledCase:
    """A case as it is read.

    Attributes:
        images: channel -> Volume.
        reference: (X, Y, Z) class indices on the native grid.
        header_of: a file on the native grid, whose header the prediction takes over.
    """

    images: dict[str, Volume]
    reference: Volume
    header_of: Path


def run(
    target: str | Config,
    *,
    cases: str = "fold",
    manifest: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    workspace: Path | None = None,
    overrides: Sequence[str] = (),
    config: Config | None = None,
    tracking_uri: str | None = None,
) -> EvaluationReport:
    """Segment labelled cases and score them against their labels on their native grids.

    Args:
        target: a model (folder, runs:/ID, models:/NAME@ALIAS), or an experiment: then the best model of each trained
            fold is evaluated on the cases that it has not seen, and all are summarised together.
        cases: fold: the validation cases of the model's fold; test: the held-out cases; all: both.
        manifest: other cases with the same labels: all labelled ones, unless it is the model's own manifest.
        out: folder of the results; None: in the run's folder, or in the workspace for a model from elsewhere.
        device: auto, cpu, cuda or cuda:N.
        workspace: where runs and fetched models are; None: the configuration's.
        overrides: SECTION.KEY=VALUE each, over the configuration that a model was trained with.
        config: data and evaluation settings in place of those that a model was trained with.
        tracking_uri: server or database of runs:/ and models:/; None: MLFLOW_TRACKING_URI, else the workspace's.

    Returns:
        The scores. A case that cannot be scored is among the failures; the others are done.

    Raises:
        PipelineError: nothing can be evaluated: no model, no case, other labels, or a manifest that has changed.
    """
    if cases not in CHOICES:
        raise PipelineError(f"--cases {cases}: unknown; use {', '.join(CHOICES)}")
    give_freed_memory_back()
    keep_freed_memory()
    places = Workspace(workspace or (target.workspace if isinstance(target, Config) else Path("work")))
    models = models_of(target, places, tracking_uri)
    if config is None:
        config = target if isinstance(target, Config) else load_config(models[0] / CONFIG, overrides)
    chosen_from = taking_part(load_manifest(manifest), config.preprocessing) if manifest else own_manifest(config)
    tasks = choose(models, chosen_from, config, cases)
    label = cases if is_own(chosen_from, tasks[0].description) else chosen_from.name
    folder = (out or _results_folder(tasks, places, label)).resolve()
    evaluation = _evaluate(tasks, chosen_from, config.evaluation, label, device, folder)
    _write(evaluation, chosen_from, tasks[0].plan, config.evaluation, folder)
    _track(evaluation, tasks, chosen_from, label, folder)
    return EvaluationReport(evaluation, folder)


def read_labelled(manifest: Manifest, case: Case, plan: Plan) -> LabelledCase:
    """Read a case's images and label.

    Raises:
        VolumeError: a file cannot be read, or the label holds values that the plan does not know.
    """
    images = read_case_images(manifest, case)
    label = read_case_label(manifest, case, images)
    if label is None or case.label is None:
        raise VolumeError(f"case {case.id!r}: no label to score against")
    on_grid = (case.images[name] for name, image in images.items() if image.geometry == label.geometry)
    header_of = manifest.path_of(next(on_grid, case.label))
    return LabelledCase(images, Volume(class_indices(label.array, plan), label.geometry), header_of)


def _evaluate(
    tasks: Sequence[Task], manifest: Manifest, settings: EvaluationSection, label: str, device: str, folder: Path
) -> Evaluation:
    """Score every case by its model, and summarise."""
    scored: list[ScoredCase] = []
    failures = {case: reason for task in tasks for case, reason in task.seen.items()}
    for task in tasks:
        outcomes = _outcomes(task, manifest, settings.surface_tolerance_mm, device, folder)
        for case, outcome in track(outcomes, f"evaluate {_title([task])}", total=len(task.cases)):
            if isinstance(outcome, ScoredCase):
                scored.append(outcome)
            else:
                log.warning("case %s: %s", case.id, outcome)
                failures[case.id] = str(outcome)
    summaries = summarise(
        {case.case_id: case.rows for case in scored},
        samples=settings.bootstrap_samples,
        seed=0,
        patients={case.case_id: case.patient for case in scored},
    )
    return Evaluation(
        title=_title(tasks),
        facts=_facts(tasks, manifest, label, scored),
        device=device_name(pick_device(device)),
        tolerance_mm=settings.surface_tolerance_mm,
        cases=tuple(scored),
        failures=failures,
        summaries=tuple(summaries),
    )


def _outcomes(
    task: Task, manifest: Manifest, tolerance_mm: float, device: str, folder: Path
) -> Iterator[tuple[Case, ScoredCase | Exception]]:
    """Yield each of a model's cases with its scores, or with why there are none."""
    predictor = Predictor.load(task.model, device)
    for case, reading in _read_ahead(task.cases, lambda case: read_labelled(manifest, case, task.plan)):
        try:
            outcome = _score(predictor, case, reading.result(), task.description.fold, tolerance_mm, folder)
        except (PipelineError, OSError) as error:
            yield case, error
        except Exception as error:
            # A bug, or memory at its end: the traceback is wanted, and so are the other cases.
            log.exception("case %s: could not be scored", case.id)
            yield case, error
        else:
            yield case, outcome


def _score(
    predictor: Predictor, case: Case, labelled: LabelledCase, fold: int | None, tolerance_mm: float, folder: Path
) -> ScoredCase:
    """Predict one case, keep the label map, and score it."""
    native, plan = labelled.reference.geometry, predictor.plan
    reset_peak_memory(predictor.device)
    start = time.perf_counter()
    prediction = predictor.predict(labelled.images, native)
    seconds = time.perf_counter() - start
    memory = peak_memory_bytes(predictor.device)
    write_label(_prediction_of(folder, case.id), prediction, header_of=labelled.header_of, names=plan.labels)
    classes = class_indices(prediction.array, plan)
    rows = score_case(classes, labelled.reference.array, native.spacing_mm, tuple(plan.labels), tolerance_mm)
    return ScoredCase(case.id, case.patient, fold, tuple(rows), seconds, memory)


def _read_ahead(
    cases: Sequence[Case], read: Callable[[Case], LabelledCase]
) -> Iterator[tuple[Case, Future[LabelledCase]]]:
    """Yield each case with its reading, which a thread does while the one before is worked on."""
    waiting: deque[tuple[Case, Future[LabelledCase]]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for case in cases:
            waiting.append((case, pool.submit(read, case)))
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting


def _write(evaluation: Evaluation, manifest: Manifest, plan: Plan, settings: EvaluationSection, folder: Path) -> None:
    """Write tables, pictures and the page, in place of those of an earlier evaluation."""
    for earlier in (folder / "distributions.png", *(folder / "pictures").glob("[0-9][0-9]_*.png")):
        earlier.unlink(missing_ok=True)
    report.write_case_table(folder / "cases.csv", evaluation.cases)
    report.write_summary(folder / "summary.json", evaluation)
    distributions = folder / "distributions.png" if evaluation.cases else None
    if distributions:
        report.draw_distributions(distributions, evaluation)
    by_id = {case.id: case for case in manifest.cases}
    pictures = {}
    for number, (case, rank) in enumerate(report.pick_cases(evaluation.cases, settings.picture_cases).items()):
        path = folder / "pictures" / f"{number:02d}_{rank}_{case}.png"
        _draw(path, read_labelled(manifest, by_id[case], plan), read_label(_prediction_of(folder, case)), plan)
        pictures[path] = f"{rank}: {case}"
    report.write_report(folder / "report.html", evaluation, distributions, pictures)


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
    figure = draw_overlay(image.array[0], grid.spacing_mm, outlines, tuple(plan.labels))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _track(evaluation: Evaluation, tasks: Sequence[Task], manifest: Manifest, label: str, folder: Path) -> None:
    """Log the results to the MLflow run that trained the model, or to the parent run of several folds."""
    run_folder = tasks[0].run if len(tasks) == 1 else _experiment_folder(tasks)
    try:
        run_log = RunLog.open(run_folder) if run_folder else None
    except ModelError:
        run_log = None
    if run_log is None or run_folder is None:
        log.info("the model lies in no tracked run: the results are in %s only", folder)
        return
    step = max(task.description.step for task in tasks)
    run_log.metrics(_metrics(evaluation, f"evaluation/{label}"), step)
    run_log.table(f"evaluation_{label}", report.case_table(evaluation.cases))
    ids = [case.case_id for case in evaluation.cases]
    run_log.dataset(manifest.name, manifest.digest(), manifest.source, ids, "evaluation")
    # The page that compares runs lists only what lies at the top of their artifacts.
    top = "" if label == "fold" else f"evaluation/{label}"
    for path in (folder / "report.html", folder / "distributions.png"):
        if path.exists():
            run_log.artifact(path, top)
    for name in ("cases.csv", "summary.json"):
        run_log.artifact(folder / name, f"evaluation/{label}")
    if (folder / "pictures").is_dir():
        run_log.artifact(folder / "pictures", f"evaluation/{label}/pictures")
    run_log.close()
    send_pending(run_folder, limit_s=SEND_LIMIT_S)


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
    if evaluation.cases:
        values[f"{section}/seconds_per_case"] = median(case.seconds for case in evaluation.cases)
    memory = [case.peak_memory_bytes for case in evaluation.cases if case.peak_memory_bytes]
    return values | ({f"{section}/peak_memory_gib": max(memory) / 2**30} if memory else {})


def _results_folder(tasks: Sequence[Task], workspace: Workspace, label: str) -> Path:
    """Return where results go by default: in the run, beside the folds of an experiment, or in the workspace."""
    if len(tasks) > 1:
        return _experiment_folder(tasks) / "evaluation" / label
    (task,) = tasks
    if task.run is None:
        return workspace.root / "evaluations" / _title(tasks).replace(", ", "_").replace(" ", "_") / label
    # The last model's results stand beside the best one's, not in their place.
    return task.run / "evaluation" / (label if task.model.name == "best" else f"{label}_{task.model.name}")


def _experiment_folder(tasks: Sequence[Task]) -> Path:
    """Return the folder that holds the runs of an experiment's folds."""
    return tasks[0].model.parent.parent.parent


def _prediction_of(folder: Path, case_id: str) -> Path:
    """Return where a case's label map is kept."""
    return folder / "predictions" / f"{case_id}.nii.gz"


def _title(tasks: Sequence[Task]) -> str:
    """Name the models: experiment and folds."""
    folds = [str(task.description.fold) for task in tasks if task.description.fold is not None]
    named = f", fold{'s' if len(folds) > 1 else ''} {' '.join(folds)}" if folds else ""
    return f"{tasks[0].description.name}{named}"


def _facts(tasks: Sequence[Task], manifest: Manifest, label: str, scored: Sequence[ScoredCase]) -> dict[str, str]:
    """Return what was evaluated on what, for people."""
    first = tasks[0]
    seconds = sum(case.seconds for case in scored)
    memory = [case.peak_memory_bytes for case in scored if case.peak_memory_bytes]
    return {
        "model": ", ".join(str(task.model) for task in tasks),
        "network": first.description.network.name,
        "steps": ", ".join(str(task.description.step) for task in tasks),
        "trained": ", ".join(task.description.created for task in tasks),
        "data set": manifest.name,
        "cases": f"{label}, {len(scored)} of {len({case.patient for case in scored})} patients",
        "prediction": f"{seconds / max(1, len(scored)):.2f} s a case",
        "peak memory": f"{max(memory) / 2**30:.2f} GiB" if memory else "unknown",
    }
