"""Seeds: how much a cell's mean Dice changes with the seed, next to how much cells differ."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.core.errors import InputError
from kdsweep.results import notes
from kdsweep.results.formats import joined, number, or_gap, points
from kdsweep.results.frame import Scores, each_variant
from kdsweep.results.paper import students
from kdsweep.results.table import MODEL, SETTINGS, Column, Options, Table

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

HEADING = "Seeds. How much another training would change"
OF_SEED = "mean_dice_percent_seed"
NOTES = [
    "Seed: each number is the mean over the test images of all splits. A seed decides initial weights, order and views "
    "of the students; whether their Teachers change with it depends on teacher.seed (`teacher.seed=0` keeps them).",
    "Repeatability: the limit on two trainings is from Bland and Altman, Measurement error, BMJ 313, 1996; from few "
    "seeds it is a rough estimate. The mean of n seeds varies by a factor of sqrt n less than one training does.",
]


def columns(frame: pd.DataFrame) -> list[Column]:
    """Return the columns, all seeds in one."""
    per_seed = _per_seed(frame)
    listed = ", ".join(name.removeprefix(OF_SEED) for name in per_seed)
    return [
        SETTINGS,
        MODEL,
        Column((*per_seed, "gap"), f"DSC % of seed {listed}", or_gap(joined), narrow=True),
        Column("mean_dice_percent", "Mean", number, narrow=True),
        Column("std_dice_percent_seeds", "SD between seeds", number, narrow=True),
        Column("to_best_points", "DSC points to best", points, narrow=True),
    ]


def _per_seed(frame: pd.DataFrame) -> list[str]:
    return [name for name in map(str, frame) if name.startswith(OF_SEED)]


def applies(sweep: Sweep, store: Path | None = None) -> bool:
    """Return whether a sweep requests its students at several seeds."""
    return len(_requested(sweep)) > 1


def _requested(sweep: Sweep) -> list[int]:
    return sorted(set(sweep.runs.loc[sweep.runs["role"] != "teacher", "seed"]))


def make(sweep: Sweep, options: Options) -> Table:
    """Make the table.

    Raises:
        InputError: the sweep is empty, mixed, or has one seed.
    """
    if not applies(sweep):
        raise InputError(f"sweep {sweep.name} has one seed, so no spread: run its cells with seed=0,1,2")
    frame = numbers(sweep)
    below = [*notes.provenance(sweep), *NOTES, *notes.gaps(frame)]
    return Table(HEADING, frame, columns(frame), sentences(frame), below)


@each_variant
def numbers(scores: Scores) -> pd.DataFrame:
    """Return a row per cell, the best first: mean Dice over the test images of all splits (%) at each seed.

    Further columns are the mean and the standard deviation (n - 1) of these, and the distance to the best cell (points,
    at most 0). A cell that is not there at every seed and split has no numbers, and its gap says why.
    """
    why = scores.gaps(students(scores.notations))
    means = 100 * scores.complete(why).groupby(["notation", "seed"])["dice"].mean().unstack()
    means = means.reindex(index=list(why), columns=_requested(scores.sweep))
    table = means.add_prefix(OF_SEED).assign(
        mean_dice_percent=means.mean(axis=1), std_dice_percent_seeds=means.std(axis=1, ddof=1)
    )
    table["to_best_points"] = table["mean_dice_percent"] - table["mean_dice_percent"].max()
    table.insert(0, "gap", pd.Series(why))
    table = table.rename_axis(index="notation", columns=None).reset_index()
    return table.sort_values("mean_dice_percent", ascending=False, ignore_index=True, kind="stable")


def repeatability_points(table: pd.DataFrame) -> float:
    """Return the limit below which 95 % of differences between two seeds of one cell are (percentage points).

    1.96 sqrt(2) s, where s^2 is the mean over the cells of the variance between seeds. Source: Bland and Altman,
    Measurement error, BMJ 313, 1996.
    """
    return float(1.96 * sqrt(2) * sqrt((table["std_dice_percent_seeds"].dropna() ** 2).mean()))


def sentences(table: pd.DataFrame) -> list[str]:
    """Return how much seeds change, and which cells are further from the best one than that."""
    if "settings" in table:
        parts = table.groupby("settings", sort=False)
        return [f"With {label}: {line}" for label, part in parts for line in sentences(part.drop(columns="settings"))]
    done = table[table["gap"] == ""]
    if done.empty:
        return ["No cell is finished at every seed and split."]
    seeds = _per_seed(done)
    limit = repeatability_points(done)
    lines = [
        f"Two trainings of one cell with other seeds differ by less than {limit:.2f} points in 95 % of cases "
        f"(repeatability: 1.96 x sqrt 2 x {limit / 1.96 / sqrt(2):.2f} points, the standard deviation between "
        f"{len(seeds)} seeds, pooled over {len(done)} models)."
    ]
    best, others = done.iloc[0], done.iloc[1:]
    if others.empty:
        return lines
    second = others.iloc[0]
    above = f"{-second['to_best_points']:.2f} points above {second['notation']} on average"
    ahead = (best[seeds] > second[seeds]).sum()
    is_near = -others["to_best_points"] <= limit
    near, far = (", ".join(others.loc[part, "notation"]) or "none" for part in (is_near, ~is_near))
    return [
        *lines,
        f"{best['notation']} is {above}, and above it in {ahead} of {len(seeds)} seeds.",
        f"No further from it than seeds alone make: {near}.",
        f"Further: {far}.",
    ]
