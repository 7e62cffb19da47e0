"""Timing of networks on this machine: a training step, for a sweep's estimate, and a forward of one image."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from kdsweep.core.device import Compute, placed
from kdsweep.models.unet import UNet

STEPS, ENOUGH_S = 5, 2.0  # timed steps at most, and seconds after which no further one begins
WARM_UP, REPEATS = 5, 50  # forward passes


class StepTime(NamedTuple):
    """Seconds per image of a training step (forward, backward, Adam; 0 if not timed) and of a forward alone."""

    train: float
    forward: float


def time_step_s(
    network: UNet, *, image_size: int, compute: Compute, images: int = 4, forward_only: bool = False
) -> StepTime:
    """Time steps of a throwaway network on noise, after one to warm up; return the fastest, the least disturbed one."""
    placed(network, compute)
    optimizer = torch.optim.Adam(network.parameters())
    batch = torch.randn(images, 3, image_size, image_size, device=compute.device)
    batch = batch.to(memory_format=torch.channels_last)
    times: list[tuple[float, float]] = []
    while len(times) <= STEPS and (len(times) < 2 or sum(map(sum, times)) < ENOUGH_S):
        clock = [_now_s(compute.device)]
        with compute.autocast():
            with torch.no_grad():
                network(batch)
            clock.append(_now_s(compute.device))
            if not forward_only:
                network(batch).logits.mean().backward()
                optimizer.step()
        clock.append(_now_s(compute.device))
        times.append((clock[2] - clock[1], clock[1] - clock[0]))
    train, forward = (min(column) / images for column in zip(*times[1:], strict=True))
    return StepTime(0.0 if forward_only else train, forward)


def time_ms(
    forward: Callable[..., object], *args: object, device: torch.device, threads: int, repeats: int = REPEATS
) -> tuple[float, float]:
    """Return median and 95th percentile of the duration of a call in milliseconds, after WARM_UP calls.

    Args:
        forward: the function to call.
        args: its arguments.
        device: the device that it computes on.
        threads: PyTorch's CPU threads meanwhile.
        repeats: number of timed calls.
    """
    before, durations = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for _ in range(WARM_UP + repeats):
                start = _now_s(device)
                forward(*args)
                durations.append(1000 * (_now_s(device) - start))
    finally:
        torch.set_num_threads(before)
    median, slow = np.percentile(durations[WARM_UP:], [50, 95])
    return float(median), float(slow)


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def load_of_others() -> float:
    """Return the mean load of the last minute, in processes, or 0 if it is at most half the cores or unknown.

    Call this before the process computes anything: then the load is that of other programs.
    """
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0
    return load if load > (os.cpu_count() or 1) / 2 else 0.0
