"""Draw test DSC of each cell next to lines of Student and Teachers, and the main effects.

The interval in a cell's row is that of its paired difference to Student, added to Student's mean: taken alone, a cell
differs from Student if it does not reach Student's line. The spread of the images does not show that. Where several
seeds give them, the intervals and p of methods are drawn too.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdsweep.core.errors import InputError
from kdsweep.results import formats
from kdsweep.results.figures import style
from kdsweep.results.figures.style import AUGMENTATIONS, BASELINE_LINES, DARK, FONT, GRAY
from kdsweep.results.paper import BASELINES, LEVELS, REPRESENTATIONS, in_order
from kdsweep.results.tables import effects, table4
from kdsweep.results.tables.table4 import SPLIT_MEAN
from kdsweep.tracking.reader import Sweep

ROW = 0.235  # inches


def of_sweep(sweep: Sweep, *, title: str, store: Path, uri: str | None) -> Figure:
    """Draw the scores of a sweep."""
    return figure(table4.numbers(sweep), effects.numbers(sweep), title=title)


def figure(scores: pd.DataFrame, main: pd.DataFrame, *, title: str) -> Figure:
    """Draw a row per cell of Table 4 on the left, a row per main effect on the right.

    Raises:
        InputError: scores has no row of a cell.
    """
    table = scores.set_index("notation")
    rows: list[str] = []
    for cell in in_order(set(table.index).difference(BASELINES)):
        heading = _heading(cell)
        rows += [cell] if heading in rows else [heading, cell]
    if not rows:
        raise InputError("scores: no row is a cell's; give the complete table that table4.numbers makes of a sweep")
    drawn = style.page(title, height=max(3.9, 1.2 + ROW * len(rows)))
    grid = drawn.add_gridspec(2, 2, width_ratios=(1.75, 1), height_ratios=(1.0, 0.85))
    left, right, below = (drawn.add_subplot(place) for place in (grid[:, 0], grid[0, 1], grid[1, 1]))
    _set_rows(left, rows=rows, gaps=table["gap"].to_dict())
    _draw_cells(left, cells=table.reindex(rows), student=table["mean_dice_percent"].get("Student", np.nan))
    _draw_baselines(left, means=table["mean_dice_percent"].reindex(list(BASELINE_LINES)).dropna())
    if table["mean_dice_percent"].isna().all():
        left.set_xlim(0, 100)
    _draw_effects(right, main=main[main["kind"] == "main"])
    below.set_axis_off()
    handles, names = left.get_legend_handles_labels()
    if handles:
        below.legend(handles, names, loc="upper left", fontsize=FONT, frameon=False, borderaxespad=0, labelspacing=0.6)
    return drawn


def _heading(cell: str) -> str:
    """Return the heading of a cell's rows, which is not a notation."""
    if cell in LEVELS:
        return REPRESENTATIONS[LEVELS[cell][0]]
    return "Own cells" if "_" in cell.removesuffix("_WAug") else "Methods"


def _set_rows(axes: Axes, *, rows: list[str], gaps: dict[Any, str]) -> None:
    style.plain(axes)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.3, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("test DSC (%)", fontsize=FONT)
    for y, (row, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
        if row not in gaps:
            label.set_fontweight("bold")
            continue
        axes.axhline(y, color="0.92", linewidth=0.6, zorder=0)
        if gaps[row]:
            _write_gap(axes, y=y, gap=gaps[row], width=50, lines=1)


def _write_gap(axes: Axes, *, y: float, gap: str, width: int, lines: int) -> None:
    """Write the reason of a gap in at most ``lines`` lines of ``width`` characters; the tables hold all of it."""
    text = textwrap.fill(gap, width, max_lines=lines, placeholder=" ...", break_on_hyphens=False)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    across = axes.get_yaxis_transform()
    axes.text(0.02, y, text, transform=across, va="center", color=GRAY, fontsize=FONT, bbox=box, zorder=6)


def _draw_cells(axes: Axes, *, cells: pd.DataFrame, student: float) -> None:
    """Draw means, intervals and splits; ``cells`` has a row per row of the axes, NaN for headings and gaps."""
    y = np.arange(len(cells))
    weak = cells.index.str.endswith("_WAug")
    for name, look in AUGMENTATIONS.items():
        mean = cells["mean_dice_percent"].where(weak == (name == "weak"))
        if mean.notna().any():
            label = f"mean of all test images,\n{name} Teacher augmentation"
            axes.plot(mean, y, look.marker, color=look.color, markersize=5, zorder=5, label=label)
    label = "95 % interval of the paired\ndifference to Student (these\nnetworks), laid off from its mean"
    _draw_intervals(axes, cells, of="student_", start=student, labels=(label, "the same of methods\n(other trainings)"))
    if (equal := (cells["teacher_verdict"] == "non-inferior").to_numpy()).any():
        label = f"at most {cells['margin_points'].max():g} points worse\nthan its Teacher (Holm)"
        at_edge = axes.get_yaxis_transform()
        axes.plot(np.full(equal.sum(), 0.985), y[equal], "*", color=DARK, markersize=5, transform=at_edge, label=label)
    splits = [int(name.removeprefix(SPLIT_MEAN)) for name in map(str, cells) if name.startswith(SPLIT_MEAN)]
    hollow: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": GRAY, "markeredgewidth": 0.7}
    for split, look in style.looks_of(splits).items() if len(splits) > 1 else ():
        mean = cells[f"{SPLIT_MEAN}{split}"]
        if mean.notna().any():
            label = f"mean of split {split}"
            axes.plot(mean, y + 0.33, look.marker, **hollow, markersize=3.2, zorder=3, label=label)


def _draw_intervals(axes: Axes, rows: pd.DataFrame, *, of: str, start: float, labels: tuple[str, str]) -> None:
    """Draw the intervals of these networks and, thin with ends, those of methods: which several seeds alone give."""
    for kind, width, label in zip(("", "methods_"), (1.3, 0.6), labels, strict=True):
        low, high = (start + rows[f"{of}{kind}{end}_points"] for end in ("low", "high"))
        y = np.flatnonzero(low.notna())
        if not len(y):
            continue
        ends = low.to_numpy()[y], high.to_numpy()[y]
        axes.hlines(y, *ends, color=DARK, linewidth=width, zorder=4, label=label)
        if kind:
            axes.plot(np.concatenate(ends), [*y, *y], "|", color=DARK, markersize=4, markeredgewidth=width, zorder=4)


def _draw_baselines(axes: Axes, *, means: pd.Series) -> None:
    """Draw the baselines' lines and labels. Labels rise to the right in steps, so that none meets another."""
    for step, (name, x) in enumerate(means.sort_values(kind="stable").items()):
        look, up = BASELINE_LINES[str(name)], (FONT + 2) * step
        axes.axvline(x, color=look.color, linestyle=look.line, linewidth=0.9, zorder=1)
        leader = {"arrowstyle": "-", "color": look.color, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
        at: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
        axes.annotate("", (x, 1), xytext=(0, up + FONT), arrowprops=leader, **at)
        axes.annotate(f"{name} {x:.1f}", (x, 1), xytext=(-2, up + 2), ha="right", fontsize=FONT, color=look.color, **at)


def _draw_effects(axes: Axes, *, main: pd.DataFrame) -> None:
    of_methods = main["p_methods_holm"].notna().any()
    style.plain(axes)
    axes.set_title("Main effects", fontsize=FONT, loc="left")
    axes.set_yticks(range(len(main)), main["effect"])
    axes.set_ylim(len(main) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    if main["difference_points"].isna().all():
        axes.set_xticks([])
    else:
        axes.axvline(0, color="black", linewidth=0.8, zorder=1)
        _draw_intervals(axes, main, of="", start=0.0, labels=("", ""))
        axes.plot(main["difference_points"], np.arange(len(main)), "o", color="black", markersize=4.5)
        label = "difference (DSC points),\n95 % interval of these networks"
        axes.set_xlabel(label + (",\nthin: of methods" if of_methods else ""), fontsize=FONT)
        axes.annotate(
            "methods:\np (Holm)" if of_methods else "p (Holm)",
            (1.04, 1),
            xycoords="axes fraction",
            xytext=(0, 6),
            textcoords="offset points",
            size=FONT,
        )
    ps = main["p_methods_holm" if of_methods else "p_holm"].map(formats.p)
    for y, (gap, p) in enumerate(zip(main["gap"], ps, strict=True)):
        if gap:
            _write_gap(axes, y=y, gap=gap, width=32, lines=2)
        else:
            axes.text(1.04, y, p, transform=axes.get_yaxis_transform(), va="center", fontsize=FONT)
