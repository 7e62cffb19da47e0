"""A lockstep group from its configurations to its results: cells that share batches, Teachers and a process."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from omegaconf import DictConfig

from kdsweep.config import grid, identity
from kdsweep.config.grid import Cell
from kdsweep.core import logs
from kdsweep.core.device import Compute, give_back_memory
from kdsweep.core.errors import CellError, DeviceError, one_line
from kdsweep.models.unet import UNet
from kdsweep.runs import records
from kdsweep.training import factory, runner, teachers
from kdsweep.training.learner import Learner

log = logging.getLogger(__name__)

Result = float | Exception


class TeacherError(CellError):
    """A cell cannot be trained because its Teacher could not."""


def run_group(configs: list[DictConfig], *, variants: Mapping[str, dict[str, str]] | None = None) -> list[Result]:
    """Train the cells of these configurations together, from their checkpoints on.

    What another command has finished meanwhile is read; what one computes at the moment is waited for at the end.

    Args:
        configs: of different cells, with equal ``cells.batches_key``.
        variants: by fingerprint those of the cells that have one.

    Returns:
        For each configuration its test Dice, or what ended it. What ends one leaves the others alone. A DeviceError
        is not the cell's fault: it goes on in a fresh process.
    """
    own = [identity.cell(cfg) for cfg in configs]
    own = [replace(cell, variant=(variants or {}).get(cell.fingerprint, {})) for cell in own]
    results: dict[int, Result] = {}
    waits = False
    while lacking := [number for number in range(len(own)) if number not in results]:
        with contextlib.ExitStack() as held:
            mine = []
            for number in lacking:
                try:
                    if not records.hold(held, own[number].folder):
                        continue
                    if (finished := records.read_finished(own[number].folder)) is not None:
                        results[number] = finished["test/dice"]
                    else:
                        mine.append(number)
                except OSError as error:  # a folder that cannot be written to
                    results[number] = _failed(own[number], error)
            if mine:
                outcomes = _train([configs[number] for number in mine], [own[number] for number in mine])
                results |= dict(zip(mine, outcomes, strict=True))
        if len(results) < len(own) and not mine:
            if not waits:
                log.info("%s: another command computes it; waiting for that", own[lacking[0]].title)
            waits = True
            time.sleep(teachers.LOOK_EVERY_S)
    return [results[number] for number in range(len(own))]


def run_trials(
    configs: list[DictConfig], *, pruning: runner.Pruning, role: str, variants: Mapping[str, dict[str, str]]
) -> list[Result]:
    """Train trials together, from their checkpoints on, until each has had its last epoch or is pruned.

    Nothing is tested: what is chosen among the trials is tested afterwards, from its checkpoint.

    Args:
        configs: of different cells that can share their batches.
        pruning: of these trials.
        role: ``teacher`` for trials of the Teachers of these configurations, else those of the Students.
        variants: by fingerprint the values that are tried.

    Returns:
        For each configuration the validation Dice of its best epoch, or what ended it.
    """
    cells = [identity.teacher_cell(cfg) if role == "teacher" else identity.cell(cfg) for cfg in configs]
    cells = [replace(cell, variant=variants.get(cell.fingerprint, {})) for cell in cells]
    with contextlib.ExitStack() as held:
        for cell in sorted(cells, key=lambda cell: cell.folder):  # in one order: two commands never wait for each other
            if records.is_held(cell.folder):
                log.info("%s: another command computes it; waiting for that", cell.title)
            while not records.hold(held, cell.folder):
                time.sleep(teachers.LOOK_EVERY_S)
        since_ms = records.now_ms()
        try:
            if role != "teacher":
                outcomes = _outcomes(configs, cells, pruning=pruning)
            else:
                outcomes = runner.run_divided(
                    [partial(_make_teacher, cfg, cell) for cfg, cell in zip(configs, cells, strict=True)],
                    teachers={},
                    feed=factory.feed(configs[0], seed=configs[0].teacher.seed),
                    compute=factory.compute(configs[0]),
                    pruning=pruning,
                )
        except DeviceError as error:
            return [_before_loss(cfg, cell, error, since_ms) for cfg, cell in zip(configs, cells, strict=True)]
    return [values if isinstance(values, Exception) else values["best/val_dice"] for values in outcomes]


def _train(configs: list[DictConfig], own: list[Cell]) -> list[Result]:
    since_ms = records.now_ms()
    try:
        outcomes = _outcomes(configs, own)
    except DeviceError as error:
        return [_before_loss(cfg, cell, error, since_ms) for cfg, cell in zip(configs, own, strict=True)]
    return [values if isinstance(values, Exception) else values["test/dice"] for values in outcomes]


def _before_loss(cfg: DictConfig, cell: Cell, lost: DeviceError, since_ms: int) -> Result:
    """Return how a cell had ended before the device failed, from the store; if it had not, that error."""
    record = records.read(cell.folder)
    if record.status == "FINISHED":
        return record.values["test/dice"]
    if record.error and record.ended_ms >= since_ms:
        return CellError(record.error)
    known = records.read(cell.teacher.folder) if cell.teacher is not None else record
    if known.error and known.ended_ms >= since_ms:
        describe(cfg, cell)
        return _failed(cell, TeacherError(f"{cell.title}: its Teacher could not be trained: {known.error}"))
    return lost


def _outcomes(
    configs: list[DictConfig], own: list[Cell], *, pruning: runner.Pruning | None = None
) -> list[runner.Values | Exception]:
    compute = factory.compute(configs[0])
    compute.prepare()
    frozen = obtain_teachers(configs, compute)
    return runner.run_divided(
        [partial(_make, cfg, cell, frozen) for cfg, cell in zip(configs, own, strict=True)],
        teachers={name: network for name, network in frozen.items() if not isinstance(network, Exception)},
        feed=factory.feed(configs[0], seed=configs[0].seed),
        compute=compute,
        pruning=pruning,
    )


def _make(cfg: DictConfig, cell: Cell, frozen: dict[str, UNet | Exception]) -> Learner | Exception:
    """The learner of a cell, or why there can be none."""
    with logs.about(cell.folder):
        try:
            describe(cfg, cell)
            lacking = frozen.get(cell.evidence.get("teacher", ""))
            if isinstance(lacking, Exception):
                raise TeacherError(f"{cell.title}: its Teacher could not be trained: {one_line(lacking)}") from lacking
            return factory.learner(cfg, cell)
        except Exception as error:
            return _failed(cell, error)


def _failed(cell: Cell, error: Exception) -> Exception:
    line = one_line(error)
    log.error("%s%s", "" if line.startswith(cell.title) else f"{cell.title}: ", line, exc_info=error)
    records.write_failed(cell.folder, line)
    return error


def obtain_teachers(configs: list[DictConfig], compute: Compute) -> dict[str, UNet | Exception]:
    """The Teachers of these cells by fingerprint; those that are not in the store are trained, together if they can be.

    Args:
        configs: of any cells; the Student baseline needs none.
        compute: device and precision.
    """
    wanted = {identity.teacher_cell(cfg).fingerprint: cfg for cfg in configs if identity.read(cfg).is_taught}
    own = list(wanted.values())
    found: dict[str, UNet | Exception] = {}
    for group in grid.group_by([identity.batches_key(cfg, seed=cfg.teacher.seed) for cfg in own]):
        members = [own[position] for position in group]
        found |= teachers.obtain(
            [_new_teacher(cfg) for cfg in members],
            feed=factory.feed(members[0], seed=members[0].teacher.seed),
            compute=compute,
        )
        give_back_memory()
    return found


def _new_teacher(cfg: DictConfig) -> teachers.Wanted:
    cell = identity.teacher_cell(cfg)
    return teachers.Wanted(cell, partial(factory.teacher_network, cfg), partial(_make_teacher, cfg, cell))


def _make_teacher(cfg: DictConfig, cell: Cell) -> Learner | Exception:
    try:
        describe(cfg, cell)
        return factory.teacher_learner(cfg, cell)
    except Exception as error:
        return _failed(cell, error)


def describe(cfg: DictConfig, own: Cell) -> None:
    """Write down what a cell is beside its results."""
    params = identity.params(cfg) | identity.factors(cfg, role=own.role)
    records.describe(own, split=identity.split_ids(cfg), params=params, tags=factory.tags(cfg))
