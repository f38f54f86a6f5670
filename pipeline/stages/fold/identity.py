"""What makes a training another one: its configuration, and the model with whose weights it begins."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Config, TrainingSection
from pipeline.errors import ModelError
from pipeline.records import digest_of
from pipeline.stages.initial_weights import find_initial


def initial_model_of(config: Config, fold: int) -> Path | None:
    """Return the model, bundle or file with whose weights a fold's training begins; None: with random ones.

    Raises:
        ModelError: there is no such model.
    """
    if config.training.init_from is None:
        return None
    name = config.training.init_from.replace("{fold}", str(fold))
    try:
        return find_initial(name, config.workspace, config.tracking.uri)
    except ModelError as error:
        raise ModelError(f"training.init_from: {error}") from error


def configuration_digest(config: Config) -> str:
    """Return a digest of what the weights depend on besides the data: not of where they are kept and tracked.

    Nor of where the initial model lies, nor of the memory that was planned for: the model's own digest and the plan's
    are among the facts.
    """
    sections = {"seed", "task", "preprocessing", "network", "training", "inference"}
    left_out = {"preprocessing": {"memory_gb"}, "training": {"init_from", "workers", "stall_minutes"}}
    if not config.training.deterministic:  # runs that know nothing of it go on
        left_out["training"].add("deterministic")
    kept = config.model_dump(mode="json", include=sections, exclude=left_out)
    # How often a checkpoint is written changes nothing; runs that had it in their digest go on by its default.
    kept["training"]["checkpoint_minutes"] = TrainingSection().checkpoint_minutes
    return digest_of(kept)
