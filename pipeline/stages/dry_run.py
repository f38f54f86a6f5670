"""`medseg train --dry-run`: what would be trained, and what is missing for it; no image is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Plan
from pipeline.data.store import CaseStore
from pipeline.errors import config_errors_of
from pipeline.networks.fitting import fitted_plan, network_for, outputs_of
from pipeline.stages.dataset import dataset_of
from pipeline.stages.describe import UndecidedError, plan_of
from pipeline.stages.fold.task import CHECKPOINT, NO_TRAINING_CASE, class_weights
from pipeline.stages.models import has_ended
from pipeline.stages.preprocess import CASES
from pipeline.stages.train import TASKS, chosen_folds
from pipeline.stages.workspace import Workspace
from pipeline.training.losses import check_class_weights

# Missing cases that are named.
NAMED = 5


@dataclass(frozen=True)
class DryRun:
    """What would be trained.

    Attributes:
        facts: name -> text, in the order in which people read them.
        folds: a line for each fold.
        missing: what stands in the way, and what to do about it; empty where training can begin.
    """

    facts: dict[str, str]
    folds: tuple[str, ...]
    missing: tuple[str, ...]

    def as_text(self) -> str:
        """Return all of it for people."""
        width = max(map(len, self.facts))
        lines = [f"{name:{width}}  {text}" for name, text in self.facts.items()]
        missing = [f"missing: {text}" for text in self.missing] or ["nothing is missing"]
        return "\n".join([*lines, "", *self.folds, "", *missing])


def run(config: Config, *, fold: str = "0") -> DryRun:
    """Say what `medseg train` would do, and do nothing.

    Args:
        config: the experiment.
        fold: the fold to hold out, or "all".

    Raises:
        ManifestError: the manifest cannot be used.
        ConfigError: it has no such fold, a label has a weight that it has not, or the network does not fit the
            plan.
    """
    manifest = dataset_of(config)
    numbers = chosen_folds(manifest, fold)
    class_weights(config.training.sampling_weights, manifest.labels)
    facts = {
        "experiment": f"{config.name}, task: {config.task}, seed {config.seed}",
        "data": f"{manifest.name}: {len(manifest.cases):,} cases, {len(manifest.test_cases):,} held out, "
        f"{len(manifest.folds)} folds",
        **_network_facts(config, manifest),
        "budget": _budget(config),
    }
    return DryRun(facts, tuple(_fold(config, manifest, n) for n in numbers), tuple(_missing(config, manifest, numbers)))


def _network_facts(config: Config, manifest: Manifest) -> dict[str, str]:
    """Return network, parameters, patch and batch, as far as they are decided."""
    name = config.network.name
    try:
        plan, source = plan_of(config, manifest)
    except UndecidedError:
        return {"network": f"{name}; patch and batch are decided by `medseg preprocess`"}
    fitted, parameters = _fitted(config, plan)
    patch = "x".join(map(str, fitted.patch_size))
    spacing = "x".join(f"{mm:.4g}" for mm in fitted.spacing_mm)
    batch = config.training.batch_size or fitted.batch_size
    return {
        "network": f"{name}, {parameters:,} parameters",
        "patch": f"{patch} voxels of {spacing} mm, {batch} a step; from {source}",
    }


def _fitted(config: Config, plan: Plan) -> tuple[Plan, int]:
    """Return the plan as the network takes it, and the network's parameters.

    Raises:
        ConfigError: it does not fit, or the loss has weights for other classes.
    """
    with config_errors_of(f"network {config.network.name}"):
        fitted = fitted_plan(plan, config.network, config.training.batch_size)
        outputs = outputs_of(config.task, fitted, fitted.output)
        with torch.device("meta"):
            network = network_for(fitted, config.network, outputs)
    if config.task == "segment":
        check_class_weights(config.training.loss_options.get("class_weights"), outputs)
    return fitted, sum(p.numel() for p in network.parameters())


def _budget(config: Config) -> str:
    """Return how long a fold is trained."""
    section, steps = config.training, config.training.budgeted_steps
    if steps is None:
        return f"{section.budget.minutes:g} minutes a fold, turned into steps by a probe and the clock"
    return f"{steps:,} steps a fold, validated every {section.validation_every_epochs * section.steps_per_epoch:,}"


def _fold(config: Config, manifest: Manifest, number: int) -> str:
    """Return a fold's cases, folder, and what lies there."""
    unlabelled = not TASKS[config.task].needs_labels
    training = len(manifest.training_cases(number, unlabelled=unlabelled))
    validation = len(manifest.validation_cases(number, unlabelled=unlabelled))
    folder = Workspace(config.workspace).run(config.name, number)
    if has_ended(folder):
        state = "a finished training lies there, and would be set aside"
    elif (folder / CHECKPOINT).exists():
        state = "a checkpoint lies there: --resume goes on from it, else it is set aside"
    else:
        state = "new"
    cases = f"{training:,} cases to train on, {validation:,} to validate on"
    return f"fold {number}: {cases}; checkpoints go to {folder} ({state})"


def _missing(config: Config, manifest: Manifest, folds: Sequence[int]) -> Iterator[str]:
    """Yield what is not there; of the cases only names are looked at."""
    unlabelled = not TASKS[config.task].needs_labels
    for fold in folds:
        if not manifest.training_cases(fold, unlabelled=unlabelled):
            yield NO_TRAINING_CASE.format(fold)
    if not manifest.root.is_dir():
        yield f"the images: {manifest.root} is no folder; set data.root"
    folder = Workspace(config.workspace).store(config, manifest.name) / CASES
    wanted = [case.id for case in manifest.development_cases if case.label or not TASKS[config.task].needs_labels]
    prepared = set(CaseStore(folder).case_ids()) if folder.is_dir() else set()
    absent = [case_id for case_id in wanted if case_id not in prepared]
    if absent:
        more = ", ..." if len(absent) > NAMED else ""
        yield (
            f"{len(absent):,} of {len(wanted):,} prepared cases in {folder}: {', '.join(absent[:NAMED])}{more}; run "
            "`medseg preprocess`"
        )
