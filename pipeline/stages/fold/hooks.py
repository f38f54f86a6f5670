"""What a fold's training does at the loop's turning points: validation, models, checkpoints, tracking."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline import __version__
from pipeline.config import Config
from pipeline.config_loading import dump_config
from pipeline.errors import TrainingError
from pipeline.model import Model, ModelDescription, save_model
from pipeline.records import atomic_path
from pipeline.stages.fold.diagnosis import FoldDiagnosis
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.model_card import DataFacts, write_card
from pipeline.stages.models import BEST
from pipeline.tracking import RunLog
from pipeline.training.checkpoints import save_checkpoint
from pipeline.training.distributed import this_share
from pipeline.training.state import TrainState, averaged_weights

log = logging.getLogger(__name__)

# Is told at each validation which part of the training is done, 0 to 1, and the scores by name.
Listener = Callable[[float, dict[str, float]], None]


def unheard_scores(done: float, scores: dict[str, float]) -> None:
    """Listen to no scores."""


class FoldHooks:
    """The loop's hooks: validation through the shipping road, models, checkpoints, tracking.

    Where several processes train together each hook is called by all of them. They share the validation out; what
    stands behind `is_first` only reads and writes, and talks to no other process.
    """

    def __init__(
        self,
        task: FoldTask,
        state: TrainState,
        tracked: RunLog,
        diagnosis: FoldDiagnosis,
        listener: Listener = unheard_scores,
    ) -> None:
        self.share = this_share()
        self.task = task
        self.tracked = tracked
        self.diagnosis = diagnosis
        self.listener = listener
        self.validation = task.validation(state.network)

    def validate(self, state: TrainState) -> dict[str, float]:
        """Score the volumes of the fold held out, and draw the first."""
        with averaged_weights(state):
            self.draw_first(state.step)
            return self.validation.scores(self.task.validation_cases, self.diagnosis.clock.reached)

    def draw_first(self, step: int, *, kept: bool = True) -> None:
        """Log a picture of the first validation case: MLflow shows how it changes over the steps.

        Args:
            step: at which it is drawn.
            kept: or drawn only to see how long it takes.
        """
        cases = self.task.validation_cases
        if not (cases and self.share.is_first):
            return
        figure = self.validation.picture(cases[0], f"step {step}")
        if not kept:
            return
        path = self.task.folder / "pictures" / f"step_{step:07d}.png"
        with atomic_path(path) as temporary:
            figure.savefig(temporary)
        self.tracked.image("validation", path, step)

    def improved(self, state: TrainState, scores: dict[str, float]) -> None:
        """Write the best model."""
        if self.share.is_first:
            self.save_model(state, BEST, scores)

    def save_model(self, state: TrainState, to: Path, scores: dict[str, float]) -> None:
        """Write the model, with the mean weights where there are any, and its card."""
        task, plan = self.task, self.task.plan
        description = ModelDescription(
            name=task.config.name,
            task=task.config.task,
            network=task.config.network,
            in_channels=len(plan.channels),
            num_classes=task.outputs,
            output=plan.output,
            precision=task.config.training.precision,
            inference=task.config.inference,
            manifest_name=task.manifest.name,
            manifest_digest=task.manifest.digest(),
            fold=task.fold,
            step=state.step,
            scores=scores,
            versions=_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        with averaged_weights(state):
            model = Model(description, state.network, plan, task.fingerprint, shareable(task.config))
            save_model(task.folder / to, model)
        write_card(task.folder / to, DataFacts.of(task.manifest, task.training_cases, task.validation_cases))

    def checkpoint(self, state: TrainState) -> None:
        """Write the checkpoint: the first process's state, which is everyone's."""
        if self.share.is_first:
            save_checkpoint(self.task.checkpoint, state, self.task.facts_to_resume)

    def epoch_ended(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Log the epoch's metrics, a line and an event; and where its time went. Then tell who listens to scores."""
        shown = "  ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in metrics.items())
        log.info("fold %d  step %d of %d  %s", self.task.fold, state.step, state.total_steps, shown)
        self.tracked.metrics({**metrics, **self.diagnosis.epoch_times()}, state.step)
        scores = {name.removeprefix("val/"): value for name, value in metrics.items() if name.startswith("val/")}
        if scores:
            self.listener(state.step / state.total_steps, scores)

    def not_finite(self, state: TrainState, step: int) -> TrainingError:
        """Look for the case and the layer."""
        return self.diagnosis.not_finite(self.task.schedule(state), step)


def shareable(config: Config) -> str:
    """Return the configuration as text without the tracking server's address, which may hold a password."""
    return dump_config(config.changed(tracking=config.tracking.changed(uri=None)))


def _versions() -> dict[str, str]:
    """Return the versions of the packages that a model's weights and use depend on."""
    found = {"medseg": __version__}
    for package in ("torch", "monai", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
