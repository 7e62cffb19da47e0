"""Dice on other data sets (``python -m kdsweep score``) next to that on the sweep's test images, and the drop."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.core.errors import InputError
from kdsweep.results import notes
from kdsweep.results.formats import interval, number, or_gap, points
from kdsweep.results.frame import Scores, each_variant, gaps, scored_images
from kdsweep.results.stats import NAN, networks_spread, over_seeds, satterthwaite
from kdsweep.results.table import MODEL, SETTINGS, Column, Options, Table

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

HEADING = "External. Test DSC on other data sets"
COLUMNS = [
    SETTINGS,
    Column("data_set", "Test data", narrow=True),
    MODEL,
    Column("internal_dice_percent", "DSC % internal", number, narrow=True),
    Column("external_dice_percent", "DSC % external", number, narrow=True),
    Column(("drop_points", "gap"), "Drop, points", or_gap(points), narrow=True),
    Column(("low_points", "high_points"), "95 % interval", interval, narrow=True),
    Column("n_external", "Images", partial(number, form=".0f")),
]
MEASURED = ("internal_dice_percent", "external_dice_percent", "drop_points", "low_points", "high_points", "n_external")
NOTES = (
    "Internal: the test images of the sweep's splits. External: all images of the other data set, scored by every "
    "finished network of the sweep; nothing was retrained. Drop: external minus internal.",
    "Interval: 95 %, Welch, images (or their groups) of both sides as clusters, seeds averaged. It says how these "
    "networks, as trained, would do on other images of both kinds; it does not say which of two models drops less.",
)


def applies(sweep: Sweep, store: Path) -> bool:
    """Return whether networks were scored on another data set."""
    return not sweep.external.empty


def make(sweep: Sweep, options: Options) -> Table:
    """Make the table."""
    return Table(HEADING, numbers(sweep), COLUMNS, notes=[*notes.provenance(sweep), *NOTES])


@each_variant
def numbers(scores: Scores) -> pd.DataFrame:
    """Return internal and external Dice (%) of each model, and the drop in points with its 95 % interval.

    Raises:
        InputError: no network was scored on another data set.
    """
    if scores.sweep.external.empty:
        command = f"python -m kdsweep score --sweep {scores.sweep.name} data=folder data.root=DIR"
        raise InputError(f"sweep {scores.sweep.name}: nothing was scored on another data set yet: `{command}`")
    rows = []
    internal = scores.gaps(scores.notations)
    for data_set, part in scores.sweep.external.groupby("data_set"):
        outside = scored_images(runs=scores.runs, scores=part)
        missing = gaps(runs=scores.runs, scored=outside, notations=scores.notations)
        for name in scores.notations:
            gap = internal[name] or missing[name].replace("no scores", "not scored")
            sides = (images[images["notation"] == name] for images in (scores.images, outside))
            measured = dict.fromkeys(MEASURED, NAN) if gap else _drop(*sides)
            rows.append({"data_set": data_set, "notation": name, "gap": gap, **measured})
    return pd.DataFrame(rows)


def _drop(ours: pd.DataFrame, others: pd.DataFrame) -> dict[str, float]:
    """Return the drop, external minus internal, with Welch's interval: these networks, other images of both kinds.

    Each side's squared error is that of ``stats.networks_spread``; they add up, since no image is on both sides, with
    Satterthwaite's degrees of freedom. Source: Welch, The generalization of Student's problem when several different
    population variances are involved, Biometrika 34, 1947.
    """
    sides = [over_seeds(side.assign(points=100 * side["dice"])) for side in (ours, others)]
    spreads = [networks_spread(rows) for rows in sides]
    internal, outside = (float(rows["points"].mean()) for rows in sides)
    half = satterthwaite(sum(spread.error**2 for spread in spreads), *spreads).half_width()
    drop = outside - internal
    measured = (internal, outside, drop, drop - half, drop + half, float(others["image"].nunique()))
    return dict(zip(MEASURED, measured, strict=True))
