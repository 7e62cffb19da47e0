"""Global state that the cells of a process share: settings of PyTorch and NumPy, and random generators.

A loss, KD path or network of a user can change it, by a call or when its module is imported. Then other cells would
compute other numbers than alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand

from kdsweep.core import signals
from kdsweep.core.errors import InputError


class SharedStateError(InputError):
    """Code of one cell has changed what all cells of its process share, or tried to end the process."""


def _set_default_device(device: torch.device) -> None:
    # None stands for the CPU: with a device of any name PyTorch intercepts each call that makes a tensor.
    torch.set_default_device(None if device.type == "cpu" else device)


def _autocast() -> tuple[int, list[tuple[str, bool, torch.dtype]]]:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth, [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]


def _set_autocast(values: tuple[int, list[tuple[str, bool, torch.dtype]]]) -> None:
    depth, kinds = values
    for kind, enabled, dtype in kinds:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    for _ in range(_autocast()[0] - depth):  # a context that was not left: rounded weights would be kept for ever
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def _fp32_precision() -> tuple[bool, str] | None:
    try:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch's newer interface has set one of them to what the older one cannot express
        return None


def _set_fp32_precision(values: tuple[bool, str]) -> None:
    torch.backends.cudnn.allow_tf32 = values[0]
    torch.set_float32_matmul_precision(values[1])


def _flushes_denormals() -> bool:
    smallest = 5e-324
    return smallest * 1.0 == 0


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    return partial(getattr, owner, name, None), partial(setattr, owner, name)


# By the name of what changes it: how a setting is read and written.
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.set_default_device": (torch.get_default_device, _set_default_device),
    "torch.set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.set_grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.autograd.set_detect_anomaly": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch.autocast": (_autocast, _set_autocast),
    "torch.use_deterministic_algorithms": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "torch.backends.fp32_precision": _attribute(torch.backends, "fp32_precision"),  # from PyTorch 2.9 on
    "torch.set_float32_matmul_precision or cudnn.allow_tf32": (_fp32_precision, _set_fp32_precision),
    "torch.backends.cudnn.enabled": _attribute(torch.backends.cudnn, "enabled"),
    "torch.backends.cudnn.benchmark": _attribute(torch.backends.cudnn, "benchmark"),
    "torch.backends.cudnn.deterministic": _attribute(torch.backends.cudnn, "deterministic"),
    "torch.backends.mkldnn.enabled": _attribute(torch.backends.mkldnn, "enabled"),
    "torch.set_flush_denormal": (_flushes_denormals, torch.set_flush_denormal),
    "numpy.seterr": (np.geterr, lambda values: np.seterr(**values)),
}

_UNUSED: list[np.random.MT19937] = []  # generators to lend to numpy.random: to make one costs as much as all the rest


@contextmanager
def confined(seed: int) -> Iterator[None]:
    """Run code of one cell so that the other cells compute what they would without it.

    What it draws from the generators of PyTorch, NumPy and Python depends on the seed alone. Afterwards SETTINGS and
    generators are as before; of CUDA's generators each turn sets the seed again.

    Args:
        seed: of the three generators, below 2^32.

    Raises:
        SharedStateError: the code has changed a setting, or raised what ends a program, such as ``sys.exit()``.
    """
    before = {name: read() for name, (read, _) in SETTINGS.items()}
    generators = random.getstate(), mtrand.get_bit_generator(), torch.get_rng_state()
    lent = _UNUSED.pop() if _UNUSED else np.random.MT19937()
    changed: dict[str, Any] = {}
    try:
        random.seed(seed)
        mtrand.set_bit_generator(lent)
        mtrand.seed(seed)
        torch.manual_seed(seed)
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        if signals.is_stop(error):
            raise
        raise SharedStateError(f"its code raises {error!r}, which ends a program: raise an error instead") from error
    finally:
        changed = _restore(before)
        random.setstate(generators[0])
        mtrand.set_bit_generator(generators[1])
        _UNUSED.append(lent)
        torch.set_rng_state(generators[2])
    if changed:
        listed = ", ".join(f"{name} (was {before[name]}, became {value})" for name, value in changed.items())
        raise SharedStateError(f"its code changes {listed}, which all cells share: leave it as it was")


def _restore(before: dict[str, Any]) -> dict[str, Any]:
    """Write back the settings that differ; return what they had become, by name."""
    changed = {}
    for name, (read, write) in SETTINGS.items():
        if (now := read()) != before[name]:
            changed[name] = now
            write(before[name])
    return changed
