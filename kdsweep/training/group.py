"""A lockstep group from its jobs to its results: cells that share batches, Teachers and a process.

The cells are locked, and their Teachers obtained: each is trained once per fingerprint, then read by every cell and
later sweep of the store. Then the learners resume, train and are tested, half of them at a time where memory is short.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from kdsweep.config import grid, identity
from kdsweep.config.grid import TEACHER, Cell, weights_file
from kdsweep.config.identity import Job
from kdsweep.core import logs
from kdsweep.core.device import give_back_memory, is_out_of_memory, placed
from kdsweep.core.errors import CellError, one_line
from kdsweep.models import networks
from kdsweep.models.ensemble import Ensemble
from kdsweep.models.networks import Network
from kdsweep.store import cell_folder, checkpoint
from kdsweep.training import build
from kdsweep.training.guard import log_failure
from kdsweep.training.learner import Learner
from kdsweep.training.lockstep import Outcome, Pruning, run

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0

Networks = dict[str, Network | Exception]  # Teachers by fingerprint, or the errors that ended their training


def run_group(jobs: list[Job]) -> list[float | Exception]:
    """Train different cells with equal ``identity.batches_key`` together, from their checkpoints on.

    Returns the test Dice of each cell, or the error that ended it, which leaves the others alone. Raises DeviceError if
    the device failed; a fresh process resumes the cells.
    """
    outcomes = _complete(jobs, lambda missing: _train(missing, obtain_teachers(missing)))
    return [_value(outcome, "test/dice") for outcome in outcomes]


def run_trials(jobs: list[Job], *, pruning: Pruning) -> list[float | Exception]:
    """Train trials, of cells or Teachers, as ``run_group`` does, until each has had its last epoch or is pruned.

    Returns the validation Dice of each trial's best epoch, or the error that ended it. Nothing is tested: the chosen
    trial is tested afterwards, from its checkpoint.
    """
    with contextlib.ExitStack() as locks:
        for job in sorted(jobs, key=lambda job: job.cell.folder):  # so that no two commands block each other
            if cell_folder.is_held(job.cell.folder):
                _log_waiting([job])
            while not cell_folder.hold(locks, job.cell.folder):
                time.sleep(LOOK_EVERY_S)
        return [_value(outcome, "best/val_dice") for outcome in _train(jobs, obtain_teachers(jobs), pruning)]


def obtain_teachers(jobs: list[Job]) -> Networks:
    """Return the frozen Teachers of these cells by fingerprint; train or score those that are missing together."""
    needed = {cell.fingerprint: replace(job, cell=cell) for job in jobs if (cell := job.cell.teacher) is not None}
    teachers, networks = list(needed.values()), dict[str, Network | Exception]()
    # Members first: an ensemble's lock would keep them from being trained with it.
    members = [member for job in teachers for member in _members(job)]
    train = partial(_train_teachers, members=obtain_teachers(members) if members else {})
    for group in grid.group_by([identity.batches_key(job.settings, seed=job.cell.seed) for job in teachers]):
        together = [teachers[position] for position in group]
        for job in together:
            folder, name = job.cell.folder, weights_file(TEACHER)
            if cell_folder.read_finished(folder) is not None and not cell_folder.check_file(folder, name):
                cell_folder.forget_finished(folder, folder / name)
        for job, outcome in zip(together, _complete(together, train), strict=True):
            networks[job.cell.fingerprint] = outcome if isinstance(outcome, Exception) else _read_teacher(job)
        give_back_memory()
    return networks


def _members(job: Job) -> list[Job]:
    """Return a job for each Teacher of an ensemble that is not finished, as of a cell that learns from it."""
    if cell_folder.read_finished(job.cell.folder) is not None:
        return []
    each = ((settings, job.cell.members[name]) for name, settings in job.settings.members.items())
    return [Job(settings, replace(job.cell, teacher=cell)) for settings, cell in each]


def _train_teachers(jobs: list[Job], *, members: Networks) -> list[Outcome]:
    for job in jobs:
        how = "not in the store yet, so trained first"
        if job.cell.members:
            how = f"the mean of {len(job.cell.members)} Teachers, scored first"
        elif job.settings.teacher.trained is not None:
            how = f"comes trained ({job.settings.teacher.trained}), scored first"
        log.info("%s: %s", job.cell.title, how)
    return _train(jobs, members)


def _read_teacher(job: Job) -> Network:
    log.info("%s: read from %s", job.cell.title, job.cell.folder)
    network = build.teacher_network(job.settings, weights="none")
    checkpoint.load_network(job.cell.folder / weights_file(TEACHER), network)
    return networks.freeze(placed(network, build.compute(job.settings)))


def _complete(jobs: list[Job], train: Callable[[list[Job]], list[Outcome]]) -> list[Outcome]:
    """Return the outcomes of cells; train those that are not finished, wait for those that another process trains."""
    outcomes, is_waiting = dict[Path, Outcome](), False
    while missing := [job for job in jobs if job.cell.folder not in outcomes]:
        with contextlib.ExitStack() as locks:
            free = [job for job in missing if _is_free(job.cell, locks, outcomes)]
            outcomes |= zip((job.cell.folder for job in free), train(free) if free else [], strict=True)
        busy = [job for job in missing if job.cell.folder not in outcomes]
        if busy and not free:
            if not is_waiting:
                _log_waiting(busy)
            is_waiting = True
            time.sleep(LOOK_EVERY_S)
    return [outcomes[job.cell.folder] for job in jobs]


def _is_free(cell: Cell, locks: contextlib.ExitStack, outcomes: dict[Path, Outcome]) -> bool:
    """Lock a cell that can be trained now; add the outcome of one that is finished or cannot be written to."""
    try:
        if (values := cell_folder.read_finished(cell.folder)) is None:
            if not cell_folder.hold(locks, cell.folder):
                return False
            if (values := cell_folder.read_finished(cell.folder)) is None:
                return True
        outcomes[cell.folder] = values
    except OSError as error:
        outcomes[cell.folder] = _failed(cell, error)
    return False


def _log_waiting(jobs: list[Job]) -> None:
    log.info("%s: another command computes it; waiting for that", ", ".join(job.cell.title for job in jobs))


def _value(outcome: Outcome, name: str) -> float | Exception:
    return outcome if isinstance(outcome, Exception) else outcome[name]


def _train(jobs: list[Job], networks: Networks, pruning: Pruning | None = None) -> list[Outcome]:
    """Train cells that share their batches, with these Teachers, as many at a time as fit into memory."""
    first = jobs[0]
    compute = build.compute(first.settings)
    feed = build.feed(first.settings, seed=first.cell.seed)
    frozen = {name: network for name, network in networks.items() if not isinstance(network, Exception)}

    def train(jobs: list[Job]) -> list[Outcome]:
        made = [_make(job, networks) for job in jobs]
        try:
            return run(made, teachers=frozen, feed=feed, compute=compute, pruning=pruning)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(jobs) == 1:
                remedy = "a smaller train.batch_size helps"
                lack = CellError(f"{jobs[0].cell.title}: out of memory on {compute.device}; {remedy}")
                lack.__cause__ = error
                return [_failed(jobs[0].cell, lack)]
            log.warning("out of memory with %d learners on %s: divided in two", len(jobs), compute.device)
        del made
        give_back_memory()
        half = len(jobs) // 2
        return train(jobs[:half]) + train(jobs[half:])

    try:
        return train(jobs)
    finally:
        feed.train.close()


def _make(job: Job, networks: Networks) -> Learner | Exception:
    """Return the learner of a cell, or the error that prevents it."""
    cell = job.cell
    try:
        build.describe(job.settings, cell)
        teachers = dict(cell.members) if cell.teacher is None else {"teacher": cell.teacher}
        trained = {name: networks[teacher.fingerprint] for name, teacher in teachers.items()}
        for teacher in trained.values():
            if isinstance(teacher, Exception):
                raise CellError(f"{cell.title}: its Teacher could not be trained: {one_line(teacher)}") from teacher
        learner = build.learner(job.settings, cell)
        if cell.members:
            members = {name: teacher for name, teacher in trained.items() if isinstance(teacher, Network)}
            learner.network.load_state_dict(Ensemble(members).state_dict())
        return learner
    except Exception as error:
        return _failed(cell, error)


def _failed(cell: Cell, error: Exception) -> Exception:
    with logs.about(cell.folder):
        log_failure(cell.title, cell.folder, error)
    return error
