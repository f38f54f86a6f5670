"""How commands read their configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.config_loading import OptionChecks


def load(path: Path, overrides: list[str] | None, workspace: Path | None) -> Config:
    """Read a configuration with its command-line overrides; a network's and a loss's options are checked with it."""
    from pipeline.config_loading import load_config

    config = load_config(path, overrides or [], option_checks)
    return config if workspace is None else config.changed(workspace=workspace.absolute())


def option_checks() -> OptionChecks:
    """Return who knows the options of what stands in tables; costs the import of torch."""
    from pipeline.networks import check_options as of_network
    from pipeline.training.losses import check_options as of_loss
    from pipeline.training.optimisation import check_optimiser, check_schedule

    return {
        "network.name": of_network,
        "training.loss": of_loss,
        "training.optimiser": check_optimiser,
        "training.schedule": check_schedule,
    }
