"""Dice by kind of image: label, and size of the lesion in terciles; each model against Student within each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.core.errors import InputError
from kdsweep.results import notes
from kdsweep.results.formats import number, points
from kdsweep.results.frame import Scores, class_names, each_variant
from kdsweep.results.paper import BASELINES
from kdsweep.results.stats import adjusted, compare, pair
from kdsweep.results.table import MODEL, SETTINGS, Column, Options, Table, differences, estimate

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

HEADING = "Strata. Test DSC by label and by size of the lesion"
SIZES = ("small", "medium", "large")
OF_A_CLASS = "DSC of a class: over the images that show it or of which the model predicts it, 0 for those it has wrong."
COLUMNS = [
    SETTINGS,
    Column(("kind", "stratum"), "Images", "{} {}".format, narrow=True),
    MODEL,
    estimate("mean_dice_percent", "DSC %", narrow=True),
    Column("mean_nsd_percent", "NSD %", number),
    *differences(Column("difference_points", "to Student", points), brief="points to Student (95 % interval)"),
]


def applies(sweep: Sweep, store: Path) -> bool:
    """Return whether the scores name the areas of lesions."""
    return "lesion_px" in sweep.scores


def make(sweep: Sweep, options: Options) -> Table:
    """Make the table."""
    frame = numbers(sweep, test=options.test)
    below = [
        *notes.provenance(sweep),
        "Strata: looked at one by one. A difference that is shown in one and not in another is not shown to differ "
        "between them. Lesion size: area of the ground truth in pixels of image_size, in three equal parts.",
        *([OF_A_CLASS] if class_names(sweep) else []),
        *notes.differences(frame, test=options.test, families="over the KD cells of each stratum"),
    ]
    by_class = [estimate(f"mean_dice_percent_{name}", f"DSC % {name}", narrow=True) for name in class_names(sweep)]
    columns = [*COLUMNS[:4], *by_class, *COLUMNS[4:]]
    return Table(HEADING, frame.assign(test=options.test), columns, notes=below)


@each_variant
def numbers(scores: Scores, *, test: str = "ttest") -> pd.DataFrame:
    """Return Dice and NSD (%) of each model within each stratum, and its paired difference to Student there.

    Of several classes, the Dice of each too.

    Strata: the labels that the data set has, and three equal parts of the different test images by the area of their
    ground truth.

    There is a row per stratum and model with the columns of ``stats.compare``; Holm's family is the KD cells of a
    stratum.

    Raises:
        InputError: the sweep is empty or mixed, or its scores name neither labels nor areas.
    """
    why = scores.gaps(scores.notations)
    dices = {name: f"dice_{name}" for name in class_names(scores.sweep)}
    further = ["fingerprint", "image", "nsd", *dices.values()]
    complete = scores.complete(why).merge(scores.sweep.scores.reindex(columns=further))
    rows = []
    for (kind, stratum), images in members(scores.sweep, images=set(scores.images["image"])).items():
        part = complete[complete["image"].isin(images)]
        student = part[part["notation"] == "Student"]
        for name, gap in why.items():
            ours = part[part["notation"] == name]
            row = {"kind": kind, "stratum": stratum, "notation": name, "mean_dice_percent": 100 * ours["dice"].mean()}
            row |= {"mean_nsd_percent": 100 * ours["nsd"].mean(), "gap": gap}
            row |= {f"mean_dice_percent_{name}": 100 * ours[dice].mean() for name, dice in dices.items()}
            pairs = pair(ours=ours, baseline=student.iloc[:0] if name == "Student" else student)
            rows.append(row | compare(pairs, test=test) | {"n_images": ours["image"].nunique() or pd.NA})
    table = pd.DataFrame(rows)
    family = table["stratum"].mask(table["notation"].isin(BASELINES))
    return adjusted(table, family=family).astype({"n_images": "Int64"})


def members(sweep: Sweep, *, images: set[str]) -> dict[tuple[str, str], list[str]]:
    """Return the images of each stratum by its kind (``label``, ``lesion size``) and name, in order.

    Raises:
        InputError: the scores name neither labels nor areas.
    """
    each = sweep.scores[sweep.scores["image"].isin(images)].drop_duplicates("image").set_index("image")
    strata: dict[tuple[str, str], list[str]] = {}
    if "label" in each:
        labels = each["label"].dropna()
        strata |= {("label", str(label)): list(part) for label, part in labels.groupby(labels).groups.items() if label}
    if "lesion_px" in each and each["lesion_px"].notna().all() and len(each) >= len(SIZES):
        by_size = each["lesion_px"].sort_index().rank(method="first")
        sizes = pd.qcut(by_size, len(SIZES), labels=SIZES)
        for size, area in each["lesion_px"].groupby(sizes, observed=True):
            strata["lesion size", f"{size} ({area.min():.0f} to {area.max():.0f} px)"] = list(area.index)
    if not strata:
        raise InputError(f"sweep {sweep.name}: its scores name neither labels nor the areas of lesions")
    return strata
