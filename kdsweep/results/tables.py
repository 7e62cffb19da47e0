"""Make the paper's tables and those of effects, from what MLflow holds: frames of numbers first, then text.

Usage: `python -m kdsweep tables TABLE [--store DIR] [--sweep NAME] [--out DIR]`, TABLE one of TABLES.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from kdsweep.config.grid import is_under
from kdsweep.core.errors import InputError, exit_code
from kdsweep.core.files import write_text
from kdsweep.core.options import add_published, add_sweep
from kdsweep.results import comparisons, effects, external, footnotes, formats, strata, tuned
from kdsweep.results.formats import DASH
from kdsweep.results.frame import (
    VALIDATION,
    each_variant,
    gaps,
    known_values,
    margin_of,
    placed_runs,
    scored_images,
    variants,
)
from kdsweep.results.paper import BASELINES, CELLS, LOSSES, PAPER, REPRESENTATIONS
from kdsweep.results.stats import ALPHA, NAN, TESTS, compare, holm, non_inferiority, own_teachers, pair

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

TABLES = ("table3", "table4", "table5", "effects", "settings", "seeds", "strata", "external", "tuned", "capacity")
HEADINGS = {
    "table3": "Table 3. The distillation experiments",
    "table4": "Table 4. Test DSC of Teacher, Student and distilled students",
    "table5": "Table 5. What the networks cost",
    "effects": "Factor effects. Which choice mattered",
    "settings": "Settings. What the varied keys change",
    "seeds": "Seeds. How much another training would change",
    "strata": "Strata. Test DSC by label and by size of the lesion",
    "external": "External. Test DSC on other data sets",
    "tuned": "Tuned. Each method as configured and as chosen, with equal budgets",
    "capacity": "Capacity. Test DSC of Students of several sizes, with and without distillation",
}
NEED_STORE = ("table5", "tuned")  # weights, networks or Optuna's studies
GRADIENT_RATIO = "kd_gradient_ratio"  # a column of Table 4: the geometric mean over its runs
SPLIT_MEAN = "mean_dice_percent_split"
UNCORRECTED = ("student_p_runs", "teacher_p_runs")
PAPER_COLUMNS = ["paper_mean_dice_percent", "paper_std_dice_percent", "paper_p_teacher", "paper_p_student"]


def cell_notations(sweep: Sweep) -> list[str]:
    """Return the paper's 12 in its order, unless others alone were asked for, then methods and a user's own cells."""
    cells = set(sweep.runs.loc[sweep.runs["role"] == "distilled", "notation"])
    others = sorted(cells.difference(CELLS))
    return others if others and cells.isdisjoint(CELLS) else [*CELLS, *others]


# ---- the tables ----------------------------------------------------------------------------------------------------


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
    is_cell = ~table["notation"].isin(
        BASELINES
    )  # the family is the KD cells: the baselines are not what is being tried
    for column in [
        str(name) for name in table if re.match("(student|teacher)_p(_|$)", str(name)) and name not in UNCORRECTED
    ]:
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


def to_markdown(*, title: str, text: pd.DataFrame, notes: list[str]) -> str:
    """Return a title line, the table and its footnotes."""
    body = text.to_markdown(index=False, disable_numparse=True)
    return "\n".join([title, "", body, "", *(f"- {note}" for note in notes), ""])


def to_latex(*, title: str, text: pd.DataFrame, notes: list[str]) -> str:
    """Return a table environment for a document with the booktabs package, its footnotes as lines below."""

    def tex(string: str) -> str:
        escaped = re.sub(r"([_%&#$])", r"\\\1", string)
        for sign, command in {"±": r"$\pm$", DASH: "--", "<": "$<$", "`": ""}.items():
            escaped = escaped.replace(sign, command)
        return escaped

    body = text.map(tex).rename(columns=tex).to_latex(index=False, escape=False).rstrip()
    lines = ["% needs \\usepackage{booktabs}", r"\begin{table}", rf"\caption{{{tex(title)}}}", body]
    return "\n".join([*lines, *(rf"\par\footnotesize {tex(note)}" for note in notes), r"\end{table}", ""])


# ---- the command ---------------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """A table ready to be written: its heading, the numbers, the strings, the footnotes."""

    heading: str
    table: pd.DataFrame
    text: pd.DataFrame
    notes: list[str]


def best_variant(sweep: Sweep, table: pd.DataFrame) -> tuple[Sweep, pd.DataFrame]:
    """Return the part of a sweep and its Table 4 whose cell has the best validation Dice; all if it varies none."""
    if "settings" not in table:
        return sweep, table
    cells = table[~table["notation"].isin(BASELINES)].sort_values(VALIDATION, ascending=False)
    label = [*cells["settings"], *table["settings"]][0]
    return variants(sweep)[label], table[table["settings"] == label].drop(columns="settings")


def suited(sweep: Sweep, *, store: Path) -> list[str]:
    """Return those of TABLES that suit a sweep, such as seeds if it has several; store is the folder of the runs."""
    has = {
        "effects": cell_notations(sweep)[0] in CELLS,  # else methods alone were asked for, which have no factors
        "settings": comparisons.has_settings(sweep),
        "seeds": comparisons.has_seeds(sweep),
        "strata": "lesion_px" in sweep.scores,
        "external": not sweep.external.empty,
        "tuned": tuned.is_tuned(sweep, store=store),
        "capacity": has_students(sweep),
    }
    return [which for which in TABLES if has.get(which, True)]


def has_students(sweep: Sweep) -> bool:
    """Return whether a sweep compares several Students."""
    return any(is_under(key, ("student",)) and not key.endswith(".weights") for key in sweep.varied)


def sentences(which: str, table: pd.DataFrame) -> list[str]:
    """Return sentences on what the numbers of a table support; none for tables that only show numbers."""
    told = {"effects": effects.sentences, "settings": comparisons.told_settings, "seeds": comparisons.told_seeds}
    told |= {"tuned": tuned.sentences}
    return told[which](table) if which in told else []


class Asked(NamedTuple):
    """A table that was asked for, with what it is made of; see ``make``."""

    which: str
    sweep: Sweep
    store: Path
    test: str
    uri: str | None
    margin_points: float | None


def made(
    which: str, *, sweep: Sweep, store: Path, test: str, uri: str | None = None, margin_points: float | None = None
) -> Made:
    """Make one of TABLES of a sweep whose cells' folders are in a store."""
    return MAKERS[which](Asked(which, sweep, store, test, uri, margin_points))


def _of_table3(asked: Asked) -> Made:
    table = table3(asked.sweep)
    notes = footnotes.of_scores(sweep=asked.sweep, table=table)
    return Made(HEADINGS[asked.which], table, format_table3(table), notes)


def _of_table4(asked: Asked) -> Made:
    table = table4(asked.sweep, test=asked.test, margin_points=asked.margin_points)
    notes = footnotes.of_scores(sweep=asked.sweep, table=table)
    notes += footnotes.of_table4(sweep=asked.sweep, table=table, test=asked.test)
    return Made(HEADINGS[asked.which], table.assign(test=asked.test), format_table4(table), notes)


def _of_table5(asked: Asked) -> Made:
    from kdsweep.results import costs  # loads torch: seconds that the other tables need not wait for

    sweep, scores = best_variant(asked.sweep, table4(asked.sweep))
    table = costs.table5(sweep, store=asked.store, scores=scores)
    notes = costs.notes(sweep=sweep, table=table, scores=scores)
    return Made(HEADINGS[asked.which], table, costs.format_table5(table), notes)


def _of_capacity(asked: Asked) -> Made:
    from kdsweep.results import capacity  # loads torch

    table = capacity.capacity(asked.sweep, scores=table4(asked.sweep, test=asked.test))
    notes = [*footnotes.provenance(asked.sweep), *capacity.notes(table)]
    return Made(HEADINGS[asked.which], table.assign(test=asked.test), capacity.format_capacity(table), notes)


def _of_external(asked: Asked) -> Made:
    table = external.external(asked.sweep)
    notes = [*footnotes.provenance(asked.sweep), *external.NOTES]
    return Made(HEADINGS[asked.which], table, external.format_external(table), notes)


def _of_effects(asked: Asked) -> Made:
    table = effects.effects(asked.sweep, test=asked.test)
    notes = effects.notes(sweep=asked.sweep, table=table, test=asked.test)
    return _led(asked, table.assign(test=asked.test), effects.format_effects(table), notes)


def _of_settings(asked: Asked) -> Made:
    table = comparisons.settings(asked.sweep, test=asked.test)
    notes = comparisons.notes_settings(table, test=asked.test)
    return _led(asked, table.assign(test=asked.test), comparisons.format_settings(table), notes)


def _of_seeds(asked: Asked) -> Made:
    table = comparisons.seeds(asked.sweep)
    return _led(asked, table, comparisons.format_seeds(table), comparisons.notes_seeds(table=table))


def _of_strata(asked: Asked) -> Made:
    table = strata.strata(asked.sweep, test=asked.test)
    return _led(
        asked, table.assign(test=asked.test), strata.format_strata(table), strata.notes(table=table, test=asked.test)
    )


def _of_tuned(asked: Asked) -> Made:
    tuning = tuned.read(asked.sweep, store=asked.store, uri=asked.uri)
    table = tuned.tuned(tuning, test=asked.test)
    notes = tuned.notes(tuning=tuning, table=table, test=asked.test)
    return _led(asked._replace(sweep=tuning.chosen), table.assign(test=asked.test), tuned.format_tuned(table), notes)


MAKERS: dict[str, Callable[[Asked], Made]] = {
    "table3": _of_table3,
    "table4": _of_table4,
    "table5": _of_table5,
    "effects": _of_effects,
    "settings": _of_settings,
    "seeds": _of_seeds,
    "strata": _of_strata,
    "external": _of_external,
    "tuned": _of_tuned,
    "capacity": _of_capacity,
}


def _led(asked: Asked, table: pd.DataFrame, text: pd.DataFrame, notes: list[str]) -> Made:
    """Return a table whose notes begin with what its numbers support."""
    told = [*sentences(asked.which, table), *footnotes.provenance(asked.sweep), *notes]
    return Made(HEADINGS[asked.which], table, text, told)


def make(
    *,
    which: str,
    sweep: Sweep,
    store: Path,
    out_dir: Path,
    test: str,
    uri: str | None = None,
    margin_points: float | None = None,
) -> str:
    """Write WHICH.md, .csv and .tex into out_dir; return the Markdown and a last line that names the files."""
    heading, table, text, notes = made(which, sweep=sweep, store=store, test=test, uri=uri, margin_points=margin_points)
    title = f"{heading} (sweep {sweep.name})"
    profile, data = ("".join(known_values(sweep.runs, key)) for key in ("profile", "data"))
    markdown = to_markdown(title=title, text=text, notes=notes)
    files = {
        "md": markdown,
        "csv": table.assign(sweep=sweep.name, profile=profile, data=data).to_csv(index=False),
        "tex": to_latex(title=title.partition(". ")[2], text=text, notes=notes),
    }
    try:
        for suffix, content in files.items():
            write_text(out_dir / f"{which}.{suffix}", content)
    except OSError as error:
        raise InputError(f"--out {out_dir}: cannot write there ({error.strerror})") from error
    return f"{markdown}\nwrote {out_dir / which}.md, .csv, .tex\n"


def main(argv: list[str] | None = None) -> int:
    """Print and write one table; return 0, or 1 after one line on stderr that says what to mend."""
    parser = argparse.ArgumentParser(prog="python -m kdsweep tables", description="The paper's tables, from MLflow.")
    parser.add_argument("table", choices=TABLES)
    add_sweep(parser)
    add_published(parser)
    parser.add_argument("--out", type=Path, help="folder for the files (STORE/tables)")
    parser.add_argument(
        "--test",
        choices=sorted(TESTS),
        default="ttest",
        help="test of table4, effects, settings, strata, tuned (ttest)",
    )
    parser.add_argument(
        "--margin", type=float, help="points of table4's non-inferiority (the sweep's stats.margin_points)"
    )
    options = parser.parse_args(argv)

    def work() -> None:
        gc.freeze()
        gc.set_threshold(100_000)  # a large sweep is a million objects that stay: looking through them is half the time
        if options.published:
            if options.table in NEED_STORE:
                raise InputError(f"--published: {options.table} needs the store; --store names it")
            from kdsweep.results import published  # loads mlflow: seconds that --help need not wait for

            sweep = published.read(options.published)
        else:
            from kdsweep.tracking.reader import read_sweep

            sweep = read_sweep(store=options.store, uri=options.tracking_uri, name=options.sweep)
        out_dir = options.out or options.store / "tables"
        common = {"sweep": sweep, "store": options.store, "out_dir": out_dir, "test": options.test}
        common["uri"] = options.tracking_uri
        if options.margin is not None and not 0 < options.margin < 100:
            raise InputError(f"--margin {options.margin:g}: must be a number of points above 0 and below 100")
        sys.stdout.write(make(which=options.table, margin_points=options.margin, **common))

    return exit_code(work)
