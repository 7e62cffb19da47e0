"""Means of an epoch's values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class EpochMeter:
    """Means over the images of an epoch, collected on the device: reading one each step would make it wait."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.counts: list[int] = []

    def add(self, values: dict[str, Tensor], count: int) -> None:
        """Add the means of a batch of ``count`` images."""
        self.steps.append({name: value.detach() for name, value in values.items()})
        self.counts.append(count)

    def state(self) -> dict[str, Any]:
        """Return everything so far, for a checkpoint."""
        return {"counts": self.counts, "steps": self._by_name()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned."""
        self.counts = list(state["counts"])
        self.steps = [{name: values[i] for name, values in state["steps"].items()} for i in range(len(self.counts))]

    def not_finite(self) -> tuple[str, float, int] | None:
        """Return name, value and step (from 0) of the first value that is not a finite number, or None."""
        bad = [
            (int((~values.isfinite()).nonzero()[0]), name)
            for name, values in self._by_name().items()
            if not bool(values.isfinite().all())
        ]
        if not bad:
            return None
        # a weighted sum is not finite if a term of it is: the term says more
        step, name = min(bad, key=lambda found: (found[0], found[1] == "loss"))
        return name, float(self._by_name()[name][step]), step

    def read(self, prefix: str) -> dict[str, float]:
        """Return the means so far as plain numbers, with ``prefix`` before their names."""
        counts = torch.tensor(self.counts, dtype=torch.float64)
        return {
            prefix + name: float((values.double() * counts).sum() / counts.sum())
            for name, values in self._by_name().items()
        }

    def _by_name(self) -> dict[str, Tensor]:
        names = self.steps[0] if self.steps else {}
        return {name: torch.stack([step[name] for step in self.steps]).cpu() for name in names}
