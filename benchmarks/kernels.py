"""What a CUDA device did during a profile."""

from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType

NOT_KERNELS = ("Memcpy", "Memset", "Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event")


def busiest(events: Iterable[Any], *, steps: int, step_s: float) -> dict[str, Any]:
    """Return number and time of the kernels per step, the share of an unprofiled step, and the longest kernels."""
    launched = kernels(events)
    busy_s = covered(sorted((event.time_range.start, event.time_range.end) for event in launched)) / 1e6 / steps
    by_name: dict[str, float] = {}
    for event in launched:
        by_name[event.name] = by_name.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6 / steps
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:15]
    return {
        "kernels_per_step": len(launched) / steps,
        "busy_s_per_step": busy_s,
        "busy_share": busy_s / step_s,
        "longest_kernels_s": {name[:120]: seconds for name, seconds in longest},
    }


def kernels(events: Iterable[Any]) -> list[Any]:
    """Return the kernels among a profile's events; annotations, which span several kernels, are events too."""
    return [
        event
        for event in events
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(NOT_KERNELS)
    ]


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of sorted intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
