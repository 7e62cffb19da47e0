"""Write a sweep as one self-contained HTML page: what was run, effects, tables, figures, every cell.

Usage: ``python -m kdsweep report [--sweep NAME] [--out FILE] [--with-images] [--no-costs] [Hydra overrides]``.
The page loads nothing from anywhere and names no folder of the computer it was made on.
"""

from __future__ import annotations

import argparse
import base64
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import jinja2
from markupsafe import Markup, escape
from tqdm import tqdm

from kdsweep.config.grid import variant_label
from kdsweep.core.errors import InputError, command, one_line
from kdsweep.core.files import write_text
from kdsweep.core.progress import duration
from kdsweep.results import formats, tables
from kdsweep.results.figures import command as figures
from kdsweep.results.figures import style
from kdsweep.results.figures.command import FIGURES, Location
from kdsweep.results.formats import DASH
from kdsweep.results.frame import known_values
from kdsweep.results.paper import BASELINES, CELLS
from kdsweep.results.stats import PLACE, TESTS
from kdsweep.results.summary import STATUS, counts, listed, summarize
from kdsweep.tracking import mirror, reader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kdsweep.tracking.reader import Sweep

LOCAL_UI = "http://127.0.0.1:5000"  # what `make ui` serves
FOLDERS = ("store", "data.root", "data.source.root", "data.source.cache_dir")
PHANTOMS = "kdsweep.data.Phantoms"
ROW_NAMES = ("Model", "Notation", "Effect")  # columns that name their row
# A path from the root, the home folder or a drive, or the address of a file; not a part of an address or of a tag. It
# ends at the suffix of an image, whose name may be a patient's, else at the next space.
START = r"(?:\b(?:file|sqlite):/+|(?<![\w/:.<#&])(?:~?/|[A-Za-z]:\\))(?=[\w.])"
REST = r"(?:[^\n'\"<>:;]*?\.(?:png|jpe?g|bmp|tiff?|xlsx)\b|[^\s'\"<>,:;)]*)"
WEIGHTS = re.compile(r"[^\\/]+\.(?:pt|pth|ckpt|bin|safetensors|onnx)$")


class Table(NamedTuple):
    """A table as the page shows it; if it could not be made, it has no rows and its gap says why."""

    name: str
    heading: str
    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    row_name: int
    notes: list[str]
    lead: list[str]
    gap: str = ""


class Picture(NamedTuple):
    """A figure as the page shows it: inline SVG, or the source of an image."""

    name: str
    alt: str
    svg: Markup = Markup()
    source: Markup = Markup()


class Figures(NamedTuple):
    """One of FIGURES, a picture for each of the sweep's settings; its gap says why there are none, or not all."""

    name: str
    heading: str
    pictures: list[Picture]
    gap: str = ""


class Wanted(NamedTuple):
    """The user's choices for the page; ui is the address of MLflow's pages."""

    ui: str
    test: str = "ttest"
    with_images: bool = False
    with_costs: bool = True


# ---- privacy -------------------------------------------------------------------------------------------------------


def hider(sweep: Sweep, *, store: Path) -> Callable[[str], str]:
    """Return a function that removes this computer's folders from a text: they may hold a person's name."""
    found = {str(store.resolve()), str(Path.home()), str(Path.cwd())}
    values = {(key, text) for params in sweep.runs["params"] for key, text in params.items()}
    found |= {text for key, text in values if re.match(START, text) or (key in FOLDERS and "/" in text)}
    known = sorted((path for path in found if len(Path(path).parts) > 1), key=len, reverse=True)
    a_path = re.compile("|".join(f"{start}{REST}" for start in [*map(re.escape, known), START]))
    return lambda text: a_path.sub(lambda match: _stand_in(match[0]), text)


def _stand_in(path: str) -> str:
    """Replace a path. The name of a file of weights is kept, since it may tell two settings apart."""
    name = WEIGHTS.search(path)
    return f"[path]{name[0]}" if name else "[path]"


def is_synthetic(sweep: Sweep) -> bool:
    """Return whether the images of a sweep are phantoms, which show nobody."""
    sources = {params.get("data.source._target_") for params in sweep.runs["params"] if params}
    return sources == {PHANTOMS} and known_values(sweep.runs, "data") == ["phantom"]


def ui_address(given: str | None, *, uri: str | None) -> str:
    """Return the address of MLflow's pages, without a user's name and password.

    Raises:
        InputError: it is not an http address.
    """
    if given and not re.match(r"https?://[^/\s]", given):
        raise InputError(f"--ui {given}: must be an address such as {LOCAL_UI}")
    address = given or (uri if uri and uri.startswith(("http://", "https://")) else LOCAL_UI)
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl().rstrip("/")


# ---- tables and figures --------------------------------------------------------------------------------------------


def _gap(error: Exception) -> str:
    return one_line(error).rstrip(".")


def make_table(which: str, sweep: Sweep, *, store: Path, uri: str | None = None, test: str) -> Table:
    """Make one of tables.TABLES; sentences on what the data support lead, the other notes are below."""
    try:
        heading, table, text, notes = tables.made(which, sweep=sweep, store=store, uri=uri, test=test)
    except (InputError, OSError) as error:
        return Table(which, which.capitalize().replace("Table", "Table "), [], [], [], 0, [], [], _gap(error))
    lead = tables.sentences(which, table)
    columns = list(map(str, text))
    numeric = [all(re.match(rf"[-+<{DASH}\d]", value) for value in text[name]) for name in columns]
    row_name = next((place for place, name in enumerate(columns) if name in ROW_NAMES), 0)
    return Table(which, heading, columns, text.to_numpy().tolist(), numeric, row_name, notes[len(lead) :], lead)


def make_figures(which: str, sweep: Sweep, *, place: Location, hide: Callable[[str], str]) -> Figures:
    """Draw one of FIGURES: photographs as PNG, the others as SVG."""
    heading = FIGURES[which][0].upper() + FIGURES[which][1:]
    drawn = figures.draw(which, sweep, place=place)
    pictures: list[Picture] = []
    try:
        for name, figure in drawn:
            alt = f"{heading}. Sweep {sweep.name}{name.removeprefix(which).replace('-', ', ', 1)}"
            if which == "figure2":
                coded = base64.b64encode(style.render(figure, "png")).decode()
                pictures.append(Picture(name, alt, source=Markup(f"data:image/png;base64,{coded}")))
            else:
                pictures.append(Picture(name, alt, svg=inline_svg(figure, prefix=name, hide=hide)))
    except (InputError, OSError) as error:
        return Figures(which, heading, pictures, _gap(error))
    return Figures(which, heading, pictures)


def inline_svg(figure: Figure, *, prefix: str, hide: Callable[[str], str]) -> Markup:
    """Return a figure as an SVG element whose ids are unique on the page and whose text stays text."""
    svg = hide(style.render(figure, "svg").decode())
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    own = figures.slug(prefix).replace("=", "-")

    def in_tag(match: re.Match[str]) -> str:
        tag = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{own}-", match[0])
        return re.sub(r'\s(width|height)="[^"]*"', "", tag) if tag.startswith("<svg") else tag  # the page has its own

    return Markup(re.sub(r"<[^>]+>", in_tag, svg))  # within tags alone: the text may be anything


# ---- every cell ----------------------------------------------------------------------------------------------------


def cell_rows(sweep: Sweep, *, place: Location, ui: str) -> list[dict[str, Any]]:
    """Return a row per run that was asked for and per Teacher, in the order of Table 4."""
    measures = [name for name in ("dice", "hd95_px", "nsd") if name in sweep.scores]
    scored = sweep.scores.groupby("fingerprint")[measures].mean()
    names = [*BASELINES, *CELLS]
    order = {name: number for number, name in enumerate([*names, *sorted(set(sweep.runs["notation"]) - set(names))])}
    rows: list[dict[str, Any]] = []
    for index, run in zip(sweep.runs.index, sweep.runs.to_dict("records"), strict=True):
        score = scored.loc[run["fingerprint"]] if run["fingerprint"] in scored.index else {}
        page_ = f"{ui}/#/experiments/{sweep.experiment_id}/runs/{run['run_id']}?{mirror.UI_TRAINING}"
        rows.append(
            {
                **{key: run[key] for key in ("notation", *PLACE)},
                "settings": variant_label(run["variant"]) or DASH,
                "status": STATUS.get(run["status"], "not run"),
                "dice": formats.number(100 * score.get("dice", float("nan"))),
                "hd95": formats.number(score.get("hd95_px", float("nan"))),
                "nsd": formats.number(100 * score.get("nsd", float("nan"))),
                "strength": formats.number(run["kd_gradient_ratio"], ".3g"),
                "epochs": _epochs(replace(sweep, runs=sweep.runs.loc[[index]]), place=place),
                "time": duration((run["ended_ms"] - run["started_ms"]) / 1000) if run["ended_ms"] else DASH,
                "link": page_ if run["run_id"] else "",
                "error": run["tags"].get(mirror.ERROR, ""),
            }
        )
    return sorted(rows, key=lambda row: (order[row["notation"]], row["settings"], row["split"], row["seed"]))


def _epochs(run: Sweep, *, place: Location) -> str:
    """Return how many epochs a run was trained; ``run`` is a sweep of this run alone."""
    try:
        curves = reader.read_curves(run, store=place.store, uri=place.uri)
    except InputError:
        return DASH
    return DASH if curves.empty else str(int(curves["epoch"].max()) + 1)


# ---- the page ------------------------------------------------------------------------------------------------------


def banners(sweep: Sweep) -> list[str]:
    """Return the warnings that a reader must see before any number."""
    told_ = []
    if "quick" in known_values(sweep.runs, "profile"):
        told_.append("A check of the machinery, not a result.")
    cells = sweep.runs[sweep.runs["role"] != "teacher"]
    if (sweep.runs["status"] != "FINISHED").any():
        told_.append(
            f"Not all is there: {counts(cells)}. What needs a missing cell is a gap, never a mean over fewer runs."
        )
    return told_


def commands(sweep: Sweep, *, place: Location, wanted: Wanted) -> list[str]:
    """Return the commands that make tables, figures and this page; STORE and URI hide the names of this computer."""
    where = f" --sweep {shlex.quote(sweep.name)}"
    where += "" if place.store == Path("multirun") else " --store STORE"
    where += " --tracking-uri URI" if place.uri else ""
    test = "" if wanted.test == "ttest" else f" --test {wanted.test}"
    own = "".join(f" {option}" for option, on in _switches(wanted).items() if on)
    return [
        *(f"python -m kdsweep tables {which}{where}{test}" for which in tables.suited(sweep, store=place.store)),
        f"python -m kdsweep figures all{where}",
        f"python -m kdsweep report{where}{test}{own}",
    ]


def _switches(wanted: Wanted) -> dict[str, bool]:
    return {"--with-images": wanted.with_images, "--no-costs": not wanted.with_costs}


def collect(sweep: Sweep, *, place: Location, wanted: Wanted, hide: Callable[[str], str]) -> dict[str, Any]:
    """Collect all that the page shows, by the names in its template."""
    names = [which for which in tables.suited(sweep, store=place.store) if wanted.with_costs or which != "table5"]
    drawn = [which for which in FIGURES if which != "figure2" or wanted.with_images or is_synthetic(sweep)]
    needed = {"tuning": "tuned", "capacity": "capacity"}  # the table of what a figure shows
    drawn = [which for which in drawn if needed.get(which, "table3") in names]
    made: dict[str, Table] = {}
    pictures: dict[str, Figures] = {}
    with tqdm(total=len(names) + len(drawn) + 1, leave=False, disable=not sys.stderr.isatty()) as bar:
        for which in names:
            bar.set_description(which)
            if which == "table5":
                tqdm.write("measuring networks for Table 5", file=sys.stdout)
            made[which] = make_table(which, sweep, store=place.store, uri=place.uri, test=wanted.test)
            bar.update()
        for which in drawn:
            bar.set_description(which)
            pictures[which] = make_figures(which, sweep, place=place, hide=hide)
            bar.update()
        bar.set_description("cells")
        rows = cell_rows(sweep, place=place, ui=wanted.ui)
    return {
        "sweep": sweep.name,
        "data": listed(known_values(sweep.runs, "data")),
        "banners": banners(sweep),
        "facts": summarize(sweep, store=place.store, uri=place.uri),
        "tables": made,
        "figures": pictures,
        "cells": rows,
        "has_settings": any(row["settings"] != DASH for row in rows),
        "ui": wanted.ui,
        "asked_by": list(sweep.commands),
        "commands": commands(sweep, place=place, wanted=wanted),
    }


def page(content: dict[str, Any], *, hide: Callable[[str], str]) -> str:
    """Render the HTML of what ``collect`` gives; every value is escaped and without folders of this computer."""

    def code(text: str) -> Markup:
        """Escape text in which backquotes enclose code, as in notes."""
        parts = [escape(part) for part in hide(text).split("`")]
        if len(parts) % 2 == 0:
            return escape(hide(text))
        return Markup("").join(Markup("<code>{}</code>").format(p) if n % 2 else p for n, p in enumerate(parts))

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: hide(value) if type(value) is str else value,  # Markup is done already
    )
    environment.filters["code"] = code
    source = resources.files("kdsweep.results").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(content)


def failures(content: dict[str, Any]) -> list[str]:
    """Return a line for each part of the page that could not be made, with the reason."""
    parts = [(kind, part) for kind in ("tables", "figures") for part in content[kind].values() if part.gap]
    return [f"{kind}: {part.name} is not in the report: {part.gap}" for kind, part in parts]


def make(*, place: Location, out: Path | None, wanted: Wanted) -> None:
    """Write the page of a sweep, log it, and print where it is; a part that cannot be made is reported and left out.

    Raises:
        InputError: there is no such sweep, or the file cannot be written.
    """
    wanted = wanted._replace(ui=ui_address(wanted.ui, uri=place.uri))
    sweep = reader.read_sweep(store=place.store, uri=place.uri, name=place.sweep)
    file = out or place.store / "reports" / f"{figures.slug(sweep.name)}.html"
    if file.is_dir():
        raise InputError(f"--out {file}: is a folder; give a file such as {file / 'report.html'}")
    hide = hider(sweep, store=place.store)
    content = collect(sweep, place=place, wanted=wanted, hide=hide)
    html = page(content, hide=hide)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, html)
    except OSError as error:
        raise InputError(f"--out {file}: cannot write there ({error.strerror})") from error
    for line in failures(content):
        sys.stderr.write(f"kdsweep: {line}\n")
    logged = reader.attach(sweep, [file], folder="report", store=place.store, uri=place.uri)
    sys.stdout.write(f"wrote {file} ({len(html.encode()) / 1e6:.1f} MB); {logged}\n")


@command
def main(argv: list[str] | None = None) -> None:
    """Make the report."""
    parser = argparse.ArgumentParser(prog="python -m kdsweep report", description="A sweep as one HTML page.")
    figures.parse_place(parser)
    parser.add_argument("--out", type=Path, help="the file (STORE/reports/SWEEP.html); one that is there is replaced")
    parser.add_argument("--ui", default="", help=f"address of MLflow's pages (the tracking URI, or {LOCAL_UI})")
    parser.add_argument("--test", choices=sorted(TESTS), default="ttest", help="test of the tables (ttest)")
    parser.add_argument("--with-images", action="store_true", help="show Figure 2 of images that are no phantoms too")
    parser.add_argument("--no-costs", action="store_true", help="leave out Table 5, which is measured (half a minute)")
    options = parser.parse_intermixed_args(argv)
    wanted = Wanted(options.ui, options.test, options.with_images, not options.no_costs)
    make(place=figures.find_place(options), out=options.out, wanted=wanted)
