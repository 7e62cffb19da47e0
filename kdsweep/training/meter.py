"""Values of an epoch, collected on the device and read together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Columns = dict[str, Tensor]  # by name the values (steps,) of an epoch


class EpochMeter:
    """The values of an epoch's steps, collected on the device: reading one each step would make it wait."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._values: dict[str, list[Tensor]] = {}

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add the means of a batch of ``count`` images, one number each."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().reshape(()))
        self.counts.append(count)

    def columns(self) -> Columns:
        """Return the values so far, on their device."""
        return {name: torch.stack(values) for name, values in self._values.items()}

    def load(self, columns: Columns, counts: Sequence[int]) -> None:
        """Restore the values of a checkpoint."""
        self.counts = list(counts)
        self._values = {name: list(values.unbind()) for name, values in columns.items()}


def to_host(columns: Sequence[Columns], device: torch.device) -> list[Columns]:
    """Copy values from the device to the host in one transfer, as fp64, which holds each type exactly."""
    flat = [values for part in columns for values in part.values()]
    if not flat:
        return [{} for _ in columns]
    joined = torch.cat([values.to(device, torch.float64) for values in flat]).cpu()
    parts = iter(joined.split([len(values) for values in flat]))
    return [{name: next(parts).to(values.dtype) for name, values in part.items()} for part in columns]


def weighted_means(columns: Columns, counts: Sequence[int], prefix: str) -> dict[str, float]:
    """Return the means over all images of the means of batches of ``counts`` images, with a prefix to their names."""
    images = torch.tensor(counts, dtype=torch.float64)
    return {prefix + name: float((values.double() * images).sum() / images.sum()) for name, values in columns.items()}
