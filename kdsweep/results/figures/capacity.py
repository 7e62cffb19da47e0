"""Draw test DSC of Students of several sizes against parameters and latency, the Pareto fronts as gray steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdsweep.core.errors import InputError
from kdsweep.results.figures import style
from kdsweep.results.figures.style import LIGHT, SPLITS, Look
from kdsweep.results.paper import BASELINES, in_order
from kdsweep.results.tables import capacity, table4
from kdsweep.tracking.reader import Sweep

COSTS = {  # panels: front, column of the table, unit
    "parameters (M)": ("parameters", "parameters", 1e6),
    "latency of one image (ms, CPU, 1 thread)": ("latency", "cpu_1_thread_median_ms", 1),
}
LABEL = 0.09  # the share of the axis that a label takes


def of_sweep(sweep: Sweep, *, title: str, store: Path, uri: str | None) -> Figure:
    """Draw the scores of a sweep over Students; latency is measured once on a machine."""
    return figure(capacity.numbers(sweep, scores=table4.numbers(sweep), store=store), title=title)


def figure(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw what ``capacity.numbers`` returns: a line per model.

    Raises:
        InputError: no row has a score.
    """
    table = table.dropna(subset="mean_dice_percent")
    if table.empty:
        raise InputError("no Student of this sweep is finished on all requested splits and seeds")
    frame = pd.concat(
        table.assign(panel=label, cost=table[column].astype(float) / unit, on_front=table[f"on_{front}_front"])
        for label, (front, column, unit) in COSTS.items()
    ).sort_values("cost")
    there = set(table["notation"])
    cells = in_order(there.difference(BASELINES))
    looks = {"Student": Look("black", "o")} if "Student" in there else {}
    looks |= {cell: SPLITS[number % len(SPLITS)] for number, cell in enumerate(cells)}

    def line(name: str) -> dict[str, Any]:
        look = looks[name]
        return {"color": look.color, "linestyle": look.line, "marker": look.marker, "markersize": 4, "linewidth": 1}

    def draw(axes: Axes, label: str, rows: pd.DataFrame) -> None:
        axes.set(xscale="log", xlabel=label)
        axes.set_title("", loc="left")
        front = rows[rows["on_front"]]
        step: dict[str, Any] = {"color": LIGHT, "linewidth": 4, "zorder": 1, "solid_capstyle": "butt"}
        axes.step(front["cost"], front["mean_dice_percent"], where="post", **step)
        for name in looks:
            here = rows[rows["notation"] == name]
            axes.plot(here["cost"], here["mean_dice_percent"], **line(name))
        ticks = _apart(rows["cost"])
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.set_xticks([], minor=True)

    handles = [Line2D([], [], label=name, **line(name)) for name in looks]
    handles.append(Line2D([], [], color=LIGHT, linewidth=4, label="Pareto front"))
    labels = "", "test DSC (%)"
    how: dict[str, Any] = {"by": "panel", "height": 2.4, "sharex": False}
    return style.panels(frame, draw, names=list(COSTS), title=title, labels=labels, handles=handles, **how)


def _apart(costs: pd.Series) -> list[float]:
    """Return the costs whose labels have room on a logarithmic axis."""
    ticks: list[float] = []
    apart = (costs.max() / costs.min()) ** LABEL
    for cost in np.unique(costs):
        if not ticks or cost > apart * ticks[-1]:
            ticks.append(float(cost))
    return ticks
