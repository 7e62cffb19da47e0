"""Give the figures of a sweep one look: sizes, colors, panels.

Plots are matplotlib Figures, 7 inches wide, with no text below 7 points. Shape, fill or line style carries every
distinction that color carries. Blue and vermilion always mean strong and weak augmentation of the Teacher's views; the
splits have the other colors.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdsweep.results.paper import CELLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, ROW = 7.0, 0.235  # inches: a page's text, a row of the figure of scores
FONT = 7.0  # points
ACROSS = 4  # panels beside each other: as many as the paper has cells of one path
GRAY, DARK, LIGHT = "0.45", "0.25", "0.78"


class LineStyle(NamedTuple):
    """The look of a mark or a line; the colors are Okabe and Ito's, safe for the color-blind."""

    color: str
    marker: str
    line: str | tuple[int, tuple[float, ...]] = "-"


AUGMENTATIONS = {"strong": LineStyle("#0072B2", "o"), "weak": LineStyle("#D55E00", "D")}
LINES = {
    "Student": LineStyle("black", ""),
    "Teacher": LineStyle("#0072B2", "", "--"),
    "Teacher_WAug": LineStyle("#D55E00", "", "-."),
}
SPLITS = (  # the last in gray; more splits than these begin again
    LineStyle("#009E73", "^", "-"),
    LineStyle("#E69F00", "s", (0, (4, 1.5))),
    LineStyle("#CC79A7", "v", (0, (1, 1))),
    LineStyle("#56B4E9", "<", (0, (5, 1.5, 1, 1.5))),
    LineStyle("#000000", ">", (0, (8, 2))),
    LineStyle("#666666", "p", (0, (4, 1.5, 1, 1.5, 1, 1.5))),
)


def new_figure(*, title: str, height: float) -> Figure:
    """Return a figure of the width of a page with its title at the top left; height in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    lines = textwrap.fill(title, 95)
    figure.suptitle(lines, x=0.01, ha="left", fontsize=FONT + 1.5, fontweight="bold")
    return figure


def plain(axes: Axes) -> None:
    """Set sizes on the axes: ticks that appear only when it is drawn would take the global settings."""
    axes.tick_params(labelsize=FONT, length=2.5, width=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_linewidth(0.6)


def looks_of(splits: Iterable[int]) -> dict[int, LineStyle]:
    """Return a look for each split."""
    return {split: SPLITS[index % len(SPLITS)] for index, split in enumerate(sorted(set(splits)))}


def panels_of(figure: Figure, *, count: int, xlabel: str, ylabel: str, sharex: bool = True) -> list[Axes]:
    """Add panels with common axes in rows of ACROSS, or one shorter row; only the outer panels have labels."""
    across = min(ACROSS, count)
    grid = figure.subplots(-(-count // across), across, sharex=sharex, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for unused in panels[count:]:
        unused.set_axis_off()
    for index, axes in enumerate(panels[:count]):
        plain(axes)
        is_lowest = index + across >= count
        axes.tick_params(labelbottom=is_lowest)
        axes.set_xlabel(xlabel if is_lowest else "", fontsize=FONT)
        axes.set_ylabel(ylabel if index % across == 0 else "", fontsize=FONT)
    return panels[:count]


def legend_below(figure: Figure, handles: list[Line2D]) -> None:
    """Add a legend below the panels."""
    across = -(-len(handles) // -(-len(handles) // 6))  # lines of at most 6, equally full
    figure.legend(handles=handles, loc="outside lower center", ncols=across, fontsize=FONT, frameon=False)


def in_order(notations: Iterable[str]) -> list[str]:
    """Return the paper's cells in its order, then the others by name."""
    there = set(notations)
    return [*(cell for cell in CELLS if cell in there), *sorted(there.difference(CELLS))]
