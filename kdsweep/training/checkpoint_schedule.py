"""When the learners of a group are saved."""

from __future__ import annotations

import time
from pathlib import Path

from kdsweep.training.learner import Learner


class CheckpointSchedule:
    """A schedule of checkpoints: as many as take at most a share of the time.

    Args:
        share: of the time since the start.
    """

    def __init__(self, share: float = 0.05) -> None:
        self.share, self.started_s = share, time.monotonic()
        self.spent_s = self.told_bytes = 0.0
        self.saved_s: dict[Path, float] = {}

    def next(self, learners: list[Learner]) -> Learner | None:
        """Return the learner that was saved longest ago if there is time for a checkpoint, else None."""
        stalest = min(learners, key=lambda learner: self.saved_s.get(learner.folder, 0.0), default=None)
        if stalest is None:
            return None
        rate = self.told_bytes / self.spent_s if self.spent_s else 2e8  # bytes per second; a guess before the first
        expected_s = stalest.state_bytes() / rate
        return stalest if self.spent_s + expected_s <= self.share * (time.monotonic() - self.started_s) else None

    def save(self, learner: Learner) -> None:
        """Write a learner's checkpoint and count its time."""
        start_s = time.monotonic()
        learner.save()
        now_s = self.saved_s[learner.folder] = time.monotonic()
        self.spent_s += now_s - start_s
        self.told_bytes += learner.state_bytes()
