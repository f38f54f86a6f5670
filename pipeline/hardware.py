"""What the machine can do: device, precision, memory allocator."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch

from pipeline.errors import ConfigError

log = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Compiled = TypeVar("Compiled", bound=torch.nn.Module)

# glibc's mallopt parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

# Linux' account of this process's memory.
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name; "auto" is the first CUDA device, else the CPU.

    Raises:
        ConfigError: the name is unknown, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: unknown; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {name!r}: no CUDA device is available to torch {torch.__version__}; use --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: there are {torch.cuda.device_count()}, the first is cuda:0")
    return device


def pick_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type in which a network computes under autocast.

    auto: bf16 where the hardware multiplies in it, fp16 on older GPUs, else float32. bf16 that is merely emulated is
        slower than float32.
    """
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Tell whether the CPU multiplies in bf16 itself (AVX-512 BF16 or AMX), as Linux reports it."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return False
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def place(network: torch.nn.Module, device: torch.device) -> None:
    """Put a network on a device to be trained, the kernels of its 3-D convolutions channels last: the layout that they
    want; without it each of them rearranges its input.
    """
    network.to(device)
    for weight in network.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)


def compiled(network: Compiled, example: torch.Tensor, dtype: torch.dtype) -> Compiled:
    """Return a network compiled by torch.compile, or as it was where that does not work here, with one warning.

    Args:
        network: on its device, in eval mode; its weights stay shared.
        example: (N, C, *input) on that device, for a first pass, in which it is compiled.
        dtype: in which it computes.
    """
    # It forwards what it does not know, such as a network's margin, to the network.
    faster = cast("Compiled", torch.compile(network))
    try:
        with torch.inference_mode(), autocast(example.device, dtype):
            faster(example)
    except Exception as error:  # a missing compiler, an operation it does not know, a bug of its own
        log.warning("going on without compiling: %s", str(error).strip().partition("\n")[0])
        return network
    return faster


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context in which a network computes in `dtype`; float32 needs none."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether torch raised an error because a GPU's memory, or the process's own, is used up."""
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory in the process instead of giving every large block back to the kernel.

    Without it each forward pass faults its activations in again: about a third of the CPU time at 96^3 voxels. It holds
    for the process, and does nothing where the C library is another.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 64 * 2**20)


def device_name(device: torch.device) -> str:
    """Return what a device is for people: cpu, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def give_freed_memory_back() -> None:
    """Give the kernel what the process has freed, so that what it did before does not count as what it does next."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure anew what `peak_memory_bytes` returns."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")  # man 5 proc: resets the peak of the resident set


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the most memory in use since `reset_peak_memory`; None where the system does not tell.

    On a GPU what torch had allocated there; on a CPU the resident set of the whole process, libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not os.access(_CLEAR_REFS, os.W_OK):
        return None
    peak = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(peak[1]) * 1024 if peak else None
