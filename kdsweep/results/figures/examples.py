"""Choose and check what Figure 2 of the paper shows: the models, the images, and what each model predicted there.

MLflow holds predictions, never images: these come from the data set, which must be byte for byte the recorded one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kdsweep.config.grid import run_folder
from kdsweep.core.errors import InputError, some
from kdsweep.data import run_data, sources
from kdsweep.data.listing import list_images
from kdsweep.results.figures.contours import PATH_ROWS
from kdsweep.results.frame import placed_runs, scored_images
from kdsweep.results.paper import BASELINES, CELLS
from kdsweep.results.stats import PLACE
from kdsweep.store import cell_folder, checkpoint
from kdsweep.tracking import artifacts, database
from kdsweep.tracking.reader import Sweep

STATUS = {"missing": "not run", "KILLED": "interrupted"}  # others by their name
PREDICTIONS = "test_predictions.npz"


class Example(NamedTuple):
    """An image as Figure 2 shows it, with what each model predicted, by notation."""

    image: np.ndarray  # (S, S, 3) uint8
    mask: np.ndarray  # (S, S) of class indices
    predictions: dict[str, np.ndarray]  # (S, S) bool, or class indices uint8
    missing: dict[str, str]  # why there is no prediction
    dice: dict[str, float]  # of the predictions, fractions
    caption: str  # why this image was chosen
    title: str  # sweep, data and profile
    class_names: tuple[str, ...] = ()  # of several classes


# ---- which models --------------------------------------------------------------------------------------------------


def notations(sweep: Sweep) -> list[str]:
    """Return all models that a figure may show: the paper's in its order, then a user's cells by name."""
    return [*BASELINES, *CELLS, *sorted(set(sweep.runs["notation"]).difference(BASELINES, CELLS))]


def default_models(sweep: Sweep) -> list[str]:
    """Return the models of the paper's figure, without the paths that the sweep does not request.

    If most of the remaining panels would be empty, return only what the sweep requests.
    """
    requested = set(sweep.runs["notation"])
    left_out = {name for row in PATH_ROWS if requested.isdisjoint(row) for name in row}
    names = [name for name in notations(sweep) if name not in left_out]
    return names if 2 * len(requested) >= len(names) else [name for name in names if name in requested]


def models_of(sweep: Sweep, *, split: int, seed: int) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the finished run of each notation in a split and seed, in order, and why each other notation has none.

    A Teacher is the one that the cells there learn from.
    """
    runs = placed_runs(sweep)
    here = runs[(runs["split"] == split) & (runs["seed"] == seed)]
    unscored = (here["status"] == "FINISHED") & ~here["fingerprint"].isin(sweep.scores["fingerprint"])
    here = here.assign(status=here["status"].mask(unscored, "no scores"))
    finished = here[here["status"] == "FINISHED"].drop_duplicates("notation").set_index("notation", drop=False)
    first = here.sort_values("status").drop_duplicates("notation").set_index("notation")["status"]
    names = notations(sweep)
    why = {name: first.get(name, "missing") for name in names if name not in finished.index}
    missing = {name: STATUS.get(status, status.lower()) for name, status in why.items()}
    return finished.loc[[name for name in names if name in finished.index]], missing


def _split_and_seed(sweep: Sweep, *, split: int | None, seed: int | None, names: list[str]) -> tuple[int, int]:
    """Return the requested split and seed, or the first in which most of these models are finished."""
    runs = placed_runs(sweep)
    for column, value in (("split", split), ("seed", seed)):
        there = sorted(set(runs[column]))
        if value is not None and value not in there:
            where = f"sweep {sweep.name}{'' if column == 'split' or split is None else f' split {split}'}"
            raise InputError(f"--{column} {value}: not in {where}; it has {', '.join(map(str, there))}")
        runs = runs if value is None else runs[runs[column] == value]
    finished = runs["notation"].where((runs["status"] == "FINISHED") & runs["notation"].isin(names))
    best: Any = finished.groupby([runs[column] for column in PLACE]).nunique().idxmax()  # the first of equals
    return int(best[0]), int(best[1])


# ---- which images --------------------------------------------------------------------------------------------------


def choose(dice: pd.DataFrame, *, count: int, ids: Sequence[str], where: str) -> dict[str, str]:
    """Return the images to show and why: those of these ids, else those at even quantiles, good and bad ones.

    Images are ranked by mean Dice over the models shown, equal ones by id. Number k of count is the first image with
    at least the share k / (count + 1) of all at or below it: the lower median for count=1, the lower quartile, median
    and upper quartile for count=3.

    Args:
        dice: fractions; one row per image id, one column per model shown.
        count: at least 1.
        ids: images chosen by hand instead.
        where: the split, for messages.

    Raises:
        InputError: there is no such image, or there are fewer than count.
    """
    means = dice.mean(axis=1).round(12)  # the order of the models must not break a tie
    ranked = sorted(dice.index, key=lambda image: (means[image], image))
    models = dice.shape[1]
    by = f"mean Dice over the {models} models shown" if models > 1 else "Dice of the one model shown"
    ranking = f"{len(dice)} test images by {by}"
    for image in ids:
        if image not in ranked:
            there = some(sorted(ranked), most=5)
            raise InputError(f"--image {image}: not a test image of {where}; there are {there}")
    if ids:
        return {image: f"chosen by hand, place {ranked.index(image) + 1} of {ranking}" for image in ids}
    if not 1 <= count <= len(ranked):
        raise InputError(f"--count {count}: must be 1 to {len(ranked)}, the number of test images")
    shares = [Fraction(number, count + 1) for number in range(1, count + 1)]
    words = ["median" if share == Fraction(1, 2) else f"quantile {share}" for share in shares]
    images = [ranked[math.ceil(share * len(ranked)) - 1] for share in shares]
    return {image: f"{word} of {ranking}" for image, word in zip(images, words, strict=True)}


# ---- reading and checking ------------------------------------------------------------------------------------------


def load(
    sweep: Sweep,
    store: Path,
    uri: str | None,
    *,
    split: int | None = None,
    seed: int | None = None,
    models: list[str] | None = None,
    count: int = 1,
    ids: Sequence[str] = (),
    root: Path | None = None,
    source: sources.Source | None = None,
) -> list[Example]:
    """Load what the figures of a sweep show, one entry per image.

    Args:
        sweep: as ``reader.read_sweep`` returns it.
        store: folder of the runs.
        uri: of the MLflow server, or None for the file in the store.
        split: None takes the first split in which most models are finished; ``seed`` likewise.
        seed: of the cells.
        models: notations; None takes the rows of the paper's figure.
        count: number of images that ``choose`` takes; ids are taken instead.
        ids: of images.
        root: folder of the images, if they were moved since the sweep ran.
        source: the data set, if it is not one of kdsweep's.

    Raises:
        InputError: there is no such model, split, seed or image; nothing is finished there; or the images are not
            those that the sweep was scored on.
    """
    names = default_models(sweep) if models is None else models
    if (unknown := [name for name in names if name not in notations(sweep)]) or not names:
        choices = ", ".join(notations(sweep))
        raise InputError(f"--models {','.join(unknown)}: not in sweep {sweep.name}; choose of {choices}")
    split, seed = _split_and_seed(sweep, split=split, seed=seed, names=names)
    where = f"split {split}" if sweep.runs["seed"].nunique() == 1 else f"split {split}, seed {seed}"
    there, missing = models_of(sweep, split=split, seed=seed)
    finished = there[there["notation"].isin(names)]
    if finished.empty:
        option = f"--split {split}" if models is None else f"--models {','.join(models)}"
        others = ", ".join(there["notation"]) or "none"
        raise InputError(f"{option}: no finished run in sweep {sweep.name}, {where}; finished there: {others}")
    dice = _dice(finished, scores=sweep.scores, where=where)
    chosen = choose(dice, count=count, ids=ids, where=where)
    masks = {str(name): _predictions(run, list(chosen), store=store, uri=uri) for name, run in finished.iterrows()}
    images = _images(source, list(chosen), finished=finished, sweep=sweep.name, store=store, root=root)
    return [
        Example(
            image=images[image].image,
            mask=images[image].mask,
            predictions={name: mask[image] for name, mask in masks.items()},
            missing={name: why for name, why in missing.items() if name in names},
            dice=dict(zip(masks, map(float, dice.loc[image]), strict=True)),
            caption=f"{where.capitalize()}, image {image}: {why}",
            title=f"Sweep {sweep.name} (data {finished.iloc[0]['data']}, profile {finished.iloc[0]['profile']})",
            class_names=run_data.class_names(finished.iloc[0]["params"]),
        )
        for image, why in chosen.items()
    ]


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
    what = f"{run['notation']} split {run['split']} seed {run['seed']}: {PREDICTIONS} of run {run['run_id']}"
    try:
        content = artifacts.read(run.to_dict(), PREDICTIONS, store=store, uri=uri)
        stored = checkpoint.load_predictions(io.BytesIO(content))
        return {image: stored[image] for image in ids}
    except InputError:
        raise
    except Exception as error:  # MLflow, NumPy and zip files each have several kinds
        why = database.line(error)
        raise InputError(f"{what} cannot be read ({why}); run the command of its sweep again") from error


def _images(
    source: sources.Source | None,
    ids: list[str],
    *,
    finished: pd.DataFrame,
    sweep: str,
    store: Path,
    root: Path | None,
) -> dict[str, run_data.Scored]:
    """Read the images; raise InputError unless the data set is byte for byte that of the finished runs."""
    run = finished.iloc[0].to_dict()
    if source is None:
        root = root or cell_folder.data_root(run_folder(store, run))
        source = run_data.source(run["params"], store=store, root=root)
    else:
        source = sources.read_as(source, run_data.window(run["params"]), run_data.classes(run["params"]))
    remedy = "--data-root does not reach phantoms: this version makes others, so run the sweep again"
    if hasattr(source, "root"):
        remedy = "name the folder of the sweep's images with --data-root"
    try:
        images = run_data.scored(source, ids, image_size=int(run["params"]["image_size"]))
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from error
    if {tags["kdsweep.data"] for tags in finished["tags"] if "kdsweep.data" in tags} - {list_images(source).digest}:
        folder = getattr(source, "root", "") or getattr(source, "cache_dir", "")
        what = f"the images in {folder} are not those that sweep {sweep} was trained and scored on"
        raise InputError(f"{what}: other files or other bytes; {remedy}")
    return images
