"""A lockstep group from its jobs to its results: cells that share batches, Teachers and a process.

A Teacher is trained once per fingerprint, then read by every cell and later sweep of the store.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kdsweep.config import grid, identity, inputs
from kdsweep.config.grid import TEACHER, Cell
from kdsweep.config.identity import Job
from kdsweep.config.schema import Settings
from kdsweep.core import logs
from kdsweep.core.device import Compute, give_back_memory, placed
from kdsweep.core.errors import CellError, DeviceError, one_line
from kdsweep.models import unet
from kdsweep.models.unet import UNet
from kdsweep.store import cell_folder, checkpoint
from kdsweep.training import build, outcome, runner
from kdsweep.training.learner import Learner

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
Networks = dict[str, UNet | Exception]  # Teachers by fingerprint, or the errors that ended their training
Outcome = runner.Values | Exception


class TeacherError(CellError):
    """A cell cannot be trained because its Teacher could not."""


def run_group(jobs: list[Job]) -> list[float | Exception]:
    """Train the cells of these jobs together, from their checkpoints on.

    Args:
        jobs: of different cells, with equal ``identity.batches_key``.

    Returns:
        The test Dice of each cell, or the error that ended it. An error of one leaves the others alone. A DeviceError
        is not the cell's fault: a fresh process resumes the cell.
    """
    by_cell = {job.cell.folder: job for job in jobs}
    outcomes = _complete([job.cell for job in jobs], lambda cells: _train([by_cell[cell.folder] for cell in cells]))
    return [_value(outcome, "test/dice") for outcome in outcomes]


def run_trials(jobs: list[Job], *, pruning: runner.Pruning) -> list[float | Exception]:
    """Train trials together, from their checkpoints on, until each has had its last epoch or is pruned.

    Nothing is tested: what is chosen among the trials is tested afterwards, from its checkpoint.

    Args:
        jobs: of different cells or Teachers that can share their batches.
        pruning: of these trials.

    Returns:
        The validation Dice of each trial's best epoch, or the error that ended it.
    """
    with contextlib.ExitStack() as held:
        for cell in sorted(
            (job.cell for job in jobs), key=lambda cell: cell.folder
        ):  # no two commands block each other
            if cell_folder.is_held(cell.folder):
                _log_waiting([cell])
            while not cell_folder.hold(held, cell.folder):
                time.sleep(LOOK_EVERY_S)
        return [_value(outcome, "best/val_dice") for outcome in _train(jobs, pruning=pruning)]


def _complete(cells: list[Cell], train: Callable[[list[Cell]], list[Outcome]]) -> list[Outcome]:
    """Return the final values of cells, or the errors that ended them; train those that no process has finished.

    Cells that another process computes at the moment are waited for at the end.
    """
    outcomes: dict[Path, Outcome] = {}
    waits = False
    while missing := [cell for cell in cells if cell.folder not in outcomes]:
        with contextlib.ExitStack() as held:
            free = []
            for cell in missing:
                try:
                    if not cell_folder.hold(held, cell.folder):
                        continue
                    if (finished := cell_folder.read_finished(cell.folder)) is not None:
                        outcomes[cell.folder] = finished
                    else:
                        free.append(cell)
                except OSError as error:  # a folder that cannot be written to
                    outcomes[cell.folder] = _failed(cell, error)
            if free:
                outcomes |= dict(zip((cell.folder for cell in free), train(free), strict=True))
        if not free and len(outcomes) < len(cells):
            if not waits:
                _log_waiting([cell for cell in cells if cell.folder not in outcomes])
            waits = True
            time.sleep(LOOK_EVERY_S)
    return [outcomes[cell.folder] for cell in cells]


def _log_waiting(cells: list[Cell]) -> None:
    log.info("%s: another command computes it; waiting for that", ", ".join(cell.title for cell in cells))


def _value(outcome: Outcome, name: str) -> float | Exception:
    return outcome if isinstance(outcome, Exception) else outcome[name]


def _train(jobs: list[Job], *, pruning: runner.Pruning | None = None) -> list[Outcome]:
    """Train cells and the Teachers that they need; if the device fails, return how each cell had ended."""
    first, since_ms = jobs[0], cell_folder.now_ms()
    compute = build.compute(first.settings)
    compute.prepare()
    try:
        frozen = obtain_teachers(jobs)
        return runner.run_divided(
            [partial(_make, job.settings, job.cell, frozen) for job in jobs],
            teachers={name: network for name, network in frozen.items() if not isinstance(network, Exception)},
            feed=build.feed(first.settings, seed=first.cell.seed),
            compute=compute,
            pruning=pruning,
        )
    except DeviceError as error:
        return [_before_loss(job, error, since_ms) for job in jobs]


def _before_loss(job: Job, lost: DeviceError, since_ms: int) -> Outcome:
    """Return how a cell had ended before the device failed, from the store; if it had not, that error."""
    cell, record = job.cell, cell_folder.read(job.cell.folder)
    if record.status == "FINISHED":
        return record.values
    if record.error and record.ended_ms >= since_ms:
        return CellError(record.error)
    if cell.teacher is not None:
        record = cell_folder.read(cell.teacher.folder)
        if record.error and record.ended_ms >= since_ms:
            describe(job.settings, cell)
            return _failed(cell, TeacherError(f"{cell.title}: its Teacher could not be trained: {record.error}"))
    return lost


def _make(settings: Settings, cell: Cell, frozen: Networks) -> Learner | Exception:
    """Return the learner of a cell, or the error that prevents it."""
    with logs.about(cell.folder):
        try:
            describe(settings, cell)
            teacher = frozen.get(cell.evidence.get("teacher", ""))
            if isinstance(teacher, Exception):
                raise TeacherError(f"{cell.title}: its Teacher could not be trained: {one_line(teacher)}") from teacher
            return build.learner(settings, cell)
        except Exception as error:
            return _failed(cell, error)


def _failed(cell: Cell, error: Exception) -> Exception:
    line = one_line(error)
    log.error("%s%s", "" if line.startswith(cell.title) else f"{cell.title}: ", line, exc_info=error)
    cell_folder.write_failed(cell.folder, line)
    return error


def obtain_teachers(jobs: list[Job]) -> Networks:
    """Return the trained and frozen Teachers of these cells by fingerprint; train those that are missing.

    Args:
        jobs: of any cells; the Student baseline needs no Teacher. Teachers that can share their batches are trained
            together.
    """
    needed = {cell.fingerprint: Job(job.settings, cell) for job in jobs if (cell := job.cell.teacher) is not None}
    teachers = list(needed.values())
    networks: Networks = {}
    for group in grid.group_by([identity.batches_key(job.settings, seed=job.cell.seed) for job in teachers]):
        networks |= _obtain([teachers[position] for position in group], build.compute(jobs[0].settings))
        give_back_memory()
    return networks


def _obtain(teachers: list[Job], compute: Compute) -> Networks:
    """Return Teachers that can share their batches."""
    networks: Networks = {}
    settings = {job.cell.folder: job.settings for job in teachers}

    def train(cells: list[Cell]) -> list[Outcome]:
        log.info("%s: not in the store yet, so trained first", ", ".join(cell.title for cell in cells))
        first = settings[cells[0].folder]
        makers: list[runner.Maker] = [partial(_make, settings[cell.folder], cell, {}) for cell in cells]
        feed = build.feed(first, seed=first.teacher.seed)
        return runner.run_divided(makers, teachers={}, feed=feed, compute=compute)

    while missing := [job.cell for job in teachers if job.cell.fingerprint not in networks]:
        read = {cell.fingerprint: _read(settings[cell.folder], cell, compute) for cell in missing}
        networks |= {name: network for name, network in read.items() if network is not None}
        missing = [cell for cell in missing if cell.fingerprint not in networks]
        for cell, end in zip(missing, _complete(missing, train), strict=True):
            if isinstance(end, Exception):  # those that succeed are read next
                networks[cell.fingerprint] = end
    return networks


def _read(settings: Settings, cell: Cell, compute: Compute) -> UNet | None:
    """Return a Teacher from the store, or None; a damaged one is forgotten."""
    folder, weights = cell.folder, outcome.weights_file(TEACHER)
    if cell_folder.read_finished(folder) is None:
        return None
    if not cell_folder.check_file(folder, weights):
        cell_folder.forget_finished(folder, folder / weights)
        return None
    log.info("%s: read from %s", cell.title, folder)
    network = build.teacher_network(settings)
    checkpoint.load_network(folder / weights, network)
    return unet.freeze(placed(network, compute))


def describe(settings: Settings, cell: Cell) -> None:
    """Write into the folder of a cell which cell it is."""
    params = identity.params(settings) | identity.factors(settings, role=cell.role)
    cell_folder.describe(cell, split=inputs.split_ids(settings), params=params, tags=build.tags(settings))
