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

    The precision is ``fp32``; ``tf32``, on CUDA alone: products of fp32 numbers with 10 bits of fraction; or ``bf16``:
    autocast of the forward passes, on the CPU without depthwise convolutions that are trained.
    """

    device: torch.device
    precision: str
    deterministic: bool = False  # CUDA chooses algorithms that give the same bits every time, else the fastest ones
    eval_batch: int = 16  # images per forward outside training; results do not depend on the Student's batch

    @contextmanager
    def autocast(self, precision: str | None = None) -> Iterator[None]:
        """Open the context of every forward pass, in this or another precision."""
        precision, before = precision or self.precision, torch.backends.cudnn.allow_tf32
        is_rounded = precision == "bf16"
        depthwise = _DepthwiseInFp32() if self.device.type == "cpu" and is_rounded else nullcontext()
        _allow_tf32(allowed=precision == "tf32")
        try:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_rounded), depthwise:
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
    """Leave depthwise convolutions in fp32 where a backward pass may follow.

    On the CPU, oneDNN takes up to 22 times as long for that pass in bf16 as in fp32. Others run in bf16.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call a function of PyTorch's, with autocast off if it is such a convolution."""
        is_trained = func is torch.conv2d and torch.is_grad_enabled()
        return (_conv2d if is_trained else func)(*args, **(kwargs or {}))


def _conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **options: Any) -> Tensor:
    is_depthwise = weight.shape[1] == 1 < input.shape[-3]
    if not is_depthwise or weight.dtype != torch.float32:
        return torch.conv2d(input, weight, bias, *args, **options)
    with torch.autocast("cpu", enabled=False):
        return torch.conv2d(input.float(), weight, bias, *args, **options)


class Stopwatch:
    """Measure the seconds of a device's work from now on until ``stop``.

    CUDA queues kernels: the host's clock would measure how long it takes to queue them. So events are queued among
    them, and the host waits only where the seconds are read.
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
    """Return the module on the device in channels-last memory, like all: another format sums in another order."""
    return module.to(compute.device).to(memory_format=torch.channels_last)


def usable_cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Let glibc keep freed activations instead of giving them back each step: 1.4 to 2 times faster on CPU."""
    _call_glibc("mallopt", -3, 1 << 30)  # M_MMAP_THRESHOLD
    _call_glibc("mallopt", -1, 2**31 - 1)  # M_TRIM_THRESHOLD


def give_back_memory() -> None:
    """Return unused memory to the system, which ``keep_freed_memory`` and CUDA's allocator hold back."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *numbers: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*map(ctypes.c_long, numbers))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of the device or of this machine was too small."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    of_cuda = ("CUDA error: out of memory", "_ALLOC_FAILED", "_ALLOCATION_FAILED")  # the latter of cuBLAS and cuDNN
    return _says(error, "can't allocate memory", "not enough memory", *of_cuda)


def is_device_error(error: BaseException) -> bool:
    """Return whether an error of CUDA's may have left the device unusable for this process, as a failed assert does."""
    if isinstance(error, DeviceError):
        return True
    while isinstance(error, CellError) and error.__cause__ is not None:
        error = error.__cause__
    return _says(error, "CUDA error", "cuDNN error", "CUDNN_STATUS") and not is_out_of_memory(error)


def _says(error: BaseException, *signs: str) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def find_device(name: str) -> torch.device:
    """Return the device of a name: ``cpu``, ``cuda`` (the first), ``cuda:NUMBER``, or ``auto``: CUDA if there is one.

    Raises:
        InputError: the name is not one of these, or the device is absent.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"device={name} is not allowed: it must be auto, cpu, cuda or cuda:NUMBER")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    number, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    if number >= count:
        raise InputError(f"device={name}: PyTorch sees {count} CUDA devices; use device=cpu or auto")
    return torch.device("cuda", number)
