"""A lockstep group from its configurations to its results: cells that share batches, Teachers and a process."""

from __future__ import annotations

import contextlib
import logging
import time
from functools import partial

from kdsweep.config import grid, identity
from kdsweep.config.grid import Cell
from kdsweep.config.identity import Job
from kdsweep.config.schema import Settings
from kdsweep.core import logs
from kdsweep.core.device import give_back_memory
from kdsweep.core.errors import CellError, DeviceError, one_line
from kdsweep.models.unet import UNet
from kdsweep.runs import records
from kdsweep.training import factory, runner, teachers
from kdsweep.training.learner import Learner

log = logging.getLogger(__name__)

Result = float | Exception


class TeacherError(CellError):
    """A cell cannot be trained because its Teacher could not."""


def run_group(jobs: list[Job]) -> list[Result]:
    """Train the cells of these jobs together, from their checkpoints on.

    What another command has finished meanwhile is read; what one computes at the moment is waited for at the end.

    Args:
        jobs: of different cells, with equal ``identity.batches_key``.

    Returns:
        The test Dice of each cell, or the error that ended it. An error of one leaves the others alone. A DeviceError
        is not the cell's fault: a fresh process resumes the cell.
    """
    results: dict[Job, Result] = {}
    waits = False
    while missing := [job for job in jobs if job not in results]:
        with contextlib.ExitStack() as held:
            free = []
            for job in missing:
                try:
                    if not records.hold(held, job.cell.folder):
                        continue
                    if (finished := records.read_finished(job.cell.folder)) is not None:
                        results[job] = finished["test/dice"]
                    else:
                        free.append(job)
                except OSError as error:  # a folder that cannot be written to
                    results[job] = _failed(job.cell, error)
            if free:
                results |= dict(zip(free, _train(free), strict=True))
        if len(results) < len(jobs) and not free:
            if not waits:
                log.info("%s: another command computes it; waiting for that", missing[0].cell.title)
            waits = True
            time.sleep(teachers.LOOK_EVERY_S)
    return [results[job] for job in jobs]


def run_trials(jobs: list[Job], *, pruning: runner.Pruning, role: str) -> list[Result]:
    """Train trials together, from their checkpoints on, until each has had its last epoch or is pruned.

    Nothing is tested: what is chosen among the trials is tested afterwards, from its checkpoint.

    Args:
        jobs: of different cells that can share their batches.
        pruning: of these trials.
        role: ``teacher`` for trials of the Teachers of these jobs, else those of the Students.

    Returns:
        The validation Dice of each trial's best epoch, or the error that ended it.
    """
    cells = [job.cell.teacher if role == "teacher" and job.cell.teacher is not None else job.cell for job in jobs]
    with contextlib.ExitStack() as held:
        for cell in sorted(cells, key=lambda cell: cell.folder):  # in one order: two commands never wait for each other
            if records.is_held(cell.folder):
                log.info("%s: another command computes it; waiting for that", cell.title)
            while not records.hold(held, cell.folder):
                time.sleep(teachers.LOOK_EVERY_S)
        since_ms = records.now_ms()
        try:
            if role != "teacher":
                outcomes = _outcomes(jobs, pruning=pruning)
            else:
                first = jobs[0].settings
                outcomes = runner.run_divided(
                    [partial(_make_teacher, job.settings, cell) for job, cell in zip(jobs, cells, strict=True)],
                    teachers={},
                    feed=factory.feed(first, seed=first.teacher.seed),
                    compute=factory.compute(first),
                    pruning=pruning,
                )
        except DeviceError as error:
            return [_before_loss(job.settings, cell, error, since_ms) for job, cell in zip(jobs, cells, strict=True)]
    return [values if isinstance(values, Exception) else values["best/val_dice"] for values in outcomes]


def _train(jobs: list[Job]) -> list[Result]:
    since_ms = records.now_ms()
    try:
        outcomes = _outcomes(jobs)
    except DeviceError as error:
        return [_before_loss(job.settings, job.cell, error, since_ms) for job in jobs]
    return [values if isinstance(values, Exception) else values["test/dice"] for values in outcomes]


def _before_loss(settings: Settings, cell: Cell, lost: DeviceError, since_ms: int) -> Result:
    """Return how a cell had ended before the device failed, from the store; if it had not, that error."""
    record = records.read(cell.folder)
    if record.status == "FINISHED":
        return record.values["test/dice"]
    if record.error and record.ended_ms >= since_ms:
        return CellError(record.error)
    known = records.read(cell.teacher.folder) if cell.teacher is not None else record
    if known.error and known.ended_ms >= since_ms:
        describe(settings, cell)
        return _failed(cell, TeacherError(f"{cell.title}: its Teacher could not be trained: {known.error}"))
    return lost


def _outcomes(jobs: list[Job], *, pruning: runner.Pruning | None = None) -> list[runner.Values | Exception]:
    first = jobs[0].settings
    compute = factory.compute(first)
    compute.prepare()
    frozen = obtain_teachers(jobs)
    return runner.run_divided(
        [partial(_make, job, frozen) for job in jobs],
        teachers={name: network for name, network in frozen.items() if not isinstance(network, Exception)},
        feed=factory.feed(first, seed=first.seed),
        compute=compute,
        pruning=pruning,
    )


def _make(job: Job, frozen: dict[str, UNet | Exception]) -> Learner | Exception:
    """Return the learner of a cell, or the error that prevents it."""
    settings, cell = job.settings, job.cell
    with logs.about(cell.folder):
        try:
            describe(settings, cell)
            lacking = frozen.get(cell.evidence.get("teacher", ""))
            if isinstance(lacking, Exception):
                raise TeacherError(f"{cell.title}: its Teacher could not be trained: {one_line(lacking)}") from lacking
            return factory.learner(settings, cell)
        except Exception as error:
            return _failed(cell, error)


def _failed(cell: Cell, error: Exception) -> Exception:
    line = one_line(error)
    log.error("%s%s", "" if line.startswith(cell.title) else f"{cell.title}: ", line, exc_info=error)
    records.write_failed(cell.folder, line)
    return error


def obtain_teachers(jobs: list[Job]) -> dict[str, UNet | Exception]:
    """Return the Teachers of these cells by fingerprint; train those that are missing, together if possible.

    Args:
        jobs: of any cells; the Student baseline needs no Teacher.
    """
    needed = {cell.fingerprint: (job.settings, cell) for job in jobs if (cell := job.cell.teacher) is not None}
    pairs = list(needed.values())
    frozen: dict[str, UNet | Exception] = {}
    for group in grid.group_by([identity.batches_key(settings, seed=settings.teacher.seed) for settings, _ in pairs]):
        first, _ = pairs[group[0]]
        frozen |= teachers.obtain(
            [_new_teacher(*pairs[position]) for position in group],
            feed=factory.feed(first, seed=first.teacher.seed),
            compute=factory.compute(jobs[0].settings),
        )
        give_back_memory()
    return frozen


def _new_teacher(settings: Settings, cell: Cell) -> teachers.Wanted:
    return teachers.Wanted(cell, partial(factory.teacher_network, settings), partial(_make_teacher, settings, cell))


def _make_teacher(settings: Settings, cell: Cell) -> Learner | Exception:
    try:
        describe(settings, cell)
        return factory.teacher_learner(settings, cell)
    except Exception as error:
        return _failed(cell, error)


def describe(settings: Settings, cell: Cell) -> None:
    """Write into the folder of a cell which cell it is."""
    params = identity.params(settings) | identity.factors(settings, role=cell.role)
    records.describe(cell, split=identity.split_ids(settings), params=params, tags=factory.tags(settings))
