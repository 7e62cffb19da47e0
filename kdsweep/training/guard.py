"""The guard between the cells of a process: an error of one ends it alone, and what it changes is restored.

A loss, KD path or network of a user can change settings of PyTorch and NumPy, and random generators, when it is called
or imported. Then other cells would compute other numbers than alone.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand
from torch import backends

from kdsweep.core import logs, signals
from kdsweep.core.device import is_device_error, is_out_of_memory
from kdsweep.core.errors import CellError, InputError, one_line
from kdsweep.store import cell_folder
from kdsweep.training.learner import Learner

log = logging.getLogger(__name__)


class SharedStateError(InputError):
    """Code of one cell has changed what all cells of its process share, or tried to end the process."""


def _set_default_device(device: torch.device) -> None:
    # None means the CPU: with a device of any name PyTorch intercepts each call that makes a tensor.
    torch.set_default_device(None if device.type == "cpu" else device)


def _autocast() -> list[Any]:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    kinds = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return [depth, *kinds]


def _set_autocast(values: list[Any]) -> None:
    for kind, enabled, dtype in values[1:]:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    for _ in range(_autocast()[0] - values[0]):  # a context that was not left would keep rounded weights for ever
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


# By the name of what changes it: how a setting is read and written.
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.set_default_device": (torch.get_default_device, _set_default_device),
    "torch.set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.set_grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.autograd.set_detect_anomaly": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch.autocast": (_autocast, _set_autocast),
    "torch.use_deterministic_algorithms": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "torch.backends.fp32_precision": (  # from PyTorch 2.9 on
        partial(getattr, backends, "fp32_precision", None),
        partial(setattr, backends, "fp32_precision"),
    ),
    "torch.set_float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch.set_flush_denormal": (lambda: float("5e-324") * 1.0 == 0, torch.set_flush_denormal),
    "numpy.seterr": (np.geterr, lambda values: np.seterr(**values)),
}
for _owner, _name in (
    *((backends.cudnn, name) for name in ("allow_tf32", "enabled", "benchmark", "deterministic")),
    (backends.mkldnn, "enabled"),
):
    SETTINGS[f"{_owner.__name__}.{_name}"] = partial(getattr, _owner, _name), partial(setattr, _owner, _name)

_UNUSED: list[np.random.MT19937] = []  # generators to lend to numpy.random: to make one takes a millisecond


@contextmanager
def confined(seed: int) -> Iterator[None]:
    """Run code of one cell so that the other cells compute what they would without it.

    Draws from the generators of PyTorch, NumPy and Python depend on the seed (below 2^32) alone. Afterwards SETTINGS
    and generators are as before; CUDA's generators are seeded at each call.

    Raises:
        SharedStateError: the code has changed a setting, or raised what ends a program, such as ``sys.exit()``.
    """
    before = _settings()
    generators = random.getstate(), mtrand.get_bit_generator(), torch.get_rng_state()
    lent = _UNUSED.pop() if _UNUSED else np.random.MT19937()
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
        after = _settings()
        changed = [name for name in before if after.get(name) != before[name]]
        for name in changed:
            SETTINGS[name][1](before[name])
        random.setstate(generators[0])
        mtrand.set_bit_generator(generators[1])
        _UNUSED.append(lent)
        torch.set_rng_state(generators[2])
    if changed:
        listed = ", ".join(f"{name} (was {before[name]}, became {after.get(name)})" for name in changed)
        raise SharedStateError(f"its code changes {listed}, which all cells share: leave it as it was")


def _settings() -> dict[str, Any]:
    values = {}
    for name, (read, _) in SETTINGS.items():
        with suppress(RuntimeError):  # the newer of two switches has set what the older one cannot express
            values[name] = read()
    return values


@contextmanager
def isolated(learner: Learner) -> Iterator[None]:
    """Let an error inside end this learner, with the traceback in its log, and not its group.

    Passed on: a lack of memory, since fewer learners at a time may fit; and the loss of the device, of which another
    learner may be the cause.
    """
    with logs.about(learner.folder):
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error) or is_device_error(error):
                raise
            learner.failure = error
            log_failure(learner.title, learner.folder, error)


def log_failure(title: str, folder: Path, error: Exception) -> None:
    """Log the error of a cell, with its traceback in the cell's log alone, and record it."""
    line = one_line(error)
    log.error("%s%s; traceback in %s", "" if line.startswith(title) else f"{title}: ", line, folder, exc_info=error)
    cell_folder.write_failed(folder, line)


@contextmanager
def turn(learner: Learner, where: str, *, seed: int) -> Iterator[None]:
    """Open a learner's turn: neither the others nor an interruption change what it draws, and it changes nothing else.

    An error inside ends the learner alone, and names where in the training it came up.
    """
    epoch = learner.epoch + 2
    with isolated(learner):
        try:
            with confined(seed):
                yield
                learner.doing = "afterwards"
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, CellError):
                raise
            line = f"epoch {epoch}, {where}, {learner.doing}: {one_line(error)}"
            raise CellError(f"{learner.title}: {line}") from error


@contextmanager
def shared(where: str) -> Iterator[None]:
    """Name where an error in shared work came up, in one line even if it is from a loader's process."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        line = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else one_line(error)
        raise CellError(f"{where}: {line}") from error
