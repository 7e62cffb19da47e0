"""Write a sweep as one self-contained HTML page: what was run, effects, tables, figures, every cell.

The page loads nothing from anywhere and names no folder of the computer it was made on: runs record none, and an error
that names one is left to the screen.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import jinja2
from markupsafe import Markup, escape
from tqdm import tqdm

from kdsweep.config.grid import variant_label
from kdsweep.core.errors import InputError, one_line
from kdsweep.core.files import write_text
from kdsweep.core.progress import duration
from kdsweep.results import formats
from kdsweep.results.figures import FIGURES, style
from kdsweep.results.figures import command as figures
from kdsweep.results.figures.command import Location
from kdsweep.results.formats import DASH
from kdsweep.results.mixing import distinct_values
from kdsweep.results.notes import QUICK
from kdsweep.results.paper import in_order
from kdsweep.results.stats import PLACE
from kdsweep.results.summary import STATUS, counts, listed, summarize
from kdsweep.results.table import Options
from kdsweep.results.tables import command as tables
from kdsweep.tracking import mirror, reader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kdsweep.tracking.reader import Sweep

LOCAL_UI = "http://127.0.0.1:5000"  # what `make ui` serves
MEASURED = ("table5", "capacity")  # tables
PHANTOMS = "kdsweep.data.Phantoms"


class Part(NamedTuple):
    """A table or a figure as the page shows it; if it could not be made, its gap says why.

    Attributes:
        name: of the table or figure.
        heading: above it.
        body: HTML.
        notes: below a table.
        lead: sentences on what the numbers of a table support.
        gap: why it is not there, or not all of it.
    """

    name: str
    heading: str
    body: Markup = Markup()
    notes: tuple[str, ...] = ()
    lead: tuple[str, ...] = ()
    gap: str = ""


# ---- privacy -------------------------------------------------------------------------------------------------------


def shown_error(text: str) -> str:
    """Return an error as the page shows it: one with a path may name a person, so the screen alone shows it."""
    return "its error names files; status and the command of this page show it" if {"/", "\\"} & set(text) else text


def is_synthetic(sweep: Sweep) -> bool:
    """Return whether all images of a sweep are phantoms, which no person can be recognized by."""
    sources = {params.get("data.source._target_") for params in sweep.runs["params"] if params}
    return sources == {PHANTOMS} and distinct_values(sweep.runs, "data") == ["phantom"]


def ui_address(typed: str | None, *, uri: str | None) -> str:
    """Return the address of MLflow's pages, without a user's name and password.

    Raises:
        InputError: it is not an http address.
    """
    if typed and not re.match(r"https?://[^/\s]", typed):
        raise InputError(f"--ui {typed}: must be an address such as {LOCAL_UI}")
    address = typed or (uri if uri and uri.startswith(("http://", "https://")) else LOCAL_UI)
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl().rstrip("/")


# ---- tables and figures --------------------------------------------------------------------------------------------


def make_table(which: str, sweep: Sweep, *, options: Options) -> Part:
    """Make one of TABLES; sentences on what the data support lead, the notes are below."""
    heading = tables.module_of(which).HEADING
    try:
        table = tables.make(which, sweep, options)
    except (InputError, OSError) as error:
        return Part(which, heading, gap=one_line(error).rstrip("."))
    # The banner of the page says it already.
    notes, lead = (tuple(line for line in lines if line != QUICK) for lines in (table.notes, table.lead))
    return Part(which, heading, Markup(table.html()), notes, lead)


def make_figures(which: str, sweep: Sweep, *, location: Location) -> Part:
    """Draw one of FIGURES, a picture for each of the sweep's settings: photographs as PNG, the others as SVG."""
    heading = FIGURES[which][0].upper() + FIGURES[which][1:]
    body, gap = Markup(), ""
    try:
        for name, figure in figures.draw(which, sweep, location=location):
            alt = f"{heading}. Sweep {sweep.name}{name.removeprefix(which).replace('-', ', ', 1)}"
            body += Markup('<figure><img src="{}" alt="{}"></figure>\n').format(_data_uri(which, figure), alt)
    except (InputError, OSError) as error:
        gap = one_line(error).rstrip(".")
    return Part(which, heading, body, gap=gap)


def _data_uri(which: str, figure: Figure) -> str:
    suffix, kind = ("png", "png") if which == "figure2" else ("svg", "svg+xml")
    return f"data:image/{kind};base64,{base64.b64encode(style.render(figure, suffix)).decode()}"


# ---- every cell ----------------------------------------------------------------------------------------------------


def cell_rows(sweep: Sweep, *, ui: str) -> list[dict[str, Any]]:
    """Return a row per requested run and per Teacher, in the order of Table 4."""
    measures = [name for name in ("dice", "hd95_px", "nsd") if name in sweep.scores]
    scored = sweep.scores.groupby("fingerprint")[measures].mean()
    order = {name: number for number, name in enumerate(in_order(set(sweep.runs["notation"])))}
    rows: list[dict[str, Any]] = []
    for run in sweep.runs.to_dict("records"):
        score = scored.loc[run["fingerprint"]] if run["fingerprint"] in scored.index else {}
        address = f"{ui}/#/experiments/{sweep.experiment_id}/runs/{run['run_id']}?{mirror.UI_TRAINING}"
        seconds = (run["ended_ms"] - run["started_ms"]) / 1000 if run["ended_ms"] else None
        rows.append(
            {
                **{key: run[key] for key in ("notation", *PLACE)},
                "settings": variant_label(run["variant"]) or DASH,
                "status": STATUS.get(run["status"], "not run"),
                "dice": formats.number(100 * score.get("dice", float("nan"))),
                "hd95": formats.number(score.get("hd95_px", float("nan"))),
                "nsd": formats.number(100 * score.get("nsd", float("nan"))),
                "strength": formats.number(run["kd_gradient_ratio"], ".3g"),
                "epochs": formats.number(run.get("epochs", float("nan")), ".0f"),
                "seconds": seconds,
                "time": DASH if seconds is None else duration(seconds),
                "link": address if run["run_id"] else "",
                "error": shown_error(run["tags"].get(mirror.ERROR, "")),
            }
        )
    return sorted(rows, key=lambda row: (order[row["notation"]], row["settings"], row["split"], row["seed"]))


# ---- the page ------------------------------------------------------------------------------------------------------


def banners(sweep: Sweep) -> list[str]:
    """Return the warnings that a reader must see before any number."""
    done = counts(sweep.runs[sweep.runs["role"] != "teacher"])
    missing = f"Not all is there: {done}. What needs a missing cell is a gap, never a mean over fewer runs."
    return [
        *([QUICK] if "quick" in distinct_values(sweep.runs, "profile") else []),
        *([missing] if (sweep.runs["status"] != "FINISHED").any() else []),
    ]


def commands(sweep: Sweep, *, location: Location, test: str, switches: str) -> list[str]:
    """Return the commands that make tables, figures and this page; STORE and URI are for names of this computer."""
    where = f" --sweep {shlex.quote(sweep.name)}"
    where += "" if location.store == Path("multirun") else " --store STORE"
    where += " --tracking-uri URI" if location.uri else ""
    tested = "" if test == "ttest" else f" --test {test}"
    return [
        *(
            f"python -m kdsweep tables {which}{where}{tested}"
            for which in tables.applicable(sweep, store=location.store)
        ),
        f"python -m kdsweep figures all{where}",
        f"python -m kdsweep report{where}{tested}{switches}",
    ]


def make_parts(
    sweep: Sweep, *, location: Location, test: str, with_images: bool, with_costs: bool
) -> tuple[dict[str, Part], dict[str, Part]]:
    """Make the tables and figures of the page, by name."""
    left_out = () if with_costs else MEASURED
    names = [which for which in tables.applicable(sweep, store=location.store) if which not in left_out]
    drawn = [which for which in FIGURES if which != "figure2" or with_images or is_synthetic(sweep)]
    needed = {"tuning": "tuned", "capacity": "capacity"}  # the table of what a figure shows
    drawn = [which for which in drawn if needed.get(which, "table3") in names]
    options = Options(location.store, test, location.uri)
    made: dict[str, Part] = {}
    pictures: dict[str, Part] = {}
    with tqdm(total=len(names) + len(drawn), leave=False, disable=not sys.stderr.isatty()) as bar:
        for which in names:
            bar.set_description(which)
            if which == "table5":
                tqdm.write("measuring networks for Table 5", file=sys.stdout)
            made[which] = make_table(which, sweep, options=options)
            bar.update()
        for which in drawn:
            bar.set_description(which)
            pictures[which] = make_figures(which, sweep, location=location)
            bar.update()
    return made, pictures


def collect(
    sweep: Sweep, *, location: Location, ui: str, test: str, with_images: bool, with_costs: bool
) -> dict[str, Any]:
    """Collect all that the page shows, by the names in its template."""
    made, pictures = make_parts(sweep, location=location, test=test, with_images=with_images, with_costs=with_costs)
    rows = cell_rows(sweep, ui=ui)
    switches = " --with-images" * with_images + " --no-costs" * (not with_costs)
    return {
        "sweep": sweep.name,
        "data": listed(distinct_values(sweep.runs, "data")),
        "banners": banners(sweep),
        "facts": summarize(sweep),
        "tables": made,
        "figures": pictures,
        "cells": rows,
        "has_settings": any(row["settings"] != DASH for row in rows),
        "ui": ui,
        "typed": list(sweep.commands),
        "commands": commands(sweep, location=location, test=test, switches=switches),
    }


def page(content: dict[str, Any]) -> str:
    """Render the HTML of what ``collect`` returns; every value is escaped, and only the page's script may run."""

    def code(text: str) -> Markup:
        """Escape text in which backquotes enclose code, as in notes."""
        parts = [escape(part) for part in text.split("`")]
        if len(parts) % 2 == 0:
            return escape(text)
        return Markup("").join(Markup("<code>{}</code>").format(p) if n % 2 else p for n, p in enumerate(parts))

    folder = resources.files("kdsweep.results")
    source, script = ((folder / name).read_text(encoding="utf-8") for name in ("report.html.j2", "report.js"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"code": code, "shown_error": shown_error}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(source).render(content, script=Markup(script), script_digest=digest)


def failures(content: dict[str, Any]) -> list[str]:
    """Return a line for each part of the page that could not be made, with the reason."""
    parts = [(kind, part) for kind in ("tables", "figures") for part in content[kind].values() if part.gap]
    return [f"{kind}: {part.name} is not in the report: {part.gap}" for kind, part in parts]


def make(
    *,
    location: Location,
    out: Path | None = None,
    ui: str | None = None,
    test: str = "ttest",
    with_images: bool = False,
    with_costs: bool = True,
) -> None:
    """Write the page of a sweep, log it, and print where it is; a part that cannot be made is reported and left out.

    Raises:
        InputError: there is no such sweep, or the file cannot be written.
    """
    ui = ui_address(ui, uri=location.uri)
    sweep = reader.read_sweep(store=location.store, uri=location.uri, name=location.sweep)
    file = out or location.store / "reports" / f"{figures.slug(sweep.name)}.html"
    if file.is_dir():
        raise InputError(f"--out {file}: is a folder; give a file such as {file / 'report.html'}")
    content = collect(sweep, location=location, ui=ui, test=test, with_images=with_images, with_costs=with_costs)
    html = page(content)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, html)
    except OSError as error:
        raise InputError(f"--out {file}: cannot write there ({error.strerror})") from error
    for line in failures(content):
        sys.stderr.write(f"kdsweep: {line}\n")
    logged = reader.attach(sweep, [file], folder="report", store=location.store, uri=location.uri)
    sys.stdout.write(f"wrote {file} ({len(html.encode()) / 1e6:.1f} MB); {logged}\n")
