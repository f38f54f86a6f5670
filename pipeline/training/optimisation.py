"""OPTIMISERS and SCHEDULES: how a gradient becomes a step, and the course of the learning rate over a budget.

A builder's keyword-only parameters are its options in the YAML; the others have defaults that suit it, which hold
where the configuration says null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field

from pipeline import options as _options
from pipeline.config import TrainingSection
from pipeline.networks.contract import ENCODER, Network

Groups = list[dict[str, Any]]
Schedule = Callable[[int, int], float]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
AtLeastOne = Annotated[float, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


def adamw(
    groups: Groups,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    *,
    beta1: BelowOne = 0.9,
    beta2: BelowOne = 0.999,
) -> torch.optim.Optimizer:
    """Build AdamW (Loshchilov and Hutter 2019), whose weight decay is apart from the gradient."""
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, fused=True)


def sgd(
    groups: Groups,
    learning_rate: float = 1e-2,
    weight_decay: float = 3e-5,
    *,
    momentum: BelowOne = 0.99,
    nesterov: bool = True,
) -> torch.optim.Optimizer:
    """Build SGD with momentum, by default Nesterov's; its defaults are nnU-Net's (Isensee et al. 2021)."""
    optimiser = torch.optim.SGD(
        groups,
        lr=learning_rate,
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        weight_decay=weight_decay,
        fused=True,
    )
    if momentum > 0:
        # A fused first step that overflows fp16 would leave its momenta behind as memory that nobody has written (torch
        # 2.13). From zero they become the first gradient, as torch begins them.
        for parameter in (parameter for group in optimiser.param_groups for parameter in group["params"]):
            optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimiser


def cosine(peak: float, warmup_fraction: float = 0.05) -> Schedule:
    """Return a linear rise to `peak`, then a half cosine, 0 as the budget ends (Loshchilov and Hutter 2017)."""
    return _with_warmup(peak, warmup_fraction, lambda progress: 0.5 * (1 + math.cos(math.pi * progress)))


def poly(peak: float, warmup_fraction: float = 0.05, *, power: Positive = 0.9) -> Schedule:
    """Return a linear rise to `peak`, then (1 - progress)^power, as DeepLab and nnU-Net do."""
    return _with_warmup(peak, warmup_fraction, lambda progress: (1 - progress) ** power)


def one_cycle(
    peak: float, warmup_fraction: float = 0.3, *, div_factor: AtLeastOne = 25.0, final_div_factor: AtLeastOne = 1e4
) -> Schedule:
    """Return half a cosine from `peak / div_factor` up to `peak`, and half a cosine down to `peak / div_factor /
    final_div_factor` (Smith and Topin 2018), with torch's defaults.

    Of the two that they cycle only the learning rate is: momentum stays what the optimiser's options say.
    """
    start = 1 / div_factor
    end = start / final_div_factor

    def rate(step: int, total_steps: int) -> float:
        warmup = round(warmup_fraction * total_steps)
        if step < warmup:
            return peak * _eased(start, 1.0, step / warmup)
        return peak * _eased(1.0, end, (step - warmup) / max(1, total_steps - warmup))

    return rate


def constant(peak: float, warmup_fraction: float = 0.05) -> Schedule:
    """Return a linear rise to `peak`, kept to the end."""
    return _with_warmup(peak, warmup_fraction, lambda progress: 1.0)


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw, "sgd": sgd}
# Copies of the weights that each keeps.
MOMENTS = {"adamw": 2, "sgd": 1}

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": cosine,
    "poly": poly,
    "one_cycle": one_cycle,
    "constant": constant,
}


def check_optimiser(name: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every problem of an optimiser's name and options as (key, message)."""
    return _options.check_options(OPTIMISERS, name, options)


def check_schedule(name: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every problem of a schedule's name and options as (key, message)."""
    return _options.check_options(SCHEDULES, name, options)


def build_optimiser(network: Network, section: TrainingSection) -> torch.optim.Optimizer:
    """Build the optimiser; norms and biases are not decayed, and an encoder may learn at a rate of its own.

    Raises:
        ValueError: the name or an option is wrong, or the network has no encoder.
    """
    given = _options.validated_options(OPTIMISERS, section.optimiser, section.optimiser_options)
    rates = {"learning_rate": section.learning_rate, "weight_decay": section.weight_decay}
    given |= {name: value for name, value in rates.items() if value is not None}
    return OPTIMISERS[section.optimiser](_groups(network, section.encoder_learning_rate_factor), **given)


def build_schedule(section: TrainingSection, optimiser: torch.optim.Optimizer) -> Schedule:
    """Build (step, total steps) -> learning rate, whose peak is the one that the optimiser was built with.

    Raises:
        ValueError: the name or an option is wrong.
    """
    given = _options.validated_options(SCHEDULES, section.schedule, section.schedule_options)
    if section.warmup_fraction is not None:
        given["warmup_fraction"] = section.warmup_fraction
    return SCHEDULES[section.schedule](optimiser.defaults["lr"], **given)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group of parameters, each times its own factor."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


def _groups(network: Network, encoder_factor: float) -> Groups:
    """Return the parameters that are decayed and those that are not, the encoder's apart where its rate is."""
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    if encoder_factor == 1.0:
        return _decayed_or_not([parameter for _, parameter in named], 1.0)
    encoder = [parameter for name, parameter in named if name.startswith(ENCODER)]
    if not encoder:
        raise ValueError("encoder_learning_rate_factor: the network has no encoder that is told apart; leave it 1")
    others = [parameter for name, parameter in named if not name.startswith(ENCODER)]
    return [*_decayed_or_not(encoder, encoder_factor), *_decayed_or_not(others, 1.0)]


def _decayed_or_not(parameters: list[torch.nn.Parameter], rate_factor: float) -> Groups:
    """Return parameters in two groups: kernels, and norms and biases, which are not decayed."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "rate_factor": rate_factor},
        {"params": [p for p in parameters if p.ndim <= 1], "rate_factor": rate_factor, "weight_decay": 0.0},
    ]


def _with_warmup(peak: float, warmup_fraction: float, course: Callable[[float], float]) -> Schedule:
    """Return a schedule that rises for a share of the budget and follows `course`, of progress 0..1, for the rest."""

    def rate(step: int, total_steps: int) -> float:
        warmup = round(warmup_fraction * total_steps)
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * course((step - warmup) / max(1, total_steps - warmup))

    return rate


def _eased(start: float, end: float, progress: float) -> float:
    """Return what lies between two values, along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
