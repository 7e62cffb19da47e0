"""Draw the figures of a sweep, from what MLflow holds, as PNG, PDF and SVG.

Published files are enough for those of FROM_SCORES.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from kdsweep.config import composition, inputs
from kdsweep.core.errors import InputError
from kdsweep.data import run_data, sources
from kdsweep.results.figures import FIGURES, contours, examples, style
from kdsweep.results.frame import variants
from kdsweep.results.mixing import distinct_values
from kdsweep.results.published import read as read_published
from kdsweep.results.tables import tuned
from kdsweep.tracking import reader
from kdsweep.tracking.reader import Sweep

FROM_SCORES = ("effects", "pairs", "capacity")  # the others need images, curves or Optuna's studies


class Location(NamedTuple):
    """The location of a sweep."""

    store: Path  # folder of the runs
    uri: str | None  # of the MLflow server or database; None is the file in the store
    sweep: str | None  # its name; None takes the last one
    root: Path | None  # folder of its images, if they were moved
    source: sources.Source | None = None  # its data set, if that is a user's class


def draw(which: str, sweep: Sweep, *, location: Location, **choice: Any) -> Iterator[tuple[str, Figure]]:
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
                yield name, module.of_sweep(part, title=title, store=location.store, uri=location.uri)
                continue
            shown = examples.load(
                part, location.store, location.uri, root=location.root, source=location.source, **choice
            )
            for number, one in enumerate(shown, start=1):
                one = one._replace(title=f"{one.title}, {label}" if label else one.title)
                yield f"{name}-{number}" if len(shown) > 1 else name, contours.figure(one)
        except InputError as error:
            failed.append(f"{label}: {error}" if label else str(error))
    if failed:
        raise InputError("; ".join(failed))


def heading(which: str, sweep: Sweep, *, label: str) -> str:
    """Return the title of a figure: what it shows, of which sweep, data and profile."""
    name, profile = ("".join(distinct_values(sweep.runs, key)) for key in ("data", "profile"))
    shows = FIGURES[which][0].upper() + FIGURES[which][1:]
    kind = " (a check, not a result)" if profile == "quick" else ""
    return f"{shows}. Sweep {sweep.name}{f', {label}' if label else ''}: data {name}, profile {profile}{kind}"


def slug(label: str) -> str:
    """Turn a label into a part of a file's name."""
    return re.sub(r"[^\w.=-]+", "_", label)


def locate(
    overrides: Sequence[str],
    *,
    store: Path | None = None,
    uri: str | None = None,
    sweep: str | None = None,
    data_root: Path | None = None,
) -> Location:
    """Return the location of a sweep that options, or Hydra overrides such as ``data=busi data.root=DIR``, name."""
    if not overrides:
        return Location(store or Path("multirun"), uri, sweep, data_root)
    cfg = composition.compose_config(overrides)  # unchecked: a table needs no folder of images
    typed = {word.lstrip("+").partition("=")[0] for word in overrides}
    root = Path(str(cfg.data.root)) if "data.root" in typed else None
    named = cfg.sweep_name if typed - {"store", "tracking.uri", "data.root"} else None
    return Location(
        store or Path(cfg.store),
        uri or cfg.tracking.uri,
        sweep or named,
        data_root or root,
        inputs.source(composition.read(cfg)) if cfg.data.source._target_ not in run_data.SOURCES else None,
    )


def make(
    which: str, *, location: Location, out: Path | None = None, published: Sequence[Path] = (), **choice: Any
) -> None:
    """Draw, write and log one figure or all; a figure that cannot be drawn does not stop the others.

    Figures of published files are not logged; ``choice`` is for figure2.

    Raises:
        InputError: there is no such sweep, or it lacks what a figure needs.
    """
    if published and which not in (*FROM_SCORES, "all"):
        raise InputError(f"--published: {which} needs the store; --store names it")
    where: dict[str, Any] = {"store": location.store, "uri": location.uri}
    sweep = read_published(published) if published else reader.read_sweep(**where, name=location.sweep)
    out = out or location.store / "figures"
    failed = []
    for name in _applicable(sweep, store=location.store, from_scores=bool(published)) if which == "all" else [which]:
        try:
            for file_name, figure in draw(name, sweep, location=location, **choice):
                written = style.write(figure, out / file_name)
                line = f"wrote {out / file_name}.{', .'.join(style.FORMATS)}"
                if not published:
                    line += f"; {reader.attach(sweep, written, folder='figures', **where)}"
                sys.stdout.write(f"{line}\n")
        except InputError as error:
            failed.append(str(error) if which == name else f"{name}: {error}")
    if failed:
        raise InputError("; ".join(failed))


def _applicable(sweep: Sweep, *, store: Path, from_scores: bool) -> list[str]:
    from kdsweep.results.tables import capacity  # loads torch: seconds that --help need not wait for

    has = {"capacity": capacity.applies(sweep), "tuning": not from_scores and tuned.applies(sweep, store)}
    return [name for name in (FROM_SCORES if from_scores else FIGURES) if has.get(name, True)]
