"""LOSSES: every loss by its name in the YAML; a builder of options that returns (logits, Truth) -> scalar.

Each of them respects what is not known: voxels that are to be ignored, classes not annotated in a case, regions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline import options as _options
from pipeline.training.losses.boundary import boundary
from pipeline.training.losses.centreline import cldice
from pipeline.training.losses.objective import Objective
from pipeline.training.losses.overlap import dice_ce, dice_focal, generalised_dice, mean_squared_error, tversky
from pipeline.training.losses.target import Target
from pipeline.training.losses.truth import Truth, truth_of
from pipeline.training.losses.voxelwise import Loss, check_class_weights, cross_entropy, focal

__all__ = [
    "LOSSES",
    "Loss",
    "Objective",
    "Target",
    "Truth",
    "build_loss",
    "check_class_weights",
    "check_options",
    "mean_squared_error",
    "truth_of",
]

LOSSES: dict[str, Callable[..., Loss]] = {
    "dice_ce": dice_ce,
    "cross_entropy": cross_entropy,
    "dice_focal": dice_focal,
    "focal": focal,
    "tversky": tversky,
    "generalised_dice": generalised_dice,
    "boundary": boundary,
    "cldice": cldice,
}


def build_loss(name: str, options: Mapping[str, Any]) -> Loss:
    """Build a loss of the table: (logits (N, K, X, Y, Z), Truth) -> scalar, 0 at best.

    Raises:
        ValueError: the name or an option is wrong.
    """
    return LOSSES[name](**_options.validated_options(LOSSES, name, options))


def check_options(name: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every problem of a loss's name and options as (key, message)."""
    return _options.check_options(LOSSES, name, options)
