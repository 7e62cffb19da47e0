"""Table 4: test Dice of Teachers, Student and cells; each against Student and its Teacher, next to the paper's."""

from __future__ import annotations

import shlex
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from kdsweep.results import notes
from kdsweep.results.formats import DASH, after_holm, joined, number, or_gap, p, points, with_interval
from kdsweep.results.frame import VALIDATION, Scores, each_variant, margin_of, variants
from kdsweep.results.mixing import distinct_values
from kdsweep.results.paper import BASELINES, PAPER, PAPER_COLUMNS, cell_notations
from kdsweep.results.stats import ALPHA, NAN, compare, holm, non_inferiority, pair
from kdsweep.results.table import MODEL, SETTINGS, Column, Options, Table, differences, p_values

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

HEADING = "Table 4. Test DSC of Teacher, Student and distilled students"
GRADIENT_RATIO = "kd_gradient_ratio"  # the geometric mean over a row's runs
SPLIT_MEAN = "mean_dice_percent_split"


def with_std(mean: float, std: float) -> str:
    """Format a mean and its standard deviation, such as ``73.16 ± 23.78``."""
    return DASH if pd.isna(mean) else f"{mean:.2f} ± {number(std)}"


def columns(frame: pd.DataFrame) -> list[Column]:
    """Return the columns; each split's mean if there are several."""
    names = [str(name) for name in frame if str(name).startswith(SPLIT_MEAN)]
    splits = tuple(sorted(names, key=lambda name: (len(name), name))) if len(names) > 1 else ("no split",)
    listed = ", ".join(name.removeprefix(SPLIT_MEAN) for name in splits)
    verdict = partial(Column, "teacher_verdict", format=lambda verdict: verdict or DASH)
    ratio = partial(number, form=".3g")
    to_student = Column("student_difference_points", "to Student", points)
    return [
        SETTINGS,
        MODEL,
        Column(("mean_dice_percent", "std_dice_percent", "gap"), "DSC %", or_gap(with_std), narrow=True),
        Column(splits, f"DSC % of split {listed}", joined),
        *differences(to_student, brief="points to Student (95 % interval)", prefix="student_"),
        Column("teacher_difference_points", "to Teacher", points, narrow=True),
        *p_values("teacher_", of="Teacher, "),
        verdict(heading=f"at most {frame['margin_points'].iloc[0]:g} points worse than Teacher"),
        verdict(heading="verdict against Teacher", narrow=True, full=False),
        Column("teacher_bound_points", "lower bound", points),
        Column("teacher_p_non_inferior_holm", "non-inferior: p (Holm)", p),
        Column(("mean_best_epoch", "mean_epochs"), "Best epoch", _epochs),
        Column(GRADIENT_RATIO, "KD to supervised gradient", ratio, needs=GRADIENT_RATIO),
        Column("mean_kd_weight", "KD weight", ratio, needs="mean_kd_weight"),
        Column(("paper_mean_dice_percent", "paper_std_dice_percent"), "DSC % (paper)", with_std),
        Column("difference_to_paper_points", "DSC points to paper", points),
        Column("paper_p_teacher", "p Teacher (paper)", p),
        Column("paper_p_student", "p Student (paper)", p),
    ]


def _epochs(best: float, epochs: float) -> str:
    return DASH if pd.isna(epochs) else f"{number(best, '.0f')} of {epochs:.0f}"


def make(sweep: Sweep, options: Options) -> Table:
    """Make the table."""
    frame = numbers(sweep, test=options.test, margin_points=options.margin_points)
    below = [*notes.provenance(sweep), *notes.gaps(frame), notes.paper(sweep)]
    below += footnotes(sweep, frame, test=options.test)
    best = next(iter(ranked(frame).index), None)
    return Table(HEADING, frame.assign(test=options.test), columns(frame), lead(sweep, frame), below, best)


# ---- the numbers ---------------------------------------------------------------------------------------------------


def numbers(sweep: Sweep, *, test: str = "ttest", margin_points: float | None = None) -> pd.DataFrame:
    """Return Dice (%) of each model, and its paired differences to Student and to the Teacher that it learnt from.

    Differences are means in percentage points (columns student_... and teacher_..., as of ``stats.compare``). A sweep
    that varies further keys has these rows for each of their values, column settings first: each is compared with the
    Teacher and the Student of its setting, and Holm's family is all of them. The margin of non-inferiority is by
    default that of the sweep.
    """
    return _numbers(sweep, test, margin_of(sweep) if margin_points is None else margin_points).copy()


@lru_cache(maxsize=1)  # a report needs them several times
def _numbers(sweep: Sweep, test: str, margin: float) -> pd.DataFrame:
    table = _models(sweep, test=test, margin_points=margin).assign(margin_points=margin)
    is_cell = ~table["notation"].isin(BASELINES)  # the family is the KD cells: no baseline is being tried
    for column in table.filter(regex=r"^(student|teacher)_p(?!_runs)(_|$)"):
        table[f"{column}_holm"] = holm(table[column].where(is_cell))
    non_inferior, inferior = table["teacher_p_non_inferior_holm"], table["teacher_p_inferior_holm"]
    verdict = pd.Series("open", index=table.index, dtype=object).mask(inferior < ALPHA, "inferior")
    verdict = verdict.mask(non_inferior < ALPHA, "non-inferior").where(non_inferior.notna(), None)
    return table.assign(teacher_verdict=verdict)


@each_variant
def _models(scores: Scores, *, test: str, margin_points: float) -> pd.DataFrame:
    why = scores.gaps([*BASELINES, *cell_notations(scores.notations)])
    complete = scores.complete(why)
    rows = [
        {"notation": notation, "gap": gap}
        | _compared(notation, scores=scores, complete=complete, test=test, margin_points=margin_points)
        | _trained(scores.runs[scores.runs["notation"] == notation], gap=gap)
        for notation, gap in why.items()
    ]
    published = pd.DataFrame.from_dict(PAPER, orient="index", columns=PAPER_COLUMNS)
    table = pd.DataFrame(rows).astype({"n_images": "Int64"}).join(published, on="notation")
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


def _compared(
    notation: str, *, scores: Scores, complete: pd.DataFrame, test: str, margin_points: float
) -> dict[str, object]:
    """Return the measured numbers of a row."""
    of = dict(iter(complete.groupby("notation")))
    none = complete.iloc[:0]
    ours, student = of.get(notation, none), of.get("Student", none)
    teacher = of.get("Teacher", none) if notation == "Student" else scores.of_teachers(ours)  # none for a Teacher
    pairs = pair(ours=ours, baseline=teacher)
    to_teacher = compare(pairs, test=test) | non_inferiority(pairs, margin_points=margin_points)
    to_student = compare(pair(ours=ours, baseline=none if notation == "Student" else student), test=test)
    del to_student["n_images"], to_teacher["n_images"]
    dice = 100 * ours.groupby(["split", "image"])["dice"].mean()  # of the seeds: not more images than there are
    return {
        "mean_dice_percent": dice.mean(),
        "std_dice_percent": dice.std(ddof=1),
        **{f"{SPLIT_MEAN}{split}": mean for split, mean in dice.groupby("split").mean().items()},
        **{f"student_{name}": value for name, value in to_student.items()},
        **{f"teacher_{name}": value for name, value in to_teacher.items()},
        "n_images": ours["image"].nunique() or pd.NA,
    }


# ---- the best cell -------------------------------------------------------------------------------------------------


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of distilled Students without a gap, the highest validation Dice first, ties by name.

    Those without validation Dice, in stores before results version 1, are left out: the test images are not for
    choosing.
    """
    cells = table[(table["gap"] == "") & ~table["notation"].isin(BASELINES)].dropna(subset=VALIDATION)
    return cells.sort_values([VALIDATION, "notation"], ascending=[False, True])


def best_variant(sweep: Sweep, table: pd.DataFrame) -> tuple[Sweep, pd.DataFrame]:
    """Return the part of a sweep and its Table 4 whose cell has the best validation Dice; all if it varies none."""
    if "settings" not in table:
        return sweep, table
    cells = table[~table["notation"].isin(BASELINES)].sort_values(VALIDATION, ascending=False)
    label = [*cells["settings"], *table["settings"]][0]
    return variants(sweep)[label], table[table["settings"] == label].drop(columns="settings")


# ---- sentences -----------------------------------------------------------------------------------------------------


def lead(sweep: Sweep, table: pd.DataFrame) -> list[str]:
    """Return the answer in sentences: the best cell by validation, its differences, how many cells differ."""
    lines = [notes.QUICK] if "quick" in distinct_values(sweep.runs, "profile") else []
    for _, row in ranked(table).head(1).iterrows():
        setting = f" with {row['settings']}" if "settings" in table else ""
        score = f"test DSC {with_std(row['mean_dice_percent'], row['std_dice_percent'])} %"
        lines.append(f"{row['notation']}{setting} has the highest validation Dice: {score}.")
        lines += filter(None, [_against_student(row), _against_teacher(row)])
    tested = table[~table["notation"].isin(BASELINES)].dropna(subset="student_p_holm")
    if len(tested):
        shown = tested.loc[tested["student_p_holm"] < ALPHA, "student_difference_points"]
        counts = f"{(shown > 0).sum()} score higher than Student and {(shown < 0).sum()} lower"
        lines.append(f"Of {len(tested)} cells, {counts} (p < 0.05 after Holm).")
    return lines


def _against_student(row: pd.Series) -> str:
    if pd.isna(row["student_difference_points"]):
        return ""
    difference = with_interval(*(row[f"student_{name}_points"] for name in ("difference", "low", "high")))
    methods = row["student_p_methods_holm"]
    others = "" if pd.isna(methods) else f"; for newly trained networks {after_holm(methods)}"
    return f"It differs from Student by {difference} points, {after_holm(row['student_p_holm'])}{others}."


def _against_teacher(row: pd.Series) -> str:
    verdict, margin = row["teacher_verdict"], f"{row['margin_points']:g}"
    if verdict is None:
        return ""
    ends = {
        "non-inferior": f"non-inferior within {margin} points",
        "inferior": f"worse by more than {margin} points",
        "open": f"whether it is worse by more than {margin} points is open",
    }
    return f"It differs from its Teacher by {points(row['teacher_difference_points'])} points: {ends[verdict]}."


def footnotes(sweep: Sweep, table: pd.DataFrame, *, test: str) -> list[str]:
    """Return the notes on comparisons, training, and the command for a missing Student baseline."""
    margin, ratios = table["margin_points"].iloc[0], table[GRADIENT_RATIO].dropna()
    chosen = "" if margin == margin_of(sweep) else ", chosen for this table and not by the sweep's stats.margin_points"
    families = "over the KD cells, against Student and, apart from that, against Teacher"
    lines = [
        *notes.differences(table, test=test, prefix="student_", families=families),
        "Teacher: the one that the cell learnt from; for Student the row Teacher.",
        f"Non-inferior: at most {margin:g} points worse than its Teacher{chosen}; one-sided t-test at 5 % for these "
        "networks, after Holm over the KD cells; inferior: worse by more than that, tested alike; open: neither. "
        "Lower bound: of the one-sided 95 % interval of the difference, percentage points.",
    ]
    if len(ratios):
        lines.append(
            "KD to supervised gradient: ratio of the norms at the Student's encoder, weights included, of the first "
            "batch of each epoch that measures it, geometric mean up to the best epoch; "
            f"{ratios.min():.2g} to {ratios.max():.2g} here. Cells of unlike strength compare path and strength at "
            "once; kd.weight=matched begins all at the ratio kd.ratio."
        )
    lines += _cut_off(sweep.runs)
    if sweep.runs["split"].nunique() == 1:
        lines.append("One split: how much the scores spread between splits is unknown.")
    student = table.loc[table["notation"] == "Student", "gap"]
    if student.empty or (student != "").any():
        is_requested = "Student" in set(sweep.runs["notation"])
        remedy = "the command of the sweep resumes it" if is_requested else f"run it with `{student_command(sweep)}`"
        lines.append(f"No p against Student before its baseline is finished: {remedy}.")
    return lines


def _cut_off(runs: pd.DataFrame) -> list[str]:
    """Return a sentence on how many runs used all their epochs; none if early stopping ended them all."""
    if "epochs" not in runs:
        return []
    ended = runs[(runs["status"] == "FINISHED") & runs["params"].map(bool)].drop_duplicates("fingerprint")
    most = ended["params"].map(lambda params: float(params.get("train.epochs", NAN)))
    count = int((ended["epochs"] >= most).sum())
    which = f"{count} of {len(ended)} runs were ended by train.epochs, not by early stopping"
    return [f"{which}: they might have got better."] if count else []


def student_command(sweep: Sweep) -> str:
    """Return the command that runs the Student baseline on every split and seed of this sweep."""
    typed = sweep.commands[-1] if sweep.commands else "python -m kdsweep -m"
    words = [word for word in shlex.split(typed) if word.partition("=")[0] not in ("path", "sweep_name")]
    return shlex.join([*words, "path=none", f"sweep_name={sweep.name}"])
