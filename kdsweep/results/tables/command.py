"""``python -m kdsweep tables TABLES``: print tables and write each as Markdown, CSV and LaTeX."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdsweep.core.errors import InputError
from kdsweep.core.files import write_text
from kdsweep.results.frame import of_seeds
from kdsweep.results.mixing import distinct_values
from kdsweep.results.table import Options, Table
from kdsweep.results.tables import TABLES

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

NEED_STORE = ("table5", "tuned")  # files of weights, or Optuna's studies


def module_of(name: str) -> Any:
    """Return the module of a table; it is imported here since some load torch, which takes seconds."""
    return import_module(f"kdsweep.results.tables.{name}")


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
    profile, data = ("".join(distinct_values(sweep.runs, key)) for key in ("profile", "data"))
    files = {
        "md": markdown,
        "csv": table.frame.assign(sweep=sweep.name, profile=profile, data=data).to_csv(index=False),
        "tex": table.latex(f"{table.heading.partition('. ')[2]} (sweep {sweep.name})"),
    }
    for suffix, content in files.items():
        write_text(out / f"{name}.{suffix}", content)
    return markdown


def show(
    names: Sequence[str],
    *,
    store: Path,
    uri: str | None = None,
    sweep: str | None = None,
    published: Sequence[Path] = (),
    seeds: Sequence[int] | None = None,
    out: Path | None = None,
    test: str = "ttest",
    margin: float | None = None,
    wide: bool = False,
) -> None:
    """Print and write tables, of a store or of published files: what fits a terminal, else Markdown."""
    if margin is not None and not 0 < margin < 100:
        raise InputError(f"--margin {margin:g}: must be a number of points above 0 and below 100")
    gc.freeze()
    gc.set_threshold(100_000)  # a large sweep is a million objects that stay: looking through them is half the time
    scored = of_seeds(_read(names, store=store, uri=uri, sweep=sweep, published=published), seeds)
    for name in names:
        table = make(name, scored, Options(store, test, uri, margin))
        title = f"{table.heading} (sweep {scored.name})"
        folder = out or store / "tables"
        try:
            write(table, name=name, sweep=scored, out=folder)
            written = f"wrote {folder / name}.md, .csv, .tex"
        except OSError as error:
            if folder != store / "tables":
                raise InputError(f"--out {out}: cannot write there ({error.strerror})") from error
            written = f"not written to {folder} ({error.strerror}); --out names another folder"
        if not sys.stdout.isatty():
            sys.stdout.write(f"{table.markdown(title)}\n{written}\n")
            continue
        more = "" if wide else "--wide shows all columns; "
        notes = f"{more}notes in {name}.md: {table.subjects()}"
        width = shutil.get_terminal_size().columns
        sys.stdout.write(table.screen(title, width=width, wide=wide, last=[notes, written]))


def _read(names: Sequence[str], *, store: Path, uri: str | None, sweep: str | None, published: Sequence[Path]) -> Sweep:
    if not published:
        from kdsweep.tracking.reader import read_sweep

        return read_sweep(store=store, uri=uri, name=sweep)
    for name in NEED_STORE:
        if name in names:
            raise InputError(f"--published: {name} needs the store; --store names it")
    from kdsweep.results.published import read

    return read(published)
