"""How long a training step takes here: the base of the estimate that a sweep starts with."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import torch

from kdsweep.compute import Compute, placed
from kdsweep.models import UNet

STEPS, ENOUGH_S = 5, 2.0  # at most so many steps, and no further one after so many seconds


class StepTime(NamedTuple):
    """Seconds per image of a training step (forward, backward, Adam; 0 if not timed) and of a forward alone."""

    train: float
    forward: float


def time_step_s(
    network: UNet, *, image_size: int, compute: Compute, images: int = 4, forward_only: bool = False
) -> StepTime:
    """Time steps of a throwaway network on a batch of noise, after one to warm up; the least, for others only add."""
    placed(network, compute)
    optimiser = torch.optim.Adam(network.parameters())
    batch = torch.randn(images, 3, image_size, image_size, device=compute.device)
    batch = batch.to(memory_format=torch.channels_last)
    times: list[tuple[float, float]] = []
    while len(times) <= STEPS and (len(times) < 2 or sum(map(sum, times)) < ENOUGH_S):
        clock = [_now_s(compute)]
        with compute.autocast():
            with torch.no_grad():
                network(batch)
            clock.append(_now_s(compute))
            if not forward_only:
                network(batch).logits.mean().backward()
                optimiser.step()
        clock.append(_now_s(compute))
        times.append((clock[2] - clock[1], clock[1] - clock[0]))
    train, forward = (min(column) / images for column in zip(*times[1:], strict=True))
    return StepTime(0.0 if forward_only else train, forward)


def _now_s(compute: Compute) -> float:
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)
    return time.perf_counter()


def load_of_others() -> float:
    """What other programs ask of the processor, the mean of the last minute; 0 if that is less than half of it.

    To be asked for before this process has computed anything. 0 also where the system does not tell.
    """
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0
    return load if load > (os.cpu_count() or 1) / 2 else 0.0
