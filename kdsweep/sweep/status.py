"""Report how far a sweep is, from its folders alone: done, running, failed and why, and the time left."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdsweep.config.grid import variant_label
from kdsweep.core import progress
from kdsweep.core.errors import InputError, command
from kdsweep.core.files import write_text
from kdsweep.core.options import folder
from kdsweep.core.progress import duration, epoch_s, plural
from kdsweep.store import cell_folder, sweep_file
from kdsweep.store.cell_folder import Record
from kdsweep.store.sweep_file import Request
from kdsweep.sweep.executors import slurm
from kdsweep.sweep.executors.slurm import Task
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
FEW = 4  # up to this many waiting cells of a split are named one by one


@dataclass(frozen=True)
class Row:
    """A requested cell or Teacher: its key in the sweep, its record, and its job in SLURM's queue, if it has one."""

    key: str
    request: Request
    record: Record
    job: str = ""

    @property
    def order(self) -> tuple[object, ...]:
        """Return what rows are sorted by: Teachers first, then split, seed, notation, variant."""
        request = self.request
        variant = variant_label(request.variant)
        return not self.is_teacher, request.split, request.seed, request.notation, variant, self.key

    @property
    def is_teacher(self) -> bool:
        """Return whether it is a Teacher."""
        return self.request.role == "teacher"

    @property
    def place(self) -> str:
        """Return its split and seed as text."""
        return f"split {self.request.split} seed {self.request.seed}"

    @property
    def name(self) -> str:
        """Return its name as in messages (``Cell.title``), without the variant."""
        return f"{self.request.notation} {self.place}"


def read_rows(store: Path, sweep: str, *, tasks: Mapping[Path, Task]) -> list[Row]:
    """Return the rows of all that a sweep requests, sorted.

    Args:
        store: folder of the runs.
        sweep: its name.
        tasks: by folder the jobs of cells that were submitted to SLURM and have not ended there.
    """
    rows = []
    for key, request in sweep_file.read(store, sweep).requests.items():
        record = cell_folder.read(request.folder(store))
        if record.status in WAITS and record.folder in tasks:
            record = replace(record, status="QUEUED")
        rows.append(Row(key, request, record, " ".join(tasks.get(record.folder, ()))))
    return sorted(rows, key=lambda row: row.order)


# ---- time left -----------------------------------------------------------------------------------------------------


def left_s(record: Record) -> float | None:
    """Return the most seconds that a training still takes, at its present pace."""
    pace = epoch_s(record.times_ms)
    return None if pace is None else progress.left_s([[(max(0, record.epochs - len(record.history)), pace)]])


def outlook(rows: Sequence[Row]) -> str:
    """Return the text after the counts of a sweep: the time left, or that nothing is running."""
    statuses = {row.record.status for row in rows}
    if "RUNNING" not in statuses and "QUEUED" in statuses:
        return "; nothing is running yet, SLURM has what is queued"
    teachers, cells = ([row for row in rows if row.is_teacher is kind] for kind in (True, False))
    if "RUNNING" not in statuses:
        finished = all(row.record.status == "FINISHED" for row in cells)
        return "" if finished else "; nothing is running, the same command goes on"
    running = [left_s(row.record) for row in rows if row.record.status == "RUNNING"]
    running_s = [seconds for seconds in running if seconds is not None]
    if not running_s:
        return ""
    waiting, waiting_teachers = ([row for row in of if row.record.status in WAITS] for of in (cells, teachers))
    training_s, teacher_s = (_training_s([row.record for row in of]) for of in (cells, teachers))
    # A group is larger than its cells that still run: some have stopped early.
    trained = [row.record for row in cells if row.record.status == "RUNNING"]
    begun_ms = min((record.started_ms for record in trained), default=math.inf)
    at_once = len(trained) + sum(row.record.status == "FINISHED" and row.record.ended_ms > begun_ms for row in cells)
    at_once = at_once or max(Counter(row.place for row in waiting).values(), default=0)
    # What waits begins at its first epoch, in groups as large as the present one; a split and seed has its Teachers.
    rounds, places = -(-len(waiting) // max(1, at_once)), {row.place for row in waiting_teachers}
    total_s = progress.left_s([[(1, max(running_s)), (rounds, training_s), (len(places), teacher_s)]])
    is_bound = len(running_s) < len(running) or (waiting and not training_s) or (waiting_teachers and not teacher_s)
    return f"; {'at least' if is_bound else 'about'} {duration(total_s)} left"


def _training_s(cells: list[Record]) -> float:
    """Return the seconds of all epochs of a training, at the pace of running ones, else of others."""
    running = [record for record in cells if record.status == "RUNNING" and epoch_s(record.times_ms)]
    return max((record.epochs * (epoch_s(record.times_ms) or 0.0) for record in running or cells), default=0.0)


# ---- text ----------------------------------------------------------------------------------------------------------


def report(sweep: str, rows: Sequence[Row], *, now_ms: int) -> str:
    """Return the text that the command prints.

    Args:
        sweep: its name.
        rows: of all that it requests, sorted.
        now_ms: milliseconds since 1970.
    """
    shared = Counter(row.name for row in rows)
    titles = {row.key: _title(row, is_shared=shared[row.name] > 1) for row in rows}
    teachers, cells = ([row.record for row in rows if row.is_teacher is kind] for kind in (True, False))
    lines = [f"sweep {sweep}: {plural(len(cells), 'cell')}: {_counts(cells)}{outlook(rows)}"]
    if teachers:
        lines.append(f"Teachers: {_counts(teachers)}")
    if unfinished := [row for row in rows if row.record.status != "FINISHED"]:
        lines += ["", *_unfinished(unfinished, titles=titles, now_ms=now_ms)]
    if finished := [row for row in rows if row.record.status == "FINISHED"]:
        dice = {row.key: row.record.values.get("test/dice", math.nan) for row in finished}
        lines += [
            "",
            *_align([("finished", "test Dice %"), *((titles[key], f"{100 * dice[key]:.2f}") for key in dice)]),
        ]
    return "\n".join([*lines, ""])


def _title(row: Row, *, is_shared: bool) -> str:
    """Return a row's name, with its variant, or the digest of its settings if others have the same name."""
    variant = variant_label(row.request.variant)
    return f"{row.name} ({variant or row.key.rpartition('/')[2]})" if variant or is_shared else row.name


def _unfinished(rows: Sequence[Row], *, titles: Mapping[str, str], now_ms: int) -> list[str]:
    """Return a header and a line per row, many that wait alike in one, with the errors of failed ones."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        waits = row.record.status in ("WAITING", "QUEUED") and not row.record.history
        alike = (row.record.status, row.is_teacher, row.place, row.job)
        groups.setdefault(alike if waits else row.key, []).append(row)
    lines: list[tuple[str, ...]] = [(*HEADER, "job" if any(row.job for row in rows) else "")]
    errors = {}
    for group in groups.values():
        first = group[0]
        if len(group) > FEW:
            what = "Teachers" if first.is_teacher else "cells"
            titled = {f"{len(group)} {what} {first.place}": first}
        else:
            titled = {titles[row.key]: row for row in group}
        for title, row in titled.items():
            if row.record.status == "FAILED":
                errors[len(lines)] = _failure(row.record)
            lines.append((*_columns(title, row.record, now_ms=now_ms), row.job))
    return [text for number, line in enumerate(_align(lines)) for text in (line, errors.get(number, "")) if text]


def _counts(found: list[Record]) -> str:
    counts = Counter(record.status for record in found)
    return ", ".join(f"{counts[status]} {word}" for status, word in WORDS.items() if counts[status] or word == "done")


def _columns(title: str, record: Record, *, now_ms: int) -> tuple[str, ...]:
    """Return a row of the table, with the columns of HEADER."""
    epochs = f"epoch {len(record.history)} of {record.epochs}" if record.epochs else ""
    dice = f"{record.history[-1].get('val/dice', math.nan):.3f}" if record.history else ""
    ago = left = ""
    if record.status == "RUNNING" and record.times_ms:
        ago = f"{duration(max(0, now_ms - record.times_ms[-1]) / 1000)} ago"
    if record.status == "RUNNING" and (seconds := left_s(record)) is not None:
        left = f"at most {duration(seconds)}"
    return title, WORDS[record.status], epochs, dice, ago, left


def _failure(record: Record) -> str:
    log = record.folder / "kdsweep.log"  # a Teacher has none: the error is in the logs of its cells
    return f"    {record.error}{f'; log: {log}' if log.exists() else ''}"


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
    from kdsweep.tuning.study import one_row_each, planned, read_studies, read_trials  # optuna: others do without

    studies = read_studies(book.read(store, sweep), sweep)
    trials, wanted = read_trials(studies), planned(studies)
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
    known = [*(name for name in tuned if name not in sweep_file.sweeps(store)), *sweep_file.sweeps(store)]
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
    try:
        tasks = slurm.queued(request.folder(store) for request in sweep_file.read(store, name).requests.values())
        unknown = ""
    except slurm.QueueError as error:
        tasks, unknown = {}, f"\nSLURM's queue is not known here: {error}\n"
    rows = read_rows(store, name, tasks=tasks)
    return trials + (report(name, rows, now_ms=cell_folder.now_ms()) + unknown if rows else "")


@command
def main(argv: list[str] | None = None) -> None:
    """Print how far a sweep is."""
    parser = argparse.ArgumentParser(prog="python -m kdsweep status", description="How far a sweep is.")
    parser.add_argument("--store", type=folder, default=Path("multirun"), help="folder of the runs (multirun)")
    parser.add_argument("--sweep", help="name of the sweep (the one last asked for)")
    parser.add_argument("--trials", type=Path, metavar="FILE.csv", help="write the trials of its tuning there too")
    options = parser.parse_args(argv)
    sys.stdout.write(make(store=options.store, sweep=options.sweep, trials_file=options.trials))
