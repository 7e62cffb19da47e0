"""Figures of a sweep from frames alone: scores, main effects, curves, tuning, size of the Student, pairs of images.

No function here writes a file; ``drawing`` has the look that they share.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdsweep.core.errors import InputError
from kdsweep.results import formats
from kdsweep.results.drawing import (
    ACROSS,
    AUGMENTATIONS,
    DARK,
    FONT,
    GRAY,
    LIGHT,
    LINES,
    ROW,
    SPLITS,
    WIDTH,
    LineStyle,
    in_order,
    legend_below,
    looks_of,
    new_figure,
    panels_of,
    plain,
)
from kdsweep.results.dsc import SPLIT_MEAN, cell_notations
from kdsweep.results.frame import gaps, placed_runs, scored_images
from kdsweep.results.paper import BASELINES, CELLS, LEVELS, REPRESENTATIONS
from kdsweep.results.stats import PLACE, pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kdsweep.tracking.reader import Sweep

PAIR_COLUMNS = ["notation", *PLACE, "image", "dice_ours", "dice_baseline"]
EQUAL = 1e-12  # largest difference of equal Dice scores (fractions)


# ---- scores and main effects ---------------------------------------------------------------------------------------


def effects_plot(*, scores: pd.DataFrame, effects: pd.DataFrame, title: str) -> Figure:
    """Plot test DSC of each cell beside lines of Student and Teachers; main effects with their 95 % intervals.

    The interval in a cell's row is that of its paired difference to Student, added to Student's mean: taken alone, a
    cell differs from Student if it does not reach Student's line. The spread of the images does not show that. Where
    several seeds give them, the intervals and p of methods are drawn too.

    Args:
        scores: as dsc.table4 gives it (percent, percentage points); without Student there are no such intervals.
        effects: as effects.effects gives it (percentage points).
        title: a line at the top left.

    Raises:
        InputError: scores has no row of a cell.
    """
    table = scores.set_index("notation")
    rows = _rows(in_order(set(table.index).difference(BASELINES)))
    if not rows:
        raise InputError("scores: no row is a cell's; give the whole table that dsc.table4 makes of a sweep")
    figure = new_figure(title=title, height=max(3.9, 1.2 + ROW * len(rows)))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.75, 1), height_ratios=(1.0, 0.85))
    left, right, beside = (figure.add_subplot(place) for place in (grid[:, 0], grid[0, 1], grid[1, 1]))
    _draw_rows(left, rows=rows, table=table)
    _draw_cells(left, cells=table.reindex(rows), student=_mean_of(table, "Student"))
    _draw_baselines(left, table=table)
    _draw_effects(right, main=effects[effects["kind"] == "main"])
    beside.set_axis_off()
    marks, names = left.get_legend_handles_labels()
    if marks:
        beside.legend(marks, names, loc="upper left", fontsize=FONT, frameon=False, borderaxespad=0, labelspacing=0.6)
    return figure


def _rows(cells: list[str]) -> list[str]:
    """Return the labels of the rows: a heading for each path (not a notation), and its cells below."""
    headings = [_heading(cell) for cell in cells]
    rows: list[str] = []
    for heading, cell in zip(headings, cells, strict=True):
        rows += [cell] if heading in rows else [heading, cell]
    return rows


def _heading(cell: str) -> str:
    if cell in CELLS:
        return REPRESENTATIONS[LEVELS[cell][0]]
    return "Own cells" if "_" in cell.removesuffix("_WAug") else "Methods"


def _mean_of(table: pd.DataFrame, notation: str) -> float:
    return float(table["mean_dice_percent"].get(notation, np.nan))


def _draw_rows(axes: Axes, *, rows: list[str], table: pd.DataFrame) -> None:
    plain(axes)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.3, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("test DSC (%)", fontsize=FONT)
    if table["mean_dice_percent"].isna().all():
        axes.set_xlim(0, 100)
    gap = table["gap"].to_dict()
    for y, (row, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
        if row not in gap:
            label.set_fontweight("bold")
            continue
        axes.axhline(y, color="0.92", linewidth=0.6, zorder=0)
        if gap[row]:
            _tell_gap(axes, y=y, gap=gap[row], width=50, lines=1)


def _tell_gap(axes: Axes, *, y: float, gap: str, width: int, lines: int) -> None:
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
    _draw_intervals(
        axes, rows=cells, of="student_", start=student, labels=(label, "the same of methods\n(networks trained anew)")
    )
    if (equal := (cells["teacher_verdict"] == "non-inferior").to_numpy()).any():
        label = f"at most {cells['margin_points'].max():g} points worse\nthan its Teacher (Holm)"
        at_edge = axes.get_yaxis_transform()
        axes.plot(np.full(equal.sum(), 0.985), y[equal], "*", color=DARK, markersize=5, transform=at_edge, label=label)
    splits = [int(name.removeprefix(SPLIT_MEAN)) for name in map(str, cells) if name.startswith(SPLIT_MEAN)]
    hollow: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": GRAY, "markeredgewidth": 0.7}
    for split, look in looks_of(splits).items() if len(splits) > 1 else ():
        mean = cells[f"{SPLIT_MEAN}{split}"]
        if mean.notna().any():
            label = f"mean of split {split}"
            axes.plot(mean, y + 0.33, look.marker, **hollow, markersize=3.2, zorder=3, label=label)


def _draw_intervals(axes: Axes, *, rows: pd.DataFrame, of: str, start: float, labels: tuple[str, str]) -> None:
    """Draw the intervals of these networks and, thin with ends, those of methods: which several seeds alone give."""
    for kind, width, label in zip(("", "methods_"), (1.3, 0.6), labels, strict=True):
        low, high = (start + rows[f"{of}{kind}{end}_points"] for end in ("low", "high"))
        known = low.notna().to_numpy()
        if not known.any():
            continue
        y = np.arange(len(rows))[known]
        axes.hlines(y, low[known], high[known], color=DARK, linewidth=width, zorder=4, label=label)
        if kind:
            ends = [*low[known], *high[known]]
            axes.plot(ends, [*y, *y], "|", color=DARK, markersize=4, markeredgewidth=width, zorder=4)


def _draw_baselines(axes: Axes, *, table: pd.DataFrame) -> None:
    """Draw the baselines' lines and labels. Labels rise to the right in steps, so that none meets another."""
    means = {name: _mean_of(table, name) for name in LINES}
    known = sorted((name for name in LINES if means[name] == means[name]), key=lambda name: means[name])
    for step, name in enumerate(known):
        x, look = means[name], LINES[name]
        axes.axvline(x, color=look.color, linestyle=look.line, linewidth=0.9, zorder=1)
        up = (FONT + 2) * step
        leader = {"arrowstyle": "-", "color": look.color, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
        place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
        axes.annotate("", (x, 1), xytext=(0, up + FONT), arrowprops=leader, **place)
        text = f"{name} {x:.1f}"
        axes.annotate(text, (x, 1), xytext=(-2, up + 2), ha="right", fontsize=FONT, color=look.color, **place)


def _draw_effects(axes: Axes, *, main: pd.DataFrame) -> None:
    of_methods = main["p_methods_holm"].notna().any()
    plain(axes)
    axes.set_title("Main effects", fontsize=FONT, loc="left")
    axes.set_yticks(range(len(main)), main["effect"])
    axes.set_ylim(len(main) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    if main["difference_points"].isna().all():
        axes.set_xticks([])
    else:
        y = np.arange(len(main))
        axes.axvline(0, color="black", linewidth=0.8, zorder=1)
        _draw_intervals(axes, rows=main, of="", start=0.0, labels=("", ""))
        axes.plot(main["difference_points"], y, "o", color="black", markersize=4.5)
        whose = (
            "95 % interval of these networks,\nthin: of methods" if of_methods else "95 % interval of these networks"
        )
        axes.set_xlabel(f"difference (DSC points),\n{whose}", fontsize=FONT)
        heading = "methods:\np (Holm)" if of_methods else "p (Holm)"
        axes.annotate(
            heading, (1.04, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points", size=FONT
        )
    ps = main["p_methods_holm" if of_methods else "p_holm"].map(formats.p)
    for at, (gap, p) in enumerate(zip(main["gap"], ps, strict=True)):
        if gap:
            _tell_gap(axes, y=at, gap=gap, width=32, lines=2)
        else:
            axes.text(1.04, at, p, transform=axes.get_yaxis_transform(), va="center", fontsize=FONT)


# ---- validation curves ---------------------------------------------------------------------------------------------


def curves_plot(*, curves: pd.DataFrame, title: str, metric: str = "val/dice") -> Figure:
    """Plot a panel per notation, a line per (split, seed) over epochs, Student's in light gray behind each cell's.

    Args:
        curves: columns notation, split, seed, metric, epoch, value; NaN leaves a hole.
        title: a line at the top left.
        metric: which of the metrics is drawn.

    Raises:
        InputError: no value of the metric is there.
    """
    mine = curves[curves["metric"] == metric].sort_values([*PLACE, "epoch"])
    if mine["value"].isna().all():
        known = ", ".join(sorted(set(curves["metric"].dropna()) - {metric})) or "none"
        raise InputError(f"metric={metric}: no run has a value of it; other metrics: {known}")
    looks, notations = looks_of(mine["split"]), _curve_notations(mine)
    figure = new_figure(title=title, height=1.0 + 1.25 * -(-len(notations) // ACROSS))
    student = mine[mine["notation"] == "Student"]
    ylabel = "validation Dice" if metric == "val/dice" else metric
    panels = panels_of(figure, count=len(notations), xlabel="epoch", ylabel=ylabel)
    for axes, notation in zip(panels, notations, strict=True):
        axes.set_title(notation, fontsize=FONT, loc="left", pad=2)
        own = mine[mine["notation"] == notation]
        if own["value"].isna().all():
            axes.text(0.5, 0.5, "no curve", transform=axes.transAxes, ha="center", color=GRAY, fontsize=FONT)
            continue
        if notation not in BASELINES:
            _draw_curves(axes, curves=student, looks=looks, color=LIGHT)
        _draw_curves(axes, curves=own, looks=looks)
    axes.locator_params(axis="x", integer=True, nbins=4)
    axes.locator_params(axis="y", nbins=4)
    handles = [Line2D([], [], color=k.color, linestyle=k.line, label=f"split {split}") for split, k in looks.items()]
    if not student.empty and set(notations).difference(BASELINES):
        handles.append(Line2D([], [], color=LIGHT, label="Student, same line styles"))
    legend_below(figure, handles)
    return figure


def _curve_notations(curves: pd.DataFrame) -> list[str]:
    """Return the notations in order: the cells (all 12 if two or more are there), the baselines, the others."""
    there = set(curves.loc[curves["value"].notna(), "notation"])
    paper = [cell for cell in CELLS if cell in there]
    first = list(CELLS) if len(paper) > 1 else paper
    baselines = [name for name in ("Student", "Teacher", "Teacher_WAug") if name in there]
    return [*first, *baselines, *sorted(there.difference(CELLS, BASELINES))]


def _draw_curves(axes: Axes, *, curves: pd.DataFrame, looks: dict[int, LineStyle], color: str = "") -> None:
    for split, look in looks.items():
        style: dict[str, Any] = {"color": color or look.color, "linestyle": look.line, "zorder": 1 if color else 2}
        for _, run in curves[curves["split"] == split].groupby("seed"):
            there = np.concatenate([[False], run["value"].notna(), [False]])
            alone = there[1:-1] & ~there[:-2] & ~there[2:]  # a line has nothing to draw there
            axes.plot(run["epoch"], run["value"], linewidth=1.0, marker=".", markersize=3, markevery=alone, **style)


# ---- tuning --------------------------------------------------------------------------------------------------------


def tuning_plot(*, progress: pd.DataFrame, title: str) -> Figure:
    """Plot a panel per method: best validation Dice so far against training seconds, a line per split.

    Student's lines are in light gray behind each; a thin line marks the seconds in which the cheapest method has ended.

    Args:
        progress: as ``tuned.best_by_seconds`` gives it.
        title: a line at the top left.

    Raises:
        InputError: there are no trials.
    """
    if progress.empty:
        raise InputError("no trial of this sweep has ended yet")
    looks, there = looks_of(progress["split"]), set(progress["notation"])
    baselines = [name for name in ("Student", "Teacher", "Teacher_WAug") if name in there]
    notations = [*in_order(there.difference(BASELINES)), *baselines]
    figure = new_figure(title=title, height=1.0 + 1.25 * -(-len(notations) // ACROSS))
    panels = panels_of(figure, count=len(notations), xlabel="training seconds", ylabel="best validation Dice")
    equal_s = progress.groupby(["notation", "split"])["seconds"].max().min()
    for axes, notation in zip(panels, notations, strict=True):
        axes.set_title(notation, fontsize=FONT, loc="left", pad=2)
        axes.axvline(equal_s, color=GRAY, linewidth=0.6, linestyle=":")
        if notation not in BASELINES:
            _draw_progress(axes, progress[progress["notation"] == "Student"], looks, color=LIGHT)
        _draw_progress(axes, progress[progress["notation"] == notation], looks)
    panels[0].set_xscale("log")
    handles = [Line2D([], [], color=k.color, linestyle=k.line, label=f"split {split}") for split, k in looks.items()]
    if "Student" in there and there.difference(BASELINES):
        handles.append(Line2D([], [], color=LIGHT, label="Student, same line styles"))
    handles.append(Line2D([], [], color=GRAY, linewidth=0.6, linestyle=":", label="equal seconds: the cheapest ends"))
    legend_below(figure, handles)
    return figure


def _draw_progress(axes: Axes, progress: pd.DataFrame, looks: dict[int, LineStyle], color: str = "") -> None:
    for split, own in progress.groupby("split"):
        look = looks[int(str(split))]
        style: dict[str, Any] = {"color": color or look.color, "linestyle": look.line, "zorder": 1 if color else 2}
        axes.step(own["seconds"], own["best_dice"], where="post", linewidth=1.0, **style)


# ---- size of the Student -------------------------------------------------------------------------------------------


def capacity_plot(*, table: pd.DataFrame, title: str) -> Figure:
    """Plot test DSC against parameters and against latency, a line per model, the Pareto fronts as gray steps.

    Args:
        table: as ``capacity.capacity`` gives it.
        title: a line at the top left.

    Raises:
        InputError: no row has a score.
    """
    known = table.dropna(subset="mean_dice_percent")
    if known.empty:
        raise InputError("no Student of this sweep is finished on all splits and seeds asked for")
    figure = new_figure(title=title, height=3.4)
    labels = {
        "parameters": ("parameters (M)", 1e6),
        "cpu_1_thread_median_ms": ("latency of one image (ms, CPU, 1 thread)", 1),
    }
    panels = panels_of(figure, count=len(labels), xlabel="", ylabel="test DSC (%)", sharex=False)
    for axes, (column, (label, unit)), front in zip(panels, labels.items(), ("parameters", "latency"), strict=True):
        axes.set_xscale("log")
        axes.set_xlabel(label, fontsize=FONT)
        on_front = known[known[f"on_{front}_front"]].sort_values(column)
        cost, dice = on_front[column].astype(float) / unit, on_front["mean_dice_percent"]
        axes.step(cost, dice, where="post", color=LIGHT, linewidth=4, zorder=1, solid_capstyle="butt")
        for notation, look in _model_looks(known["notation"]).items():
            own = known[known["notation"] == notation].sort_values(column)
            style: dict[str, Any] = {"color": look.color, "linestyle": look.line, "marker": look.marker}
            axes.plot(own[column].astype(float) / unit, own["mean_dice_percent"], **style, markersize=4, linewidth=1)
        ticks = sorted(set((known[column].astype(float) / unit).round(2)))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    handles = [
        Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, markersize=4, label=notation)
        for notation, look in _model_looks(known["notation"]).items()
    ]
    legend_below(figure, [*handles, Line2D([], [], color=LIGHT, linewidth=4, label="Pareto front")])
    return figure


def _model_looks(notations: Iterable[str]) -> dict[str, LineStyle]:
    """Return a look for Student, and for each cell in the paper's order."""
    cells = in_order(set(notations).difference(BASELINES))
    looks = {"Student": LineStyle("black", "o")} if "Student" in set(notations) else {}
    return looks | {cell: SPLITS[number % len(SPLITS)] for number, cell in enumerate(cells)}


# ---- each image against Student ------------------------------------------------------------------------------------


def paired(sweep: Sweep) -> pd.DataFrame:
    """Return the Dice of each cell without a gap beside Student's on the same image of the same split and seed.

    Returns:
        Columns notation, split, seed, image, dice_ours, dice_baseline (fractions); no rows if Student has a gap.

    Raises:
        InputError: the sweep is empty or mixed, or two were scored on different images.
    """
    runs, cells = placed_runs(sweep), cell_notations(sweep)
    scored = scored_images(runs=runs, scores=sweep.scores)
    why = gaps(runs=runs, scored=scored, notations=cells)
    student = scored[scored["notation"] == "Student"]  # with a gap it lacks a place of every cell that has none
    frames = [
        pair(ours=scored[scored["notation"] == cell], baseline=student).rename(columns={"notation_ours": "notation"})
        for cell in cells
        if not why[cell]
    ]
    return pd.concat(frames, ignore_index=True)[PAIR_COLUMNS] if frames else pd.DataFrame(columns=PAIR_COLUMNS)


def pairs_plot(*, pairs: pd.DataFrame, title: str) -> Figure:
    """Plot a panel per cell, a mark per test image: Student's Dice on x, the cell's on y (better above the diagonal).

    Args:
        pairs: as paired gives it (fractions).
        title: a line at the top left.

    Raises:
        InputError: there is no pair.
    """
    if pairs.empty:
        raise InputError("nothing to compare: no cell and Student are both finished on all splits and seeds asked for")
    looks, notations = looks_of(pairs["split"]), in_order(pairs["notation"])
    across = min(ACROSS, len(notations))
    side = min(2.6, (WIDTH - 0.5) / across - 0.15)
    figure = new_figure(title=title, height=0.8 + (side + 0.5) * -(-len(notations) // across))
    panels = panels_of(figure, count=len(notations), xlabel="Student's Dice", ylabel="Dice of the cell")
    for axes, notation in zip(panels, notations, strict=True):
        own = pairs[pairs["notation"] == notation]
        axes.axline((0, 0), (1, 1), color=GRAY, linewidth=0.7, zorder=1)
        for split, look in looks.items():
            here = own[own["split"] == split]
            hollow: dict[str, Any] = {"facecolors": "none", "edgecolors": look.color, "marker": look.marker}
            axes.scatter(here["dice_baseline"], here["dice_ours"], s=9, linewidths=0.6, **hollow)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.set_title(f"{notation}\n{_counted(own)}", fontsize=FONT, loc="left", pad=3, linespacing=1.15)
    mark: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "none", "markersize": 4}
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, label=f"split {split}", **mark)
        for split, look in looks.items()
    ]
    legend_below(figure, handles)
    return figure


def _counted(pairs: pd.DataFrame) -> str:
    """Count the images better and worse than Student's, and give the mean difference."""
    difference = (pairs["dice_ours"] - pairs["dice_baseline"]).to_numpy()
    better, worse = int((difference > EQUAL).sum()), int((difference < -EQUAL).sum())
    equal = len(difference) - better - worse
    mean = f"mean {100 * difference.mean():+.2f} points"
    return f"better {better}, worse {worse}\n{f'equal {equal}, ' if equal else ''}{mean}"
