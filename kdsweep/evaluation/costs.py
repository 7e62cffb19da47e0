"""Costs of a network on this machine: parameters, multiply-accumulates, latency. A store keeps what was measured."""

from __future__ import annotations

import contextlib
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdsweep.config.networks import Architecture
from kdsweep.core.device import Compute, placed, usable_cores
from kdsweep.core.files import DamagedError, read_json, write_json
from kdsweep.evaluation import latency
from kdsweep.evaluation.latency import REPEATS

FILE = "costs.json"  # in a store


class Network(NamedTuple):
    """The options that decide the cost of a network."""

    architecture: str  # as JSON
    image_size: int
    logits: int = 1

    @property
    def name(self) -> str:
        """Return the name of its encoder or module."""
        return Architecture.model_validate_json(self.architecture).name


def measure(network: Network, *, store: Path | None = None, repeats: int = REPEATS) -> dict[str, float]:
    """Return parameters, MACs and latency of one image in fp32, by column; without CUDA its columns are left out.

    An equal network is measured once on a machine: the store's costs.json keeps the costs with processor, threads, GPU
    and PyTorch. Whoever deletes the file has them measured again.

    Args:
        network: the network, whose weights do not matter.
        store: folder of the runs; without one, a process measures a network once.
        repeats: timed forward passes.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"cpu": cpu_name(), "threads": [1, usable_cores()], "cuda": gpu, "pytorch": str(torch.__version__)}
    about: dict[str, Any] = {**network._asdict(), **machine, "repeats": repeats}
    file = store / FILE if store is not None and store.is_dir() else None
    entries: list[dict[str, Any]] = []
    if file is not None:
        with contextlib.suppress(DamagedError):
            entries = (read_json(file, "measured") or {"measured": []})["measured"]
    for entry in entries:
        if entry["about"] == about:
            kept: dict[str, float] = entry["costs"]
            return kept
    costs = _measured(network, repeats)
    if file is not None:
        with contextlib.suppress(OSError):  # a store that can only be read
            write_json(file, {"measured": [*entries, {"about": about, "costs": costs}]})
    return costs


@cache
def _measured(network: Network, repeats: int) -> dict[str, float]:
    from kdsweep.models import networks  # with all encoders: seconds that costs in the store need not wait for
    from kdsweep.models.build import new_network

    architecture, size = Architecture.model_validate_json(network.architecture), network.image_size
    built = networks.freeze(new_network(architecture, logits=network.logits, weights="none", seed=0))
    macs = networks.count_macs(built, image_size=size)
    costs: dict[str, float] = {"parameters": networks.count_parameters(built), "macs": macs}
    kinds = [("cpu_1_thread", "cpu", 1), ("cpu_all_threads", "cpu", usable_cores())]
    kinds += [("cuda", "cuda", torch.get_num_threads())] if torch.cuda.is_available() else []
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    for name, device_name, threads in kinds:
        device = torch.device(device_name)
        placed(built, Compute(device=device, precision="fp32"))
        image = noise.to(device).to(memory_format=torch.channels_last)
        timed = latency.time_ms(built, image, device=device, threads=threads, repeats=repeats)
        costs[f"{name}_median_ms"], costs[f"{name}_p95_ms"] = timed
    return costs


def cpu_name() -> str:
    """Return the name of the processor, as far as the system gives it."""
    file = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", file.read_text(encoding="utf-8"), re.M) if file.is_file() else None
    return name[1].strip() if name else platform.processor() or platform.machine()
