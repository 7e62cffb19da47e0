"""Draw each test image against Student: its Dice on x, the cell's on y (better above the diagonal)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdsweep.core.errors import InputError
from kdsweep.results.figures import style
from kdsweep.results.figures.style import ACROSS, FONT, GRAY, WIDTH
from kdsweep.results.frame import gaps, placed_runs, scored_images
from kdsweep.results.paper import cell_notations, in_order
from kdsweep.results.stats import PLACE, pair
from kdsweep.tracking.reader import Sweep

COLUMNS = ["notation", *PLACE, "image", "dice_ours", "dice_baseline"]
EQUAL = 1e-12  # largest difference of equal Dice scores (fractions)


def of_sweep(sweep: Sweep, *, title: str, store: Path, uri: str | None) -> Figure:
    """Draw the scores of a sweep."""
    return figure(paired(sweep), title=title)


def paired(sweep: Sweep) -> pd.DataFrame:
    """Return the Dice of each cell without a gap next to Student's on the same image of the same split and seed.

    Returns:
        Columns notation, split, seed, image, dice_ours, dice_baseline (fractions); no rows if Student has a gap.

    Raises:
        InputError: the sweep is empty or mixed, or two were scored on different images.
    """
    runs, cells = placed_runs(sweep), cell_notations(sweep.runs["notation"])
    scored = scored_images(runs=runs, scores=sweep.scores)
    why = gaps(runs=runs, scored=scored, notations=cells)
    student = scored[scored["notation"] == "Student"]  # with a gap it lacks a place of every cell that has none
    frames = [
        pair(ours=scored[scored["notation"] == cell], baseline=student).rename(columns={"notation_ours": "notation"})
        for cell in cells
        if not why[cell]
    ]
    return pd.concat(frames, ignore_index=True)[COLUMNS] if frames else pd.DataFrame(columns=COLUMNS)


def figure(pairs: pd.DataFrame, *, title: str) -> Figure:
    """Draw what ``paired`` returns: a panel per cell, a mark per test image.

    Raises:
        InputError: there is no pair.
    """
    if pairs.empty:
        raise InputError("nothing to compare: no cell and Student are both finished on all requested splits and seeds")
    looks, names = style.looks_of(pairs["split"]), in_order(pairs["notation"])

    def draw(axes: Axes, name: str, rows: pd.DataFrame) -> None:
        axes.axline((0, 0), (1, 1), color=GRAY, linewidth=0.7, zorder=1)
        for split, look in looks.items():
            here = rows[rows["split"] == split]
            hollow: dict[str, Any] = {"facecolors": "none", "edgecolors": look.color, "marker": look.marker}
            axes.scatter(here["dice_baseline"], here["dice_ours"], s=9, linewidths=0.6, alpha=0.6, **hollow)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.set_title(f"{name}\n{_counts(rows)}", fontsize=FONT, loc="left", pad=3, linespacing=1.15)

    mark: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "none", "markersize": 4}
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, label=f"split {k}", **mark) for k, look in looks.items()
    ]
    side = min(2.6, (WIDTH - 0.5) / min(ACROSS, len(names)) - 0.15)
    labels = "Student's Dice", "Dice of the cell"
    return style.panels(pairs, draw, names=names, title=title, labels=labels, handles=handles, height=side + 0.5)


def _counts(pairs: pd.DataFrame) -> str:
    """Count the images better and worse than Student's, and give the mean difference."""
    difference = pairs["dice_ours"] - pairs["dice_baseline"]
    better, worse = int((difference > EQUAL).sum()), int((difference < -EQUAL).sum())
    equal = len(difference) - better - worse
    mean = f"mean {100 * difference.mean():+.2f} points"
    return f"better {better}, worse {worse}\n{f'equal {equal}, ' if equal else ''}{mean}"
