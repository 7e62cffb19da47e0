"""The interface of all executors (local.py, slurm.py, ray.py), and what follows when a process is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdsweep.config.grid import Cell
from kdsweep.core.errors import CellError, InputError, LostError
from kdsweep.core.progress import plural
from kdsweep.store import cell_folder

if TYPE_CHECKING:
    from kdsweep.sweep.estimate import Preview
    from kdsweep.sweep.plan import Job

log = logging.getLogger(__name__)

Result = float | Exception
Results = Future[list[Result]]  # of a work, to come


class LeftError(LostError):
    """The job of an earlier command has ended; the cells that it has left resume together."""


@dataclass(frozen=True, eq=False)
class Work:
    """The work of one process: a function and the jobs of a lockstep group.

    Attributes:
        call: the function, which returns a result or an error for each job; picklable, as the jobs are.
        jobs: its argument.
        devices: names of the devices of this machine where it can run.
        cells: of each job what is computed: its cell or its Teacher.
        waits: returns whether the work must not begin yet.
        is_requested: whether the cells are those of a sweep; trials are not, and are not logged to MLflow.
    """

    call: Callable[[list[Any]], list[Any]]
    jobs: list[Job]
    devices: list[str]
    cells: list[Cell]
    waits: Callable[[], bool] = bool
    is_requested: bool = True

    def part(self, positions: Sequence[int]) -> Work:
        """Return the same with some of the jobs."""
        jobs = [self.jobs[position] for position in positions]
        return replace(self, jobs=jobs, cells=[self.cells[position] for position in positions])


class Executor:
    """Computes works, several at once if it can.

    Attributes:
        largest: the most cells in a group; None for ``plan.LARGEST``.
        is_queue: whether it takes works before earlier ones have ended.
    """

    largest: int | None = None
    is_queue = True

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise InputError if these cells cannot be computed as they are configured."""

    def preview(self, jobs: list[Job], *, times: bool) -> Preview:
        """Check cells with their real networks.

        Args:
            jobs: that stand for all that wait.
            times: whether to time steps even if this machine trains none of the cells.
        """
        raise NotImplementedError

    def queued(self, jobs: Sequence[Job]) -> set[Path]:
        """Return the folders of those of these cells that an earlier command has left in a queue."""
        return set()

    def at_once(self, preview: Preview) -> int:
        """Return how many works can run at the same time, as far as it can be said."""
        return 2  # so that no work holds a device while it waits for Teachers: they are computed before

    def submit(self, works: Sequence[Work], *, after: Sequence[Results] = ()) -> list[Results]:
        """Compute each of these in a fresh process each, once those of ``after`` have ended.

        Returns:
            One per work: its results, or the error that ended it, LostError if a fresh process may do better.
        """
        raise NotImplementedError

    def close(self, error: BaseException | None) -> None:
        """Stop what runs if an error or a signal ends the command; else release what is held."""


class _Run:
    """Works on their way through an executor."""

    def __init__(self, executor: Executor, works: Sequence[Work], before: Sequence[Work]) -> None:
        self.executor = executor
        self.results: dict[Work, list[Result | None]] = {work: [None] * len(work.jobs) for work in [*before, *works]}
        self.backlog = [(work, list(range(len(work.jobs)))) for work in works]
        self.pending: dict[Results, tuple[Work, list[int], int]] = {}
        self.first: list[Results] = []
        if before:
            self._submit([(work, list(range(len(work.jobs)))) for work in before])
        self.first = list(self.pending)

    def _submit(self, parts: list[tuple[Work, list[int]]]) -> None:
        since_ms = cell_folder.now_ms()
        futures = self.executor.submit([work.part(positions) for work, positions in parts], after=self.first)
        self.pending |= {future: (*part, since_ms) for future, part in zip(futures, parts, strict=True)}

    def ended(self) -> Iterator[Work]:
        """Yield each work when all of its results are there."""
        while self.backlog or self.pending:
            count = len(self.backlog) if self.executor.is_queue else int(not self.pending)
            parts, self.backlog = self.backlog[:count], self.backlog[count:]
            if parts:
                self._submit(parts)
            for future in wait(self.pending, return_when=FIRST_COMPLETED).done:
                work = self._take(future)
                if None not in self.results[work]:
                    yield work

    def _take(self, future: Results) -> Work:
        """Keep the results of a part; what was lost resumes in two halves, and what was lost alone fails."""
        work, positions, since_ms = self.pending.pop(future)
        lost: dict[int, LostError] = {}
        for position, result in zip(positions, _results(future, work.part(positions), since_ms), strict=True):
            if not isinstance(result, LostError):
                self.results[work][position] = result
            elif len(positions) > 1 or isinstance(result, LeftError):
                lost[position] = result
            else:
                cell_folder.write_failed(work.cells[position].folder, str(result))
                self.results[work][position] = CellError(str(result))
        is_left = any(isinstance(result, LeftError) for result in lost.values())
        if lost:
            how = "two halves" if len(lost) > 1 and not is_left else "a fresh process"
            log.warning("%s: %s; resuming in %s", plural(len(lost), "cell"), next(iter(lost.values())), how)
        half = len(lost) if is_left else -(-len(lost) // 2)
        parts = list(lost)[:half], list(lost)[half:]
        self.backlog = [*((work, part) for part in parts if part), *self.backlog]
        return work


def run(executor: Executor, works: Sequence[Work], *, before: Sequence[Work] = ()) -> Iterator[tuple[Work, list[Any]]]:
    """Compute works; yield each with a result or an error for each of its jobs, as they end.

    If a process is lost (a failed device, a lack of memory, a crash), its unfinished cells resume from their
    checkpoints in two halves, down to single cells. A cell whose process is lost when it is alone fails; the others
    finish.

    Args:
        executor: computes them.
        works: in the order in which they should begin.
        before: Teachers that the others depend on; they are not yielded.
    """
    running = _Run(executor, works, before)
    for work in running.ended():
        if work not in before:
            yield work, list(running.results[work])


def _results(future: Results, work: Work, since_ms: int) -> list[Result]:
    """Return the results of a work; where its process was lost, those in its cells' folders."""
    try:
        return future.result()
    except (InputError, CellError) as error:
        return [_recorded(cell, error, work=work, since_ms=since_ms) for cell in work.cells]


def _recorded(cell: Cell, error: Exception, *, work: Work, since_ms: int) -> Result:
    """Return how a cell has ended since then, from its folder; the error if it has not."""
    record = cell_folder.read(cell.folder)
    if record.status == "FINISHED" and work.is_requested:
        return record.values["test/dice"]
    return CellError(record.error) if record.error and record.ended_ms >= since_ms else error
