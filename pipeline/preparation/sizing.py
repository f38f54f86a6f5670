"""How large a step of training may be: patch, batch, and the levels and width of a U-Net, for the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod

from pipeline.config import PreprocessingSection
from pipeline.data.plan import Fingerprint, Millimetres, NetworkPlan, Plan, Size, norm_for
from pipeline.pyramid import topology

# nnU-Net's largest patch on a GPU of 8 GB; two of them are a step's batch. Larger ones are for a GPU that holds them.
PATCH_VOXELS = 128**3
SMALLEST_BATCH, LARGEST_BATCH = 2, 4
# A bound of ours, unmeasured: where patches are small, memory alone would admit hundreds.
LARGEST_GPU_BATCH = 12
# A step sees at most this share of the data set's voxels (Isensee et al. 2021, supplementary note 2).
STEP_SHARE = 0.05
# Feature maps of the finest level, the widest first: narrower ones where a patch would be smaller than SMALL_PATCH.
WIDTHS = (32, 24, 16)
SMALL_PATCH = 64**3

SET_HERE = "set in the configuration"

StepBytes = Callable[[Plan], int | None]


@dataclass(frozen=True)
class Memory:
    """What a step of training may take, and what it would.

    Attributes:
        name: what has the memory, for people.
        usable_bytes: for a step, all that it keeps included.
        is_gpu: whether a GPU has it; on a CPU steps are kept small besides, for there time is short.
        step_bytes: what a step of training takes under a plan; None where the network does not fit it.
        width: feature maps that the network has whatever is planned; None: it takes the plan's.
    """

    name: str
    usable_bytes: int
    is_gpu: bool
    step_bytes: StepBytes
    width: int | None = None

    def holds(self, plan: Plan) -> bool:
        """Tell whether a step fits."""
        needed = self.step_bytes(plan)
        return needed is not None and needed <= self.usable_bytes


def sized(plan: Plan, fingerprint: Fingerprint, section: PreprocessingSection, memory: Memory | None) -> Plan:
    """Return a plan with patch, batch and U-Net, each with its reason; what the configuration sets wins.

    The patch is the median case, its longest axes shortened until a batch of two fits the memory; what is left is
    spent on the batch. Where the patch would become small, the U-Net is made narrower first.

    Args:
        plan: everything else; its patch and batch count for nothing.
        fingerprint: of the development cases.
        section: the configuration's wishes.
        memory: what may be taken; None: nothing is known of it, and only voxels are counted.
    """
    whole = _whole_case(fingerprint, plan.spacing_mm)
    own = memory.width if memory else None
    widths = (own,) if own else WIDTHS if memory else WIDTHS[:1]
    found, width = plan, widths[0]
    for width in widths:
        found = _with_patch(plan, fingerprint, section, memory, width)
        if section.patch_size != "auto" or prod(found.patch_size) >= min(prod(whole), SMALL_PATCH):
            break
    if memory and section.patch_size == "auto" and memory.step_bytes(found) is None:
        # The network takes no such patch, whatever the memory: training will say why.
        return sized(plan, fingerprint, section, None)
    found = _with_batch(found, fingerprint, section, memory)
    return _with_network(found, width, _width_reason(width, is_set=own is not None))


def _with_patch(
    plan: Plan, fingerprint: Fingerprint, section: PreprocessingSection, memory: Memory | None, width: int
) -> Plan:
    """Return the plan with its patch, for a U-Net of so many feature maps and the smallest batch."""
    batch = SMALLEST_BATCH if section.batch_size == "auto" else section.batch_size
    if section.patch_size != "auto":
        return _with_network(_changed(plan, SET_HERE, section.patch_size, batch), width, "")
    whole = _whole_case(fingerprint, plan.spacing_mm)
    sizes = list(_shortened(whole, plan.spacing_mm))
    if memory is None or not memory.is_gpu:
        sizes = [size for size in sizes if prod(size) <= PATCH_VOXELS] or sizes[-1:]
    plans = [_with_network(_changed(plan, "", size, batch), width, "") for size in sizes]
    chosen = _first_held(plans, memory) if memory else plans[0]
    median = "x".join(map(str, _median_case(fingerprint, plan.spacing_mm)))
    reason = f"the median case, {median} voxels, rounded up to what a U-Net can halve"
    if chosen.patch_size != whole:
        bound = f"it holds no more than {PATCH_VOXELS:,} voxels"
        if memory and chosen.patch_size != sizes[0]:
            bound = f"a batch of {batch} fits {memory.name}"
            if not memory.holds(chosen):
                bound = f"they are as short as can be, and even so a batch of {batch} does not fit {memory.name}"
        reason += f"; its longest axes shortened until {bound}"
    return _changed(chosen, reason, chosen.patch_size, batch)


def _first_held(plans: Sequence[Plan], memory: Memory) -> Plan:
    """Return the first of ever smaller plans that fits, by halving the list; the last where none does."""
    low, high = 0, len(plans) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if memory.holds(plans[middle]) else (middle + 1, high)
    return plans[low]


def _with_batch(plan: Plan, fingerprint: Fingerprint, section: PreprocessingSection, memory: Memory | None) -> Plan:
    """Return the plan with as many patches a step as memory and data set admit."""
    if section.batch_size != "auto":
        return _reasoned(plan.changed(batch_size=section.batch_size), "batch_size", SET_HERE)
    if memory is not None and memory.is_gpu:
        seen = STEP_SHARE * fingerprint.cases * prod(_median_case(fingerprint, plan.spacing_mm))
        most = min(max(int(seen / prod(plan.patch_size)), SMALLEST_BATCH), LARGEST_GPU_BATCH)
        bounds = f"{SMALLEST_BATCH} to {LARGEST_GPU_BATCH}, and no more than {STEP_SHARE:.0%} of the data set's voxels"
    else:
        most = min(max(2 * PATCH_VOXELS // prod(plan.patch_size), SMALLEST_BATCH), LARGEST_BATCH)
        bounds = (
            f"{SMALLEST_BATCH} to {LARGEST_BATCH}, and no more than {2 * PATCH_VOXELS:,} voxels: more small patches "
            "make a step dearer, not better"
        )
    reason = f"as many as fit {memory.name}, but {bounds}" if memory else f"as many as fit, but {bounds}"
    batches = [plan.changed(batch_size=n) for n in range(most, SMALLEST_BATCH - 1, -1)]
    chosen = _first_held(batches, memory) if memory else batches[0]
    return _reasoned(chosen, "batch_size", reason)


def _with_network(plan: Plan, width: int, reason: str) -> Plan:
    """Return the plan with the U-Net that fits its patch and batch; with none where the patch cannot be halved."""
    try:
        kernels, strides = topology(plan.patch_size, plan.spacing_mm)
    except ValueError:
        return _reasoned(plan.changed(network=None), "network", "the patch is too small to be halved")
    network = NetworkPlan(width=width, kernels=kernels, strides=strides, norm=norm_for(plan.batch_size))
    levels = f"{len(kernels)} levels: an axis is halved while its voxels are among the shortest and 4 of them are left"
    norm = f"{network.norm} norm for batches of {plan.batch_size}"
    return _reasoned(plan.changed(network=network), "network", "; ".join([levels, reason, norm]))


def _width_reason(width: int, *, is_set: bool) -> str:
    """Say why the U-Net is as wide as it is."""
    if is_set:
        return f"{width} feature maps, {SET_HERE}"
    if width == WIDTHS[0]:
        return f"{width} feature maps, as nnU-Net has"
    return f"{width} feature maps, for with {WIDTHS[0]} only small patches would fit"


def _changed(plan: Plan, reason: str, patch: Size, batch: int) -> Plan:
    """Return the plan with another patch and batch, and the reason for the patch."""
    return _reasoned(plan.changed(patch_size=patch, batch_size=batch), "patch_size", reason)


def _reasoned(plan: Plan, name: str, reason: str) -> Plan:
    """Return the plan with a field's reason."""
    return plan.changed(reasons={**plan.reasons, name: reason})


def _median_case(fingerprint: Fingerprint, spacing: Millimetres) -> Size:
    """Return the voxels of the median case on the plan's grid."""
    x, y, z = (max(1, round(mm / step)) for mm, step in zip(fingerprint.extent_mm["50"], spacing, strict=True))
    return x, y, z


def _whole_case(fingerprint: Fingerprint, spacing: Millimetres) -> Size:
    """Return the median case rounded up to what a U-Net can halve."""
    x, y, z = (ceil(n / _multiple(n)) * _multiple(n) for n in _median_case(fingerprint, spacing))
    return x, y, z


def _shortened(whole: Size, spacing: Millimetres) -> Iterator[Size]:
    """Yield ever smaller patches: each with the last one's longest axis, in mm, a step shorter."""
    size = list(whole)
    yield whole
    while max(size) > 8:
        longest = max(range(3), key=lambda axis: size[axis] * spacing[axis] if size[axis] > 8 else 0.0)
        size[longest] -= _multiple(size[longest] - 1)
        yield size[0], size[1], size[2]


def _multiple(length: int) -> int:
    """Return what an axis must be a multiple of, so that it can be halved down to about 4 voxels."""
    steps = ((8, 1), (24, 4), (64, 8), (128, 16))
    return next((multiple for below, multiple in steps if length < below), 32)
