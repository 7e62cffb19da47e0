"""The interface of all executors (local.py, slurm.py, ray.py), and what follows when a process is lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdsweep.config.grid import Cell
from kdsweep.core.errors import CellError, DeviceError, InputError, LostError, one_line
from kdsweep.core.progress import plural
from kdsweep.store import cell_folder
from kdsweep.sweep.executors import worker

if TYPE_CHECKING:  # status, which must be quick, imports this module
    from kdsweep.config.identity import Job
    from kdsweep.sweep.estimate import Preview

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0

Result = float | Exception
Results = Future[list[Result]]  # of a work, to come


@dataclass(frozen=True, eq=False)
class Work:
    """The work of one process: a function and the jobs of a lockstep group, which are pickled."""

    call: Callable[[list[Any]], list[Any]]  # returns a result or an error for each job
    jobs: list[Job]
    devices: list[str]  # of this machine where it can run, one several times for as many processes
    cells: list[Cell]  # of each job the cell or the Teacher that is computed
    is_requested: bool = True  # the cells are those of a sweep; trials are not, and are not logged to MLflow


class Executor:
    """Computes works, several at once if it can; closed at the end of a ``with`` block."""

    largest: int | None = None  # cells in a group at most; None for plan.LARGEST
    machines = ""  # name of the machines of a cluster that compute; empty for this one
    has_dependencies = False  # a submitted work waits by itself for the Teachers of its cells
    wait = True  # for results

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise InputError if these cells cannot be computed as they are configured."""

    def preview(self, jobs: list[Job], *, times: bool) -> Preview:
        """Check cells, which represent all that wait, with their real networks.

        ``times`` says whether to time steps even if this machine trains none of the cells.
        """
        call = partial(worker.preview, elsewhere=self.machines, times=times)
        result: Preview = worker.Processes().call(call, jobs)
        return result

    def queued(self, jobs: Sequence[Job]) -> set[Path]:
        """Return the folders of those of these cells that an earlier command has left in a queue."""
        return set()

    def submit(self, work: Work) -> Results | None:
        """Have a work computed in a fresh process.

        Returns:
            Its results, or the error that ended it, LostError if a fresh process may do better. None if it must be
            submitted later: no device is free, or another command computes its cells.
        """
        raise NotImplementedError

    def look(self) -> None:
        """Do what a round of submissions leaves to do, and set results that have come; called about once a second."""

    def close(self, error: BaseException | None) -> None:
        """Stop what runs if an error or a signal ends the command; else release what is held."""


def run(executor: Executor, works: Sequence[Work], *, before: Sequence[Work] = ()) -> Iterator[tuple[Work, list[Any]]]:
    """Compute works; yield each with a result or an error for each of its jobs, as they end.

    If a process is lost (a failed device, a lack of memory, a crash), its unfinished cells resume from their
    checkpoints in two halves, down to single cells. A cell whose process is lost when it is alone fails; the others
    finish. ``works`` begin in their order, after ``before``: Teachers that they need, which are not yielded.
    """
    if before and not executor.has_dependencies:
        for _ in run(executor, before):
            pass
        before = ()
    results: dict[Work, dict[Path, Result]] = {work: {} for work in [*before, *works]}
    origins = {work: work for work in results}  # by part
    backlog, pending, is_waiting = list(results), dict[Results, tuple[Work, int]](), False
    while backlog or pending:
        for part in list(backlog):
            since_ms = cell_folder.now_ms()
            if (future := executor.submit(part)) is not None:
                pending[future] = part, since_ms
                backlog.remove(part)
        if not pending and not is_waiting:
            log.info("all that is left is computed by another command: waiting for it")
        if is_waiting := not pending:
            time.sleep(LOOK_EVERY_S)
        executor.look()
        for future in wait(pending, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED).done:
            part, since_ms = pending.pop(future)
            if isinstance(future.exception(), DeviceError):  # another device computes it
                backlog.insert(0, part)
                continue
            work, ended = origins[part], _ended(part, future, since_ms)
            results[work] |= {folder: result for folder, result in ended.items() if not isinstance(result, LostError)}
            halves = _halves(part, ended)
            origins |= dict.fromkeys(halves, work)
            backlog = [*halves, *backlog]
            if len(results[work]) == len(work.cells) and work not in before:
                yield work, [results[work][cell.folder] for cell in work.cells]


def _ended(work: Work, future: Results, since_ms: int) -> dict[Path, Result]:
    """Return the results of a work by folder; a cell whose process is lost when it is alone has failed."""
    folders = [cell.folder for cell in work.cells]
    try:
        results = future.result()
    except Exception as error:
        is_line = isinstance(error, InputError | CellError)
        cause = error if is_line else LostError(f"its process was lost: {one_line(error)[:300]}")  # Ray says much
        results = [_recorded(folder, cause, work=work, since_ms=since_ms) for folder in folders]
    if len(results) == 1 and isinstance(results[0], LostError):
        cell_folder.write_failed(folders[0], str(results[0]))
        results = [CellError(str(results[0]))]
    return dict(zip(folders, results, strict=True))


def _recorded(folder: Path, error: Exception, *, work: Work, since_ms: int) -> Result:
    """Return how a cell has ended since then, from its folder; the error if it has not."""
    record = cell_folder.read(folder)
    if record.status == "FINISHED" and work.is_requested:
        return record.values["test/dice"]
    return CellError(record.error) if record.error and record.ended_ms >= since_ms else error


def _halves(work: Work, ended: dict[Path, Result]) -> list[Work]:
    """Return two halves of the cells that a work has lost."""
    lost = {folder: result for folder, result in ended.items() if isinstance(result, LostError)}
    members = [(job, cell) for job, cell in zip(work.jobs, work.cells, strict=True) if cell.folder in lost]
    half = -(-len(members) // 2)
    if lost:
        how = "two halves" if len(lost) > 1 else "a fresh process"
        log.warning("%s: %s; resuming in %s", plural(len(lost), "cell"), next(iter(lost.values())), how)
    parts = [part for part in (members[:half], members[half:]) if part]
    return [replace(work, jobs=[job for job, _ in part], cells=[cell for _, cell in part]) for part in parts]


def check_least(options: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Raise InputError for the first option of the launcher that is below its least value."""
    for name, lowest in least.items():
        if options[name] is not None and options[name] < lowest:
            raise InputError(f"hydra.launcher.{name}={options[name]} is not allowed: it must be at least {lowest}")


def check_tracking(jobs: Sequence[Job]) -> None:
    """Raise InputError unless several machines can write to MLflow at once: SQLite cannot."""
    from kdsweep.tracking import database

    for settings in (job.settings for job in jobs):
        where = database.store_uri(Path(settings.store), settings.tracking.uri)
        if where.startswith("sqlite"):
            raise InputError(
                f"tracking.uri={settings.tracking.uri}: workers on several machines cannot share the SQLite file "
                f"{where[10:]}; start an MLflow server that all reach and name it, tracking.uri=http://HOST:5000"
            )
