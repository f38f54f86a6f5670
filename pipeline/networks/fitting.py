"""What a plan asks of a network, and what a network asks of a plan: a patch of a legal size."""

from __future__ import annotations

import torch

from pipeline.config import NetworkSection, Output, Task
from pipeline.data.plan import Plan, norm_for
from pipeline.networks import Network, build_network
from pipeline.networks.contract import NetworkTask, Size, as_size
from pipeline.pyramid import topology

# Planes that a step of a 2-D network has at most: more make it dearer, not better.
MOST_PLANES = 32


def outputs_of(task: Task, plan: Plan, output: Output = "softmax") -> int:
    """Return how many channels a network returns.

    To segment, the plan's classes, or with regions one for each label but the background; to denoise, the image's own
    channels.
    """
    if task == "denoise":
        return len(plan.channels)
    return len(plan.labels) - (output == "regions")


def network_task(plan: Plan, section: NetworkSection, outputs: int | None = None) -> NetworkTask:
    """Return what a network is built for.

    Args:
        plan: channels, labels, patch and spacing.
        section: says whether the network is a 2-D one, which leaves the plan's thickest axis alone.
        outputs: channels of what it returns; None: the plan's classes.
    """
    flat_axis = max(range(3), key=lambda axis: (plan.spacing_mm[axis], axis)) if section.spatial_dims == 2 else None
    return NetworkTask(
        in_channels=len(plan.channels),
        num_classes=len(plan.labels) if outputs is None else outputs,
        patch_size=plan.patch_size,
        spacing_mm=plan.spacing_mm,
        flat_axis=flat_axis,
        planned=plan.network,
    )


def network_for(plan: Plan, section: NetworkSection, outputs: int | None = None) -> Network:
    """Build the network that a plan and a configuration speak of, with random weights.

    Raises:
        ValueError: its name or an option is wrong, or it does not fit the plan.
    """
    return build_network(section.name, section.options, network_task(plan, section, outputs))


def fitted_plan(plan: Plan, section: NetworkSection, batch_size: int | None = None) -> Plan:
    """Return the plan with a patch that the network takes, and the reason.

    A 2-D network gets patches one voxel thick, and more of them; any network the next size that its pooling divides
    or its valid convolutions can yield. Where planning chose a norm, it is chosen anew for another batch.

    Args:
        plan: patch, batch, spacing and U-Net.
        section: the network.
        batch_size: patches a step, where the configuration says; None: the plan's.

    Raises:
        ValueError: as `network_for`.
    """
    flat_axis = network_task(plan, section).flat_axis
    fitted = plan if flat_axis is None else _of_planes(plan, flat_axis)
    if batch_size is not None and fitted.network is not None:
        fitted = with_batch(fitted, batch_size, "training.batch_size says so")
    while (legal := _legal_patch(fitted, section)) != fitted.patch_size:
        fitted = _with(fitted, "patch_size", legal, f"rounded up to what {section.name} can yield")
    return fitted


def _legal_patch(plan: Plan, section: NetworkSection) -> Size:
    """Return the smallest patch, at least the plan's, that the network yields; none of its weights is made."""
    with torch.device("meta"):
        network = network_for(plan, section)
    return network.output_size(network.input_size(plan.patch_size))


def _of_planes(plan: Plan, axis: int) -> Plan:
    """Return a plan whose patches are planes, as many in a batch as keep its voxels but for a bound."""
    fitted, why = plan, f"one plane across axis {axis}, for the network is a 2-D one"
    if plan.patch_size[axis] != 1:
        patch = as_size(1 if a == axis else n for a, n in enumerate(plan.patch_size))
        planes = min(plan.batch_size * plan.patch_size[axis], MOST_PLANES)
        fitted = _with(plan, "patch_size", patch, why)
        fitted = with_batch(fitted, planes, f"planes for patches, at most {MOST_PLANES}")
    network = fitted.network
    if network is None or all(size[axis] == 1 for size in (*network.kernels, *network.strides)):
        return fitted
    kernels, strides = topology(fitted.patch_size, plan.spacing_mm, flat_axis=axis)
    return _with(fitted, "network", network.changed(kernels=kernels, strides=strides), why)


def with_batch(plan: Plan, batch_size: int, reason: str) -> Plan:
    """Return a plan with another batch, and the norm that goes with it."""
    if batch_size == plan.batch_size:
        return plan
    fitted = _with(plan, "batch_size", batch_size, reason)
    if fitted.network is None or norm_for(batch_size) == fitted.network.norm:
        return fitted
    network = fitted.network.changed(norm=norm_for(batch_size))
    return _with(fitted, "network", network, f"{network.norm} norm for batches of {batch_size}")


def _with(plan: Plan, name: str, value: object, reason: str) -> Plan:
    """Return a plan with another value, and why it has it after why it had the old one."""
    earlier = plan.reasons.get(name)
    return plan.changed(
        **{name: value, "reasons": {**plan.reasons, name: f"{earlier}; {reason}" if earlier else reason}}
    )
