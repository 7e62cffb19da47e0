"""Comparisons of settings that a sweep varies, and of the spread between seeds with that between cells."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any

import pandas as pd

from kdsweep.core.errors import InputError
from kdsweep.results import formats
from kdsweep.results.footnotes import of_comparisons
from kdsweep.results.frame import each_variant, gaps, placed_runs, scored_images, variants
from kdsweep.results.paper import CELLS
from kdsweep.results.stats import ALPHA, NAN, OF_IMAGE, PLACE, adjusted, compare, pair, unknown

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

ALL = "all cells"


def students(*sweeps: Sweep) -> list[str]:
    """Return the notations of the students of sweeps: the paper's cells in its order, others, the baseline."""
    asked = set().union(*(sweep.runs.loc[sweep.runs["role"] != "teacher", "notation"] for sweep in sweeps))
    own = sorted(asked.difference(CELLS, ["Student"]))
    return [*(cell for cell in CELLS if cell in asked), *own, *(["Student"] if "Student" in asked else [])]


# ---- settings ------------------------------------------------------------------------------------------------------


def has_settings(sweep: Sweep) -> bool:
    """Return whether a sweep varies further keys and mixes no options."""
    try:
        return len(variants(sweep)) > 1
    except InputError:  # mixed: each table says so
        return False


def settings(sweep: Sweep, *, test: str = "ttest") -> pd.DataFrame:
    """Compare each value of the further keys that a sweep varies with the first, paired over the test images.

    One row per cell, and one for all cells together: the mean Dice over the cells for each image of each (split, seed).
    A run that the keys do not affect, as ``kd.align`` does not affect the Student baseline, has no row.

    Args:
        sweep: its runs and scores.
        test: a key of TESTS.

    Returns:
        Mean Dice (%) at both settings, their difference (percentage points; positive where ``settings`` is better) with
        its 95 % interval, p, and Holm's p: over the rows of single cells, and apart from them over those of all cells.
        A row without a run that it needs has no numbers, and its gap says why.

    Raises:
        InputError: the sweep is empty, mixed, or varies no further key.
    """
    parts = variants(sweep)
    if len(parts) < 2:
        raise InputError(f"sweep {sweep.name} varies no key beyond its factors: give one values, kd.align=warp,none")
    (first, base), *others = parts.items()
    rows = [
        {"settings": label, "against": first} | row for label, part in others for row in _against(part, base, test=test)
    ]
    table = pd.DataFrame(rows)
    return adjusted(table, family=table["notation"] == ALL).astype({"n_images": "Int64"})


def _against(ours: Sweep, base: Sweep, *, test: str) -> list[dict[str, Any]]:
    names = [name for name in students(ours, base) if not _is_same_run(name, ours, base)]
    (dice, why), (base_dice, base_why) = (_scores(part, names) for part in (ours, base))
    rows = []
    for name in names:
        gap = why[name] or base_why[name]
        rows.append({"notation": name} | _compared(dice, base_dice, [name], gap=gap, test=test))
    cells = [name for name in names if name != "Student"]
    lacking = [name for name in cells if why[name] or base_why[name]]
    gap = f"needs {', '.join(lacking[:3])}{' and others' if len(lacking) > 3 else ''}" if lacking else ""
    return [*rows, {"notation": ALL} | _compared(dice, base_dice, cells, gap=gap, test=test)] if cells else rows


def _is_same_run(name: str, *parts: Sweep) -> bool:
    one, other = (set(part.runs.loc[part.runs["notation"] == name, "fingerprint"]) for part in parts)
    return one == other


def _scores(sweep: Sweep, names: list[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    runs = placed_runs(sweep)
    scored = scored_images(runs=runs, scores=sweep.scores)
    return scored, gaps(runs=runs, scored=scored, notations=names)


def _compared(dice: pd.DataFrame, base: pd.DataFrame, names: list[str], *, gap: str, test: str) -> dict[str, Any]:
    if gap:
        return {"mean_dice_percent": NAN, "against_mean_dice_percent": NAN} | unknown(gap=gap)
    pairs = pd.concat(
        pair(ours=dice[dice["notation"] == name], baseline=base[base["notation"] == name]) for name in names
    )
    own = [*PLACE, "image", *OF_IMAGE]
    pairs = pairs.groupby(own, as_index=False)[["dice_ours", "dice_baseline", "points"]].mean()
    ours, against = 100 * pairs[["dice_ours", "dice_baseline"]].mean()
    means = {"mean_dice_percent": ours, "against_mean_dice_percent": against}
    return means | compare(pairs, test=test) | {"gap": ""}


def format_settings(table: pd.DataFrame) -> pd.DataFrame:
    """Return the strings of the table of settings."""
    means = zip(table["mean_dice_percent"].map(formats.number), table["gap"], strict=True)
    columns = {
        "Settings": table["settings"],
        "Against": table["against"],
        "Model": table["notation"],
        "DSC %": [formats.or_gap(shown, gap) for shown, gap in means],
        "DSC % against": table["against_mean_dice_percent"].map(formats.number),
        "DSC points": table["difference_points"].map(formats.points),
        **formats.tested(table),
    }
    return pd.DataFrame(columns)


def told_settings(table: pd.DataFrame) -> list[str]:
    """Return one sentence per setting: the result over all cells, and which single cells differ at 5 % after Holm."""
    lines = []
    for (label, first), rows in table.groupby(["settings", "against"], sort=False):
        cells = rows[rows["notation"] != ALL]
        found = [
            f"{name} by {points:+.2f}"
            for name, points, p in zip(cells["notation"], cells["difference_points"], cells["p_holm"], strict=True)
            if p < ALPHA
        ]
        single = f"single cells that differ: {', '.join(found)}" if found else "no single cell differs"
        whole = [row for _, row in rows[rows["notation"] == ALL].iterrows()]
        together = [_together(row) for row in whole]
        lines.append(f"{label} against {first}, these networks: {'; '.join([*together, single])}.")
        known = [formats.on_methods(row, "over all cells") for row in whole if pd.notna(row["p_methods"])]
        lines.append(f"{label} against {first}, these methods: {'; '.join(known) or formats.ONE_SEED}.")
    return lines


def _together(row: pd.Series) -> str:
    if row["gap"]:
        return f"not known over all cells, it {row['gap']}"
    if pd.isna(row["p_holm"]):
        return f"{row['difference_points']:+.2f} points over all cells, but these scores allow no test"
    bounds = formats.interval(low=row["low_points"], high=row["high_points"])
    shown = "a difference is shown" if row["p_holm"] < ALPHA else "no difference is shown"
    number = f"{row['difference_points']:+.2f} points over all cells, 95 % interval {bounds}"
    return f"{shown} ({number}, {formats.after_holm(row['p_holm'])})"


def notes_settings(table: pd.DataFrame, *, test: str) -> list[str]:
    """Return the footnotes of the table of settings."""
    return of_comparisons(
        table, test=test, families=f"over the rows of single cells and, apart from them, over those of {ALL}"
    )


# ---- seeds ---------------------------------------------------------------------------------------------------------


def has_seeds(sweep: Sweep) -> bool:
    """Return whether a sweep asks for its students at several seeds."""
    return bool(sweep.runs.loc[sweep.runs["role"] != "teacher", "seed"].nunique() > 1)


def seeds(sweep: Sweep) -> pd.DataFrame:
    """Compare how much a cell's mean Dice changes with the seed with how much cells differ.

    Returns:
        A row per cell, the best first: its mean over the test images of all splits (%) at each seed, the mean and the
        standard deviation (n - 1) of these, and its distance to the best cell (points, at most 0). A cell that is not
        there at every seed and split has no numbers, and its gap says why. A sweep that varies further keys gives this
        for each of their values, below each other, column settings first.

    Raises:
        InputError: the sweep is empty, mixed, or has one seed.
    """
    if not has_seeds(sweep):
        raise InputError(f"sweep {sweep.name} has one seed, so no spread: run its cells with seed=0,1,2")
    return each_variant(sweep, _seeds)


def _seeds(sweep: Sweep) -> pd.DataFrame:
    names = students(sweep)
    scored, why = _scores(sweep, names)
    whole = scored[scored["notation"].map(why) == ""]
    means = 100 * whole.groupby(["notation", "seed"])["dice"].mean().unstack()
    table = pd.DataFrame({"notation": names, "gap": [why[name] for name in names]})
    asked = sorted(set(sweep.runs.loc[sweep.runs["role"] != "teacher", "seed"]))
    by_seed = means.reindex(index=names, columns=asked)
    for seed in asked:
        table[f"mean_dice_percent_seed{seed}"] = by_seed[seed].to_numpy()
    table["mean_dice_percent"] = by_seed.mean(axis=1).to_numpy()
    table["std_dice_percent_seeds"] = by_seed.std(axis=1, ddof=1).to_numpy()
    table["to_best_points"] = table["mean_dice_percent"] - table["mean_dice_percent"].max()
    return table.sort_values("mean_dice_percent", ascending=False, ignore_index=True, kind="stable")


def repeatability_points(table: pd.DataFrame) -> float:
    """Return the limit below which 95 % of differences between two seeds of one cell lie (percentage points).

    1.96 sqrt(2) s, where s^2 is the mean over the cells of the variance between seeds. Source: Bland and Altman,
    Measurement error, BMJ 313, 1996.
    """
    return float(1.96 * sqrt(2) * sqrt((table["std_dice_percent_seeds"].dropna() ** 2).mean()))


def format_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Return the strings of the table of seeds."""
    per_seed = [name for name in map(str, table) if name.startswith("mean_dice_percent_seed")]
    names = ", ".join(name.removeprefix("mean_dice_percent_seed") for name in per_seed)
    rows = zip(table[per_seed].itertuples(index=False), table["gap"], strict=True)
    columns = {
        **({"Settings": table["settings"]} if "settings" in table else {}),
        "Model": table["notation"],
        f"DSC % of seed {names}": [formats.or_gap(" / ".join(map(formats.number, row)), gap) for row, gap in rows],
        "Mean": table["mean_dice_percent"].map(formats.number),
        "SD between seeds": table["std_dice_percent_seeds"].map(formats.number),
        "DSC points to best": table["to_best_points"].map(formats.points),
    }
    return pd.DataFrame(columns)


def told_seeds(table: pd.DataFrame) -> list[str]:
    """Return sentences: how much seeds change, and which cells are further from the best one than that."""
    if "settings" in table:
        parts = table.groupby("settings", sort=False)
        return [f"With {label}: {line}" for label, part in parts for line in told_seeds(part.drop(columns="settings"))]
    known = table[table["gap"] == ""]
    if known.empty:
        return ["No cell is finished at every seed and split."]
    columns = [name for name in map(str, known) if name.startswith("mean_dice_percent_seed")]
    limit = repeatability_points(known)
    lines = [
        f"Two trainings of one cell with other seeds differ by less than {limit:.2f} points in 95 % of cases "
        f"(repeatability: 1.96 x sqrt 2 x {limit / 1.96 / sqrt(2):.2f} points, the standard deviation between "
        f"{len(columns)} seeds, pooled over {len(known)} models)."
    ]
    best, *others = (row for _, row in known.iterrows())
    if others:
        ahead = sum(best[name] > others[0][name] for name in columns)
        above = f"{-others[0]['to_best_points']:.2f} points above {others[0]['notation']} on average"
        lines.append(f"{best['notation']} is {above}, and above it in {ahead} of {len(columns)} seeds.")
        for words, own in (
            ("No further from it than seeds alone make", [row for row in others if -row["to_best_points"] <= limit]),
            ("Further", [row for row in others if -row["to_best_points"] > limit]),
        ):
            names = ", ".join(row["notation"] for row in own) or "none"
            lines.append(f"{words}: {names}.")
    return lines


def notes_seeds(*, table: pd.DataFrame) -> list[str]:
    """Return the footnotes of the table of seeds."""
    lines = [
        "Each number is the mean over the test images of all splits. A seed decides initial weights, order and views "
        "of the students; whether their Teachers change with it depends on teacher.seed (`teacher.seed=0` keeps them).",
        "The limit on two trainings is from Bland and Altman, Measurement error, BMJ 313, 1996; from few seeds it is "
        "a rough estimate. The mean of n seeds varies by a factor of sqrt n less than one training does.",
    ]
    if missing := [f"{name} ({gap})" for name, gap in zip(table["notation"], table["gap"], strict=True) if gap]:
        lines.append(f"Gaps, never averaged over fewer runs: {'; '.join(missing)}.")
    return lines
