"""Report how far a sweep is, from its folders alone: done, running, failed and why, and the time left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdsweep.config.grid import variant_label
from kdsweep.core.errors import InputError
from kdsweep.core.files import is_locked, write_text
from kdsweep.core.progress import duration, epoch_s, left_s, plural
from kdsweep.store import cell_folder, sweep_file
from kdsweep.store.cell_folder import Record
from kdsweep.store.sweep_file import Request
from kdsweep.sweep.executors import slurm
from kdsweep.sweep.executors.slurm import Task

STATES = {
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
    """A requested cell or Teacher."""

    title: str  # as in messages (``Cell.title``); of several without a variant each has the digest of its settings
    group: str  # split and seed, in which cells can be trained together
    is_teacher: bool
    record: Record
    job: str  # in SLURM's queue, or empty


def read_rows(store: Path, sweep: str, *, tasks: Mapping[Path, Task]) -> list[Row]:
    """Return the rows of all that a sweep requests: Teachers first, then by split, seed, notation, variant.

    ``tasks`` are by folder the jobs of cells that were submitted to SLURM and have not ended there.
    """

    def order(item: tuple[str, Request]) -> tuple[object, ...]:
        key, of = item
        return of.role != "teacher", of.split, of.seed, of.notation, variant_label(of.variant), key

    rows, requests = [], sweep_file.read(store, sweep).requests
    names = Counter((request.notation, request.split, request.seed) for request in requests.values())
    for key, request in sorted(requests.items(), key=order):
        record = cell_folder.read(request.folder(store))
        if record.status in WAITS and record.folder in tasks:
            record = replace(record, status="QUEUED")
        group = f"split {request.split} seed {request.seed}"
        is_shared = names[request.notation, request.split, request.seed] > 1
        variant = variant_label(request.variant) or (key.rpartition("/")[2] if is_shared else "")
        title = f"{request.notation} {group}" + (f" ({variant})" if variant else "")
        rows.append(Row(title, group, request.role == "teacher", record, " ".join(tasks.get(record.folder, ()))))
    return rows


# ---- time left -------------------------------------------------------------------------------------------------------


def outlook(rows: Sequence[Row]) -> str:
    """Return the text after the counts of a sweep: the time left, or that nothing is running."""
    statuses = {row.record.status for row in rows}
    teachers, cells = ([row for row in rows if row.is_teacher is kind] for kind in (True, False))
    if "RUNNING" not in statuses:
        if "QUEUED" in statuses:
            return "; nothing is running yet, SLURM has what is queued"
        finished = all(row.record.status == "FINISHED" for row in cells)
        return "" if finished else "; nothing is running, the same command resumes"
    left = [_left_s(kind) for kind in (teachers, cells)]
    seconds = sum(each or 0.0 for each in left)
    return f"; {'at least' if None in left else 'about'} {duration(seconds)} left" if seconds else ""


def _left_s(rows: Sequence[Row]) -> float | None:
    """Return the seconds until the Teachers, or the cells, have ended; None if the seconds of an epoch are unknown.

    Those that wait take as many epochs as the longest, each as long as in the slowest that runs, or else has run, and
    run as many at a time as now, those that have stopped early included.
    """
    records = [row.record for row in rows]
    running, waiting = ([record for record in records if record.status in of] for of in (("RUNNING",), WAITS))
    if not running and not waiting:
        return 0.0
    slowest_s = _slowest_s(running) or _slowest_s(records)
    if not slowest_s:
        return None
    epochs = max(record.epochs for record in records)
    works = [(record, epoch_s(record.times_ms) or slowest_s) for record in running]
    works += [(record, slowest_s) for record in waiting]
    begun_ms = min((record.started_ms for record in running), default=math.inf)
    ended = sum(record.status == "FINISHED" and record.ended_ms > begun_ms for record in records)
    at_once = len(running) + ended or max(Counter(row.group for row in rows if row.record.status in WAITS).values())
    return left_s(
        [[((record.epochs or epochs) - len(record.history), pace_s)] for record, pace_s in works], places=at_once
    )


def _slowest_s(records: Sequence[Record]) -> float:
    return max((epoch_s(record.times_ms) or 0.0 for record in records), default=0.0)


# ---- text ------------------------------------------------------------------------------------------------------------


def report(sweep: str, rows: Sequence[Row], *, now_ms: int) -> str:
    """Return the text on a sweep; ``now_ms`` are milliseconds since 1970."""
    teachers, cells = ([row for row in rows if row.is_teacher is kind] for kind in (True, False))
    lines = [f"sweep {sweep}: {plural(len(cells), 'cell')}: {_counts(cells)}{outlook(rows)}"]
    lines += [f"Teachers: {_counts(teachers)}"] if teachers else []
    if unfinished := [row for row in rows if row.record.status != "FINISHED"]:
        lines += ["", *_unfinished(unfinished, now_ms=now_ms)]
    finished = [row for row in rows if row.record.status == "FINISHED"]
    if finished:
        dice = [(row.title, f"{100 * row.record.values.get('test/dice', math.nan):.2f}") for row in finished]
        lines += ["", *_align([("finished", "test Dice %"), *dice])]
    return "\n".join([*lines, ""])


def _counts(rows: Sequence[Row]) -> str:
    counts = Counter(row.record.status for row in rows)
    return ", ".join(f"{counts[status]} {name}" for status, name in STATES.items() if counts[status] or name == "done")


def _unfinished(rows: Sequence[Row], *, now_ms: int) -> list[str]:
    """Return a header and a line per row, many that wait alike in one, with the errors of failed ones."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        waits = row.record.status in ("WAITING", "QUEUED") and not row.record.history
        alike = (row.record.status, row.is_teacher, row.group, row.job)
        groups.setdefault(alike if waits else row.title, []).append(row)
    table: list[tuple[str, ...]] = [(*HEADER, "job" if any(row.job for row in rows) else "")]
    errors = [""]
    for members in groups.values():
        first, titled = members[0], {row.title: row for row in members}
        if len(members) > FEW:
            titled = {f"{len(members)} {'Teachers' if first.is_teacher else 'cells'} {first.group}": first}
        for title, row in titled.items():
            table.append((title, *_columns(row.record, now_ms=now_ms), row.job))
            errors.append(_error(row.record))
    return [text for line, error in zip(_align(table), errors, strict=True) for text in (line, error) if text]


def _columns(record: Record, *, now_ms: int) -> tuple[str, ...]:
    """Return the columns of HEADER after the first one."""
    epochs = f"epoch {len(record.history)} of {record.epochs}" if record.epochs else ""
    dice = f"{record.history[-1].get('val/dice', math.nan):.3f}" if record.history else ""
    ago = left = ""
    if record.status == "RUNNING" and record.times_ms:
        ago = f"{duration(max(0, now_ms - record.times_ms[-1]) / 1000)} ago"
    if record.status == "RUNNING" and (pace_s := epoch_s(record.times_ms)) is not None:
        left = f"at most {duration(left_s([[(record.epochs - len(record.history), pace_s)]]))}"
    return STATES[record.status], epochs, dice, ago, left


def _error(record: Record) -> str:
    log = record.folder / "kdsweep.log"  # a Teacher has none: the error is in the logs of its cells
    return f"    {record.error}{f'; log: {log}' if log.exists() else ''}" if record.status == "FAILED" else ""


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
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
    from kdsweep.tuning.study import one_row_each, read_studies, read_trials  # optuna: others do without

    studies = read_studies(store, sweep)
    trials, planned = read_trials(studies), sum(study.user_attrs["trials"] for study in studies)
    states, names = Counter(trials["state"]), {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    counts = ", ".join(f"{states[state]} {name}" for state, name in names.items() if states[state])
    line = f"tuning of sweep {sweep}: {len(trials)} of {planned} trials ended{f': {counts}' if counts else ''}"
    if len(trials) < planned:
        is_held = is_locked(sweep_file.tuning_lock(store, sweep))
        line += "; a round is being trained" if is_held else "; nothing is running, the same command resumes"
    rows: list[tuple[str, ...]] = [("tuned", "trials", "best val/dice", "of trial")]
    for (notation, split), rows_of in trials.groupby(["notation", "split"]):
        best = [(f"{row.value:.3f}", str(row.number)) for row in rows_of[rows_of["is_chosen"]].itertuples()]
        rows.append((f"{notation} split {split}", str(len(rows_of)), *(best or [("", "")])[0]))
    lines = [line, "", *_align(rows), ""]
    if trials_file:
        try:
            write_text(trials_file, one_row_each(trials).to_csv(index=False))
        except OSError as error:
            raise InputError(f"--trials {trials_file}: cannot be written ({error.strerror})") from error
        lines += [f"wrote {plural(len(trials), 'trial')} to {trials_file}", ""]
    return "\n".join([*lines, ""])


# ---- the command -----------------------------------------------------------------------------------------------------


def make(*, store: Path, sweep: str | None, trials_file: Path | None = None) -> str:
    """Return the report on a sweep of a store, by default the latest, and write its trials to a file if one is named.

    Raises:
        InputError: there is no such sweep, or it has no trials to be written.
    """
    names = sweep_file.sweeps(store)
    if not names:
        raise InputError(f"--store {store}: no sweep was started in it yet")
    if sweep is not None and sweep not in names:
        raise InputError(f"--sweep {sweep}: not in this store; it holds: {', '.join(sorted(names))}")
    name = sweep or names[-1]
    base = sweep_file.as_configured(store, name)
    is_tuned = sweep_file.read(store, base).storage is not None
    if trials_file and not is_tuned:
        remedy = f"sweep {base} was not tuned: `python -m kdsweep -m +experiment=tuned`"
        raise InputError(f"--trials {trials_file}: {remedy}")
    text = tuning(store, base, trials_file=trials_file) if is_tuned else ""
    try:
        tasks = slurm.queued(request.folder(store) for request in sweep_file.read(store, name).requests.values())
        problem = ""
    except slurm.QueueError as error:
        tasks, problem = {}, f"\nSLURM's queue cannot be read: {error}\n"
    rows = read_rows(store, name, tasks=tasks)
    return text + (report(name, rows, now_ms=cell_folder.now_ms()) + problem if rows else "")
