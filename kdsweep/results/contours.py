"""Choose and check what Figure 2 of the paper shows: the models, the images, and what each model predicted there.

Images come from the data set and are checked against the recorded scores: MLflow holds predictions, never images.
"""

from __future__ import annotations

import io
import math
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from kdsweep.core.errors import InputError
from kdsweep.data import run_data, sources
from kdsweep.results.frame import placed_runs, scored_images
from kdsweep.results.panels import PATH_ROWS
from kdsweep.results.paper import BASELINES, CELLS, LOSSES
from kdsweep.results.stats import PLACE
from kdsweep.store import checkpoint
from kdsweep.tracking import artifacts, database

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

STATUS = {"missing": "not run", "KILLED": "interrupted"}  # others by their own name
PREDICTIONS = "test_predictions.npz"
TOLERANCE = 1e-6  # of Dice, between the recorded one and that with the mask of the data set


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
    missing = {name: why for name, why in there.missing.items() if name in names}
    dice = _dice(finished, scores=sweep.scores, where=where)
    chosen = _chosen(dice, count=count, ids=ids, where=where)
    recorded = dict(zip(dice.index, dice.to_numpy(float), strict=True))
    masks = {str(name): _predictions(run, list(chosen), store=store, uri=uri) for name, run in finished.iterrows()}
    source = source or run_data.source(finished.iloc[0]["params"], store=store, root=root)
    images = _images(source, list(chosen), finished=finished, sweep=sweep.name)
    shown = [
        Shown(
            image=images[image].image,
            mask=images[image].mask,
            predictions={name: own[image] for name, own in masks.items()},
            missing=missing,
            dice={name: float(value) for name, value in zip(masks, recorded[image], strict=True)},
            caption=f"{where.capitalize()}, image {image}: {why}",
            title=f"Sweep {sweep.name} (data {finished.iloc[0]['data']}, profile {finished.iloc[0]['profile']})",
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
        kept = artifacts.read(run.to_dict(), PREDICTIONS, store=store, uri=uri)
        stored = checkpoint.load_predictions(io.BytesIO(kept))
        return {image: stored[image] for image in ids}
    except InputError:
        raise
    except Exception as error:  # MLflow, NumPy and zip files each have their own
        what = f"{run['notation']} split {run['split']} seed {run['seed']}: {PREDICTIONS} of run {run['run_id']}"
        raise InputError(
            f"{what} cannot be read ({database.line(error)}); run the command of its sweep again"
        ) from error


def _images(
    source: sources.Source, ids: list[str], *, finished: pd.DataFrame, sweep: str
) -> dict[str, run_data.Scored]:
    """Read the images; raise InputError unless the data set is byte for byte that of the finished runs."""
    try:
        images = run_data.scored(source, ids, image_size=int(finished.iloc[0]["params"]["image_size"]))
    except InputError as error:
        raise InputError(f"{error}; {_remedy(source)}") from error
    known = {tags["kdsweep.data"] for tags in finished["tags"] if "kdsweep.data" in tags}
    if known - {sources.listing(source).digest}:
        what = f"the images in {_folder(source)} are not those that sweep {sweep} was trained and scored on"
        raise InputError(f"{what}: other files or other bytes; {_remedy(source)}")
    return images


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
