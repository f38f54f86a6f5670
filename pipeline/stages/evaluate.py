"""`medseg evaluate`: segment labelled cases by the road that `segment` takes, and score them on their native grids."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.config import Config, EvaluationSection
from pipeline.config_loading import load_config
from pipeline.data.manifest import Case, Manifest, load_manifest
from pipeline.data.plan import Plan
from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluation import report
from pipeline.evaluation.cross_validation import CrossValidation, cross_validate
from pipeline.evaluation.lesions.scoring import LesionRules
from pipeline.evaluation.lesions.summary import summarise_lesions
from pipeline.evaluation.report import Evaluation
from pipeline.evaluation.scored import ScoredCase
from pipeline.evaluation.self_assessment import assess_dice, estimate_reliability
from pipeline.evaluation.statistics import summarise
from pipeline.hardware import give_freed_memory_back, keep_freed_memory
from pipeline.model import CONFIG
from pipeline.progress import track
from pipeline.records import json_number
from pipeline.stages.dataset import taking_part
from pipeline.stages.evaluating.cases import (
    LabelledCase,
    Task,
    choose,
    descriptions_of,
    experiment_folder,
    is_own,
    models_of,
    own_manifest,
    read_labelled,
)
from pipeline.stages.evaluating.results import run_of, track_results, write_results
from pipeline.stages.evaluating.scoring import CaseScorer, keep_table
from pipeline.stages.model_card import Evaluated, Score, keep_evaluation
from pipeline.stages.workspace import Workspace

log = logging.getLogger(__name__)

CHOICES = ("fold", "test", "all")


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
    probabilities: bool = False,
    overwrite: bool = False,
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
        probabilities: keep those of out-of-fold predictions beside their label maps.
        overwrite: predict anew what is kept of them and has not changed.

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
    _refuse_other_inference(tasks, config)
    lesions = _lesion_rules(config.evaluation, tasks[0].plan)
    label = cases if is_own(chosen_from, tasks[0].descriptions[0]) else chosen_from.name
    folder = (out or _results_folder(tasks, places, label)).resolve()
    scored_as = partial(
        CaseScorer,
        manifest=chosen_from,
        tolerance_mm=config.evaluation.surface_tolerance_mm,
        device=device,
        folder=folder,
        probabilities=probabilities,
        overwrite=overwrite,
        lesions=lesions,
    )
    of_experiment = isinstance(target, Config) or len(models) > 1
    evaluation = _evaluate([*map(scored_as, tasks)], chosen_from, config.evaluation, lesions, label, of_experiment)
    write_results(evaluation, chosen_from, tasks[0].plan, config.evaluation, folder)
    run_log = run_of(tasks, folder, places, tracking_uri)
    track_results(evaluation, tasks, chosen_from, label, folder, run_log)
    _card(tasks, evaluation, label)
    return EvaluationReport(evaluation, folder)


def _refuse_other_inference(tasks: Sequence[Task], config: Config) -> None:
    """Raise where a configuration says how volumes are predicted in another way than a model has it.

    Raises:
        ConfigError: it would be of no effect.
    """
    for model, description in zip((m for task in tasks for m in task.models), descriptions_of(tasks), strict=True):
        own = description.inference
        said = {name: value for name, value in config.inference if getattr(own, name) != value}
        if said:
            raise ConfigError(
                f"inference: {', '.join(f'{name} is {value}' for name, value in said.items())}: how volumes are "
                f"predicted belongs to the model, and {model} was trained with "
                f"{', '.join(f'{name} {getattr(own, name)}' for name in said)}; put that back, or train anew"
            )


def _card(tasks: Sequence[Task], evaluation: Evaluation, label: str) -> None:
    """Write the scores of a single run's model into its card, where the cases are of the manifest it was trained on."""
    (task, *others), (model, *members) = tasks, tasks[0].models
    if others or members or task.run is None or not task.is_own:
        return
    scores = [
        Score(
            structure=summary.class_name,
            metric=name,
            mean=json_number(found.mean),
            low=json_number(found.low),
            high=json_number(found.high),
            cases=found.cases,
        )
        for summary in evaluation.summaries
        for name, found in summary.metrics.items()
    ]
    keep_evaluation(model, Evaluated(cases=label, number=len(evaluation.cases), scores=tuple(scores)))


def _lesion_rules(settings: EvaluationSection, plan: Plan) -> LesionRules:
    """Return how lesions are counted.

    Raises:
        ConfigError: a structure that is to be counted is none that is scored.
    """
    if unknown := [name for name in settings.lesions if name not in plan.structures]:
        raise ConfigError(
            f"evaluation.lesions: {', '.join(unknown)}: unknown; what is scored are {', '.join(plan.structures)}"
        )
    return LesionRules(
        structures=tuple(dict.fromkeys(settings.lesions)),
        iou_thresholds=settings.lesion_iou_thresholds,
        connectivity=settings.lesion_connectivity,
        smallest_mm3=settings.smallest_lesion_mm3,
    )


def _evaluate(
    scorers: Sequence[CaseScorer],
    manifest: Manifest,
    settings: EvaluationSection,
    lesions: LesionRules,
    label: str,
    of_experiment: bool,
) -> Evaluation:
    """Score every case by its model, and summarise."""
    tasks = [scorer.task for scorer in scorers]
    scored: list[ScoredCase] = []
    failures = {case: reason for task in tasks for case, reason in task.seen.items()}
    for scorer in scorers:
        task = scorer.task
        outcomes = _outcomes(scorer, manifest)
        for case, outcome in track(outcomes, f"evaluate {_title([task])}", total=len(task.cases)):
            if isinstance(outcome, ScoredCase):
                scored.append(outcome)
            else:
                log.warning("case %s: %s", case.id, outcome)
                failures[case.id] = str(outcome)
        keep_table(task)
    summaries = summarise(
        {case.case_id: case.rows for case in scored},
        samples=settings.bootstrap_samples,
        seed=0,
        patients={case.case_id: case.patient for case in scored},
    )
    return Evaluation(
        title=_title(tasks),
        facts=_facts(scorers, manifest, label, scored),
        device=" and ".join(sorted({device for scorer in scorers for device in scorer.devices})),
        tolerance_mm=settings.surface_tolerance_mm,
        cases=tuple(scored),
        failures=failures,
        summaries=tuple(summaries),
        reliability=estimate_reliability(scored, samples=settings.bootstrap_samples, seed=0),
        dice_predictions=tuple(assess_dice(scored)),
        lesion_rules=lesions,
        lesions=summarise_lesions(scored, lesions, samples=settings.bootstrap_samples, seed=0),
        cross_validation=(
            _cross_validated(tasks, manifest, scored, failures) if of_experiment and label == "fold" else None
        ),
    )


def _cross_validated(
    tasks: Sequence[Task], manifest: Manifest, scored: Sequence[ScoredCase], failures: Collection[str]
) -> CrossValidation:
    """Compare an experiment's folds; what is incomplete is said."""
    trained = {task.fold for task in tasks}
    found = cross_validate(
        scored,
        missing=[fold for fold in manifest.folds if fold not in trained],
        unfinished=[task.fold for task in tasks if task.fold is not None and not task.is_finished],
        failed=sorted(failures),
    )
    if found.remark:
        log.warning("%s: %s", tasks[0].descriptions[0].name, found.remark)
    return found


def _outcomes(scorer: CaseScorer, manifest: Manifest) -> Iterator[tuple[Case, ScoredCase | Exception]]:
    """Yield each of a model's cases with its scores, or with why there are none."""
    task = scorer.task
    for case, reading in _read_ahead(task.cases, lambda case: read_labelled(manifest, case, task.plan)):
        kept = scorer.kept(case)
        if kept is None:
            scorer.load()  # Outside of what follows: without the model no case can be scored.
        try:
            outcome = scorer.score(case, reading.result(), kept)
        except (PipelineError, OSError) as error:
            yield case, error
        except Exception as error:
            # A bug, or memory at its end: the traceback is wanted, and so are the other cases.
            log.exception("case %s: could not be scored", case.id)
            yield case, error
        else:
            yield case, outcome


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


def _results_folder(tasks: Sequence[Task], workspace: Workspace, label: str) -> Path:
    """Return where results go by default: in the run, beside the folds of an experiment, or in the workspace."""
    if len(tasks) > 1:
        return experiment_folder(tasks) / "evaluation" / label
    (task,) = tasks
    if task.run is None:
        return workspace.evaluations / _title(tasks).replace(", ", "_").replace(" ", "_") / label
    # The last model's results stand beside the best one's, not in their place.
    return task.run / "evaluation" / (label if task.models[0].name == "best" else f"{label}_{task.models[0].name}")


def _title(tasks: Sequence[Task]) -> str:
    """Name the models: experiment and folds."""
    descriptions = descriptions_of(tasks)
    folds = [str(description.fold) for description in descriptions if description.fold is not None]
    named = f", fold{'s' if len(folds) > 1 else ''} {' '.join(folds)}" if folds else ""
    together = ", ensemble" if len(tasks[0].models) > 1 else ""
    return f"{descriptions[0].name}{named}{together}"


def _facts(
    scorers: Sequence[CaseScorer], manifest: Manifest, label: str, scored: Sequence[ScoredCase]
) -> dict[str, str]:
    """Return what was evaluated on what, for people."""
    tasks = [scorer.task for scorer in scorers]
    rules = {scorer.rules.as_text(): scorer.rules.chosen_on for scorer in scorers if scorer.rules.has_rules}
    descriptions = descriptions_of(tasks)
    seconds = sum(case.seconds for case in scored)
    memory = [case.peak_memory_bytes for case in scored if case.peak_memory_bytes]
    return {
        "model": ", ".join(str(model) for task in tasks for model in task.models),
        "network": descriptions[0].network.name,
        "steps": ", ".join(str(description.step) for description in descriptions),
        "trained": ", ".join(description.created for description in descriptions),
        **({"postprocessing": "; ".join(f"{said}, chosen on {on}" for said, on in rules.items())} if rules else {}),
        "data set": manifest.name,
        "cases": f"{label}, {len(scored)} of {len({case.patient for case in scored})} patients",
        "prediction": f"{seconds / max(1, len(scored)):.2f} s a case",
        "peak memory": f"{max(memory) / 2**30:.2f} GiB" if memory else "unknown",
    }
