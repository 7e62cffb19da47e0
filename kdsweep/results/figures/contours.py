"""Draw Figure 2 of the paper: a test image with the contours of ground truth and prediction, a panel per model."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from kdsweep.core.palette import as_hex, class_colors
from kdsweep.results.figures.style import ACROSS, FONT, WIDTH
from kdsweep.results.paper import BASELINES, CELLS

if TYPE_CHECKING:
    from kdsweep.results.figures.examples import Example

IMAGE = "Image"
PATH_ROWS = [CELLS[start : start + ACROSS] for start in range(0, len(CELLS), ACROSS)]
# Inches: of the largest panel, of a panel's title, of a line of text, of what is above and below the panels.
LARGEST_PANEL, PANEL_TITLE, TEXT_LINE, AROUND = 2.2, 0.2, 0.135, 0.6
LEGEND_COLUMNS = 6
PANEL_CHARACTERS, CAPTION_CHARACTERS = 21, 115  # what fits above the narrowest panel, and in the width
# Green and red as in the paper, a green that stays lighter for the color-blind; dashes short enough for a small island.
LINE, TRUTH, PREDICTION = 1.1, ("#00e8a8", "solid"), ("#ff1f3d", (0, (2.4, 1.2)))
HALO = [patheffects.withStroke(linewidth=2 * LINE, foreground="black", alpha=0.55)]
GRAY = "0.4"


def figure(example: Example) -> Figure:
    """Draw the image alone, then a panel per model: ground truth green and solid, prediction red and dashed.

    Of several classes each has its color, in ground truth and prediction. Use the paper's rows if they are complete
    (image and baselines, then a row per path), else a compact grid.
    """
    best = _best(example.dice)
    note = "" if example.mask.any() else "The ground truth holds no lesion. "
    mean = ", the mean over its classes" if example.class_names else ""
    note += f"Number: Dice on this image{mean}{', bold: the best cell' if best else ''}."
    text = "\n".join(textwrap.fill(line, CAPTION_CHARACTERS) for line in (example.caption, note))
    drawn, panels = _grid(_rows([*example.predictions, *example.missing]), lines=text.count("\n") + 1)
    for name, axes in panels.items():
        axes.set(xticks=[], yticks=[], box_aspect=1)
        axes.spines[:].set_visible(name in example.missing)
        if name in example.missing:
            axes.set_facecolor("0.95")
            axes.spines[:].set_color("0.8")
            _label(axes, name, color=GRAY)
            _write(axes, 0.5, example.missing[name], color=GRAY, va="center")
            continue
        axes.imshow(example.image, interpolation="bicubic")
        label = name if name == IMAGE else f"{name} {example.dice[name]:.2f}"
        _label(axes, label, weight="bold" if name in best else "normal")
        if name in example.predictions:
            _outline_classes(axes, example, name)
            if not example.predictions[name].any():
                paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
                _write(axes, 0.04, "no lesion predicted", bbox=paper, va="bottom")
    drawn.suptitle(example.title, fontsize=FONT, parse_math=False)
    sizes: dict[str, float] = {"fontsize": FONT, "title_fontsize": FONT}
    handles = _handles(example.class_names)
    columns = min(len(handles), LEGEND_COLUMNS)
    below = drawn.legend(handles=handles, title=text, loc="outside lower center", ncols=columns, frameon=False, **sizes)
    below.get_title().set(parse_math=False, ha="center")
    return drawn


def _handles(class_names: Sequence[str]) -> list[Line2D]:
    """Return the lines of the legend: each class in its color, and how ground truth and prediction are drawn."""
    truth, prediction = (GRAY, GRAY) if class_names else (TRUTH[0], PREDICTION[0])
    colors = map(as_hex, class_colors(len(class_names)))
    lines: list[tuple[str, str, Any]] = [(*each, "solid") for each in zip(class_names, colors, strict=True)]
    lines += [("ground truth", truth, TRUTH[1]), ("prediction", prediction, PREDICTION[1])]
    return [
        Line2D([], [], color=color, linestyle=line, linewidth=1.3 * LINE, label=label, path_effects=HALO)
        for label, color, line in lines
    ]


def _outline_classes(axes: Axes, example: Example, name: str) -> None:
    """Draw the contours of ground truth and of a model's prediction: green and red, or each class in its color."""
    by_class = [as_hex(color) for color in class_colors(len(example.class_names))]
    masks = {TRUTH: example.mask, PREDICTION: example.predictions[name]}
    for (color, line), mask in masks.items():
        for index, shown in enumerate(by_class or [color], start=1):
            _outline(axes, mask == index, shown, line)


def _best(dice: dict[str, float]) -> list[str]:
    """Return the cells with the highest Dice, none if there is only one cell."""
    cells = {name: round(value, 9) for name, value in dice.items() if name not in BASELINES}
    return [name for name, value in cells.items() if value == max(cells.values())] if len(cells) > 1 else []


def _rows(names: list[str]) -> list[list[str]]:
    """Return the grid of panels: the paper's rows if all that occur are complete, else rows of equal length."""
    others = [name for name in names if name not in (*BASELINES, *CELLS)]
    paper = [row for row in (BASELINES, *PATH_ROWS) if not set(row).isdisjoint(names)]
    if set(BASELINES) <= set(names) and {name for row in paper for name in row} == set(names).difference(others):
        paths = [name.removesuffix("_WAug").rpartition("_")[0] for name in others]  # "" for a method
        groups = [
            [name for name, path in zip(others, paths, strict=True) if path == key] for key in dict.fromkeys(paths)
        ]
        return [[IMAGE, *BASELINES], *map(list, paper[1:]), *(row for group in groups for row in _cut(group, ACROSS))]
    panels = [IMAGE, *(name for name in (*BASELINES, *CELLS) if name in names), *others]
    return _cut(panels, -(-len(panels) // -(-len(panels) // ACROSS)))


def _cut(names: list[str], length: int) -> list[list[str]]:
    return [names[start : start + length] for start in range(0, len(names), length)]


def _grid(rows: list[list[str]], *, lines: int) -> tuple[Figure, dict[str, Axes]]:
    """Return an empty figure with square panels and room for lines of text below."""
    columns = max(map(len, rows))
    panel = min(WIDTH / columns - 0.08, LARGEST_PANEL)
    height = len(rows) * (PANEL_TITLE + panel) + AROUND + TEXT_LINE * lines
    layout = ConstrainedLayoutEngine(compress=True, w_pad=0.03, h_pad=0.02, wspace=0, hspace=0)
    drawn = Figure(figsize=(WIDTH, height), layout=layout)
    panels: dict[str, Axes] = drawn.subplot_mosaic([row + ["."] * (columns - len(row)) for row in rows])
    return drawn, {name: panels[name] for row in rows for name in row}


def _outline(axes: Axes, mask: np.ndarray, color: str, line: Any) -> None:
    """Draw the closed border of a mask (S, S), also along the border of the image."""
    if not mask.any():
        return
    padded = np.pad(mask.astype(float), 1)
    y, x = (np.arange(-1, length - 1) for length in padded.shape)
    view = axes.axis()
    lines = axes.contour(x, y, padded, levels=[0.5], colors=[color], linestyles=[line], linewidths=[LINE])
    lines.set(path_effects=HALO, clip_on=False)
    axes.axis(view)  # that of the image


def _label(axes: Axes, text: str, **how: Any) -> None:
    size = FONT * min(1, PANEL_CHARACTERS / len(text))  # never over the neighbor's
    axes.set_title(text, fontsize=size, pad=3, parse_math=False, **how)


def _write(axes: Axes, y: float, text: str, **how: Any) -> None:
    axes.text(0.5, y, text, transform=axes.transAxes, ha="center", fontsize=FONT, **how)
