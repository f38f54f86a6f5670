"""What one fold's training is made of, before it begins: cases, plan, network, batches; and where it is kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from pipeline.confidence.calibration import Calibration
from pipeline.config import AugmentationSection, Config
from pipeline.data.manifest import Case, Manifest
from pipeline.data.plan import Fingerprint, Plan, read_plan
from pipeline.data.store import CaseStore
from pipeline.errors import ConfigError, StoreError, config_errors_of
from pipeline.evaluation.structures import Structures
from pipeline.hardware import arithmetic_facts, autocast, compiled_to_train, pick_dtype, place
from pipeline.networks import Network
from pipeline.networks.fitting import fitted_plan, network_for, outputs_of
from pipeline.networks.recomputing import recompute_activations
from pipeline.predictor import Engine, Predictor
from pipeline.stages.fold.calibrating import PASS_COST, TEMPERATURE_CASES, calibration_of
from pipeline.stages.fold.identity import configuration_digest, initial_model_of
from pipeline.stages.fold.step_size import GPU_SHARE, step_of
from pipeline.stages.fold.validation import DiceValidation, Validation
from pipeline.stages.initial_weights import initial_digest
from pipeline.stages.models import FACTS, has_ended
from pipeline.stages.preprocess import CASES, KEYS, sources_digest
from pipeline.stages.settling import plan_path
from pipeline.stages.workspace import Workspace
from pipeline.training.batch_norm import pool_batch_norms, pools_statistics
from pipeline.training.diagnosis.stopwatch import Clock, unheard, untimed
from pipeline.training.distributed import synchronised, this_share
from pipeline.training.loop import Batch, LoopSettings
from pipeline.training.losses import Objective, build_loss, check_class_weights
from pipeline.training.optimisation import Schedule, build_optimiser, build_schedule
from pipeline.training.randomness import torch_seed
from pipeline.training.sampling.augmentation import Augmentation
from pipeline.training.sampling.batches import Batches, CaseBatches, workers_for
from pipeline.training.sampling.cases import PatchCase, Place, bytes_of, keep, place_for
from pipeline.training.sampling.patches import PatchSampler
from pipeline.training.state import TrainState

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
NO_TRAINING_CASE = "fold {}: all cases to train on lie in it, so that held out it leaves none; see the manifest's folds"


@dataclass(frozen=True)
class FoldTask:
    """One fold's training before it begins: what to train, on which cases, where.

    Attributes:
        config: the experiment.
        manifest: the data set.
        plan: how its cases were prepared, with a patch that the network takes.
        fingerprint: what its development cases are like.
        store: the prepared cases.
        folder: the run folder.
        fold: the fold held out.
        device: where the network runs.
        needs_labels: whether cases without a label are left out.
    """

    needs_labels: ClassVar[bool] = True

    config: Config
    manifest: Manifest
    plan: Plan
    fingerprint: Fingerprint
    store: CaseStore
    folder: Path
    fold: int
    device: torch.device

    @classmethod
    def prepare(cls, config: Config, manifest: Manifest, fold: int, device: torch.device) -> FoldTask:
        """Read plan and fingerprint and see that every case is in the store.

        Raises:
            StoreError: the data are not preprocessed.
            ConfigError: there is no case to train on, or the network does not fit the plan.
        """
        workspace = Workspace(config.workspace)
        folder = workspace.store(config, manifest.name)
        if not (folder / KEYS).exists():
            raise StoreError(f"{folder}: {manifest.name} is not preprocessed so; run `medseg preprocess`")
        fingerprint = Fingerprint.model_validate_json((folder / "fingerprint.json").read_bytes())
        store = CaseStore(folder / CASES)
        task = cls(
            config,
            manifest,
            read_plan(plan_path(folder, config)),
            fingerprint,
            store,
            workspace.run(config.name, fold),
            fold,
            device,
        )
        if not task.training_cases:
            raise ConfigError(NO_TRAINING_CASE.format(fold))
        task.refuse_stale_store(folder / KEYS)
        with config_errors_of(f"network {config.network.name}"):
            plan = fitted_plan(task.plan, config.network, config.training.batch_size)
        # From here on a case that is prepared anew is an error: the plan would be another's.
        return replace(task, plan=plan, store=CaseStore(store.folder, task.keys))

    def refuse_stale_store(self, record: Path) -> None:
        """See that the store was made from this manifest and plan, and that each case came out.

        Raises:
            StoreError: it was not; names the first cases.
        """
        made_from = json.loads(record.read_text(encoding="utf-8"))
        if made_from["sources"] != sources_digest(self.manifest, self.plan):
            raise StoreError(f"{record.parent}: manifest or plan has changed since; run `medseg preprocess`")
        keys = made_from["cases"]
        wanted = self.keys
        stale = [case_id for case_id, key in wanted.items() if key != keys.get(case_id, "none")]
        if stale:
            raise StoreError(
                f"{self.store.folder}: {len(stale)} of {len(wanted)} cases are missing or stale, "
                f"{', '.join(stale[:5])} first; run `medseg preprocess`"
            )

    @cached_property
    def keys(self) -> dict[str, str | None]:
        """Digest of what each prepared case was made from, by the case's id."""
        if self.store.keys is not None:
            return dict(self.store.keys)
        return {case.id: self.store.key_of(case.id) for case in (*self.training_cases, *self.validation_cases)}

    @property
    def training_cases(self) -> tuple[Case, ...]:
        """Cases of the other folds."""
        return self.manifest.training_cases(self.fold, unlabelled=not self.needs_labels)

    @property
    def validation_cases(self) -> tuple[Case, ...]:
        """Cases of the fold held out."""
        return self.manifest.validation_cases(self.fold, unlabelled=not self.needs_labels)

    @property
    def is_scored(self) -> bool:
        """Whether validation can tell one model from another: people looked for something in the fold held out."""
        cases = self.validation_cases
        return any(Structures.of(self.plan, case).any_known for case in cases) if self.needs_labels else bool(cases)

    @property
    def checkpoint(self) -> Path:
        """The run's checkpoint."""
        return self.folder / CHECKPOINT

    @property
    def is_begun(self) -> bool:
        """Whether the run folder holds a training of this configuration, plan and data."""
        path = self.folder / FACTS
        return path.exists() and json.loads(path.read_text(encoding="utf-8")) == self.facts

    @property
    def is_finished(self) -> bool:
        """Whether that training has ended."""
        return self.is_begun and has_ended(self.folder)

    @property
    def outputs(self) -> int:
        """Channels of what the network returns."""
        return outputs_of(self.config.task, self.plan, self.plan.output)

    @property
    def batch_size(self) -> int:
        """Patches of a batch, over all processes that train together."""
        return self.config.training.batch_size or self.plan.batch_size

    @property
    def engine(self) -> Engine:
        """How the machine is used where whole volumes are predicted."""
        return Engine(str(self.device), self.config.training.precision)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type in which the network computes."""
        return pick_dtype(self.config.training.precision, self.device)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What was trained on what; written beside the run."""
        return {
            "configuration": configuration_digest(self.config),
            "plan": self.plan.digest(),
            "manifest": self.manifest.digest(),
            "fold": self.fold,
            "initial model": None if self.initial_model is None else initial_digest(self.initial_model),
        }

    @property
    def facts_to_resume(self) -> dict[str, Any]:
        """What a resumed run must share with the run that began: the facts, and what a deterministic one's last bits
        depend on.
        """
        if not self.config.training.deterministic:
            return self.facts
        return {**self.facts, **arithmetic_facts(self.device), "number of processes": this_share().processes}

    @cached_property
    def initial_model(self) -> Path | None:
        """Model, bundle or file with whose weights the training begins; None: with random ones."""
        return initial_model_of(self.config, self.fold)

    @cached_property
    def settings(self) -> LoopSettings:
        """The loop's settings."""
        section = self.config.training
        return LoopSettings(
            steps_per_epoch=section.steps_per_epoch,
            validation_every_epochs=section.validation_every_epochs,
            early_stop_validations=section.early_stop_validations if self.is_scored else None,
            checkpoint_s=60 * section.checkpoint_minutes,
            gradient_clip=section.gradient_clip,
            ema_decay=section.ema_decay,
            dtype=self.dtype,
            device=self.device,
            seed=self.config.seed,
            accumulate=section.accumulate,
        )

    def new_state(self) -> TrainState:
        """Build network, loss and optimiser from the seed.

        Raises:
            ConfigError: an option is wrong, or asks for what the network has not.
        """
        config, section = self.config, self.config.training
        torch.manual_seed(torch_seed(config.seed, "weights", 0))
        network = network_for(self.plan, config.network, self.outputs)
        objective = self.objective(network)
        if pools_statistics(this_share(), self.batch_size, asked=section.sync_batch_norm):
            pool_batch_norms(network)
        place(network, self.device)
        if section.activation_checkpointing:
            recompute_activations(network, partial(autocast, self.device, self.dtype))
        with config_errors_of(f"training.optimiser {section.optimiser}"):
            optimiser = build_optimiser(network, section)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        return TrainState.begin(objective, optimiser, scaler, ema=section.ema_decay is not None)

    def wrap_step(self, state: TrainState, batches: Callable[[int], Batch]) -> None:
        """Compile what a step calls, where it is to be and works here, and join it to other processes."""
        if self.config.training.compile:
            state.objective.compile_network_only()
            state.step_module = compiled_to_train(state.step_module, batches(0), self.dtype)
        state.step_module = synchronised(state.step_module)

    def schedule(self, state: TrainState) -> Schedule:
        """Return the course of the learning rate.

        Raises:
            ConfigError: an option of the schedule is wrong.
        """
        section = self.config.training
        with config_errors_of(f"training.schedule {section.schedule}"):
            return build_schedule(section, state.optimiser)

    def objective(self, network: Network) -> Objective:
        """Join the network to the loss that it learns by.

        Raises:
            ConfigError: the loss's options are wrong or of other classes, or the network has no outputs for deep
                supervision.
        """
        section = self.config.training
        with config_errors_of(f"training.loss {section.loss}"):
            loss = build_loss(section.loss, section.loss_options)
        check_class_weights(section.loss_options.get("class_weights"), self.outputs)
        if section.deep_supervision and not network.coarse_logits:
            raise ConfigError(
                f"training.deep_supervision: network {self.config.network.name} has no coarser outputs; leave it false"
            )
        regions = tuple(self.plan.structures.values()) if self.plan.output == "regions" else None
        return Objective(network, loss, deep_supervision=section.deep_supervision, regions=regions)

    def validation(self, network: Network) -> Validation:
        """Return what scores the network on whole volumes."""
        predictor = Predictor(network, self.plan, self.config.inference, self.engine, output=self.plan.output)
        return DiceValidation(predictor, self.store)

    def calibration(self, model: Path, reached: Callable[[str], None] = unheard) -> Calibration | None:
        """Learn from validation cases how far a model's confidence can be trusted; None where there is nothing.

        Args:
            model: its folder.
            reached: is told the id of each case as it is begun.
        """
        if self.config.task != "segment":
            return None
        return calibration_of(model, self.store, self.calibration_cases, self.engine, reached)

    @property
    def calibration_cases(self) -> list[Case]:
        """Validation cases in which people looked for everything: elsewhere what is right is not known."""
        structures = list(self.plan.labels)[1:]
        return [case for case in self.validation_cases if case.is_annotated(structures)]

    @property
    def calibration_passes(self) -> float:
        """What `calibration` costs, in validations: a pass over its cases, and one over some for the temperature."""
        cases = len(self.calibration_cases) if self.config.task == "segment" else 0
        return PASS_COST * (cases + min(cases, TEMPERATURE_CASES)) / max(1, len(self.validation_cases))

    @property
    def augmentation(self) -> AugmentationSection:
        """Random changes of the patches."""
        return self.config.training.augmentation

    @cached_property
    def cases_at(self) -> Place:
        """Where the prepared training cases are kept."""
        needed = bytes_of(self.training_cases, self.store, self.plan)
        step = step_of(self, self.dtype).peak_bytes / GPU_SHARE if self.device.type == "cuda" else 0.0
        return place_for(needed, self.device, this_share().processes, step_bytes=int(step))

    @property
    def workers(self) -> int:
        """Threads that read ahead."""
        return workers_for(self.config.training.workers, self.cases_at, self.device)

    def batches(
        self, network: Network, clock: Clock = untimed, reached: Callable[[str], None] = unheard
    ) -> CaseBatches:
        """Build the way from the store to the network's augmented batches; to be closed.

        Args:
            network: that learns from them.
            clock: measures the phases.
            reached: is told the id of each case as it is read or opened.

        Raises:
            ConfigError: a label with a weight is not among the plan's.
        """
        section = self.config.training
        weights = class_weights(section.sampling_weights, self.plan.labels)
        augmentation = Augmentation(
            self.augmentation,
            patch_size=network.input_size(self.plan.patch_size),
            target_size=self.plan.patch_size,
            left_right_axis=self.plan.left_right_axis,
            paired_classes=self.plan.paired_classes,
            num_classes=len(self.plan.labels) + self.plan.has_ignored,
            spacing_mm=self.plan.spacing_mm,
            seed=self.config.seed,
        )
        sampler = PatchSampler(
            self.patch_cases(reached),
            patch_size=self.plan.patch_size,
            read_size=augmentation.read_size,
            foreground_fraction=section.foreground_fraction,
            seed=self.config.seed,
            class_weights=weights,
        )
        share = this_share()
        size = share.batch_size(self.batch_size)
        return Batches(
            sampler,
            augmentation,
            batch_size=size,
            device=self.device,
            workers=self.workers,
            share=share,
            clock=clock,
        )

    def patch_cases(self, reached: Callable[[str], None] = unheard) -> list[PatchCase]:
        """Return the training cases, kept as near to the network as they fit."""
        return keep(self.training_cases, self.store, self.plan, self.cases_at, self.device, reached)


def class_weights(of_labels: Mapping[str, float], labels: Iterable[str]) -> dict[int, float]:
    """Return class index -> weight of the labels that `training.sampling_weights` names.

    Raises:
        ConfigError: one of them is none of the labels, the first of which is the background.
    """
    structures = list(labels)[1:]
    unknown = [name for name in of_labels if name not in structures]
    if unknown:
        raise ConfigError(
            f"training.sampling_weights: {', '.join(map(repr, unknown))} cannot be drawn; patches are centred on "
            f"voxels of {', '.join(structures)}"
        )
    return {1 + structures.index(name): weight for name, weight in of_labels.items()}
