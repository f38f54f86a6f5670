"""What the machine can do: device, precision, memory allocator."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode

from pipeline.errors import ConfigError

log = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Compiled = TypeVar("Compiled", bound=torch.nn.Module)

# cuBLAS adds in one order with either of two workspaces (its manual, "Results reproducibility"); this is the faster.
_CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# How far a compiled network's logits may be off, as a share of the largest: operations fused round differently.
COMPILED_ERROR = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

# glibc's mallopt parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

# How those say that memory is used up that raise no error of a type of its own: torch's allocator on a CPU, cuDNN and
# cuBLAS, and the driver, of pinned memory too.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "STATUS_ALLOC_FAILED", "CUDA error: out of memory")

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


def place_to_predict(network: torch.nn.Module, device: torch.device) -> None:
    """Put a network on a device to predict: in the layout of `place`, where that pays.

    An instance norm goes through one channel after another and takes each layer back to the plain layout. Measured with
    the networks here, on a CPU in bf16 and float32: 0.5 to 1.0 of the time without such a norm, 0.9 to 1.25 with one.
    """
    if any(isinstance(module, torch.nn.InstanceNorm3d) for module in network.modules()):
        network.to(device)
    else:
        place(network, device)


def compiled(network: Compiled, example: torch.Tensor, dtype: torch.dtype, backend: str = "inductor") -> Compiled:
    """Return a network compiled by torch.compile, or as it was where that does not pay here, with one warning.

    It is left as it was where compiling fails, gives other logits, or takes longer.

    Args:
        network: on its device, in eval mode; its weights stay shared.
        example: (N, C, *input) on that device; its shape is what is compiled for, its values are not used.
        dtype: in which it computes.
        backend: torch.compile's.
    """
    # It forwards what it does not know, such as a network's margin, to the network.
    faster = cast("Compiled", torch.compile(network, backend=backend))
    image = torch.randn_like(example)
    try:
        before, after = (_timed_pass(one, image, dtype) for one in (network, faster))
    except Exception as error:  # a missing compiler, an operation it does not know, a bug of its own
        why = str(error).strip().partition("\n")[0]
    else:
        error_share = float((before[0] - after[0]).abs().max() / before[0].abs().max().clamp(min=1e-6))
        if error_share > COMPILED_ERROR[dtype]:
            why = f"logits differ by {error_share:.1g} of the largest"
        elif after[1] > before[1]:
            why = f"a batch takes {after[1]:.3g} s, {before[1]:.3g} s without"
        else:
            return faster
    log.warning("going on without compiling: %s", why)
    return network


def compiled_to_train(
    objective: torch.nn.Module, batch: Sequence[Any], dtype: torch.dtype, backend: str = "inductor"
) -> torch.nn.Module:
    """Return what a training step calls compiled by torch.compile, or as it was where that fails here or gives another
    loss, with one warning.

    Whether it pays is not measured: a resumed run would decide otherwise now and then, and no longer have the weights
    of the one that was cut.

    Args:
        objective: returns the loss of a batch; its weights stay shared, its buffers and gradients as they are.
        batch: what it is called with, on its device; an image first.
        dtype: in which it computes.
        backend: torch.compile's.
    """
    start = time.monotonic()
    try:
        faster = cast("torch.nn.Module", torch.compile(objective, backend=backend))
        before, after = (_loss_of_one_step(one, batch, dtype) for one in (objective, faster))
    except Exception as error:  # a missing compiler, an operation it does not know, a bug of its own
        why = " ".join(str(error).split())[:200]
    else:
        if abs(after - before) <= COMPILED_ERROR[dtype] * max(abs(before), 1e-6):
            log.info("compiled in %.0f s", time.monotonic() - start)
            return faster
        why = f"the loss of a batch is {after:.6g}, {before:.6g} without"
    log.warning("training without compiling: %s", why)
    return objective


def _loss_of_one_step(objective: torch.nn.Module, batch: Sequence[Any], dtype: torch.dtype) -> float:
    """Return the loss of a batch, there and back; what batch norms counted of it, and its gradients, are dropped."""
    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    was_training = objective.training
    torch.manual_seed(0)  # dropout is the same
    try:
        with autocast(batch[0].device, dtype):
            loss: torch.Tensor = objective.train()(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()
    finally:
        objective.train(was_training)
        objective.zero_grad(set_to_none=True)
        for name, buffer in objective.named_buffers():
            buffer.copy_(buffers[name])


@torch.inference_mode()
def _timed_pass(network: torch.nn.Module, image: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Return a network's logits in float32, and the seconds of the fastest of three passes after a first."""
    seconds = []
    with autocast(image.device, dtype):
        for _ in range(4):
            start = time.perf_counter()
            logits = network(image)
            if image.is_cuda:
                torch.cuda.synchronize(image.device)
            seconds.append(time.perf_counter() - start)
    return logits.float(), min(seconds[1:])


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let a network compute in `dtype`; float32 needs nothing for it."""
    with ExitStack() as stack:
        if dtype != torch.float32:
            stack.enter_context(torch.autocast(device.type, dtype=dtype))
            if device.type == "cpu" and torch.is_grad_enabled():
                stack.enter_context(_ThinInFloat32())
        yield


class _ThinInFloat32(TorchFunctionMode):
    """Convolves volumes of few planes in float32.

    Where a kernel is longer than the volume along the first axis, oneDNN leaves parts of the kernel's gradient in bf16
    unwritten, or writes beyond it (seen with torch 2.13): the gradient is then what lay in memory, now and then NaN.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, in float32 if it is such a convolution: of so few planes that it costs nothing."""
        kwargs = kwargs or {}
        if func is not torch.conv3d or not _is_thin(*args):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(args[0].float(), *args[1:], **kwargs)


def _is_thin(
    image: torch.Tensor, kernel: torch.Tensor, bias: object = None, stride: Sequence[int] = (1,), *_: object
) -> bool:
    """Tell whether a kernel is longer than what it makes of an image, both (N, C, X, Y, Z), along the first axis."""
    return image.shape[2] < kernel.shape[2] * stride[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether torch raised an error because a GPU's memory, or the process's own, is used up."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return any(sign in str(error) for sign in _OUT_OF_MEMORY)


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


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Have torch take only operators that give the same bits each time, for a while; else it is left as it is.

    An operator without such an implementation raises a RuntimeError that names it.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault(*_CUBLAS_WORKSPACE)
    torch.backends.cudnn.benchmark = False  # it chooses kernels by their time
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def arithmetic_facts(device: torch.device) -> dict[str, Any]:
    """Return what the last bits of a result depend on besides what is computed.

    On a CPU the number of threads decides how a sum is divided, and what the processor can do decides the kernels.
    """
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "version of torch": str(torch.__version__)}
    return {
        "device": f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}",
        "number of threads": torch.get_num_threads(),
        "version of torch": str(torch.__version__),
    }


def threads_per_worker(workers: int) -> int:
    """Return the threads of each of so many processes that share the cores that this one may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


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
