"""Progress of a training with its time left: a bar on a terminal, a line a minute in a log file."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

T = TypeVar("T")
LINE_EVERY_S = 60.0


def duration(seconds: float) -> str:
    """Return seconds in words, such as ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def left_s(*, passed_s: float, done: int, left: int) -> float:
    """Return the seconds left if each remaining item takes as long as the finished ones did on average."""
    return passed_s / done * left


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
    started_s = told_s = time.monotonic()
    for done, item in enumerate(items):
        now_s = time.monotonic()
        if done and now_s - told_s > LINE_EVERY_S:
            told_s = now_s
            rest_s = left_s(passed_s=now_s - started_s, done=done, left=total - done)
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
        self.started_s = self.told_s = time.monotonic()
        self._bar = tqdm(
            total=epochs, initial=done, desc=label, unit="epoch", leave=False, disable=not sys.stderr.isatty()
        )
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
        if self._bar.disable and now_s - self.told_s > LINE_EVERY_S:
            self.told_s = now_s
            passed_s, own = now_s - self.started_s, self.done - self.before
            most_s = left_s(passed_s=passed_s, done=own, left=self.epochs - self.done)
            line = "%s: epoch %d of %d, validation Dice %s%.3f, at most %s left"
            most = "up to " if len(val_dices) > 1 else ""
            log.info(line, self.label, self.done, self.epochs, most, val_dice, duration(most_s))
