"""Make Tables 3 and 4: the test Dice of cells and baselines, and whether it differs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from kdsweep.results import formats
from kdsweep.results.formats import DASH
from kdsweep.results.frame import VALIDATION, each_variant, gaps, margin_of, placed_runs, scored_images, variants
from kdsweep.results.paper import BASELINES, CELLS, LOSSES, PAPER, REPRESENTATIONS
from kdsweep.results.stats import ALPHA, NAN, compare, holm, non_inferiority, own_teachers, pair

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

GRADIENT_RATIO = "kd_gradient_ratio"  # a column of Table 4: the geometric mean over its runs
SPLIT_MEAN = "mean_dice_percent_split"
UNCORRECTED = ("student_p_runs", "teacher_p_runs")
PAPER_COLUMNS = ["paper_mean_dice_percent", "paper_std_dice_percent", "paper_p_teacher", "paper_p_student"]


def cell_notations(sweep: Sweep) -> list[str]:
    """Return the paper's 12 in its order, unless others alone were asked for, then methods and a user's own cells."""
    cells = set(sweep.runs.loc[sweep.runs["role"] == "distilled", "notation"])
    others = sorted(cells.difference(CELLS))
    return others if others and cells.isdisjoint(CELLS) else [*CELLS, *others]


def table3(sweep: Sweep) -> pd.DataFrame:
    """Return Table 3: each experiment's factors, our mean Dice over the test images of all splits (%), the paper's.

    A sweep that varies further keys gives a table for each of their values, below each other, column settings first.
    """
    return each_variant(sweep, _table3)


def _table3(sweep: Sweep) -> pd.DataFrame:
    runs, notations = placed_runs(sweep), cell_notations(sweep)
    scored = scored_images(runs=runs, scores=sweep.scores)
    why = gaps(runs=runs, scored=scored, notations=notations)
    rows = []
    for notation in notations:
        path, _, loss = notation.removesuffix("_WAug").partition("_")
        row = {
            "representation": REPRESENTATIONS.get(path, path),
            "notation": notation,
            "loss": LOSSES.get(loss, loss),
            "teacher_augmentation": "weak" if notation.endswith("_WAug") else "strong",
            "gap": why[notation],
            "mean_dice_percent": NAN if why[notation] else 100 * scored["dice"][scored["notation"] == notation].mean(),
        }
        rows.append(row)
    return pd.DataFrame(rows).join(_paper()[PAPER_COLUMNS[0]], on="notation")


def table4(sweep: Sweep, *, test: str = "ttest", margin_points: float | None = None) -> pd.DataFrame:
    """Return Table 4: Dice (%), each model against its Teacher and against Student, the paper's figures beside.

    Differences are paired mean differences in percentage points, to Student and to the Teacher that the cell learnt
    from (columns student_... and teacher_..., as of ``stats.compare``), with whether it is non-inferior to that. A
    sweep that varies further keys gives a table for each of their values, below each other, column settings first:
    each row is compared with the Teacher and the Student of its own settings, and Holm's family is all of them.

    Args:
        sweep: its runs and scores.
        test: of TESTS.
        margin_points: what a cell may lose to its Teacher and still be non-inferior; the sweep's own by default.
    """
    margin = margin_of(sweep) if margin_points is None else margin_points
    table = each_variant(sweep, partial(_table4, test=test, margin_points=margin)).assign(margin_points=margin)
    is_cell = ~table["notation"].isin(BASELINES)  # the family is the KD cells: no baseline is being tried
    ps = [str(name) for name in table if re.match("(student|teacher)_p(_|$)", str(name))]
    for column in [name for name in ps if name not in UNCORRECTED]:
        table[f"{column}_holm"] = holm(table[column].where(is_cell))
    pairs = zip(table["teacher_p_non_inferior_holm"], table["teacher_p_inferior_holm"], strict=True)
    verdicts = [_verdict(non_inferior, inferior) for non_inferior, inferior in pairs]
    return table.assign(teacher_verdict=pd.Series(verdicts, index=table.index, dtype=object))


def _verdict(p_non_inferior: float, p_inferior: float) -> str | None:
    if pd.isna(p_non_inferior):
        return None
    return "non-inferior" if p_non_inferior < ALPHA else "inferior" if p_inferior < ALPHA else "open"


def _table4(sweep: Sweep, *, test: str, margin_points: float) -> pd.DataFrame:
    runs, cells = placed_runs(sweep), cell_notations(sweep)
    scored = scored_images(runs=runs, scores=sweep.scores)
    why = gaps(runs=runs, scored=scored, notations=[*BASELINES, *cells])
    whole = scored[scored["notation"].map(why) == ""]
    rows = [
        {"notation": notation, "gap": gap}
        | _compared(notation, whole=whole, scored=scored, test=test, margin_points=margin_points)
        | _trained(runs[runs["notation"] == notation], gap=gap)
        for notation, gap in why.items()
    ]
    table = pd.DataFrame(rows).astype({"n_images": "Int64"})
    table = table.join(_paper(), on="notation")
    return table.assign(difference_to_paper_points=table["mean_dice_percent"] - table["paper_mean_dice_percent"])


def _trained(runs: pd.DataFrame, *, gap: str) -> dict[str, float]:
    """Return how a row's runs were trained: means over them; epochs from 1, Dice (%) of the best epoch."""
    single = runs.drop_duplicates("fingerprint")
    means = {VALIDATION: 100 * single["val_dice"].mean(skipna=False)}
    if "epochs" in single:
        means |= {"mean_epochs": single["epochs"].mean(), "mean_best_epoch": single["best_epoch"].mean() + 1}
    means[GRADIENT_RATIO] = float(np.exp(np.log(single["kd_gradient_ratio"]).mean(skipna=False)))
    means["mean_kd_weight"] = single["kd_weight"].mean(skipna=False)
    return dict.fromkeys(means, NAN) if gap else means


def _paper() -> pd.DataFrame:
    return pd.DataFrame.from_dict(PAPER, orient="index", columns=PAPER_COLUMNS)


def _compared(
    notation: str, *, whole: pd.DataFrame, scored: pd.DataFrame, test: str, margin_points: float
) -> dict[str, object]:
    """Return one row's measured numbers for Table 4; whole holds rows without a gap, scored all that finished."""
    ours, baseline = whole[whole["notation"] == notation], whole[whole["notation"] == "Student"]
    if notation == "Student":
        teacher, baseline = whole[whole["notation"] == "Teacher"], whole.iloc[:0]
    else:
        teacher = own_teachers(ours=ours, scored=scored)  # none for a Teacher
    to_teacher = pair(ours=ours, baseline=teacher)
    dice = 100 * ours.groupby(["split", "image"])["dice"].mean()  # of the seeds: not more images than there are
    return {
        "mean_dice_percent": dice.mean(),
        "std_dice_percent": dice.std(ddof=1),
        **{f"{SPLIT_MEAN}{split}": mean for split, mean in dice.groupby("split").mean().items()},
        **_prefixed("student_", compare(pair(ours=ours, baseline=baseline), test=test)),
        **_prefixed("teacher_", compare(to_teacher, test=test)),
        **_prefixed("teacher_", non_inferiority(to_teacher, margin_points=margin_points)),
        "n_images": ours["image"].nunique() or pd.NA,
    }


def _prefixed(prefix: str, values: Mapping[str, object]) -> dict[str, object]:
    return {prefix + name: value for name, value in values.items() if name != "n_images"}


def best_variant(sweep: Sweep, table: pd.DataFrame) -> tuple[Sweep, pd.DataFrame]:
    """Return the part of a sweep and its Table 4 whose cell has the best validation Dice; all if it varies none."""
    if "settings" not in table:
        return sweep, table
    cells = table[~table["notation"].isin(BASELINES)].sort_values(VALIDATION, ascending=False)
    label = [*cells["settings"], *table["settings"]][0]
    return variants(sweep)[label], table[table["settings"] == label].drop(columns="settings")


# ---- text ----------------------------------------------------------------------------------------------------------


def _with_std(*, mean: pd.Series, std: pd.Series) -> list[str]:
    return [DASH if pd.isna(m) else f"{m:.2f} ± {formats.number(s)}" for m, s in zip(mean, std, strict=True)]


def _settings(table: pd.DataFrame) -> dict[str, pd.Series]:
    return {"Settings": table["settings"]} if "settings" in table else {}


def format_table3(table: pd.DataFrame) -> pd.DataFrame:
    """Return the strings of Table 3."""
    columns = {
        **_settings(table),
        "KD representation": table["representation"],
        "Notation": table["notation"],
        "KD loss": table["loss"].replace("", DASH),
        "Teacher augmentation": table["teacher_augmentation"],
        "DSC % (ours)": list(map(formats.or_gap, table["mean_dice_percent"].map(formats.number), table["gap"])),
        "DSC % (paper)": table["paper_mean_dice_percent"].map(formats.number),
    }
    return pd.DataFrame(columns)


def format_table4(table: pd.DataFrame) -> pd.DataFrame:
    """Return the strings of Table 4."""
    means = _with_std(mean=table["mean_dice_percent"], std=table["std_dice_percent"])
    columns = {
        **_settings(table),
        "Model": table["notation"],
        "DSC %": list(map(formats.or_gap, means, table["gap"])),
        **_per_split(table),
        "to Student": table["student_difference_points"].map(formats.points),
        **formats.tested(table, prefix="student_"),
        "to Teacher": table["teacher_difference_points"].map(formats.points),
        **formats.p_values(table, prefix="teacher_", of="Teacher, "),
        f"at most {table['margin_points'].iloc[0]:g} points worse than Teacher": table["teacher_verdict"].fillna(DASH),
        "lower bound": table["teacher_bound_points"].map(formats.points),
        "non-inferior: p (Holm)": table["teacher_p_non_inferior_holm"].map(formats.p),
        **_epochs(table),
        **_strength(table),
        "DSC % (paper)": _with_std(mean=table["paper_mean_dice_percent"], std=table["paper_std_dice_percent"]),
        "DSC points to paper": table["difference_to_paper_points"].map(formats.points),
        "p Teacher (paper)": table["paper_p_teacher"].map(formats.p),
        "p Student (paper)": table["paper_p_student"].map(formats.p),
    }
    return pd.DataFrame(columns)


def _per_split(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return a column with the mean of each split, which shows their spread; none for a single split."""
    names = sorted(
        (str(name) for name in table if str(name).startswith(SPLIT_MEAN)), key=lambda name: (len(name), name)
    )
    if len(names) < 2:
        return {}
    rows = table[names].itertuples(index=False)
    splits = ", ".join(name.removeprefix(SPLIT_MEAN) for name in names)
    return {
        f"DSC % of split {splits}": [" / ".join(map(formats.number, row)) if row[0] == row[0] else DASH for row in rows]
    }


def _epochs(table: pd.DataFrame) -> dict[str, list[str]]:
    if "mean_epochs" not in table:
        return {}
    pairs = zip(table["mean_best_epoch"], table["mean_epochs"], strict=True)
    return {
        "Best epoch": [
            f"{formats.number(best, '.0f')} of {epochs:.0f}" if epochs == epochs else DASH for best, epochs in pairs
        ]
    }


def _strength(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return a column on how strongly the KD term acts, and one on matched weights; none where no run has measured."""
    columns = {"KD to supervised gradient": GRADIENT_RATIO, "KD weight": "mean_kd_weight"}
    return {
        heading: [formats.number(value, ".3g") for value in table[name]]
        for heading, name in columns.items()
        if table[name].notna().any()
    }
