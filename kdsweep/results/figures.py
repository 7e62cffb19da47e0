"""Draw the figures of a sweep, from what MLflow holds, as PNG, PDF and SVG.

Usage: ``python -m kdsweep figures figure2|effects|curves|pairs|capacity|tuning|all [--sweep NAME] [--out DIR] [Hydra
overrides]``. Hydra overrides, such as ``data=busi data.root=DIR``, may say which sweep is meant and where its images
lie. ``--published FILE ...`` draws those of FROM_SCORES from files of ``publish`` instead.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import pandas as pd

from kdsweep.config import composition, identity
from kdsweep.core.errors import InputError, command
from kdsweep.core.files import write_bytes
from kdsweep.core.options import add_published, add_sweep
from kdsweep.data import run_data, sources
from kdsweep.results import contours, dsc, effects, panels, plots, published, tables, tuned
from kdsweep.results.frame import known_values, variants
from kdsweep.tracking import reader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kdsweep.tracking.reader import Sweep

FIGURES = {
    "figure2": "contours of all models on test images",
    "effects": "test DSC of each cell, and the main effects",
    "curves": "validation Dice over the epochs",
    "pairs": "each test image against Student",
    "capacity": "test DSC of Students of several sizes against parameters and latency",
    "tuning": "best validation Dice against the seconds that a method's trials took",
}
FROM_SCORES = ("effects", "pairs", "capacity")  # the others need images, curves or Optuna's studies
# Arguments of savefig by format. Dates are left out, so that equal figures are equal files.
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 200},
    "pdf": {"metadata": {"CreationDate": None}},
    "svg": {"metadata": {"Date": None}},
}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "kdsweep", "pdf.fonttype": 42}  # text stays text


@dataclass(frozen=True)
class Choice:
    """The models and images that ``figure2`` shows; see ``contours.load``."""

    split: int | None = None
    seed: int | None = None
    models: list[str] | None = None
    count: int = 1
    ids: list[str] | None = None
    root: Path | None = None
    source: sources.Source | None = None


def draw(which: str, sweep: Sweep, *, store: Path, uri: str | None, choice: Choice) -> Iterator[tuple[str, Figure]]:
    """Draw one of FIGURES and name its file; yield several if it shows several images or settings.

    Args:
        which: a key of FIGURES.
        sweep: as ``tracking.read_sweep`` gives it.
        store: folder of the runs.
        uri: of the MLflow server or database, or None for the file in the store.
        choice: for figure2.

    Raises:
        InputError: the sweep lacks what some figures need; raised after the others are drawn.
    """
    if which == "capacity":  # its points are the variants
        yield which, plots.capacity_plot(table=_capacity(sweep), title=heading(which, sweep, label=""))
        return
    failed = []
    for label, part in variants(sweep).items():
        name = f"{which}-{slug(label)}" if label else which
        try:
            if which == "figure2":
                yield from _contours(part, name=name, label=label, store=store, uri=uri, choice=choice)
            else:
                yield name, _plot(which, part, title=heading(which, part, label=label), store=store, uri=uri)
        except InputError as error:
            failed.append(f"{label}: {error}" if label else str(error))
    if failed:
        raise InputError("; ".join(failed))


def _contours(
    sweep: Sweep, *, name: str, label: str, store: Path, uri: str | None, choice: Choice
) -> Iterator[tuple[str, Figure]]:
    shown = contours.load(sweep, store=store, uri=uri, **vars(choice))
    for number, one in enumerate(shown, start=1):
        one = one._replace(title=f"{one.title}, {label}" if label else one.title)
        yield f"{name}-{number}" if len(shown) > 1 else name, panels.figure2(**one._asdict())


def _capacity(sweep: Sweep) -> pd.DataFrame:
    from kdsweep.results import capacity  # loads torch: seconds that the other figures need not wait for

    return capacity.capacity(sweep, scores=dsc.table4(sweep))


def _plot(which: str, sweep: Sweep, *, title: str, store: Path, uri: str | None) -> Figure:
    if which == "effects":
        return plots.effects_plot(scores=dsc.table4(sweep), effects=effects.effects(sweep), title=title)
    if which == "tuning":
        trials = tuned.read(sweep, store=store, uri=uri).trials
        return plots.tuning_plot(progress=tuned.best_by_seconds(trials), title=title)
    if which == "curves":
        return plots.curves_plot(curves=reader.read_curves(sweep, store=store, uri=uri), title=title)
    return plots.pairs_plot(pairs=plots.paired(sweep), title=title)


def heading(which: str, sweep: Sweep, *, label: str) -> str:
    """Return the title of a figure: what it shows, of which sweep, data and profile."""
    name, profile = ("".join(known_values(sweep.runs, key)) for key in ("data", "profile"))
    shows = FIGURES[which][0].upper() + FIGURES[which][1:]
    kind = " (a check, not a result)" if profile == "quick" else ""
    return f"{shows}. Sweep {sweep.name}{f', {label}' if label else ''}: data {name}, profile {profile}{kind}"


def slug(label: str) -> str:
    """Turn a label into a part of a file's name."""
    return re.sub(r"[^\w.=-]+", "_", label)


def render(figure: Figure, suffix: str) -> bytes:
    """Return the bytes of a figure as one of FORMATS; equal figures give equal bytes."""
    stream = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format=suffix, **FORMATS[suffix])
    return stream.getvalue()


def write(figure: Figure, *, out_dir: Path, name: str) -> list[Path]:
    """Write NAME.png, .pdf and .svg.

    Raises:
        InputError: the folder cannot be written to.
    """
    files = [out_dir / f"{name}.{suffix}" for suffix in FORMATS]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for file in files:
            write_bytes(file, render(figure, file.suffix[1:]))
    except OSError as error:
        raise InputError(f"--out {out_dir}: cannot write there ({error.strerror})") from error
    return files


class Location(NamedTuple):
    """The place of a sweep.

    Attributes:
        store: folder of the runs.
        uri: of the MLflow server or database, or None for the file in the store.
        sweep: its name; None takes the one last asked for.
        root: folder of its images, if they were moved.
        source: its data set, if that is a user's own class.
    """

    store: Path
    uri: str | None
    sweep: str | None
    root: Path | None
    source: sources.Source | None = None


def parse_place(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a sweep."""
    add_sweep(parser, default=None)
    parser.add_argument("--data-root", type=Path, help="folder of the sweep's images, if they were moved")
    parser.add_argument("overrides", nargs="*", help="or Hydra overrides of the sweep: data=busi data.root=DIR")


def find_place(options: argparse.Namespace) -> Location:
    """Return the place of the sweep that the options of ``parse_place`` name."""
    own = options.store or Path("multirun"), options.tracking_uri, options.sweep, options.data_root
    if not options.overrides:
        return Location(*own)
    cfg = composition.compose_config(options.overrides)  # unchecked: a table needs no folder of images
    typed = {word.lstrip("+").partition("=")[0] for word in options.overrides}
    root = Path(str(cfg.data.root)) if "data.root" in typed else None
    named = cfg.sweep_name if typed - {"store", "tracking.uri", "data.root"} else None
    return Location(
        options.store or Path(cfg.store),
        options.tracking_uri or cfg.tracking.uri,
        options.sweep or named,
        options.data_root or root,
        identity.source(composition.read(cfg)) if cfg.data.source._target_ not in run_data.SOURCES else None,
    )


def make(
    which: str, *, place: Location, out_dir: Path | None, choice: Choice, files: Sequence[Path] | None = None
) -> None:
    """Draw, write and log one figure or all; a figure that cannot be drawn does not stop the others.

    Args:
        which: a key of FIGURES or all.
        place: of the sweep.
        out_dir: folder of the figures; None is STORE/figures.
        choice: for figure2.
        files: of ``publish``, to draw from instead of a store; nothing is logged then.

    Raises:
        InputError: there is no such sweep, or it lacks what a figure needs.
    """
    if files and which not in (*FROM_SCORES, "all"):
        raise InputError(f"--published: {which} needs the store; --store names it")
    sweep = published.read(files) if files else reader.read_sweep(store=place.store, uri=place.uri, name=place.sweep)
    out_dir = out_dir or place.store / "figures"
    choice = replace(choice, root=place.root, source=place.source)
    failed = []
    for name in suited(sweep, store=place.store, from_scores=bool(files)) if which == "all" else [which]:
        try:
            for file_name, figure in draw(name, sweep, store=place.store, uri=place.uri, choice=choice):
                drawn = write(figure, out_dir=out_dir, name=file_name)
                told = f"wrote {out_dir / file_name}.{', .'.join(FORMATS)}"
                if not files:
                    told += f"; {reader.attach(sweep, drawn, folder='figures', store=place.store, uri=place.uri)}"
                sys.stdout.write(f"{told}\n")
        except InputError as error:
            failed.append(str(error) if which == name else f"{name}: {error}")
    if failed:
        raise InputError("; ".join(failed))


def suited(sweep: Sweep, *, store: Path, from_scores: bool) -> list[str]:
    """Return those of FIGURES that suit a sweep; ``from_scores``: of published files, not of a store."""
    has = {"capacity": tables.has_students(sweep), "tuning": not from_scores and tuned.is_tuned(sweep, store=store)}
    return [name for name in (FROM_SCORES if from_scores else FIGURES) if has.get(name, True)]


@command
def main(argv: list[str] | None = None) -> None:
    """Draw one figure or all."""
    shows = "; ".join(f"{name}: {what}" for name, what in FIGURES.items())
    parser = argparse.ArgumentParser(prog="python -m kdsweep figures", description=f"Figures of a sweep. {shows}.")
    parser.add_argument("figure", choices=[*FIGURES, "all"])
    parse_place(parser)
    add_published(parser)
    parser.add_argument("--out", type=Path, help="folder for the files (STORE/figures)")
    own = parser.add_argument_group("figure2")
    own.add_argument("--models", help="notations, comma between them (the paper's figure)")
    own.add_argument("--split", type=int, help="index of the random split (the first with most models finished)")
    own.add_argument("--seed", type=int, help="of the cells (likewise)")
    own.add_argument("--count", type=int, default=1, help="how many test images, at even quantiles of Dice (1: median)")
    own.add_argument("--image", action="append", help="id of a test image instead; may be repeated")
    options = parser.parse_intermixed_args(argv)
    models = options.models.split(",") if options.models else None
    choice = Choice(options.split, options.seed, models, options.count, options.image)
    place = find_place(options)
    make(options.figure, place=place, out_dir=options.out, choice=choice, files=options.published)
