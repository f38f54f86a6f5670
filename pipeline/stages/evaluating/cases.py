"""Which models are evaluated on which cases: as far as can be told, never on one that any of them was trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config
from pipeline.data.cases import read_case_images, read_case_label
from pipeline.data.manifest import Case, Manifest
from pipeline.data.plan import Plan, read_plan
from pipeline.errors import ManifestError, ModelError, VolumeError
from pipeline.model import CONFIG, DESCRIPTION, PLAN, ModelDescription, read_description, refuse_other_task
from pipeline.preparation.preprocessing import class_indices
from pipeline.stages.dataset import dataset_of
from pipeline.stages.models import has_ended, models_of_experiment, resolve_models
from pipeline.stages.workspace import Workspace
from pipeline.volumes.volume import Volume

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One model, or an ensemble, and the cases it is evaluated on.

    Attributes:
        models: its folder, or those of the ensemble's members.
        descriptions: what each is and was trained on.
        plan: their channels and labels.
        cases: labelled cases to score.
        seen: id of a case that a model was trained on -> why it is left out.
        is_own: whether the cases are of the very manifest that they were trained on.
    """

    models: tuple[Path, ...]
    descriptions: tuple[ModelDescription, ...]
    plan: Plan
    cases: tuple[Case, ...]
    seen: dict[str, str]
    is_own: bool

    @property
    def fold(self) -> int | None:
        """The fold of a single model; an ensemble has none."""
        return self.descriptions[0].fold if len(self.models) == 1 else None

    @property
    def run(self) -> Path | None:
        """The run folder of a model, or of the experiment whose folds these are; None for models from elsewhere."""
        runs = {_run_of(model) for model in self.models}
        parents = {run.parent for run in runs if run is not None}
        if None in runs or len(parents) > 1:
            return None
        return runs.pop() if len(self.models) == 1 else parents.pop()

    @property
    def is_finished(self) -> bool:
        """Whether the training of each model has ended, as far as its run tells."""
        runs = [_run_of(model) for model in self.models]
        return all(run is None or has_ended(run) for run in runs)


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


def models_of(target: str | Config, workspace: Workspace, uri: str | None = None) -> list[Path]:
    """Return the folder of the model that is named, or of the best model of each fold that an experiment has trained.

    Raises:
        ModelError: there is none.
    """
    if isinstance(target, str):
        return resolve_models([target], workspace.root, uri)
    return models_of_experiment(workspace.experiment(target.name).resolve())


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
    """Tell which cases the models are evaluated on.

    By `fold`, each model has its own cases of the manifest that it was trained on; otherwise several are an ensemble,
    which is evaluated on the cases that none of them has seen.

    Raises:
        ManifestError: the manifest has other labels, has changed since the training, or holds no such case.
        ModelError: two models are of one fold.
    """
    tasks = [_task(model, manifest, config, cases) for model in models]
    if cases != "fold" or not is_own(manifest, tasks[0].descriptions[0]):
        tasks = [_ensemble(tasks)]
    ids = [case.id for task in tasks for case in task.cases]
    if not ids:
        hint = f"; {len(models)} models leave those that none of them has seen" if len(models) > 1 else ""
        raise ManifestError(f"manifest {manifest.name!r}: no labelled case to evaluate on (--cases {cases}){hint}")
    if len(set(ids)) < len(ids):
        raise ModelError(f"two models for one fold among {', '.join(map(str, models))}; name one")
    return tasks


def is_own(manifest: Manifest, description: ModelDescription) -> bool:
    """Tell whether a manifest is the very one that a model was trained on."""
    return manifest.digest() == description.manifest_digest


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


def descriptions_of(tasks: Sequence[Task]) -> list[ModelDescription]:
    """Return what each model is, members of ensembles one by one."""
    return [description for task in tasks for description in task.descriptions]


def experiment_folder(tasks: Sequence[Task]) -> Path:
    """Return the folder that holds the runs of an experiment's folds."""
    return tasks[0].models[0].parent.parent.parent


def _task(model: Path, manifest: Manifest, config: Config, cases: str) -> Task:
    """Choose one model's cases, and set aside those that it was trained on."""
    description, plan = read_description(model / DESCRIPTION), read_plan(model / PLAN)
    refuse_other_task(model, description)
    plan = plan.changed(ignore_label=manifest.ignore_label)  # of the label files that are read here
    if manifest.labels != plan.labels:
        raise ManifestError(f"manifest {manifest.name!r}: labels are {manifest.labels}, the model's {plan.labels}")
    if is_own(manifest, description):
        return Task((model,), (description,), plan, _own_cases(manifest, description.fold, cases), {}, is_own=True)
    if manifest.name == description.manifest_name:
        # Its folds may be others now: a case that was trained on could pass for one that was held out.
        raise ManifestError(
            f"manifest {manifest.name!r} has changed since {model} was trained; restore it, or give other cases a "
            "manifest of another name"
        )
    seen = _seen(manifest, description, config)
    chosen = tuple(case for case in manifest.cases if case.label and case.id not in seen)
    return Task((model,), (description,), plan, chosen, seen, is_own=False)


def _ensemble(tasks: Sequence[Task]) -> Task:
    """Make one task of several: of the cases that all of them have."""
    in_all = set.intersection(*({case.id for case in task.cases} for task in tasks))
    return Task(
        models=tuple(model for task in tasks for model in task.models),
        descriptions=tuple(description for task in tasks for description in task.descriptions),
        plan=tasks[0].plan,
        cases=tuple(case for case in tasks[0].cases if case.id in in_all),
        seen={case: reason for task in tasks for case, reason in task.seen.items()},
        is_own=tasks[0].is_own,
    )


def _run_of(model: Path) -> Path | None:
    """Return the run folder that a model lies in; None for a model from elsewhere."""
    folder = model.parent.parent
    return folder if model.parent.name == "models" and (folder / CONFIG).is_file() else None


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
