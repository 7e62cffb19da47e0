"""Timing of networks on this machine: a training step, for a sweep's estimate, and a forward of one image."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from kdsweep.core.device import Compute, give_back_memory, is_out_of_memory, placed

if TYPE_CHECKING:
    from kdsweep.models.networks import Network

STEPS, ENOUGH_S = 5, 2.0  # timed steps at most, and seconds after which no further one begins
WARM_UP_STEPS = {"cpu": 1, "cuda": 3}  # CUDA chooses algorithms and reserves memory in the first ones
WARM_UP, REPEATS = 5, 50  # forward passes


class StepTime(NamedTuple):
    """Seconds per image of a training step (forward, backward, Adam; 0 if not timed) and of validation's forward."""

    train: float
    forward: float


def time_step_s(
    network: Network, *, image_size: int, compute: Compute, images: int = 4, forward_only: bool = False
) -> StepTime:
    """Time steps of a throwaway network on noise, after some to warm up; return the fastest, the least disturbed one.

    A step is that of a training: backward pass outside of autocast, fused Adam on CUDA, new gradients each time. A
    batch that does not fit into the memory is halved.
    """
    while True:
        try:
            return _time_step_s(
                network, image_size=image_size, compute=compute, images=images, forward_only=forward_only
            )
        except Exception as error:
            if images == 1 or not is_out_of_memory(error):
                raise
        give_back_memory()
        images //= 2


def _time_step_s(network: Network, *, image_size: int, compute: Compute, images: int, forward_only: bool) -> StepTime:
    placed(network, compute)
    optimizer = torch.optim.Adam(network.parameters(), fused=compute.device.type == "cuda" or None)
    batch = torch.randn(images, 3, image_size, image_size, device=compute.device)
    batch = batch.to(memory_format=torch.channels_last)
    times: list[tuple[float, float]] = []
    first = WARM_UP_STEPS[compute.device.type]
    while len(times) < first + STEPS and (len(times) <= first or sum(map(sum, times)) < ENOUGH_S):
        network.eval()
        clock = [_now_s(compute.device)]
        with torch.no_grad(), compute.autocast():
            network(batch)
        clock.append(_now_s(compute.device))
        if not forward_only:
            network.train()
            with compute.autocast():
                loss = network(batch).logits.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        clock.append(_now_s(compute.device))
        times.append((clock[2] - clock[1], clock[1] - clock[0]))
    train, forward = (min(column) / images for column in zip(*times[first:], strict=True))
    return StepTime(0.0 if forward_only else train, forward)


def time_ms(
    forward: Callable[..., object], *args: object, device: torch.device, threads: int, repeats: int = REPEATS
) -> tuple[float, float]:
    """Return median and 95th percentile of a call's duration in milliseconds, after WARM_UP calls.

    The function computes on the device, with so many CPU threads of PyTorch.
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
