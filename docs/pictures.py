"""Draw the pictures of README.md: ``python docs/pictures.py [FOLDER]``; the seconds come from benchmarks/cpu.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from kdsweep.config.grid import notation

DOCS = Path(__file__).resolve().parent
BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "#6e6e6e"  # Okabe and Ito: told apart by the color-blind
BARS = {
    "torchdistill": "torchdistill",
    "one by one": "one by one",
    "lockstep 12": "lockstep",
    "lockstep all bf16": "lockstep, bf16",
}


def box(axes: Axes, x: float, y: float, text: str, *, color: str, width: float = 0.26, height: float = 0.13) -> None:
    """Draw a rounded box with a text, centered at (x, y) in fractions of the axes."""
    corner, style = (x - width / 2, y - height / 2), "round,pad=0.01"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor="white", edgecolor=color, lw=1.4))
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5)


def draw_lockstep(file: Path) -> None:
    """Draw what a lockstep group shares, next to the measured seconds of a step of 12 cells."""
    figure, (shared, bars) = plt.subplots(1, 2, figsize=(8.6, 3.1), width_ratios=(1.25, 1), layout="constrained")
    shared.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    shared.axis("off")
    box(shared, 0.14, 0.5, "one batch,\ntwo views", color=GRAY, height=0.22)
    for y, view in ((0.78, "strong"), (0.22, "weak")):
        box(shared, 0.48, y, f"Teacher,\n{view} view: once", color=BLUE, height=0.22)
        shared.annotate("", (0.34, y), (0.28, 0.5), arrowprops={"arrowstyle": "->", "color": GRAY})
        for student in range(6):
            height = y - 0.19 + 0.076 * student
            box(shared, 0.86, height, f"Student {6 - student + 6 * (view == 'weak')}", color=ORANGE, height=0.045)
            shared.plot([0.62, 0.72], [y, height], color=GRAY, linewidth=0.6)
    median = json.loads((DOCS.parent / "benchmarks" / "cpu.json").read_text())["median"]
    seconds = [median[name] for name in BARS]
    drawn = bars.barh(list(BARS.values()), seconds, color=[GRAY, GRAY, ORANGE, ORANGE], height=0.62)
    bars.bar_label(drawn, [f"{value:.1f} s" for value in seconds], padding=3, fontsize=9)
    bars.invert_yaxis()
    bars.set_xlim(0, max(seconds) * 1.2)
    bars.set_xlabel("seconds per training step of the 12 cells\n(2 CPU cores, 224 x 224, batch 16)", fontsize=8.5)
    bars.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_grid(file: Path) -> None:
    """Draw the 12 cells by path, loss and Teacher augmentation, with their names."""
    paths = {"L": "L: logits", "H": "H: hidden maps", "HReg": "HR: hidden maps through a regressor"}
    columns = [(loss, view) for loss in ("MSE", "KLD") for view in ("strong", "weak")]
    figure, axes = plt.subplots(figsize=(8.6, 1.9), layout="constrained")
    names = [[notation(f"{path}_{loss}", view) for loss, view in columns] for path in paths]
    heads = [f"loss={loss.lower()}\nteacher_aug={view}" for loss, view in columns]
    table = axes.table(names, rowLabels=list(paths.values()), colLabels=heads, cellLoc="center", bbox=(0.3, 0, 0.7, 1))
    table.auto_set_font_size(value=False)
    table.set_fontsize(9)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor("#c8c8c8")
        if row == 0 or column == -1:
            cell.set_facecolor("#f2f2f2")
    axes.axis("off")
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    draw_lockstep(folder / "lockstep.png")
    draw_grid(folder / "grid.png")
