"""What is written down of a fold's training as it begins: all that `medseg reproduce` makes it anew from."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

from pipeline.data.manifest import save_manifest
from pipeline.data.plan import write_plan
from pipeline.hardware import arithmetic_facts
from pipeline.records import write_json, write_text
from pipeline.stages.fold.hooks import shareable
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.initialisation import Initialisation
from pipeline.stages.models import FACTS
from pipeline.stages.preprocess import KEYS
from pipeline.stages.workspace import EARLIER, Workspace
from pipeline.tracking import RunLog, environment_tags
from pipeline.training.distributed import this_share

log = logging.getLogger(__name__)

# The manifest's cases that take part, as a file of the run; beside it, under KEYS, a digest of each prepared case.
MANIFEST = "manifest.json"
# Of a budget in minutes: [step, steps in all from there on] wherever it was counted anew.
RECOUNTS = "recounts.json"
# How the tags begin that say what a run computed with, and which weights came out.
ARITHMETIC_TAG, WEIGHTS_TAG = "medseg.arithmetic.", "medseg.weights_sha256."
MANIFEST_TAG, ROOT_TAG = "medseg.manifest_digest", "medseg.data_root"


def _set_aside(folder: Path) -> None:
    """Rename an earlier run's folder: hours of training are not overwritten by a command typed twice."""
    if not folder.exists():
        return
    names = (folder.with_name(f"{EARLIER}{number}_{folder.name}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    folder.rename(aside)
    log.info("the earlier run is kept as %s (`medseg train --resume` would have gone on with it)", aside)


def new_run(task: FoldTask, taken: Initialisation | None) -> RunLog:
    """Make the run folder, write down what is trained on what, and begin the run in MLflow."""
    config, folder = task.config, task.folder
    _set_aside(folder)
    write_text(folder / "config.yaml", shareable(config))
    write_plan(folder / "plan.yaml", task.plan)
    write_json(folder / "fingerprint.json", task.fingerprint.model_dump(mode="json"))
    write_json(folder / FACTS, task.facts)
    save_manifest(task.manifest, folder / MANIFEST)
    write_json(folder / KEYS, task.keys)
    parent = experiment_run(task)
    parent.close()
    tracked = RunLog.create(
        folder,
        uri=config.tracking.uri,
        workspace=config.workspace,
        experiment=config.tracking.experiment or task.manifest.name,
        name=f"{config.name} fold {task.fold}",
        parent=parent.folder,
        tags={**environment_tags(), **tags_of(task)},
    )
    tracked.params(config.model_dump(mode="json", exclude={"tracking", "workspace"}))
    tracked.params({"fold": task.fold, "plan": task.plan.model_dump(mode="json", exclude={"reasons"})})
    for context, cases in (("training", task.training_cases), ("validation", task.validation_cases)):
        ids = [case.id for case in cases]
        tracked.dataset(task.manifest.name, task.manifest.digest(), task.manifest.source, ids, context)
    for name in ("config.yaml", "plan.yaml", "fingerprint.json", MANIFEST, KEYS):
        tracked.artifact(folder / name)
    if taken is not None:
        taken.record(folder, tracked)
    return tracked


def experiment_run(task: FoldTask) -> RunLog:
    """Open the run in MLflow whose children the runs of the experiment's folds are, or begin it."""
    config = task.config
    return RunLog.ensure_parent(
        Workspace(config.workspace).experiment(config.name),
        uri=config.tracking.uri,
        workspace=config.workspace,
        experiment=config.tracking.experiment or task.manifest.name,
        name=config.name,
    )


def tags_of(task: FoldTask) -> dict[str, str]:
    """Return what decides a training's result, to its last bits, and stands in none of its files."""
    facts = {**arithmetic_facts(task.device), "number of processes": this_share().processes}
    said = {ARITHMETIC_TAG + name.replace(" ", "_"): str(value) for name, value in facts.items()}
    return {
        MANIFEST_TAG: task.manifest.digest(),
        ROOT_TAG: str(task.manifest.root),
        **said,
    }
