"""Make the paper's tables and those of effects, from what MLflow holds: frames of numbers first, then text.

Usage: `python -m kdsweep tables TABLE [--store DIR] [--sweep NAME] [--out DIR]`, TABLE one of TABLES.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from kdsweep.config.grid import is_under
from kdsweep.core.errors import InputError, command
from kdsweep.core.files import write_text
from kdsweep.core.options import add_published, add_seeds, add_sweep
from kdsweep.results import comparisons, dsc, effects, external, footnotes, strata, tuned
from kdsweep.results.formats import DASH
from kdsweep.results.frame import known_values, of_seeds
from kdsweep.results.paper import CELLS
from kdsweep.results.stats import TESTS

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
NEED_STORE = ("table5", "tuned")  # files of weights, or Optuna's studies


# ---- text ----------------------------------------------------------------------------------------------------------


def to_markdown(*, title: str, text: pd.DataFrame, notes: list[str]) -> str:
    """Return a title line, the table and its footnotes."""
    body = text.to_markdown(index=False, disable_numparse=True)
    return "\n".join([title, "", body, "", *(f"- {note}" for note in notes), ""])


def to_latex(*, title: str, text: pd.DataFrame, notes: list[str]) -> str:
    """Return a table environment for a document with the booktabs package, its footnotes as lines below."""

    def tex(string: str) -> str:
        escaped = re.sub(r"([_%&#$])", r"\\\1", string)
        for sign, symbol in {"±": r"$\pm$", DASH: "--", "<": "$<$", "`": ""}.items():
            escaped = escaped.replace(sign, symbol)
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


def suited(sweep: Sweep, *, store: Path) -> list[str]:
    """Return those of TABLES that suit a sweep, such as seeds if it has several; store is the folder of the runs."""
    has = {
        "effects": dsc.cell_notations(sweep)[0] in CELLS,  # else methods alone were asked for, which have no factors
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
    table = dsc.table3(asked.sweep)
    notes = footnotes.of_scores(sweep=asked.sweep, table=table)
    return Made(HEADINGS[asked.which], table, dsc.format_table3(table), notes)


def _of_table4(asked: Asked) -> Made:
    table = dsc.table4(asked.sweep, test=asked.test, margin_points=asked.margin_points)
    notes = footnotes.of_scores(sweep=asked.sweep, table=table)
    notes += footnotes.of_table4(sweep=asked.sweep, table=table, test=asked.test)
    return Made(HEADINGS[asked.which], table.assign(test=asked.test), dsc.format_table4(table), notes)


def _of_table5(asked: Asked) -> Made:
    from kdsweep.results import costs  # loads torch: seconds that the other tables need not wait for

    sweep, scores = dsc.best_variant(asked.sweep, dsc.table4(asked.sweep))
    table = costs.table5(sweep, store=asked.store, scores=scores)
    notes = costs.notes(sweep=sweep, table=table, scores=scores)
    return Made(HEADINGS[asked.which], table, costs.format_table5(table), notes)


def _of_capacity(asked: Asked) -> Made:
    from kdsweep.results import capacity  # loads torch

    table = capacity.capacity(asked.sweep, scores=dsc.table4(asked.sweep, test=asked.test), store=asked.store)
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
        if out_dir == store / "tables":  # the table of a store that can only be read is shown all the same
            return f"{markdown}\nnot written to {out_dir} ({error.strerror}); --out names another folder\n"
        raise InputError(f"--out {out_dir}: cannot write there ({error.strerror})") from error
    return f"{markdown}\nwrote {out_dir / which}.md, .csv, .tex\n"


@command
def main(argv: list[str] | None = None) -> None:
    """Print and write one table."""
    parser = argparse.ArgumentParser(prog="python -m kdsweep tables", description="The paper's tables, from MLflow.")
    parser.add_argument("table", choices=TABLES)
    add_sweep(parser)
    add_published(parser)
    add_seeds(parser)
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
    sweep = of_seeds(sweep, options.seeds)
    common = {"sweep": sweep, "store": options.store, "out_dir": out_dir, "test": options.test}
    common["uri"] = options.tracking_uri
    if options.margin is not None and not 0 < options.margin < 100:
        raise InputError(f"--margin {options.margin:g}: must be a number of points above 0 and below 100")
    sys.stdout.write(make(which=options.table, margin_points=options.margin, **common))
