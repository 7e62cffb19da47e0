"""Seeds: how much a cell's mean Dice changes with the seed, next to how much cells differ."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.core.errors import InputError
from kdsweep.results import notes
from kdsweep.results.formats import joined, number, or_gap, points
from kdsweep.results.frame import Scores, each_variant
from kdsweep.results.paper import students
from kdsweep.results.table import MODEL, SETTINGS, Column, Options, Table

if TYPE_CHECKING:
    from pathlib import Path

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
    return bool(sweep.runs.loc[sweep.runs["role"] != "teacher", "seed"].nunique() > 1)


def make(sweep: Sweep, options: Options) -> Table:
    """Make the table."""
    frame = numbers(sweep)
    below = [*notes.provenance(sweep), *NOTES, *notes.gaps(frame)]
    return Table(HEADING, frame, columns(frame), sentences(frame), below)


def numbers(sweep: Sweep) -> pd.DataFrame:
    """Return a row per cell, the best first: mean Dice over the test images of all splits (%) at each seed.

    Further columns are the mean and the standard deviation (n - 1) of these, and the distance to the best cell (points,
    at most 0). A cell that is not there at every seed and split has no numbers, and its gap says why.

    Raises:
        InputError: the sweep is empty, mixed, or has one seed.
    """
    if not applies(sweep):
        raise InputError(f"sweep {sweep.name} has one seed, so no spread: run its cells with seed=0,1,2")
    return each_variant(sweep, _numbers)


def _numbers(scores: Scores) -> pd.DataFrame:
    names = students(scores.notations)
    why = scores.gaps(names)
    means = 100 * scores.complete(why).groupby(["notation", "seed"])["dice"].mean().unstack()
    table = pd.DataFrame({"notation": names, "gap": [why[name] for name in names]})
    requested = sorted(set(scores.sweep.runs.loc[scores.sweep.runs["role"] != "teacher", "seed"]))
    by_seed = means.reindex(index=names, columns=requested)
    for seed in requested:
        table[f"{OF_SEED}{seed}"] = by_seed[seed].to_numpy()
    table["mean_dice_percent"] = by_seed.mean(axis=1).to_numpy()
    table["std_dice_percent_seeds"] = by_seed.std(axis=1, ddof=1).to_numpy()
    table["to_best_points"] = table["mean_dice_percent"] - table["mean_dice_percent"].max()
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
    best, *others = (row for _, row in done.iterrows())
    if others:
        ahead = sum(best[name] > others[0][name] for name in seeds)
        above = f"{-others[0]['to_best_points']:.2f} points above {others[0]['notation']} on average"
        lines.append(f"{best['notation']} is {above}, and above it in {ahead} of {len(seeds)} seeds.")
        near = [row["notation"] for row in others if -row["to_best_points"] <= limit]
        far = [row["notation"] for row in others if -row["to_best_points"] > limit]
        lines.append(f"No further from it than seeds alone make: {', '.join(near) or 'none'}.")
        lines.append(f"Further: {', '.join(far) or 'none'}.")
    return lines
