"""Dice by kind of image: label, and size of the lesion in terciles; each model against Student within each."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.core.errors import InputError
from kdsweep.results import formats
from kdsweep.results.footnotes import of_comparisons
from kdsweep.results.frame import each_variant, gaps, placed_runs, scored_images
from kdsweep.results.paper import BASELINES, CELLS
from kdsweep.results.stats import NAN, adjusted, compare, pair, unknown

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

SIZES = ("small", "medium", "large")


def strata(sweep: Sweep, *, test: str = "ttest") -> pd.DataFrame:
    """Return Dice and NSD (%) of each model within each stratum, and its paired difference to Student there.

    Strata: the labels that the data set has, and three equal parts of the different test images by the area of their
    ground truth.

    Args:
        sweep: its runs and scores.
        test: of TESTS.

    Returns:
        A row per stratum and model with the columns of ``stats.compare``; Holm's family is the KD cells of a stratum.
        A sweep that varies further keys gives this for each of their values, below each other, column settings first.

    Raises:
        InputError: the sweep is empty or mixed, or its scores name neither labels nor areas.
    """
    return each_variant(sweep, partial(_strata, test=test))


def _strata(sweep: Sweep, *, test: str) -> pd.DataFrame:
    runs = placed_runs(sweep)
    scored = scored_images(runs=runs, scores=sweep.scores)
    if "nsd" in sweep.scores:
        scored = scored.merge(sweep.scores[["fingerprint", "image", "nsd"]])
    asked = set(runs["notation"])
    names = [*BASELINES, *CELLS, *sorted(asked.difference(BASELINES, CELLS))]
    why = gaps(runs=runs, scored=scored, notations=[name for name in names if name in asked])
    whole = scored[scored["notation"].map(why) == ""]
    rows = []
    for (kind, stratum), images in members(sweep, images=set(scored["image"])).items():
        part = whole[whole["image"].isin(images)]
        student = part[part["notation"] == "Student"]
        for name, gap in why.items():
            ours = part[part["notation"] == name]
            row = {"kind": kind, "stratum": stratum, "notation": name, "mean_dice_percent": 100 * ours["dice"].mean()}
            row["mean_nsd_percent"] = 100 * ours["nsd"].mean() if "nsd" in ours else NAN
            pairs = pair(ours=ours, baseline=student.iloc[:0] if name == "Student" else student)
            measured = unknown(gap=gap) if gap else {"gap": ""} | compare(pairs, test=test)
            rows.append(row | measured | {"n_images": ours["image"].nunique() or pd.NA})
    table = pd.DataFrame(rows)
    is_baseline = table["notation"].isin(BASELINES)
    table = adjusted(table, family=table["stratum"].where(~is_baseline, "not tried"))
    table.loc[is_baseline, ["p_holm", "p_methods_holm"]] = NAN
    return table.astype({"n_images": "Int64"})


def members(sweep: Sweep, *, images: set[str]) -> dict[tuple[str, str], list[str]]:
    """Return the images of each stratum by its kind (``label``, ``lesion size``) and name, in order.

    Raises:
        InputError: the scores name neither labels nor areas.
    """
    known = [name for name in ("label", "lesion_px") if name in sweep.scores]
    each = sweep.scores[sweep.scores["image"].isin(images)].drop_duplicates("image").set_index("image")[known]
    found: dict[tuple[str, str], list[str]] = {}
    if "label" in each:
        labels = each["label"].dropna()
        found |= {("label", str(label)): list(part) for label, part in labels.groupby(labels).groups.items() if label}
    if "lesion_px" in each and each["lesion_px"].notna().all() and len(each) >= len(SIZES):
        by_size = each["lesion_px"].sort_index().rank(method="first")
        sizes = pd.qcut(by_size, len(SIZES), labels=SIZES)
        for size in SIZES:
            area = each["lesion_px"][sizes == size]
            found["lesion size", f"{size} ({area.min():.0f} to {area.max():.0f} px)"] = list(area.index)
    if not found:
        raise InputError(f"sweep {sweep.name}: its scores name neither labels nor the areas of lesions")
    return found


def format_strata(table: pd.DataFrame) -> pd.DataFrame:
    """Return the strings of the table of strata."""
    means = zip(table["mean_dice_percent"].map(formats.number), table["gap"], strict=True)
    columns = {
        **({"Settings": table["settings"]} if "settings" in table else {}),
        "Images": table["kind"] + " " + table["stratum"],
        "Model": table["notation"],
        "DSC %": [formats.or_gap(shown, gap) for shown, gap in means],
        "NSD %": table["mean_nsd_percent"].map(formats.number),
        "to Student": table["difference_points"].map(formats.points),
        **formats.tested(table),
    }
    return pd.DataFrame(columns)


def notes(*, table: pd.DataFrame, test: str) -> list[str]:
    """Return the footnotes of the table of strata."""
    return [
        "Strata are looked at one by one: a difference that is shown in one and not in another is not shown to differ "
        "between them. Lesion size: area of the ground truth in pixels of image_size, in three equal parts.",
        *of_comparisons(table, test=test, families="over the KD cells of each stratum"),
    ]
