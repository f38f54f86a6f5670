"""What a case will take in memory, known before its first window.

The size of the windows and their overlap belong to the model and stay; what may change is how many run at once, and
where the unfinished planes lie. So the labels do not depend on the memory there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pipeline.errors import ResourceError
from pipeline.free_memory import available_bytes, resident_bytes
from pipeline.inference.windows.agreement import agreement_bytes
from pipeline.inference.windows.ring import plane_bytes, planes_at_once
from pipeline.inference.windows.streaming import tiling_of
from pipeline.inference.windows.tiling import Size, Windowing
from pipeline.networks.footprint import footprint

if TYPE_CHECKING:
    from pipeline.networks import Network

# What a forward pass takes over its live tensors: gaps that the allocator leaves between blocks of changing sizes, and
# the kernels' own room. Measured: 1.1 to 1.4 on a CPU, in float32 and bf16, at 3 and 25 classes.
SLACK = 1.3

# What torch takes on top with its first window: its tracer (70 MB), kernels compiled for these shapes. Measured too.
RUNTIME_BYTES = 2**27

# Finished planes are there three times over: divided, in the order of the stream's axis, and in the labelling's.
COPIES_OF_PLANES = 3


@dataclass(frozen=True)
class MemoryPlan:
    """What a case takes, in bytes, at most.

    Attributes:
        process: the process as it is before the case, its libraries and, on a CPU, the weights; and what torch takes
            on top with the first window.
        input: the case's channels as they were read.
        image: the channels on the plan's grid.
        output: the label map on the native grid.
        ring: unfinished planes of logits; in memory or on disk.
        ring_in_memory: what of them is in memory where they lie on disk: one window's, and what is missing of weights.
        planes: finished planes on their way.
        activations: what a batch of windows takes in the network.
        agreement: what is kept to tell how far an ensemble agrees.
        postprocessing: what the model's rules take, once all windows are done.
        weights: of all networks, on the device.
        weight_copies: those that autocast keeps in its own type, of one network at a time.
        windows: how many there are, skipped ones included.
        slabs: windows run in so many groups along the longest axis.
        batch: windows a forward pass.
        ring_on_disk: where the unfinished planes lie.
        on_gpu: whether the network runs on a GPU, and has its ring there.
    """

    process: int
    input: int
    image: int
    output: int
    ring: int
    ring_in_memory: int
    planes: int
    activations: int
    agreement: int
    postprocessing: int
    weights: int
    weight_copies: int
    windows: int
    slabs: int
    batch: int
    ring_on_disk: bool
    on_gpu: bool

    @property
    def peak_ram_bytes(self) -> int:
        """The most that the process takes, all parts at once but postprocessing, which comes after the windows."""
        windows = self.planes + self.ring_in_memory * self.ring_on_disk
        if not self.on_gpu:
            windows += self.ring * (not self.ring_on_disk) + self.activations + self.weight_copies + self.agreement
        return self.process + self.input + self.image + self.output + max(windows, self.postprocessing)

    @property
    def peak_vram_bytes(self) -> int:
        """The most that it takes on a GPU; 0 without one."""
        ring = 0 if self.ring_on_disk else self.ring + self.planes
        return (self.weights + self.weight_copies + self.activations + self.agreement + ring) * self.on_gpu

    def as_text(self) -> str:
        """Return the plan for people: the peak, and the parts that make it up."""
        parts = {
            "the process": self.process,
            "input": self.input,
            "image on the plan's grid": self.image,
            "label map": self.output,
            "unfinished planes" + " (on disk)" * self.ring_on_disk: self.ring,
            "finished planes": self.planes,
            f"{self.batch} windows at once" if self.batch > 1 else "a window": self.activations,
            "weights": self.weights,
        }
        if self.agreement:
            parts["the networks' agreement"] = self.agreement
        if self.postprocessing:
            parts["postprocessing, after the windows"] = self.postprocessing
        gpu = f", on the GPU {_gb(self.peak_vram_bytes)}" if self.on_gpu else ""
        head = f"peak memory {_gb(self.peak_ram_bytes)}{gpu}; {self.windows} windows in {self.slabs} slabs"
        return head + "; " + ", ".join(f"{name} {_gb(size)}" for name, size in parts.items())


def plan_memory(
    networks: Sequence[Network],
    windowing: Windowing,
    *,
    image_shape: tuple[int, int, int, int],
    native_shape: Size,
    input_bytes: int,
    postprocessing_bytes: int,
    batch: int,
    dtype: torch.dtype,
    limit_bytes: int | None = None,
    process_bytes: int | None = None,
) -> MemoryPlan:
    """Plan the memory of a case: the largest batch that fits, else the unfinished planes on disk.

    Args:
        networks: on their device.
        windowing: how the volume is cut and put together.
        image_shape: (C, X, Y, Z) on the plan's grid.
        native_shape: of the label map.
        input_bytes: of the channels as they are read, while they are held beside the image on the plan's grid.
        postprocessing_bytes: of postprocessing, beside the label map.
        batch: windows a forward pass that would keep the device busy.
        dtype: the networks compute in it.
        limit_bytes: what the process may take; None: what it takes now and what is free.
        process_bytes: what it takes without the case; None: what it takes now.

    Raises:
        ResourceError: the case does not fit, window by window and with the planes on disk.
    """
    process = resident_bytes() if process_bytes is None else process_bytes
    limit = limit_bytes if limit_bytes is not None else resident_bytes() + available_bytes()
    device = next(networks[0].parameters()).device
    largest = _largest(networks, windowing, image_shape, batch, dtype)
    largest = replace(
        largest,
        process=process + RUNTIME_BYTES,
        input=input_bytes,
        output=math.prod(native_shape),
        postprocessing=postprocessing_bytes,
    )
    gpu_limit = 0
    if device.type == "cuda":
        # Blocks that torch has kept are for the case too, and the weights are there already; what else lies there is
        # not its own: in training the optimiser, the mean of the weights, the cases.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        gpu_limit = torch.cuda.mem_get_info(device)[0] + kept + largest.weights
    for plan in _ever_smaller(largest):
        if plan.peak_ram_bytes <= limit and plan.peak_vram_bytes <= gpu_limit:
            return plan
    # The last is the smallest.
    free = f"{_gb(limit)}" + f" and {_gb(gpu_limit)} on the GPU" * plan.on_gpu
    raise ResourceError(
        f"a volume of {'x'.join(map(str, native_shape))} voxels does not fit in {free}, even window by window with the "
        f"unfinished planes on disk: {plan.as_text()}; give --max-memory more, or take a machine with more"
    )


def _ever_smaller(plan: MemoryPlan) -> Iterator[MemoryPlan]:
    """Yield a plan, and others that take less and less."""
    per_window = plan.activations // plan.batch
    batch = plan.batch
    while batch >= 1:
        plan = replace(plan, batch=batch, activations=per_window * batch)
        yield plan
        batch //= 2
    yield replace(plan, ring_on_disk=True)


def _largest(
    networks: Sequence[Network],
    windowing: Windowing,
    image_shape: tuple[int, int, int, int],
    batch: int,
    dtype: torch.dtype,
) -> MemoryPlan:
    """Return the plan of all that lies in windows and planes, everything in memory."""
    channels, *voxels = image_shape
    x, y, z = voxels
    tiling = tiling_of(networks, (x, y, z), windowing)
    own = [footprint(network, channels, network.input_size(windowing.window)) for network in networks]
    cast_bytes = 0 if dtype == torch.float32 else max(one.weight_bytes for one in own) * dtype.itemsize // 4
    window_bytes = max(one.activation_bytes for one in own) * dtype.itemsize / 4
    logits = own[0].num_logits
    return MemoryPlan(
        process=0,
        input=0,
        image=4 * math.prod(image_shape),
        output=0,
        ring=(logits + 1) * tiling.depth * plane_bytes(tiling, 1),
        ring_in_memory=4 * logits * math.prod(len(axis.weights) for axis in tiling.axes)
        + tiling.depth * plane_bytes(tiling, 1),
        planes=COPIES_OF_PLANES * planes_at_once(tiling, logits) * plane_bytes(tiling, logits),
        activations=batch * int(SLACK * window_bytes),
        agreement=agreement_bytes(tiling, len(networks), logits),
        postprocessing=0,
        weight_copies=cast_bytes,
        weights=sum(one.weight_bytes for one in own),
        windows=tiling.count,
        slabs=len(tiling.slabs),
        batch=batch,
        ring_on_disk=False,
        on_gpu=next(networks[0].parameters()).device.type == "cuda",
    )


def _gb(size: int) -> str:
    """Return bytes for people."""
    return f"{size / 2**30:.2f} GB"
