"""Device, precision and memory of the computation."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.utils.deterministic
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kdsweep.core.errors import CellError, DeviceError, InputError

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Compute:
    """Device and precision of the computation.

    Attributes:
        device: of networks and batches.
        precision: ``fp32``; ``tf32``, on CUDA alone: products of fp32 numbers with 10 bits of fraction; or ``bf16``:
            autocast of the forward passes, on the CPU without depthwise convolutions that are trained.
        deterministic: have CUDA choose algorithms that give the same bits every time, else the fastest ones.
        eval_batch: images per forward outside training; results do not depend on the Student's batch.
    """

    device: torch.device
    precision: str
    deterministic: bool = False
    eval_batch: int = 16

    @contextmanager
    def autocast(self, precision: str | None = None) -> Iterator[None]:
        """Open the context of every forward pass, in this or another precision."""
        wanted, before = precision or self.precision, torch.backends.cudnn.allow_tf32
        _allow_tf32(allowed=wanted == "tf32")
        is_cpu = self.device.type == "cpu"
        depthwise = _DepthwiseInFp32() if is_cpu and wanted == "bf16" else nullcontext()
        try:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=wanted == "bf16"), depthwise:
                yield
        finally:
            _allow_tf32(allowed=before)

    def prepare(self) -> None:
        """Set up the process, before anything else is computed."""
        keep_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # else what names no device, as a loader's thread, would open GPU 0 too
        _allow_tf32(allowed=self.precision == "tf32")  # for backward passes, which run outside of autocast
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is used first
            # Filling each new tensor finds code that reads it before it is written, at the cost of a kernel each.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(self.deterministic)
        # The fastest algorithms are measured, and may be others in another process.
        torch.backends.cudnn.benchmark = self.device.type == "cuda" and not self.deterministic


class _DepthwiseInFp32(TorchFunctionMode):
    """Leave depthwise convolutions in fp32 where a backward pass may follow: on the CPU, that of bf16 is slow.

    oneDNN takes 12 to 22 times as long for it as in fp32 at a stride of 2 (96 channels, 5 x 5, 28 x 28, batch 16, one
    thread without AMX: 43 ms instead of 3), up to 3 times at a stride of 1. Without gradients they run in bf16.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call a function of PyTorch's, with autocast off if it is such a convolution."""
        options = kwargs or {}
        if func is not torch.conv2d or not torch.is_grad_enabled():
            return func(*args, **options)
        return _conv2d(*args, **options)


def _conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **options: Any) -> Tensor:
    is_depthwise = weight.shape[1] == 1 < input.shape[-3]
    if not is_depthwise or weight.dtype != torch.float32:
        return torch.conv2d(input, weight, bias, *args, **options)
    with torch.autocast("cpu", enabled=False):
        return torch.conv2d(input.float(), weight, bias, *args, **options)


class Stopwatch:
    """Measure the seconds that a device works on what it is given from now on, until ``stop``.

    CUDA queues kernels: the host's clock would measure how long it takes to queue them. So events are queued among
    them, and the host waits only where the seconds are read.

    Args:
        device: of the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._start = self._end = self._now()

    def stop(self) -> None:
        """End the measurement."""
        self._end = self._now()

    def seconds(self) -> float:
        """Return the seconds from the start to ``stop``; on CUDA the host waits until the device is there."""
        if self.device.type != "cuda":
            return float(self._end - self._start)
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1000

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _allow_tf32(*, allowed: bool) -> None:
    """Say whether CUDA may compute products of fp32 numbers in TF32, which cuDNN's convolutions do by default."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def usable_precision(precision: str, device: torch.device) -> str:
    """Return a precision, or the next better one that the device has: fp32 for tf32 on the CPU."""
    return "fp32" if precision == "tf32" and device.type != "cuda" else precision


def placed(module: Module, compute: Compute) -> Module:
    """Return the module on the device in channels-last memory, which is faster on CPU and CUDA.

    Every network is placed so, freshly trained or read from a file: the other memory format sums in another order.
    """
    return module.to(compute.device).to(memory_format=torch.channels_last)


def usable_cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Let glibc keep freed activations instead of giving them back each step: 1.4 to 2 times faster on CPU.

    Results stay the same bit for bit. Without glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(ctypes.c_int(-3), ctypes.c_int(1 << 30))  # M_MMAP_THRESHOLD
        mallopt(ctypes.c_int(-1), ctypes.c_int(2**31 - 1))  # M_TRIM_THRESHOLD


def give_back_memory() -> None:
    """Return unused memory to the system, which ``keep_freed_memory`` and CUDA's allocator hold back."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of the device or of this machine was too small."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ["can't allocate memory", "not enough memory", "CUDA error: out of memory"]
    signs += ["_ALLOC_FAILED", "_ALLOCATION_FAILED"]  # of cuBLAS and cuDNN
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def is_device_error(error: BaseException) -> bool:
    """Return whether an error of CUDA's may have left the device unusable for this process, as a failed assert does.

    Kernels are queued: the error is raised by a later call, not by the one that caused it.
    """
    if isinstance(error, DeviceError):
        return True
    while isinstance(error, CellError) and error.__cause__ is not None:
        error = error.__cause__
    signs = ("CUDA error", "cuDNN error", "CUDNN_STATUS")
    found = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return found and not is_out_of_memory(error)


def find_device(name: str) -> torch.device:
    """Return the device of a name: ``cpu``, ``cuda``, ``cuda:NUMBER``, or ``auto``, which is CUDA if there is one.

    One of CUDA has its number: the first where the name has none.

    Raises:
        InputError: the name is not one of these, or the device is absent.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"device={name} is not allowed: it must be auto, cpu, cuda or cuda:NUMBER")
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={name}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use device=cpu or auto"
        )
    return torch.device(kind, int(number or 0)) if kind == "cuda" else torch.device(name)
