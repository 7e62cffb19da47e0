"""Translation: the same predictions, scored by the habits of other publications, so that figures can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.results import notes
from kdsweep.results.formats import number, or_gap, points
from kdsweep.results.frame import VALIDATION, Scores, class_names, each_variant
from kdsweep.results.stats import PLACE
from kdsweep.results.table import MODEL, SETTINGS, Column, Options, Table
from kdsweep.results.tables.table4 import ranked

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

HEADING = "Translation. Test DSC by the habits of other publications"
CHOSEN = "best_test_epoch_dice"  # of a run: a fraction
RUN = ["notation", *PLACE]
COLUMNS = [
    SETTINGS,
    MODEL,
    Column(("mean_dice_percent", "gap"), "DSC % per image (here)", or_gap(number), narrow=True),
    Column("pooled_dice_percent", "DSC % of pooled pixels", number, narrow=True),
    Column("pooled_points", "points by pooling", points),
    Column("chosen_dice_percent", "DSC % at the epoch best on test images (wrong)", number, narrow=True),
    Column("chosen_points", "points by the wrong epoch", points),
]
NOTES = (
    "Per image: the mean over test images of each one's DSC, as in all tables here.",
    "Pooled pixels: 2 TP / (2 TP + FP + FN) with the pixels of all test images of a run added up, so that a large "
    "lesion counts more than a small one; of several classes the mean. Mean over runs, weighted by their test images.",
    "Epoch best on test images: what a run reports that chooses its epoch by the images it is tested on. It is wrong, "
    "since these images no longer tell how others would be segmented; nothing else here uses it. Per image; recorded "
    "by runs with scores.each_epoch=true.",
)


def applies(sweep: Sweep, store: Path) -> bool:
    """Return whether runs recorded what the other habits need."""
    return "predicted_px" in sweep.scores


def make(sweep: Sweep, options: Options) -> Table:
    """Make the table."""
    frame = numbers(sweep, class_names(sweep))
    below = [*notes.provenance(sweep), *NOTES, *notes.gaps(frame), *_not_recorded(frame)]
    return Table(HEADING, frame, COLUMNS, lead(frame), below)


@each_variant
def numbers(scores: Scores, classes: tuple[str, ...] = ()) -> pd.DataFrame:
    """Return a row per model: Dice (%) per image, of pooled pixels, and at the epoch that is best on the test images.

    NaN where a run recorded no numbers of predicted pixels, or no Dice of each epoch.
    """
    why, runs = scores.gaps(scores.notations), scores.runs.drop_duplicates("fingerprint").set_index("fingerprint")
    complete = scores.complete(why)
    images = complete[["fingerprint", *RUN, "image"]].merge(scores.sweep.scores, on=["fingerprint", "image"])
    sizes, fingerprints = images.groupby(RUN).size(), images.groupby(RUN)["fingerprint"].first()
    pooled = [_pooled(images, f"_{name}" if name else "") for name in classes or [""]]
    habits = {
        "pooled": _mean(pd.concat(pooled, axis=1).mean(axis=1, skipna=False), sizes),
        "chosen": _mean(fingerprints.map(runs.reindex(columns=[CHOSEN])[CHOSEN].astype(float)), sizes),
    }
    table = pd.DataFrame({"notation": why.keys(), "gap": why.values()})
    table[VALIDATION] = table["notation"].map(100 * runs.groupby("notation")["val_dice"].mean())
    table["mean_dice_percent"] = table["notation"].map(100 * complete.groupby("notation")["dice"].mean())
    for name, means in habits.items():
        table[f"{name}_dice_percent"] = table["notation"].map(100 * means)
        table[f"{name}_points"] = table[f"{name}_dice_percent"] - table["mean_dice_percent"]
    return table


def _pooled(images: pd.DataFrame, suffix: str) -> pd.Series:
    """Return the Dice of each run with the pixels of its images added up: 2 TP of an image is Dice x pixels of both."""
    names = [f"{name}{suffix}" for name in ("dice", "lesion_px", "predicted_px")]
    images = images[RUN].join(images.reindex(columns=names).astype(float))
    pixels = images[names[1]] + images[names[2]]
    summed = images[RUN].assign(twice_tp=images[names[0]] * pixels, pixels=pixels).groupby(RUN).sum()
    return summed["twice_tp"] / summed["pixels"]


def _mean(of_runs: pd.Series, sizes: pd.Series) -> pd.Series:
    """Return the mean over each model's runs, weighted by their test images; NaN if one is."""
    sums = (of_runs.astype(float) * sizes).groupby("notation").sum()
    return (sums / sizes.groupby("notation").sum()).where(of_runs.notna().groupby("notation").all())


def lead(table: pd.DataFrame) -> list[str]:
    """Return the best cell's figures by each habit, in a sentence for each setting."""
    if "settings" in table:
        parts = table.groupby("settings", sort=False)
        return [f"With {label}: {line}" for label, part in parts for line in lead(part.drop(columns="settings"))]
    lines = []
    for _, row in ranked(table).head(1).iterrows():
        text = f"{row['notation']}, the best cell in validation: {number(row['mean_dice_percent'])} % per image"
        if pd.notna(row["pooled_points"]):
            text += f", {number(row['pooled_dice_percent'])} % with pixels pooled"
        if pd.notna(row["chosen_points"]):
            text += f", {number(row['chosen_dice_percent'])} % at the epoch that is best on the test images (wrong)"
        lines.append(f"{text}.")
    return lines


def _not_recorded(table: pd.DataFrame) -> list[str]:
    done = table[table["gap"] == ""]
    reasons = {
        "pooled_dice_percent": "Pooled pixels are not recorded by runs of earlier versions.",
        "chosen_dice_percent": "The Dice of each epoch is not recorded; scores.each_epoch=true has new runs record it.",
    }
    return [text for column, text in reasons.items() if len(done) and done[column].isna().any()]
