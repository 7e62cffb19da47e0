"""Dice on other data sets (``python -m kdsweep score``) next to that on the sweep's test images, and the drop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.core.errors import InputError
from kdsweep.results import notes
from kdsweep.results.formats import interval, number, or_gap, p, points, with_interval
from kdsweep.results.frame import VALIDATION, Scores, each_variant, gaps, scored_images
from kdsweep.results.paper import BASELINES, students
from kdsweep.results.ranks import rank_correlation
from kdsweep.results.stats import (
    ALPHA,
    NAN,
    compare,
    holm,
    networks_spread,
    over_seeds,
    pair,
    satterthwaite,
)
from kdsweep.results.table import MODEL, SETTINGS, Column, Options, Table

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

HEADING = "External. Test DSC on other data sets"
DROP = ("drop_points", "low_points", "high_points")
STUDENT = tuple(f"student_{name}_points" for name in ("difference", "low", "high"))
COLUMNS = [
    SETTINGS,
    Column("data_set", "Test data", narrow=True),
    MODEL,
    Column("internal_dice_percent", "DSC % internal", number, narrow=True),
    Column("external_dice_percent", "DSC % external", number, narrow=True),
    Column(("drop_points", "gap"), "Drop, points", or_gap(points)),
    Column(("low_points", "high_points"), "95 % interval", interval),
    Column((*DROP, "gap"), "drop, points (95 % interval)", or_gap(with_interval), narrow=True, full=False),
    Column(STUDENT, "External, points to Student (95 % interval)", with_interval),
    Column(STUDENT[0], "external, to Student", points, narrow=True, full=False),
    Column("student_p", "p", p),
    Column("student_p_holm", "p (Holm)", p, narrow=True),
    Column("n_external", "Images", partial(number, form=".0f")),
]
MEASURED = ("internal_dice_percent", "external_dice_percent", *DROP, "n_external")
ORDER = ("rank_correlation", "rank_low", "rank_high")
NOTES = (
    "Internal: the test images of the sweep's splits. External: all images of the other data set, scored by every "
    "finished network of the sweep; nothing was retrained. Drop: external minus internal.",
    "Interval: 95 %, Welch, images (or their groups) of both sides as clusters, seeds averaged. It says how these "
    "networks, as trained, would do on other images of both kinds; it does not say which of two models drops less.",
    "Points to Student: on the external images alone, paired by image; clustered t-test, Holm over the KD cells of a "
    "data set; interval: 95 % bootstrap (BCa).",
    "Order: Spearman's rank correlation of the students' internal and external DSC; interval: 95 % bootstrap over the "
    "images of both sides (percentiles), which tends to be low since drawing adds noise to the ranks.",
)


def applies(sweep: Sweep, store: Path) -> bool:
    """Return whether networks were scored on another data set."""
    return not sweep.external.empty


def make(sweep: Sweep, options: Options) -> Table:
    """Make the table."""
    frame = numbers(sweep)
    return Table(HEADING, frame, COLUMNS, lead(frame), notes=[*notes.provenance(sweep), *NOTES, *notes.gaps(frame)])


@each_variant
def numbers(scores: Scores) -> pd.DataFrame:
    """Return a row for each data set and model.

    Columns: internal and external Dice (%); the drop in points with its 95 % interval; the difference to Student on the
    external images (points, as of ``stats.compare``) with p and its correction; Spearman's correlation of the students'
    internal and external Dice, the same in all rows of a data set.

    Raises:
        InputError: no network was scored on another data set.
    """
    if scores.sweep.external.empty:
        command = f"python -m kdsweep score --sweep {scores.sweep.name} data=folder data.root=DIR"
        raise InputError(f"sweep {scores.sweep.name}: nothing was scored on another data set yet: `{command}`")
    internal, parts = scores.gaps(scores.notations), []
    validation = 100 * scores.runs.drop_duplicates("fingerprint").groupby("notation")["val_dice"].mean()
    for data_set, part in named(scores.sweep.external).groupby("data_set"):
        outside = scored_images(runs=scores.runs, scores=part)
        missing = gaps(runs=scores.runs, scored=outside, notations=scores.notations)
        why = {name: internal[name] or missing[name].replace("no scores", "not scored") for name in scores.notations}
        sides = [images[images["notation"].map(why) == ""] for images in (scores.images, outside)]
        rows = [{"data_set": data_set, "notation": name, "gap": why[name]} | _measured(name, *sides) for name in why]
        table = pd.DataFrame(rows).join(validation.rename(VALIDATION), on="notation")
        is_cell = ~table["notation"].isin(BASELINES)
        table["student_p_holm"] = holm(table["student_p"].where(is_cell))
        ranked = [side[side["notation"].isin(students(why))] for side in sides]
        parts.append(table.assign(**dict(zip(ORDER, _order(*ranked), strict=True))))
    return pd.concat(parts, ignore_index=True)


def named(external: pd.DataFrame) -> pd.DataFrame:
    """Return scores with data sets by their names alone, with the digest behind it where two have one name."""
    names = {full: full.rpartition("-")[0] or full for full in external["data_set"].unique()}
    counts = pd.Series(names).value_counts()
    return external.assign(
        data_set=external["data_set"].map(lambda full: full if counts[names[full]] > 1 else names[full])
    )


def _measured(name: str, *sides: pd.DataFrame) -> dict[str, object]:
    """Return the numbers of a model from the scores of all on internal and external images."""
    ours, others = (side[side["notation"] == name] for side in sides)
    student = sides[1][sides[1]["notation"] == "Student"].iloc[: 0 if name == "Student" else None]
    of_student = compare(pair(ours=others, baseline=student), test="ttest")
    differences = {f"student_{key}": of_student[key] for key in ("difference_points", "low_points", "high_points", "p")}
    return (dict.fromkeys(MEASURED, NAN) if ours.empty else _drop(ours, others)) | differences


def _order(*sides: pd.DataFrame) -> tuple[float, float, float]:
    return (NAN, NAN, NAN) if any(side.empty for side in sides) else rank_correlation(*sides)


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


# ---- sentences -----------------------------------------------------------------------------------------------------


def lead(table: pd.DataFrame) -> list[str]:
    """Return the answer in three sentences: how much the best cell drops, whether the order holds, what KD is worth."""
    if "settings" in table:
        parts = table.groupby("settings", sort=False)
        return [f"With {label}: {line}" for label, part in parts for line in lead(part.drop(columns="settings"))]
    done = table[table["gap"] == ""]
    cells = done[~done["notation"].isin(BASELINES)].dropna(subset=VALIDATION)
    lines = []
    if len(cells):
        best = cells.sort_values([VALIDATION, "notation"], ascending=[False, True])["notation"].iloc[0]
        rows = cells[cells["notation"] == best]
        changes = _each(rows, lambda row: with_interval(*(row[key] for key in DROP)))
        lines.append(
            f"Drop: {best}, the best cell in validation, has {number(rows['internal_dice_percent'].iloc[0])} % on the "
            f"sweep's test images; the change elsewhere is, in points, {changes}."
        )
    if (ranked := done.dropna(subset="rank_correlation").drop_duplicates("data_set")).shape[0]:
        correlations = _each(ranked, lambda row: "{:.2f} ({:.2f} to {:.2f})".format(*(row[key] for key in ORDER)))
        lines.append(f"Order: Spearman's rank correlation of the students' DSC inside and outside is {correlations}.")
    if len(tested := cells.dropna(subset="student_p_holm")):
        counts = _each(tested.drop_duplicates("data_set"), lambda row: _counts(tested, row["data_set"]))
        lines.append(f"Distillation, p < 0.05 after Holm: {counts}.")
    return lines


def _each(rows: pd.DataFrame, show: Callable[[pd.Series], str]) -> str:
    """Return what is shown of each data set's row, such as ``-7.40 on clinic and -9.10 on other``."""
    return " and ".join(f"{show(row)} on {row['data_set']}" for _, row in rows.iterrows())


def _counts(tested: pd.DataFrame, data_set: str) -> str:
    part = tested[tested["data_set"] == data_set]
    shown = part.loc[part["student_p_holm"] < ALPHA, "student_difference_points"]
    return f"{(shown > 0).sum()} of {len(part)} cells score higher than Student and {(shown < 0).sum()} lower"
