"""Figure 2 of the paper: test images with the contours of ground truth and prediction, a panel per model.

Images come from the data set and are checked against the recorded scores: MLflow holds predictions, never images.
"""

from __future__ import annotations

import io
import math
import textwrap
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdsweep.core.errors import InputError
from kdsweep.data import run_data, sources
from kdsweep.results.frame import placed_runs, scored_images
from kdsweep.results.paper import BASELINES, CELLS, LOSSES
from kdsweep.results.stats import PLACE
from kdsweep.runs import checkpoint
from kdsweep.tracking import database, reader

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kdsweep.tracking.reader import Sweep

IMAGE = "Image"
COLUMNS = 4
PATH_ROWS = [CELLS[start : start + COLUMNS] for start in range(0, len(CELLS), COLUMNS)]
STATUS = {"missing": "not run", "KILLED": "interrupted"}  # others by their own name
PREDICTIONS = "test_predictions.npz"
TOLERANCE = 1e-6  # of Dice, between the recorded one and that with the mask of the data set

# Inches and points: the figure is as wide as a page's text, so it is printed in the sizes given here.
WIDTH, MARGIN, GAP, LARGEST_PANEL = 7.0, 0.06, 0.08, 2.2
HEAD, PANEL_TITLE, LEGEND, TEXT_LINE = 0.2, 0.2, 0.24, 0.135
FONT, SMALL_FONT, LINE = 7.5, 7.0, 1.1
PANEL_CHARACTERS, CAPTION_CHARACTERS = 21, 115  # what fits above the narrowest panel, and in the width
# The paper's colors; line styles for the color-blind, with dashes short enough for a small island.
TRUTH, PREDICTION = ("#00e050", "solid"), ("#ff1f3d", (0, (2.4, 1.2)))
HALO = [patheffects.withStroke(linewidth=2 * LINE, foreground="black", alpha=0.55)]
GRAY = "0.4"


class Models(NamedTuple):
    """The finished runs of one split and seed, in the figure's order, and why each other notation has none."""

    finished: pd.DataFrame
    missing: dict[str, str]


class Shown(NamedTuple):
    """The arguments of ``figure2`` for one image."""

    image: np.ndarray
    mask: np.ndarray
    predictions: dict[str, np.ndarray]
    missing: dict[str, str]
    dice: dict[str, float]
    caption: str
    title: str


# ---- which models --------------------------------------------------------------------------------------------------


def notations(sweep: Sweep) -> list[str]:
    """Return all models that a figure may show: the paper's in its order, then a user's cells by path and loss."""
    losses = list(LOSSES)

    def order(notation: str) -> tuple[str, int, str]:
        path, _, loss = notation.partition("_")
        name = loss.removesuffix("_WAug")
        return path, losses.index(name) if name in losses else len(losses), loss

    own = set(sweep.runs["notation"]).difference(BASELINES, CELLS)
    return [*BASELINES, *CELLS, *sorted(own, key=order)]


def whole_rows(sweep: Sweep) -> list[str]:
    """Return the models of the paper's figure, without the paths of which nothing was asked for.

    If most of the remaining panels would be empty, return only what was asked for.
    """
    known, asked = notations(sweep), set(sweep.runs["notation"])
    left_out = {name for row in PATH_ROWS if asked.isdisjoint(row) for name in row}
    names = [name for name in known if name not in left_out]
    return names if 2 * len(asked) >= len(names) else [name for name in names if name in asked]


def models_of(sweep: Sweep, *, split: int, seed: int) -> Models:
    """Find the finished run of each notation in a split and seed; a Teacher is the one its cells learnt from.

    Raises:
        InputError: the sweep is empty, mixes options, or holds two results for one cell.
    """
    runs = placed_runs(sweep)
    here = runs[(runs["split"] == split) & (runs["seed"] == seed)]
    unscored = (here["status"] == "FINISHED") & ~here["fingerprint"].isin(sweep.scores["fingerprint"])
    here = here.assign(status=here["status"].mask(unscored, "no scores"))
    finished = here[here["status"] == "FINISHED"].drop_duplicates("notation").set_index("notation", drop=False)
    known = notations(sweep)
    missing = {name: _why(here[here["notation"] == name]) for name in known if name not in finished.index}
    return Models(finished.loc[[name for name in known if name in finished.index]], missing)


def _why(runs: pd.DataFrame) -> str:
    if runs.empty:
        return "not run"
    status = sorted(runs["status"])[0]
    return STATUS.get(status, status.lower())


def _place(runs: pd.DataFrame, *, sweep: str, split: int | None, seed: int | None, names: list[str]) -> tuple[int, int]:
    """Return the split and seed asked for, or the first in which most of these models are finished."""
    for column, value in (("split", split), ("seed", seed)):
        there = sorted(set(runs[column]))
        if value is not None and value not in there:
            where = f"sweep {sweep}{'' if column == 'split' or split is None else f' split {split}'}"
            raise InputError(f"--{column} {value}: not in {where}; it has {', '.join(map(str, there))}")
        runs = runs if value is None else runs[runs[column] == value]
    finished = runs["notation"].where((runs["status"] == "FINISHED") & runs["notation"].isin(names))
    counts = finished.groupby([runs[column] for column in PLACE]).nunique()  # sorted by split, then seed
    best_split, best_seed = counts.index[int(counts.to_numpy().argmax())]  # the first of equals
    return int(best_split), int(best_seed)


def _known(models: list[str], sweep: Sweep) -> list[str]:
    known = notations(sweep)
    unknown = [name for name in models if name not in known]
    if unknown or not models:
        raise InputError(f"--models {','.join(unknown)}: not in sweep {sweep.name}; choose of {', '.join(known)}")
    return list(dict.fromkeys(models))


# ---- which images --------------------------------------------------------------------------------------------------


def pick(dice: pd.DataFrame, *, count: int) -> list[str]:
    """Pick the images at even quantiles of the ranking by mean Dice over the models shown: good and bad ones.

    Number k of count is the first image with at least the share k / (count + 1) of all at or below its place: the
    lower median for count=1, the lower quartile, median and upper quartile for count=3. Equal means rank by id.

    Args:
        dice: fractions; one row per image id, one column per model shown.
        count: at least 1.

    Raises:
        InputError: there are fewer images than count.
    """
    if not 1 <= count <= len(dice):
        raise InputError(f"--count {count}: must be 1 to {len(dice)}, the number of test images")
    ranked = _ranked(dice)
    return [ranked[math.ceil(Fraction(number * len(ranked), count + 1)) - 1] for number in range(1, count + 1)]


def _ranked(dice: pd.DataFrame) -> list[str]:
    means = dice.mean(axis=1).round(12)  # the order of the models must not break a tie
    return sorted(dice.index, key=lambda image: (means[image], image))


def rule(dice: pd.DataFrame, *, number: int, count: int) -> str:
    """Return the words in the figure for how ``pick`` chose image number (from 1) of count."""
    share = Fraction(number, count + 1)
    place = "median" if share == Fraction(1, 2) else f"quantile {share}"
    return f"{place} of {_ranking(dice)}"


def _ranking(dice: pd.DataFrame) -> str:
    several = f"mean Dice over the {dice.shape[1]} models shown"
    return f"{len(dice)} test images by {several if dice.shape[1] > 1 else 'Dice of the one model shown'}"


def _chosen(dice: pd.DataFrame, *, count: int, ids: list[str] | None, where: str) -> dict[str, str]:
    """Return the images to show and why each was chosen."""
    if not ids:
        return {image: rule(dice, number=k, count=count) for k, image in enumerate(pick(dice, count=count), start=1)}
    ranked = _ranked(dice)
    for image in ids:
        if image not in ranked:
            there = ", ".join(sorted(ranked)[:5]) + (", ..." if len(ranked) > 5 else "")
            raise InputError(f"--image {image}: not a test image of {where}; there are {len(ranked)}: {there}")
    return {image: f"chosen by hand, place {ranked.index(image) + 1} of {_ranking(dice)}" for image in ids}


# ---- reading and checking ------------------------------------------------------------------------------------------


def load(
    sweep: Sweep,
    *,
    store: Path,
    uri: str | None,
    split: int | None,
    seed: int | None,
    models: list[str] | None,
    count: int,
    ids: list[str] | None,
    root: Path | None,
    source: sources.Source | None = None,
) -> list[Shown]:
    """Load what the figures of a sweep show, one entry per image.

    Args:
        sweep: as ``tracking.read_sweep`` gives it.
        store: folder of the runs.
        uri: of the MLflow server, or None for the file in the store.
        split: index of the random split; None takes the first in which most models are finished.
        seed: of the cells; None as for split.
        models: notations; None takes the rows of the paper's figure.
        count: how many images ``pick`` chooses.
        ids: images chosen by hand instead.
        root: folder of the images, if they were moved since the sweep ran.
        source: the data set, if it is not one of kdsweep's own.

    Raises:
        InputError: there is no such model, split, seed or image; nothing is finished there; or the images are not
            those that the sweep was scored on.
    """
    names = whole_rows(sweep) if models is None else _known(models, sweep)
    runs = placed_runs(sweep)
    split, seed = _place(runs, sweep=sweep.name, split=split, seed=seed, names=names)
    where = f"split {split}" if runs["seed"].nunique() == 1 else f"split {split}, seed {seed}"
    there = models_of(sweep, split=split, seed=seed)
    finished = there.finished[there.finished["notation"].isin(names)]
    if finished.empty:
        asked = f"--split {split}" if models is None else f"--models {','.join(models)}"
        others = ", ".join(there.finished["notation"]) or "none"
        raise InputError(f"{asked}: no finished run in sweep {sweep.name}, {where}; finished there: {others}")
    dice = _dice(finished, scores=sweep.scores, where=where)
    chosen = _chosen(dice, count=count, ids=ids, where=where)
    recorded = dict(zip(dice.index, dice.to_numpy(float), strict=True))
    masks = {str(name): _predictions(run, list(chosen), store=store, uri=uri) for name, run in finished.iterrows()}
    first = finished.iloc[0]
    source = source or run_data.source(first["params"], store=store, root=root)
    images = _images(source, list(chosen), image_size=int(first["params"]["image_size"]))
    known = {tags["kdsweep.data"] for tags in finished["tags"] if "kdsweep.data" in tags}
    if known - {sources.listing(source).digest}:
        what = f"the images in {_folder(source)} are not those that sweep {sweep.name} was trained and scored on"
        raise InputError(f"{what}: other files or other bytes; {_remedy(source)}")
    shown = [
        Shown(
            image=images[image].image,
            mask=images[image].mask,
            predictions={name: own[image] for name, own in masks.items()},
            missing={name: why for name, why in there.missing.items() if name in names},
            dice={name: float(value) for name, value in zip(masks, recorded[image], strict=True)},
            caption=f"{where.capitalize()}, image {image}: {why}",
            title=f"Sweep {sweep.name} (data {first['data']}, profile {first['profile']})",
        )
        for image, why in chosen.items()
    ]
    for image, one in zip(chosen, shown, strict=True):
        _refuse_other_images(one, f"image {image} in {_folder(source)}", sweep=sweep.name, remedy=_remedy(source))
    return shown


def _dice(finished: pd.DataFrame, *, scores: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the recorded Dice, one row per test image, one column per model."""
    scored = scored_images(runs=finished.reset_index(drop=True), scores=scores)
    dice = scored.pivot(index="image", columns="notation", values="dice")[list(finished["notation"])]
    alone = dice[dice.isna().any(axis=1)]
    if not alone.empty:
        first = alone.iloc[0]
        raise InputError(
            f"{first[first.isna()].index[0]} and {first.dropna().index[0]} were scored on different images: the first "
            f"is {alone.index[0]} of {where}; run both on the same data"
        )
    return dice


def _predictions(run: pd.Series, ids: list[str], *, store: Path, uri: str | None) -> dict[str, np.ndarray]:
    try:
        kept = reader.artifact(store=store, uri=uri, run_id=run["run_id"], name=PREDICTIONS)
        stored = checkpoint.load_predictions(io.BytesIO(kept))
        return {image: stored[image] for image in ids}
    except Exception as error:  # MLflow, NumPy and zip files each have their own
        what = f"{run['notation']} split {run['split']} seed {run['seed']}: {PREDICTIONS} of run {run['run_id']}"
        raise InputError(f"{what} cannot be read ({database.line(error)}); delete this run, run it again") from error


def _images(source: sources.Source, ids: list[str], *, image_size: int) -> dict[str, run_data.Scored]:
    try:
        return run_data.scored(source, ids, image_size=image_size)
    except InputError as error:
        raise InputError(f"{error}; {_remedy(source)}") from error


def _folder(source: sources.Source) -> Path:
    return Path(getattr(source, "root", "") or getattr(source, "cache_dir", ""))


def _remedy(source: sources.Source) -> str:
    if hasattr(source, "root"):
        return "name the folder of the sweep's images with --data-root"
    return "--data-root does not reach phantoms: this version makes others, so run the sweep again"


def _refuse_other_images(shown: Shown, what: str, *, sweep: str, remedy: str) -> None:
    """Raise InputError unless the mask gives each prediction its recorded Dice."""
    import torch  # it and metrics load for seconds: a mistyped option must fail before

    from kdsweep.evaluation import metrics

    for name, prediction in shown.predictions.items():
        own = f"is {shown.mask.shape[0]} pixels wide there and the prediction {prediction.shape[0]}"
        if prediction.shape == shown.mask.shape:
            pair = [torch.from_numpy(array)[None, None] for array in (prediction, shown.mask)]
            dice = float(metrics.overlap(prediction=pair[0], mask=pair[1])["dice"][0])
            if abs(dice - shown.dice[name]) <= TOLERANCE:
                continue
            own = f"has Dice {dice:.6f} there and {shown.dice[name]:.6f} by its record"
        raise InputError(f"{what} is not the one that sweep {sweep} was scored on: {name} {own}; {remedy}")


# ---- drawing -------------------------------------------------------------------------------------------------------


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
