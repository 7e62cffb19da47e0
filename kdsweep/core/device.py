"""Where and how the numbers are computed: device, precision, memory."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from kdsweep.core.errors import InputError

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Compute:
    """Where and how the numbers are computed.

    Attributes:
        device: of networks and batches.
        precision: ``fp32``, or ``bf16`` for autocast of the forward passes.
        deterministic: have CUDA choose algorithms that give the same bits every time.
        eval_batch: images per forward outside training; results do not depend on the Student's batch.
    """

    device: torch.device
    precision: str
    deterministic: bool = False
    eval_batch: int = 16

    def autocast(self, precision: str | None = None) -> AbstractContextManager[None]:
        """The context of every forward pass, of this or another precision."""
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=(precision or self.precision) == "bf16"
        )
        return context

    def prepare(self) -> None:
        """Set the process up; before anything else is computed."""
        keep_freed_memory()
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is used first
        torch.use_deterministic_algorithms(self.deterministic)


def placed(module: Module, compute: Compute) -> Module:
    """The module on the device in channels-last memory, which is faster on CPU and CUDA.

    Every network is placed so, trained now or read from a file: the other memory format sums in another order.
    """
    return module.to(compute.device).to(memory_format=torch.channels_last)


def keep_freed_memory() -> None:
    """Let glibc keep freed activations instead of giving them back each step: 1.4 to 2 times faster on CPU.

    Results stay the same bit for bit. Elsewhere than on glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(ctypes.c_int(-3), ctypes.c_int(1 << 30))  # M_MMAP_THRESHOLD
        mallopt(ctypes.c_int(-1), ctypes.c_int(2**31 - 1))  # M_TRIM_THRESHOLD


def give_back_memory() -> None:
    """Return what is no longer used: ``keep_freed_memory`` holds it back, and CUDA's allocator does so anyway."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the device, or of this machine, was too small."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def find_device(name: str) -> torch.device:
    """The device of a name: ``cpu``, ``cuda``, ``cuda:NUMBER``, or ``auto``, which is CUDA if there is one.

    Raises:
        InputError: it is not a device, or not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"device={name} is not allowed: it must be auto, cpu, cuda or cuda:NUMBER")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={name}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use device=cpu or auto"
        )
    return torch.device(name)
