"""Draw the best validation Dice of each method against the training seconds of its trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdsweep.core.errors import InputError
from kdsweep.results.figures import style
from kdsweep.results.figures.curves import ORDER, before_student
from kdsweep.results.paper import BASELINES, in_order
from kdsweep.results.tables import tuned
from kdsweep.tracking.reader import Sweep


def of_sweep(sweep: Sweep, *, title: str, store: Path, uri: str | None) -> Figure:
    """Draw the trials of a sweep."""
    return figure(tuned.best_by_seconds(tuned.read(sweep, store=store, uri=uri).trials), title=title)


def figure(progress: pd.DataFrame, *, title: str) -> Figure:
    """Draw what ``tuned.best_by_seconds`` returns; a thin line shows the seconds at which the cheapest method ends.

    Raises:
        InputError: there are no trials.
    """
    if progress.empty:
        raise InputError("no trial of this sweep has ended yet")
    there = set(progress["notation"])
    names = [*in_order(there.difference(BASELINES)), *(name for name in ORDER if name in there)]
    mark: dict[str, Any] = {"color": style.GRAY, "linewidth": 0.6, "linestyle": ":"}
    equal_s = tuned.equal_seconds(progress)

    def steps(axes: Axes, rows: pd.DataFrame, **how: Any) -> None:
        axes.step(rows["seconds"], rows["best_dice"], where="post", **how)

    handles = [Line2D([], [], label="equal seconds: the cheapest ends", **mark)]
    labels = "training seconds", "best validation Dice"
    drawn = before_student(progress, steps, names=names, title=title, labels=labels, handles=handles)
    for axes in drawn.axes[: len(names)]:
        axes.set_xscale("log")
        axes.axvline(equal_s, **mark)
    return drawn
