"""Dice on other data sets (``python -m kdsweep score``) beside that on the sweep's own test images, and the drop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from kdsweep.core.errors import InputError
from kdsweep.results import formats
from kdsweep.results.frame import each_variant, gaps, placed_runs, scored_images
from kdsweep.results.paper import BASELINES, CELLS
from kdsweep.results.stats import NAN, PLACE, Spread, networks_spread, over_seeds

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep


def external(sweep: Sweep) -> pd.DataFrame:
    """Return internal and external Dice (%) of each model, and the drop in points with its 95 % interval.

    Raises:
        InputError: no network was scored on another data set.
    """
    if sweep.external.empty:
        command = f"python -m kdsweep score --sweep {sweep.name} data=folder data.root=DIR"
        raise InputError(f"sweep {sweep.name}: nothing was scored on another data set yet: `{command}`")
    return each_variant(sweep, _external)


def _external(sweep: Sweep) -> pd.DataFrame:
    runs = placed_runs(sweep)
    own = scored_images(runs=runs, scores=sweep.scores)
    asked = set(runs["notation"])
    names = [name for name in [*BASELINES, *CELLS, *sorted(asked.difference(BASELINES, CELLS))] if name in asked]
    rows = []
    for data_set, part in sweep.external.groupby("data_set"):
        theirs = scored_images(runs=runs, scores=part)
        lacking = gaps(runs=runs, scored=theirs, notations=names)
        for name, gap in gaps(runs=runs, scored=own, notations=names).items():
            row = {
                "data_set": data_set,
                "notation": name,
                "gap": gap or lacking[name].replace("no scores", "not scored"),
            }
            of = (frame[frame["notation"] == name] for frame in (own, theirs))
            rows.append(row | (_drop(*of) if not row["gap"] else dict.fromkeys(MEASURED, NAN)))
    return pd.DataFrame(rows)


MEASURED = ("internal_dice_percent", "external_dice_percent", "drop_points", "low_points", "high_points", "n_external")


def _drop(own: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, float]:
    """Return the drop, external minus internal, with Welch's interval: these networks, other images of both kinds.

    Each side's squared error is that of ``stats.networks_spread``; they add up, since no image is on both sides, with
    Satterthwaite's degrees of freedom. Source: Welch, The generalization of Student's problem when several different
    population variances are involved, Biometrika 34, 1947.
    """
    sides = [_rows(frame) for frame in (own, theirs)]
    spreads = [networks_spread(rows) for rows in sides]
    internal, outside = (float(rows["points"].mean()) for rows in sides)
    variance = sum(spread.error**2 for spread in spreads)
    parts = sum(spread.error**4 / spread.freedom for spread in spreads)
    half = Spread(float(np.sqrt(variance)), variance**2 / parts).half_width() if parts > 0 else NAN
    drop = outside - internal
    numbers = (internal, outside, drop, drop - half, drop + half, float(theirs["image"].nunique()))
    return dict(zip(MEASURED, numbers, strict=True))


def _rows(scored: pd.DataFrame) -> pd.DataFrame:
    return over_seeds(scored.assign(points=100 * scored["dice"])[[*PLACE, "image", "group", "points"]])


def format_external(table: pd.DataFrame) -> pd.DataFrame:
    """Return the strings of the table of other data sets."""
    drops = zip(table["drop_points"].map(formats.points), table["gap"], strict=True)
    bounds = zip(table["low_points"], table["high_points"], strict=True)
    columns = {
        **({"Settings": table["settings"]} if "settings" in table else {}),
        "Test data": table["data_set"],
        "Model": table["notation"],
        "DSC % internal": table["internal_dice_percent"].map(formats.number),
        "DSC % external": table["external_dice_percent"].map(formats.number),
        "Drop, points": [formats.or_gap(shown, gap) for shown, gap in drops],
        "95 % interval": [formats.interval(low=low, high=high) for low, high in bounds],
        "Images": table["n_external"].map(lambda count: formats.number(count, ".0f")),
    }
    return pd.DataFrame(columns)


NOTES = (
    "Internal: the test images of the sweep's own splits. External: all images of the other data set, scored by every "
    "finished network of the sweep; nothing was retrained. Drop: external minus internal.",
    "Interval: 95 %, Welch, images (or their groups) of both sides as clusters, seeds averaged. It says how these "
    "networks, as trained, would do on other images of both kinds; it does not say which of two models drops less.",
)
