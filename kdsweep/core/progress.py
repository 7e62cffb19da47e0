"""Progress with its time left: a bar on a terminal, a line a minute where there is none."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

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
    """Iterate over items, of which there are ``total``; show progress, such as ``scoring: 2 of 8 networks``."""
    with counted(what, unit=unit, total=total) as count:
        for item in items:
            yield item
            count()


@contextlib.contextmanager
def counted(
    what: str, *, unit: str, total: int, done: int = 0, write: Callable[[str], object] | None = None
) -> Iterator[Callable[..., None]]:
    """Show how many of at most ``total`` are done; each call of the yielded function counts one.

    ``done`` were counted before an interruption. Keywords of the call, such as a Dice, are shown with the count. The
    line of a minute goes to ``write`` or stderr.
    """
    has_bar = sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE")
    numbers, started_s = itertools.count(done + 1), time.monotonic()
    line_s = started_s

    def count(**values: str) -> None:
        nonlocal line_s
        number, now_s = next(numbers), time.monotonic()
        bar.set_postfix(values, refresh=False)
        bar.update()
        if not has_bar and now_s - line_s > LINE_EVERY_S:
            line_s = now_s
            rest_s = left_s([[(total - number, (now_s - started_s) / (number - done))]])
            details = "".join(f", {name} {value}" for name, value in values.items())
            line = f"{what}: {number} of {total} {unit}s{details}, about {duration(rest_s)} left"
            write(line) if write else sys.stderr.write(f"{line}\n")

    with (
        tqdm(total=total, initial=done, desc=what, unit=unit, leave=False, disable=not has_bar) as bar,
        logging_redirect_tqdm() if has_bar else contextlib.nullcontext(),  # else a log line would cut the bar in two
    ):
        yield count
