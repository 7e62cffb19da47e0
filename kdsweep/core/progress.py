"""Progress of a training with its time left: a bar on a terminal, a line a minute in a log file."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

T = TypeVar("T")
LINE_EVERY_S = 60.0
PACE_EPOCHS = 10


def duration(seconds: float) -> str:
    """Return seconds in words, such as ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def left_s(groups: Iterable[Iterable[tuple[float, float]]], *, places: int = 1) -> float:
    """Return the seconds until groups of trainings have ended if none stops early.

    A group takes the sum over its trainings of epochs left times seconds per epoch. Groups begin in their order, each
    where one has ended first.

    Args:
        groups: for each training of each group its epochs left and its seconds per epoch (or other items of work).
        places: how many groups run at the same time.
    """
    ends_s = [0.0] * places
    for group in groups:
        heapq.heapreplace(ends_s, ends_s[0] + sum(epochs * epoch_s for epochs, epoch_s in group))
    return max(ends_s)


def epoch_s(times_ms: Sequence[int]) -> float | None:
    """Return the seconds per epoch from the times at which epochs ended: the median of the latest.

    None before the second. Not the mean: after a resumption one of the differences is the break, which may be a night.
    """
    gaps_ms = [later - earlier for earlier, later in itertools.pairwise(times_ms[-PACE_EPOCHS:])]
    return statistics.median(gaps_ms) / 1000 if gaps_ms else None


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, such as ``3 cells``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def track(items: Iterable[T], *, what: str, unit: str, total: int) -> Iterator[T]:
    """Iterate over items with a bar on a terminal, and with a line a minute on stderr where there is none.

    Args:
        items: what is done one by one.
        what: is done with them, such as ``scoring``.
        unit: name of one.
        total: how many there are.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, unit=unit, total=total, leave=False)
        return
    started_s = line_s = time.monotonic()
    for done, item in enumerate(items):
        now_s = time.monotonic()
        if done and now_s - line_s > LINE_EVERY_S:
            line_s = now_s
            rest_s = left_s([[(total - done, (now_s - started_s) / done)]])
            sys.stderr.write(f"{what}: {done} of {total} {unit}s, about {duration(rest_s)} left\n")
        yield item


class Progress:
    """A counter of epochs, used as a context manager.

    Args:
        label: name of what is trained.
        epochs: the maximum; early stopping may end the training sooner.
        done: epochs finished before an interruption.
    """

    def __init__(self, label: str, *, epochs: int, done: int = 0) -> None:
        self.label, self.epochs, self.done, self.before = label, epochs, done, done
        self.started_s = self.line_s = time.monotonic()
        has_bar = sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE")
        self._bar = tqdm(total=epochs, initial=done, desc=label, unit="epoch", leave=False, disable=not has_bar)
        self._context = contextlib.ExitStack()

    def __enter__(self) -> Progress:
        self._context.enter_context(self._bar)
        if not self._bar.disable:
            self._context.enter_context(logging_redirect_tqdm())  # else a log line would cut the bar in two
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._context.__exit__(kind, error, at)

    def update(self, val_dices: list[float]) -> None:
        """Count one epoch; show the best of val_dices, the Dice (0 to 1) of each network in training."""
        self.done += 1
        val_dice = max(val_dices, default=math.nan)
        self._bar.set_postfix(val_dice=f"{val_dice:.3f}", refresh=False)
        self._bar.update()
        now_s = time.monotonic()
        if self._bar.disable and now_s - self.line_s > LINE_EVERY_S:
            self.line_s = now_s
            each_s = (now_s - self.started_s) / (self.done - self.before)
            most_s = left_s([[(self.epochs - self.done, each_s)]])
            line = "%s: epoch %d of %d, validation Dice %s%.3f, at most %s left"
            most = "up to " if len(val_dices) > 1 else ""
            log.info(line, self.label, self.done, self.epochs, most, val_dice, duration(most_s))
