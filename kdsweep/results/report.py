"""Write a sweep as one self-contained HTML page: what was run, effects, tables, figures, every cell.

The page loads nothing from anywhere and names no folder of the computer it was made on.
"""

from __future__ import annotations

import base64
import re
import shlex
import sys
from collections.abc import Callable
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
from kdsweep.results.mixing import known_values
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
FOLDERS = ("store", "data.root", "data.source.root", "data.source.cache_dir")
MEASURED = ("table5", "capacity")  # tables
PHANTOMS = "kdsweep.data.Phantoms"
# A path from the root, the home folder or a drive, or the address of a file; not a part of an address or of a tag. It
# ends at the suffix of an image, whose name may be a patient's, else at the next space.
START = r"(?:\b(?:file|sqlite):/+|(?<![\w/:.<#&])(?:~?/|[A-Za-z]:\\))(?=[\w.])"
REST = r"(?:[^\n'\"<>:;]*?\.(?:png|jpe?g|bmp|tiff?|xlsx)\b|[^\s'\"<>,:;)]*)"
WEIGHTS = re.compile(r"[^\\/]+\.(?:pt|pth|ckpt|bin|safetensors|onnx)$")


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


def make_table(which: str, sweep: Sweep, *, options: Options, hide: Callable[[str], str]) -> Part:
    """Make one of TABLES; sentences on what the data support lead, the notes are below."""
    heading = tables.module_of(which).HEADING
    try:
        table = tables.make(which, sweep, options)
    except (InputError, OSError) as error:
        return Part(which, heading, gap=_gap(error))
    return Part(which, heading, Markup(hide(table.html())), tuple(table.notes), tuple(table.lead))


def make_figures(which: str, sweep: Sweep, *, location: Location, hide: Callable[[str], str]) -> Part:
    """Draw one of FIGURES, a picture for each of the sweep's settings: photographs as PNG, the others as SVG."""
    heading = FIGURES[which][0].upper() + FIGURES[which][1:]
    body, gap = Markup(), ""
    try:
        for name, figure in figures.draw(which, sweep, location=location):
            alt = hide(f"{heading}. Sweep {sweep.name}{name.removeprefix(which).replace('-', ', ', 1)}")
            body += Markup('<figure><img src="{}" alt="{}"></figure>\n').format(
                _data_uri(which, figure, hide=hide), alt
            )
    except (InputError, OSError) as error:
        gap = _gap(error)
    return Part(which, heading, body, gap=gap)


def _data_uri(which: str, figure: Figure, *, hide: Callable[[str], str]) -> str:
    if which == "figure2":
        return f"data:image/png;base64,{base64.b64encode(style.render(figure, 'png')).decode()}"
    svg = hide(style.render(figure, "svg").decode())
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


# ---- every cell ----------------------------------------------------------------------------------------------------


def cell_rows(sweep: Sweep, *, ui: str) -> list[dict[str, Any]]:
    """Return a row per run that was asked for and per Teacher, in the order of Table 4."""
    measures = [name for name in ("dice", "hd95_px", "nsd") if name in sweep.scores]
    scored = sweep.scores.groupby("fingerprint")[measures].mean()
    order = {name: number for number, name in enumerate(in_order(set(sweep.runs["notation"])))}
    rows: list[dict[str, Any]] = []
    for run in sweep.runs.to_dict("records"):
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
                "epochs": formats.number(run.get("epochs", float("nan")), ".0f"),
                "time": duration((run["ended_ms"] - run["started_ms"]) / 1000) if run["ended_ms"] else DASH,
                "link": page_ if run["run_id"] else "",
                "error": run["tags"].get(mirror.ERROR, ""),
            }
        )
    return sorted(rows, key=lambda row: (order[row["notation"]], row["settings"], row["split"], row["seed"]))


# ---- the page ------------------------------------------------------------------------------------------------------


def banners(sweep: Sweep) -> list[str]:
    """Return the warnings that a reader must see before any number."""
    done = counts(sweep.runs[sweep.runs["role"] != "teacher"])
    missing = f"Not all is there: {done}. What needs a missing cell is a gap, never a mean over fewer runs."
    return [
        *([QUICK] if "quick" in known_values(sweep.runs, "profile") else []),
        *([missing] if (sweep.runs["status"] != "FINISHED").any() else []),
    ]


def commands(sweep: Sweep, *, location: Location, wanted: Wanted) -> list[str]:
    """Return the commands that make tables, figures and this page; STORE and URI hide the names of this computer."""
    where = f" --sweep {shlex.quote(sweep.name)}"
    where += "" if location.store == Path("multirun") else " --store STORE"
    where += " --tracking-uri URI" if location.uri else ""
    test = "" if wanted.test == "ttest" else f" --test {wanted.test}"
    switches = " --with-images" * wanted.with_images + " --no-costs" * (not wanted.with_costs)
    return [
        *(f"python -m kdsweep tables {which}{where}{test}" for which in tables.applicable(sweep, store=location.store)),
        f"python -m kdsweep figures all{where}",
        f"python -m kdsweep report{where}{test}{switches}",
    ]


def collect(sweep: Sweep, *, location: Location, wanted: Wanted, hide: Callable[[str], str]) -> dict[str, Any]:
    """Collect all that the page shows, by the names in its template."""
    left_out = () if wanted.with_costs else MEASURED
    names = [which for which in tables.applicable(sweep, store=location.store) if which not in left_out]
    drawn = [which for which in FIGURES if which != "figure2" or wanted.with_images or is_synthetic(sweep)]
    needed = {"tuning": "tuned", "capacity": "capacity"}  # the table of what a figure shows
    drawn = [which for which in drawn if needed.get(which, "table3") in names]
    made: dict[str, Part] = {}
    options = Options(location.store, wanted.test, location.uri)
    pictures: dict[str, Part] = {}
    with tqdm(total=len(names) + len(drawn) + 1, leave=False, disable=not sys.stderr.isatty()) as bar:
        for which in names:
            bar.set_description(which)
            if which == "table5":
                tqdm.write("measuring networks for Table 5", file=sys.stdout)
            made[which] = make_table(which, sweep, options=options, hide=hide)
            bar.update()
        for which in drawn:
            bar.set_description(which)
            pictures[which] = make_figures(which, sweep, location=location, hide=hide)
            bar.update()
        bar.set_description("cells")
        rows = cell_rows(sweep, ui=wanted.ui)
    return {
        "sweep": sweep.name,
        "data": listed(known_values(sweep.runs, "data")),
        "banners": banners(sweep),
        "facts": summarize(sweep),
        "tables": made,
        "figures": pictures,
        "cells": rows,
        "has_settings": any(row["settings"] != DASH for row in rows),
        "ui": wanted.ui,
        "asked_by": list(sweep.commands),
        "commands": commands(sweep, location=location, wanted=wanted),
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
    wanted = Wanted(ui_address(ui, uri=location.uri), test, with_images, with_costs)
    sweep = reader.read_sweep(store=location.store, uri=location.uri, name=location.sweep)
    file = out or location.store / "reports" / f"{figures.slug(sweep.name)}.html"
    if file.is_dir():
        raise InputError(f"--out {file}: is a folder; give a file such as {file / 'report.html'}")
    hide = hider(sweep, store=location.store)
    content = collect(sweep, location=location, wanted=wanted, hide=hide)
    html = page(content, hide=hide)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, html)
    except OSError as error:
        raise InputError(f"--out {file}: cannot write there ({error.strerror})") from error
    for line in failures(content):
        sys.stderr.write(f"kdsweep: {line}\n")
    logged = reader.attach(sweep, [file], folder="report", store=location.store, uri=location.uri)
    sys.stdout.write(f"wrote {file} ({len(html.encode()) / 1e6:.1f} MB); {logged}\n")
