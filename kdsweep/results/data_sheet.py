"""``python -m kdsweep data data=NAME data.root=DIR``: an account of a data set, and a contact sheet of its masks.

The account says whether the images can be used, what is doubtful and what is ignored. The sheet shows the images that
show most: doubtful ones, the smallest and the largest lesions, then some at random.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from kdsweep.config import composition, inputs
from kdsweep.config.schema import Settings
from kdsweep.core.errors import InputError
from kdsweep.core.files import private_path, write_bytes
from kdsweep.core.palette import as_hex, class_colors
from kdsweep.core.progress import plural
from kdsweep.data.account import Account, measure, text
from kdsweep.data.images import read_entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACROSS, IMAGES, OF_A_KIND = 6, 36, 6  # panels in a row, on the sheet, and of each reason but the last
PANEL_W, PANEL_H, HEAD = 2.0, 1.7, 0.62  # inches
DPI, THUMB_PX, ID_CHARACTERS, LEGEND_COLUMNS = 130, 300, 24, 6
# Okabe and Ito's colors, safe for the color-blind; yellow stands out from gray images. The text says what color says.
CONTOUR, DOUBT = "#F0E442", "#D55E00"
HALO = [patheffects.withStroke(linewidth=2.6, foreground="black", alpha=0.7)]
SMALLEST, LARGEST, RANDOM = "smallest lesions", "largest lesions", "at random"


def choose(account: Account, *, count: int = IMAGES) -> dict[int, str]:
    """Choose images to look at; the last ones are drawn at random, with a fixed seed.

    Args:
        account: of the data set.
        count: the most images.

    Returns:
        The reason by the image's index, in the order of the sheet.
    """
    chosen: dict[int, str] = {}
    for reason, numbers in account.doubts().items():
        rest = [number for number in numbers if number not in chosen]
        chosen |= dict.fromkeys(rest[:OF_A_KIND], reason)
    lesions = {number: image.lesion for number, image in enumerate(account.measured) if image.lesion > 0}
    for reason, sign in ((SMALLEST, 1), (LARGEST, -1)):
        rest = sorted((number for number in lesions if number not in chosen), key=lambda n: sign * lesions[n])
        chosen |= dict.fromkeys(rest[:OF_A_KIND], reason)
    readable = [number for number, image in enumerate(account.measured) if image.height and number not in chosen]
    drawn = np.random.default_rng(0).permutation(readable)[: max(0, count - len(chosen))]
    chosen |= dict.fromkeys(sorted(int(number) for number in drawn), RANDOM)
    return dict(list(chosen.items())[:count])


def draw(account: Account, chosen: Mapping[int, str]) -> Figure:
    """Draw the chosen images with the contours of their masks, a panel each."""
    rows = -(-len(chosen) // ACROSS)
    height = rows * (PANEL_H + HEAD) + 0.5
    figure = Figure(
        figsize=(ACROSS * PANEL_W, height),
        layout=ConstrainedLayoutEngine(h_pad=0.14, w_pad=0.04, rect=(0, 0.01, 1, 0.99)),
    )
    title = f"data={account.name}: {len(chosen)} of {plural(len(account.entries), 'image')}, masks as "
    title += "contours" if account.class_names else "yellow contours"
    title += ", circles on specks" + "\n" * -(-len(account.class_names) // LEGEND_COLUMNS)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    if names := account.class_names:
        lines = [Line2D([], [], color=color, path_effects=HALO) for color in _colors(len(names))]
        look: dict[str, Any] = {"ncols": LEGEND_COLUMNS, "frameon": False, "fontsize": 9, "borderpad": 0}
        below = (0.01, 1 - 0.34 / height)  # the first line of the title, whose others are empty
        figure.legend(lines, names, loc="upper left", bbox_to_anchor=below, borderaxespad=0, **look)
    panels = figure.subplots(rows, ACROSS, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
        axes.set_anchor("NW")  # the titles of a row on one line
    for axes, (number, reason) in zip(panels, chosen.items(), strict=False):
        _draw_image(axes, *read_entry(account.entries[number]), _colors(len(account.class_names)))
        _write_title(axes, account, number, reason)
    return figure


def _colors(classes: int) -> list[str]:
    """Return the colors of the contours of several classes, or of one (0)."""
    return [as_hex(color) for color in class_colors(classes)] or [CONTOUR]


def _draw_image(axes: Axes, image: np.ndarray, mask: np.ndarray, colors: Sequence[str]) -> None:
    """Draw an image (H, W, 3) uint8 and the contours of its mask (H, W) of class indices, in full resolution."""
    height, width = mask.shape
    scale = min(1.0, THUMB_PX / max(height, width))
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    thumb = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    axes.imshow(thumb, extent=(0, width, height, 0), interpolation="antialiased")
    for index, color in enumerate(colors, start=1):
        _draw_contours(axes, (mask == index).astype(np.uint8), color)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _draw_contours(axes: Axes, mask: np.ndarray, color: str) -> None:
    """Draw the contours of a mask (H, W) uint8 in {0, 1}, with circles on specks."""
    height, width = mask.shape
    contours, _ = cv2.findContours(np.pad(mask, 1), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for contour in contours:
        x, y = (contour[:, 0] - 0.5).T  # one pixel of padding, less half a pixel to its center
        marker = "o" if max(np.ptp(x) / width, np.ptp(y) / height) < 0.03 else ""  # else it would hardly be seen
        line: dict[str, Any] = {"color": color, "linewidth": 1.3, "path_effects": HALO}
        axes.plot([*x, x[0]], [*y, y[0]], marker=marker, markersize=9, markevery=[0], fillstyle="none", **line)


def _write_title(axes: Axes, account: Account, number: int, reason: str) -> None:
    entry, image = account.entries[number], account.measured[number]
    is_doubt = reason not in (SMALLEST, LARGEST, RANDOM)
    name = entry.id if len(entry.id) <= ID_CHARACTERS else f"{entry.id[: ID_CHARACTERS - 3]}..."
    label = [entry.label] if entry.label != "unknown" else []
    part = [account.parts[entry.id]] if entry.id in account.parts else []
    shares = [(name, share) for name, share in zip(account.class_names, image.classes, strict=True) if share > 0]
    areas = [f"{name} {100 * share:.2g} %" for name, share in shares or [("lesion", image.lesion)]]
    what = ", ".join([*label, *part, *areas])
    axes.set_title(f"{name}\n{what}", loc="left", fontsize=7.5, parse_math=False)
    shade: dict[str, Any] = {"color": DOUBT, "fontweight": "bold"} if is_doubt else {"color": "0.35"}
    below = f"{reason.upper() if is_doubt else reason}, {image.width} x {image.height}"
    axes.text(0.0, -0.03, below, transform=axes.transAxes, va="top", fontsize=7, in_layout=False, **shade)


def _save(figure: Figure, file: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    try:
        write_bytes(file, picture.getvalue())
    except OSError as error:
        raise InputError(f"--sheet {file}: cannot be written ({error.strerror}); choose another file") from error


def take_account(settings: Settings) -> Account:
    """Read and measure the data set of a configuration, and draw its split.

    Raises:
        InputError: the data set cannot be listed.
    """
    listed = inputs.listing(settings)
    split: dict[str, Any] = {}
    try:
        parts = inputs.split_ids(settings)
        split["parts"] = {image_id: part for part, ids in parts.items() for image_id in ids}
        split["groups"] = inputs.image_groups(settings)
        split["ignored"] = inputs.ignored(settings)
    except InputError as error:
        split |= {"refused": str(error), "ignored": listed.ignored}
    sizes = (settings.image_size, settings.load_size)
    measured = measure(listed.entries, sizes=sizes, allow_empty_masks=bool(settings.data.allow_empty_masks))
    name, protocol = settings.data.name, settings.split.in_words()
    return Account(name, listed.entries, measured, image_size=settings.image_size, split=protocol, **split)


def check(overrides: Sequence[str], *, sheet: Path | None = None) -> int:
    """Print the account of the data set that overrides name; return 1 if it cannot be used."""
    settings = composition.compose(overrides)
    listing = inputs.listing(settings)
    sheet = private_path(sheet, "--sheet", default=f"data/{settings.data.name}-{listing.digest[:8]}.png")
    account = take_account(settings)
    sys.stdout.write(text(account))
    sys.stdout.flush()
    if chosen := choose(account):
        _save(draw(account, chosen), sheet)
        sys.stdout.write(f"\nwrote {sheet}: {plural(len(chosen), 'image')} with contours; look at them\n")
    return 1 if account.faults else 0
