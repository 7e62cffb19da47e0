"""``python -m kdsweep tables TABLE``: print one table and write it as Markdown, CSV and LaTeX."""

from __future__ import annotations

import argparse
import gc
import pkgutil
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdsweep.core.errors import InputError, command
from kdsweep.core.files import write_text
from kdsweep.core.options import add_published, add_seeds, add_sweep
from kdsweep.results import tables
from kdsweep.results.frame import of_seeds
from kdsweep.results.mixing import known_values
from kdsweep.results.stats import TESTS
from kdsweep.results.table import Options, Table

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

TABLES = tuple(module.name for module in pkgutil.iter_modules(tables.__path__) if module.name != "command")
NEED_STORE = ("table5", "tuned")  # files of weights, or Optuna's studies


def module_of(name: str) -> Any:
    """Return the module of a table; it is imported here since some load torch, which takes seconds."""
    return import_module(f"{tables.__name__}.{name}")


def applicable(sweep: Sweep, *, store: Path) -> list[str]:
    """Return those of TABLES that apply to a sweep in a store, such as seeds if it has several."""
    modules = {name: module_of(name) for name in TABLES}
    return [name for name, each in modules.items() if not hasattr(each, "applies") or each.applies(sweep, store)]


def make(name: str, sweep: Sweep, options: Options) -> Table:
    """Make one of TABLES of a sweep.

    Raises:
        InputError: the table does not apply to the sweep, or the sweep mixes options that determine results.
    """
    table: Table = module_of(name).make(sweep, options)
    return table


def write(table: Table, *, name: str, sweep: Sweep, out: Path) -> str:
    """Write NAME.md, .csv and .tex into a folder; return the Markdown."""
    markdown = table.markdown(f"{table.heading} (sweep {sweep.name})")
    profile, data = ("".join(known_values(sweep.runs, key)) for key in ("profile", "data"))
    files = {
        "md": markdown,
        "csv": table.frame.assign(sweep=sweep.name, profile=profile, data=data).to_csv(index=False),
        "tex": table.latex(f"{table.heading.partition('. ')[2]} (sweep {sweep.name})"),
    }
    for suffix, content in files.items():
        write_text(out / f"{name}.{suffix}", content)
    return markdown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kdsweep tables", description="The paper's tables, from MLflow.")
    parser.add_argument("table", choices=TABLES)
    add_sweep(parser)
    add_published(parser)
    add_seeds(parser)
    parser.add_argument("--out", type=Path, help="folder for the files (STORE/tables)")
    tests = "test of table4, effects, settings, strata, tuned (ttest)"
    parser.add_argument("--test", choices=sorted(TESTS), default="ttest", help=tests)
    margin = "points of table4's non-inferiority (the sweep's stats.margin_points)"
    parser.add_argument("--margin", type=float, help=margin)
    parser.add_argument("--wide", action="store_true", help="show all columns on the screen too")
    return parser


def _sweep(options: argparse.Namespace) -> Sweep:
    if options.published:
        if options.table in NEED_STORE:
            raise InputError(f"--published: {options.table} needs the store; --store names it")
        from kdsweep.results import published  # loads mlflow: seconds that --help need not wait for

        sweep = published.read(options.published)
    else:
        from kdsweep.tracking.reader import read_sweep

        sweep = read_sweep(store=options.store, uri=options.tracking_uri, name=options.sweep)
    return of_seeds(sweep, options.seeds)


@command
def main(argv: list[str] | None = None) -> None:
    """Print and write one table: what fits the screen of a terminal, else Markdown."""
    options = _parser().parse_args(argv)
    if options.margin is not None and not 0 < options.margin < 100:
        raise InputError(f"--margin {options.margin:g}: must be a number of points above 0 and below 100")
    gc.freeze()
    gc.set_threshold(100_000)  # a large sweep is a million objects that stay: looking through them is half the time
    sweep = _sweep(options)
    choices = Options(options.store, options.test, options.tracking_uri, options.margin)
    table = make(options.table, sweep, choices)
    title = f"{table.heading} (sweep {sweep.name})"
    out = options.out or options.store / "tables"
    try:
        write(table, name=options.table, sweep=sweep, out=out)
        written = f"wrote {out / options.table}.md, .csv, .tex"
    except OSError as error:
        if options.out and options.out != options.store / "tables":
            raise InputError(f"--out {out}: cannot write there ({error.strerror})") from error
        written = f"not written to {out} ({error.strerror}); --out names another folder"
    if not sys.stdout.isatty():
        sys.stdout.write(f"{table.markdown(title)}\n{written}\n")
        return
    width = shutil.get_terminal_size().columns
    more = "" if options.wide else "--wide shows all columns; "
    notes = f"{more}notes in {options.table}.md: {table.subjects()}"
    sys.stdout.write(table.screen(title, width=width, wide=options.wide, last=[notes, written]))
