"""Draw Figure 2 of the paper: a test image with the contours of ground truth and prediction, a panel per model."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdsweep.results.paper import BASELINES, CELLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGE = "Image"
COLUMNS = 4
PATH_ROWS = [CELLS[start : start + COLUMNS] for start in range(0, len(CELLS), COLUMNS)]

# Inches and points: the figure is as wide as a page's text, so it is printed in the sizes given here.
WIDTH, MARGIN, GAP, LARGEST_PANEL = 7.0, 0.06, 0.08, 2.2
HEAD, PANEL_TITLE, LEGEND, TEXT_LINE = 0.2, 0.2, 0.24, 0.135
FONT, SMALL_FONT, LINE = 7.5, 7.0, 1.1
PANEL_CHARACTERS, CAPTION_CHARACTERS = 21, 115  # what fits above the narrowest panel, and in the width
# The paper's colors; line styles for the color-blind, with dashes short enough for a small island.
TRUTH, PREDICTION = ("#00e050", "solid"), ("#ff1f3d", (0, (2.4, 1.2)))
HALO = [patheffects.withStroke(linewidth=2 * LINE, foreground="black", alpha=0.55)]
GRAY = "0.4"


def figure2(
    *,
    image: np.ndarray,
    mask: np.ndarray,
    predictions: dict[str, np.ndarray],
    missing: dict[str, str],
    dice: dict[str, float],
    caption: str,
    title: str,
) -> Figure:
    """Draw the image alone, then a panel per model: ground truth green and solid, prediction red and dashed.

    Use the paper's rows if they are whole (image and baselines, then a row per path), else a compact grid.

    Args:
        image: (S, S, 3) uint8.
        mask: (S, S) in {0, 1}.
        predictions: (S, S) bool by notation.
        missing: why there is no prediction, by notation.
        dice: fractions by notation of predictions.
        caption: line below, which says why this image was chosen.
        title: line above.
    """
    best = _best(dice)
    told = "" if mask.any() else "The ground truth holds no lesion. "
    told += f"Number: Dice on this image{', bold: the best cell' if best else ''}."
    lines = [line for text in (caption, told) for line in textwrap.wrap(text, width=CAPTION_CHARACTERS)]
    below = LEGEND + TEXT_LINE * len(lines) + MARGIN
    figure, panels = _panels(_rows([*predictions, *missing]), below=below)
    for name, axes in panels.items():
        if name in missing:
            _absent(axes, name, missing[name])
            continue
        axes.imshow(image, interpolation="bicubic")
        axes.set_axis_off()
        label = name if name == IMAGE else f"{name} {dice[name]:.2f}"
        _label(axes, label, weight="bold" if name in best else "normal")
        if name in predictions:
            _outline(axes, mask, *TRUTH)
            _outline(axes, predictions[name], *PREDICTION)
            if not predictions[name].any():
                _note(axes, "no lesion found")
    _around(figure, title=title, lines=lines, below=below)
    return figure


def _best(dice: dict[str, float]) -> list[str]:
    """Return the cells with the highest Dice, none if there is only one cell."""
    cells = {name: round(value, 9) for name, value in dice.items() if name not in BASELINES}
    return [name for name, value in cells.items() if value == max(cells.values())] if len(cells) > 1 else []


def _rows(names: list[str]) -> list[list[str]]:
    """Return the grid of panels: the paper's rows if all that occur are whole, else rows of equal length."""
    own = [name for name in names if name not in (*BASELINES, *CELLS)]
    paper = [row for row in (BASELINES, *PATH_ROWS) if not set(row).isdisjoint(names)]
    if set(BASELINES) <= set(names) and {name for row in paper for name in row} == set(names).difference(own):
        paths = [name.removesuffix("_WAug").rpartition("_")[0] for name in own]  # "" for a method
        groups = [[name for name, path in zip(own, paths, strict=True) if path == key] for key in dict.fromkeys(paths)]
        more = [group[start : start + COLUMNS] for group in groups for start in range(0, len(group), COLUMNS)]
        return [[IMAGE, *BASELINES], *map(list, paper[1:]), *more]
    panels = [IMAGE, *(name for name in (*BASELINES, *CELLS) if name in names), *own]
    columns = math.ceil(len(panels) / math.ceil(len(panels) / COLUMNS))
    return [panels[start : start + columns] for start in range(0, len(panels), columns)]


def _panels(rows: list[list[str]], *, below: float) -> tuple[Figure, dict[str, Axes]]:
    """Return an empty figure with square panels and ``below`` inches under them."""
    columns = max(map(len, rows))
    panel = min((WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns, LARGEST_PANEL)
    left = (WIDTH - columns * panel - (columns - 1) * GAP) / 2
    height = HEAD + len(rows) * (PANEL_TITLE + panel) + below
    figure = Figure(figsize=(WIDTH, height))
    panels = {}
    for row, names in enumerate(rows):
        bottom = height - HEAD - (row + 1) * (PANEL_TITLE + panel)
        for column, name in enumerate(names):
            x = left + column * (panel + GAP)
            box = (x / WIDTH, bottom / height, panel / WIDTH, panel / height)
            panels[name] = figure.add_axes(box, label=name)
    return figure, panels


def _outline(axes: Axes, mask: np.ndarray, color: str, style: Any) -> None:
    """Draw the closed border of a mask (S, S), also along the border of the image."""
    if not mask.any():
        return
    padded = np.pad(mask.astype(float), 1)
    y, x = (np.arange(-1, length - 1) for length in padded.shape)
    view = axes.axis()
    lines = axes.contour(x, y, padded, levels=[0.5], colors=[color], linestyles=[style], linewidths=[LINE])
    lines.set(path_effects=HALO, clip_on=False)
    axes.axis(view)  # that of the image


def _absent(axes: Axes, name: str, why: str) -> None:
    axes.set(xticks=[], yticks=[], facecolor="0.95")
    axes.spines[:].set_color("0.8")
    _label(axes, name, color=GRAY)
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=GRAY, fontsize=FONT)


def _label(axes: Axes, text: str, **how: Any) -> None:
    size = FONT * min(1, PANEL_CHARACTERS / len(text))  # never over the neighbor's
    axes.set_title(text, fontsize=size, pad=3, parse_math=False, **how)


def _note(axes: Axes, text: str) -> None:
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    axes.text(0.5, 0.04, text, transform=axes.transAxes, ha="center", va="bottom", fontsize=SMALL_FONT, bbox=paper)


def _around(figure: Figure, *, title: str, lines: list[str], below: float) -> None:
    """Draw the title above the panels, and the legend and the lines of the caption below them."""
    height = figure.get_figheight()
    figure.text(0.5, 1 - MARGIN / height, title, ha="center", va="top", fontsize=FONT, parse_math=False)
    names = {"ground truth": TRUTH, "prediction": PREDICTION}
    drawn = [
        Line2D([], [], color=color, linestyle=style, linewidth=1.3 * LINE, label=label, path_effects=HALO)
        for label, (color, style) in names.items()
    ]
    place = (0.5, (below - LEGEND / 2) / height)
    figure.legend(handles=drawn, loc="center", bbox_to_anchor=place, ncols=2, fontsize=FONT, frameon=False)
    for number, line in enumerate(lines):
        y = (below - LEGEND - number * TEXT_LINE) / height
        figure.text(0.5, y, line, ha="center", va="top", fontsize=SMALL_FONT, parse_math=False)
