"""LOSSES: every loss by its name in the YAML; a builder of options that returns (logits, target) -> scalar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline import options as _options
from pipeline.training.losses.objective import Objective
from pipeline.training.losses.overlap import Loss, cross_entropy, dice_ce, mean_squared_error
from pipeline.training.losses.target import Target

__all__ = ["LOSSES", "Loss", "Objective", "Target", "build_loss", "check_options", "mean_squared_error"]

LOSSES: dict[str, Callable[..., Loss]] = {
    "dice_ce": dice_ce,
    "cross_entropy": cross_entropy,
}


def build_loss(name: str, options: Mapping[str, Any]) -> Loss:
    """Build a loss of the table: (logits (N, K, X, Y, Z), target (N, X, Y, Z) int64) -> scalar, 0 at best.

    Raises:
        ValueError: the name or an option is wrong.
    """
    return LOSSES[name](**_options.validated_options(LOSSES, name, options))


def check_options(name: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every problem of a loss's name and options as (key, message)."""
    return _options.check_options(LOSSES, name, options)
