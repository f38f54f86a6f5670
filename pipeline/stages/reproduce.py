"""`medseg reproduce`: a fold's run made anew from what MLflow keeps of it, and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipeline.config import BudgetSection, Config, DataSection
from pipeline.config_loading import load_config
from pipeline.data.plan import read_plan, write_plan
from pipeline.errors import ManifestError, ModelError, StoreError
from pipeline.records import write_json
from pipeline.stages import preprocess
from pipeline.stages.dataset import dataset_of
from pipeline.stages.fold.identity import initial_model_of
from pipeline.stages.fold.record import (
    ARITHMETIC_TAG,
    MANIFEST,
    MANIFEST_TAG,
    RECOUNTS,
    ROOT_TAG,
    WEIGHTS_TAG,
    tags_of,
)
from pipeline.stages.fold.run import complete_fold
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.initial_weights import initial_digest
from pipeline.stages.initialisation import INITIAL_DIGEST_TAG
from pipeline.stages.preprocess import KEYS
from pipeline.stages.train import fold_tasks
from pipeline.stages.workspace import Workspace
from pipeline.tracking import (
    FetchedRun,
    RunLog,
    environment_tags,
    fetch_run,
    is_tracked,
    metric_history,
    read_state,
    send_pending,
)
from pipeline.tracking.log import read_tags, safe_name, tracking_uri
from pipeline.training.budget import repeated

CONFIG, PLAN, REPORT = "config.yaml", "plan.yaml", "reproduction.json"
# Metrics that say what was learned; the others say how long it took and what the machine did.
_LEARNED = ("train/loss", "train/gradient_norm", "train/learning_rate", "val/", "best/")
# How the tags begin in which a difference may explain one of results.
_EXPLAINING = (ARITHMETIC_TAG, "version.", "mlflow.source.git.commit", "medseg.git_dirty", INITIAL_DIGEST_TAG)
_THREADS = f"{ARITHMETIC_TAG}number_of_threads"
SEND_LIMIT_S = 60.0


@dataclass(frozen=True)
class Reproduction:
    """What came of making a run anew.

    Attributes:
        run_id: of the original in MLflow.
        folder: of the new run.
        same_weights: whether the best and the last model's weights are the same to the last bit; None: the original
            did not say.
        differences: metric -> (original, new), of those that are further apart than `tolerance`; None: it is missing.
        compared: how many metrics were.
        tolerance: how far a metric may be off.
        deterministic: whether the original promised the same bits.
        explanations: what else is not as it was.
    """

    run_id: str
    folder: Path
    same_weights: bool | None
    differences: dict[str, tuple[float, float | None]]
    compared: int
    tolerance: float
    deterministic: bool
    explanations: tuple[str, ...]

    @property
    def matches(self) -> bool:
        """Whether the weights are the same, or the metrics are within the tolerance."""
        return bool(self.same_weights) or (self.compared > 0 and not self.differences)

    @property
    def was_expected(self) -> bool:
        """Whether other results were to be expected."""
        return not self.deterministic or bool(self.explanations)

    def as_text(self) -> str:
        """Return the verdict, the differences, and whether they were to be expected."""
        weights = {True: "the same, to the last bit", False: "others", None: "not compared, the run kept no hash"}
        lines = [f"run {self.run_id}, made anew in {self.folder}", f"weights: {weights[self.same_weights]}"]
        lines.append(f"metrics: {self.compared - len(self.differences)} of {self.compared} within {self.tolerance:g}")
        lines += [f"  {name}: {old:.6g}, now {_shown(new)}" for name, (old, new) in self.differences.items()]
        if not self.same_weights:
            lines.append(f"training.deterministic was {str(self.deterministic).lower()}")
            lines += self.explanations or ["versions, device and threads are as they were"]
        verdict = "matches" if self.matches else "DIFFERS, as was to be expected" if self.was_expected else "DIFFERS"
        return "\n".join([*lines, verdict])


def run(
    name: str,
    workspace: Path,
    *,
    manifest: Path | None = None,
    root: Path | None = None,
    tolerance: float = 1e-6,
    device: str = "auto",
    jobs: int | None = None,
    uri: str | None = None,
) -> Reproduction:
    """Preprocess and train as a run did, from what MLflow keeps of it, and compare weights and metrics.

    On a CPU it computes by as many threads as the run did. What was begun in the workspace before goes on. Each run has
    a workspace of its own within it, `reproduced/ID`: no store, plan or run that lies in it by another road counts.

    Args:
        name: the run's folder, runs:/ID or its ID.
        workspace: folder in which it is made anew.
        manifest: must be the run's; None: the one that the run has logged.
        root: folder of the images; None: the manifest's, or where they lay.
        tolerance: how far a metric may be off, relative to its size where that is above 1.
        device: auto, cpu, cuda or cuda:N.
        jobs: processes of preprocessing.
        uri: MLflow server or database; None: the run folder's, MLFLOW_TRACKING_URI, or mlflow.db in ./work.

    Raises:
        ModelError: MLflow has no such run, it is none that can be made anew, or the model that it began with is not
            there, or another one now.
        ManifestError: the manifest is not the run's.
        StoreError: images or labels are not the run's.
    """
    run_id, uri = _named(name, uri)
    own = Workspace(workspace).reproduced / run_id
    original = fetch_run(run_id, uri, own, (CONFIG, PLAN, MANIFEST, KEYS, RECOUNTS))
    _refuse_incomplete(original)
    config = _as_then(original, own, uri, manifest, root)
    _refuse_other_manifest(config, original)
    _refuse_other_initial_model(config, original)
    if _THREADS in original.tags and device in ("auto", "cpu"):
        torch.set_num_threads(int(original.tags[_THREADS]))
    task = _prepared(config, original, device, jobs)
    complete_fold(task, recount=repeated(_recounts(original)))
    report = _compared(task, original, tolerance)
    _record(report)
    return report


def _named(name: str, uri: str | None) -> tuple[str, str]:
    """Return a run's id in MLflow, and where that is."""
    folder = Path(name)
    if not is_tracked(folder):
        return name.removeprefix("runs:/").removesuffix("/model"), tracking_uri(uri, Path("work"))
    send_pending(folder, limit_s=SEND_LIMIT_S)
    state = read_state(folder)
    if state.run_id is None:
        raise ModelError(f"{folder}: is not in MLflow yet; `medseg sync` sends it")
    return state.run_id, uri or state.uri


def _refuse_incomplete(original: FetchedRun) -> None:
    """Raise where a run did not end well, or has not logged what it takes to make it anew."""
    missing = [name for name in (CONFIG, PLAN, MANIFEST, KEYS) if not (original.files / name).is_file()]
    if "fold" not in original.params or missing:
        raise ModelError(
            f"runs:/{original.run_id}: cannot be made anew: {', '.join(missing) or 'its fold'} is missing; name the "
            "run of one fold, trained by this version of medseg or a later one"
        )
    if original.status != "FINISHED":
        raise ModelError(f"runs:/{original.run_id}: has not come to its end ({original.status}); name a finished run")


def _as_then(original: FetchedRun, workspace: Path, uri: str, manifest: Path | None, root: Path | None) -> Config:
    """Return the run's configuration, on the manifest and in the workspace of now."""
    config = load_config(original.files / CONFIG)
    if manifest is None and root is None and ROOT_TAG in original.tags:
        root = Path(original.tags[ROOT_TAG])
    data = DataSection(manifest=(manifest or original.files / MANIFEST).absolute(), root=root and root.absolute())
    training = config.training
    if training.budget.minutes is not None:
        steps = _recounts(original).get(0, int(original.params["training.total_steps"]))
        training = training.changed(budget=BudgetSection(steps=steps))
    # What is registered under a name stays the original.
    tracking = config.tracking.changed(uri=uri, register_as=None, alias=None)
    return config.changed(workspace=workspace.absolute(), data=data, training=training, tracking=tracking)


def _recounts(original: FetchedRun) -> dict[int, int]:
    """Return step -> steps in all from there on, as the run counted its minutes: the learning rate followed them."""
    path = original.files / RECOUNTS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _refuse_other_manifest(config: Config, original: FetchedRun) -> None:
    """Raise where the manifest is not the run's."""
    digest, wanted = dataset_of(config).digest(), original.tags.get(MANIFEST_TAG)
    if digest != wanted:
        raise ManifestError(
            f"{config.data.manifest}: is not the manifest that runs:/{original.run_id} was trained on (SHA-256 "
            f"{digest}, not {wanted}); leave --manifest out to take the one that the run has logged"
        )


def _refuse_other_initial_model(config: Config, original: FetchedRun) -> None:
    """Raise where the model that the run began with is another one now, as far as the run says which it was."""
    model, wanted = initial_model_of(config, int(original.params["fold"])), original.tags.get(INITIAL_DIGEST_TAG)
    if model is None or wanted is None:
        return
    digest = initial_digest(model)
    if digest != wanted:
        raise ModelError(
            f"training.init_from: {model}: is not the model that runs:/{original.run_id} began with (SHA-256 {digest}, "
            f"not {wanted}); put that one back in its place"
        )


def _prepared(config: Config, original: FetchedRun, device: str, jobs: int | None) -> FoldTask:
    """Preprocess by the run's own plan, and return the training.

    Raises:
        StoreError: images or labels are not those of the run; names the first cases.
    """
    plan = Workspace(config.workspace).store(config, dataset_of(config).name) / PLAN
    if not plan.exists():  # as if edited by hand: preprocessing keeps it as it is
        write_plan(plan, read_plan(original.files / PLAN))
    preprocess.run(config, jobs=jobs)
    (task,) = fold_tasks(config, original.params["fold"], device)
    then = json.loads((original.files / KEYS).read_text(encoding="utf-8"))
    other = [case_id for case_id, key in task.keys.items() if then.get(case_id) != key]
    if other:
        raise StoreError(
            f"{task.manifest.root}: the images or labels of {len(other)} of {len(task.keys)} cases are not those that "
            f"runs:/{original.run_id} was trained on, {', '.join(other[:5])} first; name their folder with --root"
        )
    return task


def _compared(task: FoldTask, original: FetchedRun, tolerance: float) -> Reproduction:
    """Compare weights and metrics of a run and of the one that was made anew."""
    history = {safe_name(name): points[-1][1] for name, points in metric_history(task.folder).items()}
    learned = {name: value for name, value in original.metrics.items() if name.startswith(_LEARNED)}
    differences = {
        name: (value, history.get(name))
        for name, value in learned.items()
        if name not in history or not abs(history[name] - value) <= tolerance * max(1.0, abs(value))
    }
    now = {**environment_tags(), **tags_of(task), **read_tags(task.folder)}
    weights = {name: tag for name, tag in original.tags.items() if name.startswith(WEIGHTS_TAG)}
    return Reproduction(
        run_id=original.run_id,
        folder=task.folder,
        same_weights=all(now.get(name) == tag for name, tag in weights.items()) if weights else None,
        differences=differences,
        compared=len(learned),
        tolerance=tolerance,
        deterministic=task.config.training.deterministic,
        explanations=_explanations(original.tags, now),
    )


def _explanations(then: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """Say which tags that may explain other results are not as they were."""
    names = sorted(name for name in {*then, *now} if name.startswith(_EXPLAINING))
    return tuple(
        f"{name.removeprefix(ARITHMETIC_TAG).replace('_', ' ')}: {then.get(name, 'not said')} then, "
        f"{now.get(name, 'not said')} now"
        for name in names
        if then.get(name) != now.get(name)
    )


def _record(report: Reproduction) -> None:
    """Write what was found into the new run's folder, and into MLflow beside the original."""
    path = report.folder / REPORT
    verdict = {"matches": report.matches, "was_expected": report.was_expected}
    write_json(path, {**asdict(report), "folder": str(report.folder), **verdict})
    tracked = RunLog.open(report.folder)
    found = "same weights" if report.same_weights else "same metrics" if report.matches else "differs"
    tracked.tags({"medseg.reproduces": report.run_id, "medseg.reproduction": found})
    tracked.artifact(path)
    tracked.close()
    send_pending(report.folder, limit_s=SEND_LIMIT_S)


def _shown(value: float | None) -> str:
    """Return a metric's value as text."""
    return "missing" if value is None else f"{value:.6g}"
