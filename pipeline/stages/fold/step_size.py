"""What a step of a fold's training takes in memory, by the shapes of its tensors alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.hardware import place
from pipeline.networks import Network
from pipeline.networks.fitting import network_for
from pipeline.networks.footprint import StepFootprint, step_footprint
from pipeline.networks.recomputing import recompute_activations
from pipeline.training.distributed import this_share
from pipeline.training.losses import Target
from pipeline.training.optimisation import MOMENTS

if TYPE_CHECKING:
    from pipeline.stages.fold.task import FoldTask

# Share of a GPU's free memory that a step's tensors may have: kernels rearrange what they compute with, and the
# allocator leaves gaps.
GPU_SHARE = 0.8


def step_of(task: FoldTask, dtype: torch.dtype) -> StepFootprint:
    """Return what a step of training takes in this process, found without a device.

    Raises:
        ValueError: the network does not fit the plan.
    """
    section = task.config.training
    # Losses take about as much as one another; some of them compute what has no values here.
    plain = replace(task, config=task.config.changed(training=section.changed(loss="dice_ce", loss_options={})))
    with torch.device("meta"):
        network = network_for(task.plan, task.config.network, task.outputs)
        image, target = blank_batch(task, network)
    place(network, torch.device("meta"))  # where kernels want another layout, copies are made
    objective = plain.objective(network)
    if section.activation_checkpointing:
        recompute_activations(network, nullcontext)
    copies = MOMENTS[section.optimiser] + (section.ema_decay is not None)
    return step_footprint(objective, (image, target), copies=copies, dtype=dtype)


def blank_batch(task: FoldTask, network: Network) -> tuple[Tensor, Target | Tensor]:
    """Return a batch of the size that this process's have: noise, and its first class; on the default device."""
    patch, count = task.plan.patch_size, this_share().batch_size(task.batch_size)
    image = torch.randn(count, len(task.plan.channels), *network.input_size(patch))
    if task.config.task == "denoise":
        return image, torch.randn(count, task.outputs, *patch)
    is_partly = any(case.annotated_classes is not None for case in task.manifest.cases)
    annotated = torch.ones(count, len(task.plan.labels), dtype=torch.bool) if is_partly else None
    return image, Target(torch.zeros(count, *patch, dtype=torch.int64), annotated)
