"""Give the figures of a sweep one look: sizes, colors, panels, files.

Figures are 7 inches wide, with no text below 7 points. Shape, fill or line style carries every distinction that color
carries. Blue and vermilion always mean strong and weak augmentation of the Teacher's views; the splits have the other
colors.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdsweep.core.files import write_bytes

WIDTH, FONT = 7.0, 7.0  # inches, a page's text; points
ACROSS = 4  # panels in a row: as many as the paper has cells of one path
GRAY, DARK, LIGHT = "0.45", "0.25", "0.78"
# Arguments of savefig by format. Dates are left out, so that equal figures are equal files.
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 200},
    "pdf": {"metadata": {"CreationDate": None}},
    "svg": {"metadata": {"Date": None}},
}
FILES = {"svg.fonttype": "none", "svg.hashsalt": "kdsweep", "pdf.fonttype": 42}  # text stays text


class Look(NamedTuple):
    """The look of a mark or a line; the colors are Okabe and Ito's, safe for the color-blind."""

    color: str
    marker: str
    line: str | tuple[int, tuple[float, ...]] = "-"


AUGMENTATIONS = {"strong": Look("#0072B2", "o"), "weak": Look("#D55E00", "D")}
BASELINE_LINES = {
    "Student": Look("black", ""),
    "Teacher": Look("#0072B2", "", "--"),
    "Teacher_WAug": Look("#D55E00", "", "-."),
}
SPLITS = (  # the last in gray; more splits than these begin again
    Look("#009E73", "^", "-"),
    Look("#E69F00", "s", (0, (4, 1.5))),
    Look("#CC79A7", "v", (0, (1, 1))),
    Look("#56B4E9", "<", (0, (5, 1.5, 1, 1.5))),
    Look("#000000", ">", (0, (8, 2))),
    Look("#666666", "p", (0, (4, 1.5, 1, 1.5, 1, 1.5))),
)


def looks_of(splits: Iterable[Any]) -> dict[Any, Look]:
    """Return a look for each split."""
    return {split: SPLITS[index % len(SPLITS)] for index, split in enumerate(sorted(set(splits)))}


def page(title: str, *, height: float) -> Figure:
    """Return a figure with its title at the top left; height in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(textwrap.fill(title, 95), x=0.01, ha="left", fontsize=FONT + 1.5, fontweight="bold")
    return figure


def plain(axes: Axes) -> None:
    """Set sizes on the axes: ticks that appear only when it is drawn would take the global settings."""
    axes.tick_params(labelsize=FONT, length=2.5, width=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_linewidth(0.6)


def legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Add a legend below the panels, in lines of at most 6, equally full."""
    columns = -(-len(handles) // -(-len(handles) // 6))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=FONT, frameon=False)


def panels(
    frame: pd.DataFrame,
    draw: Callable[[Axes, str, pd.DataFrame], None],
    *,
    names: Sequence[str],
    title: str,
    labels: tuple[str, str],
    handles: Sequence[Line2D],
    by: str = "notation",
    height: float = 1.25,
    sharex: bool = True,
) -> Figure:
    """Draw a panel of ``height`` inches for each name, with common axes; only the outer panels have labels, of x and y.

    ``draw`` draws a panel from its axes, its name, and the frame's rows with that name in column ``by``.
    """
    across = min(ACROSS, len(names))
    down = -(-len(names) // across)
    figure = page(title, height=1.0 + height * down)
    grid = figure.subplots(down, across, sharex=sharex, sharey=True, squeeze=False).flat
    for index, axes in enumerate(grid):
        if index >= len(names):
            axes.set_axis_off()
            continue
        plain(axes)
        is_lowest = index + across >= len(names)
        axes.tick_params(labelbottom=is_lowest)
        axes.set_xlabel(labels[0] if is_lowest else "", fontsize=FONT)
        axes.set_ylabel("" if index % across else labels[1], fontsize=FONT)
        axes.set_title(names[index], fontsize=FONT, loc="left", pad=2)
        draw(axes, names[index], frame[frame[by] == names[index]])
    legend_below(figure, handles)
    return figure


def render(figure: Figure, suffix: str) -> bytes:
    """Return the bytes of a figure as one of FORMATS; equal figures give equal bytes."""
    stream = io.BytesIO()
    with mpl.rc_context(FILES):
        figure.savefig(stream, format=suffix, **FORMATS[suffix])
    return stream.getvalue()


def write(figure: Figure, stem: Path) -> list[Path]:
    """Write STEM.png, .pdf and .svg."""
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in FORMATS]
    for file in files:
        write_bytes(file, render(figure, file.suffix[1:]))
    return files
