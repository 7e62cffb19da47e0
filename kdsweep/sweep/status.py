"""Report how far a sweep is, from its folders alone: done, running, failed and why, and the time left."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from kdsweep.config.grid import variant_label
from kdsweep.core.errors import InputError, command
from kdsweep.core.files import write_text
from kdsweep.core.options import folder
from kdsweep.core.progress import duration, plural
from kdsweep.runs import records, requests
from kdsweep.runs.records import Record
from kdsweep.sweep.engines import queue
from kdsweep.sweep.engines.queue import Task
from kdsweep.tuning import book

WORDS = {
    "FINISHED": "done",
    "RUNNING": "running",
    "QUEUED": "queued",
    "FAILED": "failed",
    "KILLED": "interrupted",
    "WAITING": "waiting",
}
WAITS = ("WAITING", "QUEUED", "KILLED")
HEADER = ("not finished", "state", "saved", "val/dice", "last epoch", "left")
PACE_EPOCHS = 10
FEW = 4  # up to this many waiting cells of a split are named one by one


# ---- time left -----------------------------------------------------------------------------------------------------


def pace_s(record: Record) -> float | None:
    """Return the seconds per epoch, the median of the latest; None before the second epoch is saved.

    Not the mean: after a resumption one of the differences is the break, which may be a night.
    """
    gaps = [later - earlier for earlier, later in itertools.pairwise(record.times_ms[-PACE_EPOCHS:])]
    return statistics.median(gaps) / 1000 if gaps else None


def left_s(record: Record) -> float | None:
    """Return the most seconds that a training still takes, at its present pace."""
    pace = pace_s(record)
    return None if pace is None else max(0, record.epochs - len(record.history)) * pace


def total_left_s(*, running_s: list[float], waiting: int, at_once: int, whole_s: float) -> float:
    """Return the seconds until the last cell is done: max(running_s) + ceil(waiting / at_once) * whole_s.

    Assumes that no training stops early and that waiting cells start at their first epoch, in groups as large as the
    present one, one group after the other.

    Args:
        running_s: time left of each running training, Teachers included.
        waiting: number of cells that no process trains.
        at_once: number of cells in training.
        whole_s: how long a cell takes from its first epoch to its last.
    """
    return max(running_s) + math.ceil(waiting / max(1, at_once)) * whole_s


def outlook(*, teachers: list[Record], cells: list[Record]) -> str:
    """Return the text after the counts of a sweep: the time left, or that nothing is running."""
    running = [record for record in [*teachers, *cells] if record.status == "RUNNING"]
    if not running:
        if any(record.status == "QUEUED" for record in [*teachers, *cells]):
            return "; nothing is running yet, SLURM has what is queued"
        finished = all(cell.status == "FINISHED" for cell in cells)
        return "" if finished else "; nothing is running, the same command goes on"
    known_s = [left for record in running if (left := left_s(record)) is not None]
    if not known_s:
        return ""
    trained = [cell for cell in cells if cell.status == "RUNNING"]
    waiting = [cell for cell in cells if cell.status in WAITS]
    untaught = [teacher for teacher in teachers if teacher.status in WAITS]
    whole_s, teach_s = (_whole_s(records_) for records_ in (cells, teachers))
    # A group is larger than what still runs of it: some have stopped early.
    begun_ms = min((cell.started_ms for cell in trained), default=0)
    group = trained + [cell for cell in cells if trained and cell.status == "FINISHED" and cell.ended_ms > begun_ms]
    at_once = len(group) or max(Counter(map(_where, waiting)).values(), default=0)
    total_s = total_left_s(running_s=known_s, waiting=len(waiting), at_once=at_once, whole_s=whole_s)
    total_s += len(set(map(_where, untaught))) * teach_s  # those of a split and seed are trained together
    unknown = len(known_s) < len(running) or (waiting and not whole_s) or (untaught and not teach_s)
    return f"; {'at least' if unknown else 'about'} {duration(total_s)} left"


def _whole_s(found: list[Record]) -> float:
    """Return the seconds of a whole training, at the pace of running ones, else of earlier ones."""
    running = [record for record in found if record.status == "RUNNING" and pace_s(record)]
    return max((record.epochs * (pace_s(record) or 0.0) for record in running or found), default=0.0)


def _where(record: Record) -> str:
    """Return a record's split and seed, such as ``split0-seed0``."""
    return "-".join(record.folder.name.rsplit("-", 3)[1:3])  # its notation may have a dash too


# ---- text ----------------------------------------------------------------------------------------------------------


def report(
    sweep: str,
    found: Mapping[str, Record],
    *,
    variants: Mapping[str, dict[str, str]] | None = None,
    tasks: Mapping[Path, Task] | None = None,
    now_ms: int,
) -> str:
    """Return the text that the command prints.

    Args:
        sweep: its name.
        found: records of all that it asked for, by their places (``Cell.key``).
        variants: the variant by place, for places that have one.
        tasks: by folder the jobs of cells that were submitted to SLURM and have not ended there.
        now_ms: milliseconds since 1970.
    """
    variants, tasks = variants or {}, tasks or {}
    found = {
        place: replace(record, status="QUEUED") if record.status in WAITS and record.folder in tasks else record
        for place, record in found.items()
    }
    places = sorted(found, key=lambda place: (*_order(place, found[place]), variant_label(variants.get(place, {}))))
    titles = _titles(places, variants)
    teachers = [found[place] for place in places if _is_teacher(found[place])]
    cells = [found[place] for place in places if not _is_teacher(found[place])]
    lines = [f"sweep {sweep}: {plural(len(cells), 'cell')}: {_counts(cells)}{outlook(teachers=teachers, cells=cells)}"]
    if teachers:
        lines.append(f"Teachers: {_counts(teachers)}")
    if open_ := {place: found[place] for place in places if found[place].status != "FINISHED"}:
        lines += ["", *_unfinished(open_, titles=titles, tasks=tasks, now_ms=now_ms)]
    if done := [place for place in places if found[place].status == "FINISHED"]:
        scores = [(titles[place], f"{100 * found[place].values.get('test/dice', math.nan):.2f}") for place in done]
        lines += ["", *_align([("finished", "test Dice %"), *scores])]
    return "\n".join([*lines, ""])


def _unfinished(
    found: Mapping[str, Record], *, titles: Mapping[str, str], tasks: Mapping[Path, Task], now_ms: int
) -> list[str]:
    """Return a header and a line per record by its place, those alike in one, with the error of failed ones."""
    jobs = {place: " ".join(tasks.get(record.folder, ())) for place, record in found.items()}
    alike = _alike(found, jobs)
    columns = []
    for first, *more in alike:
        title = _title_of_all([first, *more], found[first]) if more else titles[first]
        columns.append((*_columns(title, found[first], now_ms=now_ms), jobs[first]))
    head, *rows = _align([(*HEADER, "job"), *columns])
    lines = [head if any(jobs.values()) else head.removesuffix("job").rstrip()]
    for (first, *_), row in zip(alike, rows, strict=True):
        lines += [row, *_failure(found[first])]
    return lines


def _is_teacher(record: Record) -> bool:
    return record.folder.parent.name == "teachers"


def _order(place: str, record: Record) -> tuple[bool, int, int, str]:
    notation, split, seed, _ = place.rsplit("/", 3)
    numbers = int(split.removeprefix("split")), int(seed.removeprefix("seed"))
    return not _is_teacher(record), *numbers, notation


def _alike(found: Mapping[str, Record], jobs: Mapping[str, str]) -> list[list[str]]:
    """Group places that share a row: more than FEW of one split and seed that wait and have not begun."""
    groups: dict[object, list[str]] = {}
    for place, record in found.items():
        begun = record.status not in ("WAITING", "QUEUED") or bool(record.history)
        key = place if begun else (record.status, *_order(place, record)[:3], jobs[place])
        groups.setdefault(key, []).append(place)
    return [part for own in groups.values() for part in ([own] if len(own) > FEW else [[place] for place in own])]


def _title_of_all(places: list[str], first: Record) -> str:
    _, split, seed, _ = places[0].rsplit("/", 3)
    what = "Teachers" if _is_teacher(first) else "cells"
    return f"{len(places)} {what} split {split.removeprefix('split')} seed {seed.removeprefix('seed')}"


def _titles(places: Iterable[str], variants: Mapping[str, dict[str, str]]) -> dict[str, str]:
    """Return names as in messages (``Cell.title``), with variant or digest of the settings if several share one."""
    parts = {place: place.rpartition("/") for place in places}
    shared = Counter(name for name, _, _ in parts.values())
    titles = {}
    for place, (name, _, settings) in parts.items():
        notation, split, seed = name.rsplit("/", 2)
        title = f"{notation} split {split.removeprefix('split')} seed {seed.removeprefix('seed')}"
        variant = variant_label(variants.get(place, {}))
        titles[place] = f"{title} ({variant or settings.rpartition('-')[2]})" if variant or shared[name] > 1 else title
    return titles


def _counts(found: list[Record]) -> str:
    counts = Counter(record.status for record in found)
    return ", ".join(f"{counts[status]} {word}" for status, word in WORDS.items() if counts[status] or word == "done")


def _columns(title: str, record: Record, *, now_ms: int) -> tuple[str, ...]:
    """Return a row of the table, with the columns of HEADER."""
    epochs = f"epoch {len(record.history)} of {record.epochs}" if record.epochs else ""
    dice = record.history[-1].get("val/dice", math.nan) if record.history else None
    ago = left = ""
    if record.status == "RUNNING":
        if record.times_ms:
            ago = f"{duration(max(0, now_ms - record.times_ms[-1]) / 1000)} ago"
        if (own_s := left_s(record)) is not None:
            left = f"at most {duration(own_s)}"
    return title, WORDS[record.status], epochs, "" if dice is None else f"{dice:.3f}", ago, left


def _failure(record: Record) -> list[str]:
    if record.status != "FAILED":
        return []
    log = record.folder / "kdsweep.log"  # a Teacher has none: the error is in the logs of its cells
    return [f"    {record.error}{f'; log: {log}' if log.exists() else ''}"]


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def tuning(store: Path, sweep: str, *, trials_file: Path | None = None) -> str:
    """Return the text on the trials of a sweep: how many have ended and how, and the best of each method.

    Args:
        store: folder of the runs.
        sweep: its name.
        trials_file: where all of them are written as CSV, or None.

    Raises:
        InputError: the file cannot be written.
    """
    from kdsweep.tuning.study import one_row_each, read_trials  # with optuna, which other sweeps do not need

    known = book.read(store, sweep)
    trials = read_trials(known.storage, known.entries)
    wanted = sum(entry.trials for entry in known.entries.values())
    states = Counter(trials["state"])
    words = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    counts = ", ".join(f"{states[state]} {word}" for state, word in words.items() if states[state])
    line = f"tuning of sweep {sweep}: {len(trials)} of {wanted} trials ended{f': {counts}' if counts else ''}"
    if len(trials) < wanted:
        held = book.is_held(store, sweep)
        line += "; a round is being trained" if held else "; nothing is running, the same command goes on"
    rows: list[tuple[str, ...]] = [("tuned", "trials", "best val/dice", "of trial")]
    for (notation, split), own in trials.groupby(["notation", "split"]):
        best = own[own["is_chosen"]]
        dice, number = (f"{best['value'].iloc[0]:.3f}", str(best["number"].iloc[0])) if len(best) else ("", "")
        rows.append((f"{notation} split {split}", str(len(own)), dice, number))
    lines = [line, "", *_align(rows), ""]
    if trials_file:
        try:
            write_text(trials_file, one_row_each(trials).to_csv(index=False))
        except OSError as error:
            raise InputError(f"--trials {trials_file}: cannot be written ({error.strerror})") from error
        lines += [f"wrote {plural(len(trials), 'trial')} to {trials_file}", ""]
    return "\n".join([*lines, ""])


# ---- the command ---------------------------------------------------------------------------------------------------


def make(*, store: Path, sweep: str | None, trials_file: Path | None = None) -> str:
    """Return the report on a sweep of a store, or on the one last asked for.

    Args:
        store: folder of the runs.
        sweep: its name, or None.
        trials_file: where its trials are written, or None.

    Raises:
        InputError: there is no such sweep, or it has no trials to be written.
    """
    tuned = book.sweeps(store)
    known = [*(name for name in tuned if name not in requests.sweeps(store)), *requests.sweeps(store)]
    if not known:
        raise InputError(f"--store {store}: no sweep was started in it yet")
    if sweep is not None and sweep not in known:
        raise InputError(f"--sweep {sweep}: not in this store; it holds: {', '.join(sorted(known))}")
    name = sweep or next((name for name in tuned if book.is_held(store, name)), known[-1])
    base = book.as_configured(store, name)
    if trials_file and base not in tuned:
        told = f"sweep {base} was not tuned: `python -m kdsweep -m +experiment=tuned`"
        raise InputError(f"--trials {trials_file}: {told}")
    trials = tuning(store, base, trials_file=trials_file) if base in tuned else ""
    asked = requests.read_asked(store, name)
    if not asked:
        return trials
    found = {place: records.read(store / folder) for place, folder in asked.items()}
    variants = requests.read_variants(store, name)
    try:
        tasks = {store / folder: task for folder, task in queue.queued(store).items()}
        unknown = ""
    except queue.QueueError as error:
        tasks, unknown = {}, f"\nSLURM's queue is not known here: {error}\n"
    return trials + report(name, found, variants=variants, tasks=tasks, now_ms=records.now_ms()) + unknown


@command
def main(argv: list[str] | None = None) -> None:
    """Print how far a sweep is."""
    parser = argparse.ArgumentParser(prog="python -m kdsweep status", description="How far a sweep is.")
    parser.add_argument("--store", type=folder, default=Path("multirun"), help="folder of the runs (multirun)")
    parser.add_argument("--sweep", help="name of the sweep (the one last asked for)")
    parser.add_argument("--trials", type=Path, metavar="FILE.csv", help="write the trials of its tuning there too")
    options = parser.parse_args(argv)
    sys.stdout.write(make(store=options.store, sweep=options.sweep, trials_file=options.trials))
