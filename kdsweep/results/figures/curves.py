"""Draw validation Dice over the epochs: a panel per notation, a line per split and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdsweep.core.errors import InputError
from kdsweep.results.figures import style
from kdsweep.results.figures.style import FONT, GRAY, LIGHT
from kdsweep.results.paper import BASELINES, CELLS
from kdsweep.results.stats import PLACE
from kdsweep.tracking import reader
from kdsweep.tracking.reader import Sweep

ORDER = ("Student", "Teacher", "Teacher_WAug")


def of_sweep(sweep: Sweep, *, title: str, store: Path, uri: str | None) -> Figure:
    """Draw the curves that MLflow holds of a sweep."""
    return figure(reader.read_curves(sweep, store=store, uri=uri), title=title)


def figure(curves: pd.DataFrame, *, title: str, metric: str = "val/dice") -> Figure:
    """Draw a metric of the frame that ``reader.read_curves`` returns; all 12 cells have a panel if two have a curve.

    Raises:
        InputError: no run has a value of the metric.
    """
    drawn = curves[curves["metric"] == metric].sort_values([*PLACE, "epoch"])
    there = set(drawn.loc[drawn["value"].notna(), "notation"])
    if not there:
        others = ", ".join(sorted(set(curves["metric"].dropna()) - {metric})) or "none"
        raise InputError(f"metric={metric}: no run has a value of it; other metrics: {others}")
    cells = [cell for cell in CELLS if cell in there]
    baselines = [name for name in ORDER if name in there]
    names = [*(CELLS if len(cells) > 1 else cells), *baselines, *sorted(there.difference(CELLS, BASELINES))]
    labels = "epoch", "validation Dice" if metric == "val/dice" else metric
    return before_student(drawn[drawn["notation"].isin(there)], _lines, names=names, title=title, labels=labels)


def before_student(
    frame: pd.DataFrame,
    line: Callable[..., None],
    *,
    names: Sequence[str],
    title: str,
    labels: tuple[str, str],
    handles: Sequence[Line2D] = (),
) -> Figure:
    """Draw a panel per notation with a line per split, Student's in light gray behind those of each cell.

    ``line`` draws the rows of one notation and split on an axes, with the arguments of a line.
    """
    looks = style.looks_of(frame["split"])
    student = frame[frame["notation"] == "Student"]

    def draw(axes: Axes, name: str, rows: pd.DataFrame) -> None:
        if rows.empty:
            axes.text(0.5, 0.5, "no curve", transform=axes.transAxes, ha="center", color=GRAY, fontsize=FONT)
            return
        for split, look in looks.items():
            how: dict[str, Any] = {"linestyle": look.line, "linewidth": 1.0}
            if name not in BASELINES:
                line(axes, student[student["split"] == split], color=LIGHT, zorder=1, **how)
            line(axes, rows[rows["split"] == split], color=look.color, zorder=2, **how)

    legend = [Line2D([], [], color=look.color, linestyle=look.line, label=f"split {k}") for k, look in looks.items()]
    if len(student) and set(names).difference(BASELINES):
        legend.append(Line2D([], [], color=LIGHT, label="Student, same line styles"))
    return style.panels(frame, draw, names=names, title=title, labels=labels, handles=[*legend, *handles])


def _lines(axes: Axes, rows: pd.DataFrame, **how: Any) -> None:
    axes.locator_params(axis="x", integer=True, nbins=4)
    axes.locator_params(axis="y", nbins=4)
    for _, run in rows.groupby("seed"):
        there = np.concatenate([[False], run["value"].notna(), [False]])
        alone = there[1:-1] & ~there[:-2] & ~there[2:]  # a line has nothing to draw there
        axes.plot(run["epoch"], run["value"], marker=".", markersize=3, markevery=alone, **how)
