"""Values of an epoch, collected on the device and read together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Columns = dict[str, Tensor]  # by name the values (steps,) of an epoch


class EpochMeter:
    """The values of an epoch's steps, collected on the device: reading one each step would make it wait."""

    def __init__(self) -> None:
        self.steps: list[Columns] = []
        self.counts: list[int] = []

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add the means of a batch of ``count`` images, one number each."""
        self.steps.append({name: value.detach().reshape(()) for name, value in values.items()})
        self.counts.append(count)

    def columns(self) -> Columns:
        """Return the values so far, on their device."""
        names = self.steps[0] if self.steps else {}
        return {name: torch.stack([step[name] for step in self.steps]) for name in names}

    def state(self) -> dict[str, Any]:
        """Return everything so far, for a checkpoint."""
        return {"counts": self.counts, "steps": self.columns()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned."""
        self.counts = list(state["counts"])
        self.steps = [{name: values[i] for name, values in state["steps"].items()} for i in range(len(self.counts))]


def to_host(columns: Sequence[Columns], device: torch.device) -> list[Columns]:
    """Copy values to the host in one transfer, for which it waits once.

    They travel as fp64, which holds each floating-point type exactly.

    Args:
        columns: of any number of meters.
        device: of the computation.
    """
    flat = [values for own in columns for values in own.values()]
    if not flat:
        return [{} for _ in columns]
    joined = torch.cat([values.to(device, torch.float64) for values in flat]).cpu()
    parts = iter(joined.split([len(values) for values in flat]))
    return [{name: next(parts).to(values.dtype) for name, values in own.items()} for own in columns]


def not_finite(columns: Columns) -> tuple[str, float, int] | None:
    """Return name, value and step (from 0) of the first value on the host that is not a finite number, or None."""
    bad = [
        (int((~values.isfinite()).nonzero()[0]), name)
        for name, values in columns.items()
        if not bool(values.isfinite().all())
    ]
    if not bad:
        return None
    # a weighted sum is not finite if a term of it is: the term says more
    step, name = min(bad, key=lambda found: (found[0], found[1] == "loss"))
    return name, float(columns[name][step]), step


def weighted_means(columns: Columns, counts: Sequence[int], prefix: str) -> dict[str, float]:
    """Return the means over all images of values on the host as plain numbers, with ``prefix`` before their names.

    Args:
        columns: the mean of each batch.
        counts: images of each batch.
        prefix: of the part, such as ``train/``.
    """
    images = torch.tensor(counts, dtype=torch.float64)
    return {prefix + name: float((values.double() * images).sum() / images.sum()) for name, values in columns.items()}
