"""What a step of training takes in memory, and what there is: what planning sizes patch and batch by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Fingerprint, Plan
from pipeline.data.store import CaseStore
from pipeline.free_memory import available_bytes
from pipeline.hardware import device_name, pick_device, pick_dtype
from pipeline.networks.fitting import fitted_plan
from pipeline.preparation.sizing import Memory
from pipeline.stages.fold.step_size import GPU_SHARE, step_of
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.preprocess import CASES
from pipeline.stages.train import TASKS
from pipeline.stages.workspace import Workspace

GIB = 2**30
# Of a GPU's memory, what CUDA, cuDNN and cuBLAS take for themselves.
GPU_CONTEXT_BYTES = GIB
# Share of a CPU's free memory that a step may take: the store's cases and other programs want some too. And what a
# step takes there of what its tensors have: kernels hold copies, and freed blocks are kept (1.61 to 1.75 measured with
# two U-Nets at 96^3 voxels, in float32 and bf16).
CPU_SHARE, CPU_OVERHEAD = 0.6, 1.75


def memory_for(config: Config, manifest: Manifest, facts: Fingerprint, device: str = "auto") -> Memory:
    """Return the memory that a configuration's training may take, with the probe that measures a step.

    Args:
        config: `preprocessing.memory_gb` is that of a GPU, whether it is here or not; auto: what `device` has.
        manifest: of the data set.
        facts: what its development cases are like.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ConfigError: the device is not there.
    """
    said = config.preprocessing.memory_gb
    chosen = pick_device(device)
    if said == "auto" and chosen.type == "cpu":
        usable, name = int(CPU_SHARE * available_bytes()), "what this CPU's memory has free"
    else:
        total = GIB * said if said != "auto" else torch.cuda.get_device_properties(chosen).total_memory
        usable = int(GPU_SHARE * (total - GPU_CONTEXT_BYTES))
        name = f"a GPU of {total / GIB:.3g} GB" if said != "auto" else f"{device_name(chosen)}, {total / GIB:.0f} GB"
    overhead = CPU_OVERHEAD if said == "auto" and chosen.type == "cpu" else 1.0
    is_gpu = said != "auto" or chosen.type != "cpu"
    dtype = dtype_of(config, chosen)

    def step_bytes(plan: Plan) -> int | None:
        """Return what a step takes under a plan; None where the network does not fit it."""
        try:
            return int(overhead * step_of(task_of(config, manifest, facts, plan), dtype).peak_bytes)
        except ValueError:
            return None

    return Memory(name, usable, is_gpu, step_bytes, _own_width(config.network.options))


def _own_width(options: Mapping[str, Any]) -> int | None:
    """Return the feature maps of the finest level where a network's options say them; what is wrong is said later."""
    widths = options.get("widths")
    width = widths[0] if isinstance(widths, list | tuple) and widths else options.get("width")
    return width if isinstance(width, int) and width > 0 else None


def task_of(
    config: Config, manifest: Manifest, facts: Fingerprint, plan: Plan, device: torch.device | None = None
) -> FoldTask:
    """Return a fold's training under a plan, whether its cases are prepared or not.

    Raises:
        ValueError: the network does not fit the plan.
    """
    workspace, fold = Workspace(config.workspace), min(manifest.folds, default=0)
    fitted = fitted_plan(plan, config.network, config.training.batch_size)
    store = CaseStore(workspace.store(config, manifest.name) / CASES)
    folder = workspace.run(config.name, fold)
    return TASKS[config.task](config, manifest, fitted, facts, store, folder, fold, device or torch.device("meta"))


def is_elsewhere(config: Config, device: torch.device) -> bool:
    """Tell whether the GPU that is planned for is another than the device: there is none, or it has less memory."""
    said = config.preprocessing.memory_gb
    if said == "auto" or device.type != "cuda":
        return said != "auto"
    # Cards are sold by a rounded number, of which some is kept from programs.
    return GIB * said > 1.15 * torch.cuda.get_device_properties(device).total_memory


def dtype_of(config: Config, device: torch.device) -> torch.dtype:
    """Return the type in which a network trains: on this device, or on the GPU that is planned for and not here."""
    if config.preprocessing.memory_gb == "auto" or device.type == "cuda" or config.training.precision != "auto":
        return pick_dtype(config.training.precision, device)
    return torch.bfloat16
