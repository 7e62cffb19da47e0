"""Draw the figures of a sweep, from what MLflow holds, as PNG, PDF and SVG.

Usage: ``python -m kdsweep figures figure2|effects|curves|pairs|capacity|tuning|all [--sweep NAME] [--out DIR] [Hydra
overrides]``. Hydra overrides, such as ``data=busi data.root=DIR``, may say which sweep is meant and where its images
are. ``--published FILE ...`` draws those of FROM_SCORES from files of ``publish`` instead.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from kdsweep.config import composition, inputs
from kdsweep.core.errors import InputError, command
from kdsweep.core.options import add_published, add_sweep
from kdsweep.data import run_data, sources
from kdsweep.results import published
from kdsweep.results.figures import contours, examples, style
from kdsweep.results.frame import variants
from kdsweep.results.mixing import known_values
from kdsweep.results.tables import tuned
from kdsweep.tracking import reader
from kdsweep.tracking.reader import Sweep

FIGURES = {  # each but figure2 has a module of its name
    "figure2": "contours of all models on test images",
    "effects": "test DSC of each cell, and the main effects",
    "curves": "validation Dice over the epochs",
    "pairs": "each test image against Student",
    "capacity": "test DSC of Students of several sizes against parameters and latency",
    "tuning": "best validation Dice against the seconds that a method's trials took",
}
FROM_SCORES = ("effects", "pairs", "capacity")  # the others need images, curves or Optuna's studies


class Location(NamedTuple):
    """The place of a sweep.

    Attributes:
        store: folder of the runs.
        uri: of the MLflow server or database, or None for the file in the store.
        sweep: its name; None takes the last one.
        root: folder of its images, if they were moved.
        source: its data set, if that is a user's own class.
    """

    store: Path
    uri: str | None
    sweep: str | None
    root: Path | None
    source: sources.Source | None = None


def draw(which: str, sweep: Sweep, *, place: Location, **choice: Any) -> Iterator[tuple[str, Figure]]:
    """Draw one of FIGURES and name its file; yield several if it shows several images or settings.

    The choice of models and images for figure2 is that of ``examples.load``.

    Raises:
        InputError: the sweep lacks what some figures need; raised after the others are drawn.
    """
    parts = {"": sweep} if which == "capacity" else variants(sweep)  # its points are the variants
    failed = []
    for label, part in parts.items():
        name = f"{which}-{slug(label)}" if label else which
        try:
            if which != "figure2":
                module = importlib.import_module(f"kdsweep.results.figures.{which}")
                title = heading(which, part, label=label)
                yield name, module.of_sweep(part, title=title, store=place.store, uri=place.uri)
                continue
            shown = examples.load(part, place.store, place.uri, root=place.root, source=place.source, **choice)
            for number, one in enumerate(shown, start=1):
                one = one._replace(title=f"{one.title}, {label}" if label else one.title)
                yield f"{name}-{number}" if len(shown) > 1 else name, contours.figure(one)
        except InputError as error:
            failed.append(f"{label}: {error}" if label else str(error))
    if failed:
        raise InputError("; ".join(failed))


def heading(which: str, sweep: Sweep, *, label: str) -> str:
    """Return the title of a figure: what it shows, of which sweep, data and profile."""
    name, profile = ("".join(known_values(sweep.runs, key)) for key in ("data", "profile"))
    shows = FIGURES[which][0].upper() + FIGURES[which][1:]
    kind = " (a check, not a result)" if profile == "quick" else ""
    return f"{shows}. Sweep {sweep.name}{f', {label}' if label else ''}: data {name}, profile {profile}{kind}"


def slug(label: str) -> str:
    """Turn a label into a part of a file's name."""
    return re.sub(r"[^\w.=-]+", "_", label)


def parse_place(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a sweep."""
    add_sweep(parser, default=None)
    parser.add_argument("--data-root", type=Path, help="folder of the sweep's images, if they were moved")
    parser.add_argument("overrides", nargs="*", help="or Hydra overrides of the sweep: data=busi data.root=DIR")


def find_place(options: argparse.Namespace) -> Location:
    """Return the place of the sweep that the options of ``parse_place`` name."""
    by_options = options.store or Path("multirun"), options.tracking_uri, options.sweep, options.data_root
    if not options.overrides:
        return Location(*by_options)
    cfg = composition.compose_config(options.overrides)  # unchecked: a table needs no folder of images
    typed = {word.lstrip("+").partition("=")[0] for word in options.overrides}
    root = Path(str(cfg.data.root)) if "data.root" in typed else None
    named = cfg.sweep_name if typed - {"store", "tracking.uri", "data.root"} else None
    return Location(
        options.store or Path(cfg.store),
        options.tracking_uri or cfg.tracking.uri,
        options.sweep or named,
        options.data_root or root,
        inputs.source(composition.read(cfg)) if cfg.data.source._target_ not in run_data.SOURCES else None,
    )


def make(which: str, *, place: Location, out: Path | None, files: Sequence[Path] | None = None, **choice: Any) -> None:
    """Draw, write and log one figure or all; a figure that cannot be drawn does not stop the others.

    Args:
        which: a key of FIGURES or all.
        place: of the sweep.
        out: folder of the figures; None is STORE/figures.
        files: of ``publish``, to draw from instead of a store; nothing is logged then.
        choice: for figure2.

    Raises:
        InputError: there is no such sweep, or it lacks what a figure needs.
    """
    if files and which not in (*FROM_SCORES, "all"):
        raise InputError(f"--published: {which} needs the store; --store names it")
    sweep = published.read(files) if files else reader.read_sweep(store=place.store, uri=place.uri, name=place.sweep)
    out = out or place.store / "figures"
    failed = []
    for name in _applicable(sweep, store=place.store, from_scores=bool(files)) if which == "all" else [which]:
        try:
            for file_name, figure in draw(name, sweep, place=place, **choice):
                written = style.write(figure, out / file_name)
                line = f"wrote {out / file_name}.{', .'.join(style.FORMATS)}"
                if not files:
                    line += f"; {reader.attach(sweep, written, folder='figures', store=place.store, uri=place.uri)}"
                sys.stdout.write(f"{line}\n")
        except InputError as error:
            failed.append(str(error) if which == name else f"{name}: {error}")
    if failed:
        raise InputError("; ".join(failed))


def _applicable(sweep: Sweep, *, store: Path, from_scores: bool) -> list[str]:
    from kdsweep.results.tables import capacity  # loads torch: seconds that --help need not wait for

    has = {"capacity": capacity.applies(sweep), "tuning": not from_scores and tuned.applies(sweep, store)}
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
    of_figure2 = parser.add_argument_group("figure2")
    of_figure2.add_argument("--models", type=lambda text: text.split(","), help="notations, comma between them")
    of_figure2.add_argument("--split", type=int, help="index of the random split (the first with most models finished)")
    of_figure2.add_argument("--seed", type=int, help="of the cells (likewise)")
    of_figure2.add_argument("--count", type=int, default=1, help="number of test images, at even quantiles of Dice (1)")
    of_figure2.add_argument("--image", action="append", help="id of a test image instead; may be repeated")
    options = parser.parse_intermixed_args(argv)
    choice = {key: getattr(options, key) for key in ("models", "split", "seed", "count")}
    place = find_place(options)
    make(options.figure, place=place, out=options.out, files=options.published, ids=options.image, **choice)
