"""Settings: each value of the further keys that a sweep varies against the first, paired over the test images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from kdsweep.core.errors import InputError, some
from kdsweep.results import notes
from kdsweep.results.formats import after_holm, number, on_methods, points, with_interval
from kdsweep.results.frame import Scores, variants
from kdsweep.results.paper import students
from kdsweep.results.stats import ALPHA, NAN, OF_IMAGE, PLACE, adjusted, compare, pair
from kdsweep.results.table import MODEL, SETTINGS, Column, Options, Table, differences, estimate

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

HEADING = "Settings. What the varied keys change"
ALL = "all cells"
COLUMNS = [
    SETTINGS,
    Column("against", "Against", narrow=True),
    MODEL,
    estimate("mean_dice_percent", "DSC %", narrow=True),
    Column("against_mean_dice_percent", "DSC % against", number),
    *differences(Column("difference_points", "DSC points", points), brief="points (95 % interval)"),
]


def applies(sweep: Sweep, store: Path) -> bool:
    """Return whether a sweep varies further keys."""
    return bool(sweep.varied)


def make(sweep: Sweep, options: Options) -> Table:
    """Make the table."""
    frame = numbers(sweep, test=options.test)
    families = f"over the rows of single cells and, apart from them, over those of {ALL}"
    below = [*notes.provenance(sweep), *notes.differences(frame, test=options.test, families=families)]
    return Table(HEADING, frame.assign(test=options.test), COLUMNS, sentences(frame), below)


def numbers(sweep: Sweep, *, test: str = "ttest") -> pd.DataFrame:
    """Compare settings: a row per cell, and one for all cells together (the mean over the cells for each image).

    Columns are mean Dice (%) at both settings and those of ``stats.compare`` (positive where ``settings`` is better);
    Holm's family is the rows of single cells and, apart from them, those of all cells. A row without a run that it
    needs has no numbers, and its gap says why; a run that the keys do not affect, as ``kd.align`` does not affect the
    Student baseline, has no row.

    Raises:
        InputError: the sweep is empty, mixed, or varies no further key.
    """
    parts = {label: Scores.of(part) for label, part in variants(sweep).items()}
    if len(parts) < 2:
        raise InputError(f"sweep {sweep.name} varies no key beyond its factors: give one values, kd.align=warp,none")
    (first, base), *others = parts.items()
    rows = [
        {"settings": label, "against": first} | row for label, part in others for row in _against(part, base, test=test)
    ]
    table = pd.DataFrame(rows)
    return adjusted(table, family=table["notation"] == ALL).astype({"n_images": "Int64"})


def _against(ours: Scores, base: Scores, *, test: str) -> list[dict[str, Any]]:
    def fingerprints(scores: Scores, name: str) -> set[str]:
        return set(scores.runs.loc[scores.runs["notation"] == name, "fingerprint"])

    names = students([*ours.notations, *base.notations])
    names = [name for name in names if fingerprints(ours, name) != fingerprints(base, name)]
    base_why = base.gaps(names)
    why = {name: gap or base_why[name] for name, gap in ours.gaps(names).items()}
    rows = [{"notation": name} | _compared(ours, base, [name], gap=gap, test=test) for name, gap in why.items()]
    cells = [name for name in names if name != "Student"]
    if not cells:
        return rows
    missing = [name for name in cells if why[name]]
    gap = f"needs {some(missing, most=3)}" if missing else ""
    return [*rows, {"notation": ALL} | _compared(ours, base, cells, gap=gap, test=test)]


def _compared(ours: Scores, base: Scores, names: list[str], *, gap: str, test: str) -> dict[str, Any]:
    if gap:
        means = dict.fromkeys(("mean_dice_percent", "against_mean_dice_percent"), NAN)
        return means | compare(pd.DataFrame(), test=test) | {"gap": gap}
    sides = [[part.images[part.images["notation"] == name] for part in (ours, base)] for name in names]
    pairs = pd.concat(pair(ours=one, baseline=other) for one, other in sides)
    pairs = pairs.groupby([*PLACE, "image", *OF_IMAGE], as_index=False)[["dice_ours", "dice_baseline", "points"]].mean()
    mean, against = 100 * pairs[["dice_ours", "dice_baseline"]].mean()
    means = {"mean_dice_percent": mean, "against_mean_dice_percent": against}
    return means | compare(pairs, test=test) | {"gap": ""}


def sentences(table: pd.DataFrame) -> list[str]:
    """Return the result of each setting over all cells, and which single cells differ at 5 % after Holm."""
    lines = []
    for (label, first), rows in table.groupby(["settings", "against"], sort=False):
        cells = rows[(rows["notation"] != ALL) & (rows["p_holm"] < ALPHA)]
        differ = [f"{row['notation']} by {row['difference_points']:+.2f}" for _, row in cells.iterrows()]
        single = f"single cells that differ: {', '.join(differ)}" if differ else "no single cell differs"
        together = rows[rows["notation"] == ALL]
        clauses = [*(_together(row) for _, row in together.iterrows()), single]
        lines.append(f"{label} against {first}, these networks: {'; '.join(clauses)}.")
        methods = on_methods(together, ["over all cells"] * len(together))
        lines.append(f"{label} against {first}, these methods: {methods}.")
    return lines


def _together(row: pd.Series) -> str:
    if row["gap"]:
        return f"unknown over all cells, it {row['gap']}"
    if pd.isna(row["p_holm"]):
        return f"{row['difference_points']:+.2f} points over all cells, but these scores allow no test"
    shown = "a difference is shown" if row["p_holm"] < ALPHA else "no difference is shown"
    bounds = with_interval(row["difference_points"], row["low_points"], row["high_points"])
    return f"{shown} ({bounds} points over all cells, {after_holm(row['p_holm'])})"
