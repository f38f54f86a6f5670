"""Which model is evaluated on which cases: as far as can be told, never on one that it was trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config
from pipeline.data.manifest import Case, Manifest
from pipeline.data.plan import Plan, read_plan
from pipeline.errors import ManifestError, ModelError
from pipeline.model import CONFIG, DESCRIPTION, PLAN, ModelDescription, read_description, refuse_other_task
from pipeline.stages.dataset import dataset_of
from pipeline.stages.models import resolve_model
from pipeline.stages.workspace import Workspace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One model and the cases it is evaluated on.

    Attributes:
        model: its folder.
        description: what it is and was trained on.
        plan: its channels and labels.
        cases: labelled cases to score.
        seen: id of a case that the model was trained on -> why it is left out.
    """

    model: Path
    description: ModelDescription
    plan: Plan
    cases: tuple[Case, ...]
    seen: dict[str, str]

    @property
    def run(self) -> Path | None:
        """The run folder that the model lies in; None for a model from elsewhere."""
        folder = self.model.parent.parent
        return folder if self.model.parent.name == "models" and (folder / CONFIG).is_file() else None


def models_of(target: str | Config, workspace: Workspace, uri: str | None = None) -> list[Path]:
    """Return the folder of the model that is named, or of the best model of each fold that an experiment has trained.

    Raises:
        ModelError: there is none.
    """
    if isinstance(target, str):
        return [resolve_model(target, workspace.root, uri).resolve()]
    experiment = workspace.experiment(target.name).resolve()
    found = sorted(path.parent for path in experiment.glob(f"fold_*/models/best/{DESCRIPTION}"))
    if not found:
        raise ModelError(f"{experiment}: no fold is trained yet; run `medseg train` first")
    return found


def own_manifest(config: Config) -> Manifest:
    """Load the manifest that a model was trained on.

    Raises:
        ManifestError: it cannot be read; says how to name other cases.
    """
    try:
        return dataset_of(config)
    except ManifestError as error:
        raise ManifestError(f"{error}\nor name the cases to evaluate on with --manifest") from error


def choose(models: Sequence[Path], manifest: Manifest, config: Config, cases: str) -> list[Task]:
    """Tell which cases each model is evaluated on.

    Raises:
        ManifestError: the manifest has other labels, has changed since the training, or holds no such case.
        ModelError: several models for one case.
    """
    tasks = [_task(model, manifest, config, cases) for model in models]
    ids = [case.id for task in tasks for case in task.cases]
    if not ids:
        raise ManifestError(f"manifest {manifest.name!r}: no labelled case to evaluate on (--cases {cases})")
    if len(set(ids)) < len(ids):
        names = ", ".join(str(model) for model in models)
        raise ModelError(
            f"{len(models)} folds are trained, and only --cases fold gives each its own cases: name one, {names}"
        )
    return tasks


def is_own(manifest: Manifest, description: ModelDescription) -> bool:
    """Tell whether a manifest is the very one that a model was trained on."""
    return manifest.digest() == description.manifest_digest


def _task(model: Path, manifest: Manifest, config: Config, cases: str) -> Task:
    """Choose one model's cases, and set aside those that it was trained on."""
    description, plan = read_description(model / DESCRIPTION), read_plan(model / PLAN)
    refuse_other_task(model, description)
    if manifest.labels != plan.labels:
        raise ManifestError(f"manifest {manifest.name!r}: labels are {manifest.labels}, the model's {plan.labels}")
    if is_own(manifest, description):
        return Task(model, description, plan, _own_cases(manifest, description.fold, cases), {})
    if manifest.name == description.manifest_name:
        # Its folds may be others now: a case that was trained on could pass for one that was held out.
        raise ManifestError(
            f"manifest {manifest.name!r} has changed since {model} was trained; restore it, or give other cases a "
            "manifest of another name"
        )
    seen = _seen(manifest, description, config)
    chosen = tuple(case for case in manifest.cases if case.label and case.id not in seen)
    return Task(model, description, plan, chosen, seen)


def _own_cases(manifest: Manifest, fold: int | None, cases: str) -> tuple[Case, ...]:
    """Return the labelled cases of the training's own manifest that the model has not seen, by `--cases`."""
    validation = () if fold is None else manifest.validation_cases(fold)
    held_out = tuple(case for case in manifest.test_cases if case.label)
    return {"fold": validation, "test": held_out, "all": validation + held_out}[cases]


def _seen(manifest: Manifest, description: ModelDescription, config: Config) -> dict[str, str]:
    """Return the cases of another manifest that the model was trained on, by their content, and why they stay out."""
    try:
        trained_on = own_manifest(config)
    except ManifestError:
        trained_on = None
    if trained_on is None or not is_own(trained_on, description):
        log.warning("%s is not here: cannot tell whether a case was trained on", description.manifest_name)
        return {}
    fold = -1 if description.fold is None else description.fold
    owners = {key: case.id for case in trained_on.training_cases(fold) for key in _contents(trained_on, case)}
    found = {case.id: [owners[key] for key in _contents(manifest, case) if key in owners] for case in manifest.cases}
    return {case: f"the model was trained on its image, as case {own[0]!r}" for case, own in found.items() if own}


def _contents(manifest: Manifest, case: Case) -> list[tuple[str, int | None]]:
    """Return what tells a case's images from others: digests, or paths where none is recorded."""
    return [(file.sha256 or str(manifest.path_of(file).resolve()), file.index) for file in case.images.values()]
