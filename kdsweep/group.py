"""A lockstep group from its configurations to its results: cells that share batches, Teachers and a process."""

from __future__ import annotations

import contextlib
import gc
import logging
from functools import partial

from omegaconf import DictConfig

from kdsweep import build, cells, checkpoint, grid, logs, teachers, timing, train
from kdsweep.grid import Cell
from kdsweep.learner import Learner, Run
from kdsweep.models import UNet
from kdsweep.plan import Look

log = logging.getLogger(__name__)

Result = float | Exception


class TeacherError(RuntimeError):
    """A cell cannot be trained because its Teacher could not."""


def check(configs: list[DictConfig]) -> None:
    """Raise InputError for the first of these cells that could not be trained: device, networks, weights, images."""
    for cfg in configs:
        build.device(cfg)
        build.check_networks(cfg)
        build.feed(cfg, seed=cfg.seed)


def look(configs: list[DictConfig], devices: list[str]) -> Look:
    """Check cells that wait, and time one step of the first one's networks.

    Args:
        configs: of all that wait.
        devices: where to run, or empty for what the configurations say.

    Raises:
        InputError: one of them could not be trained.
    """
    check(configs)
    for name in devices:
        build.find_device(name)
    first = configs[0]
    compute = build.compute(first)
    compute.prepare()
    timed = {"image_size": first.image_size, "compute": compute}
    student = timing.time_step_s(build.student_network(first, weights="none"), **timed)
    teacher = timing.StepTime(0.0, 0.0)
    if taught := [cfg for cfg in configs if cfg.path.kd_path is not None]:
        trained = all(checkpoint.read_finished(cells.teacher_cell(cfg).folder) is not None for cfg in taught)
        network = build.teacher_network(taught[0], weights="none")
        teacher = timing.time_step_s(network, **timed, forward_only=trained)
        del network
    gc.collect()
    train.give_back_memory()
    return Look(
        devices={str(cfg.device): devices or build.devices(cfg) for cfg in configs},
        student_s=student.train,
        teacher_s=teacher.train,
        lesson_s=teacher.forward,
        images=len(cells.split_ids(first)["train"]),
    )


def run_group(configs: list[DictConfig]) -> list[Result]:
    """Train the cells of these configurations together.

    Args:
        configs: of different cells that are not finished, with equal ``cells.batches_key``.

    Returns:
        For each configuration its test Dice, or what ended it. What ends one leaves the others alone.
    """
    compute = build.compute(configs[0])
    compute.prepare()
    staff = obtain_teachers(configs, compute)
    results: dict[int, Result] = {}
    learners: dict[int, Learner] = {}
    for number, cfg in enumerate(configs):
        cell = cells.cell(cfg)
        with logs.about(cell.folder):
            try:
                lacking = staff.get(cell.evidence.get("teacher", ""))
                if isinstance(lacking, Exception):
                    raise TeacherError(f"its Teacher could not be trained: {lacking}") from lacking
                learners[number] = build.learner(cfg, cell, partial(start, cfg))
            except Exception as error:
                log.error("%s: %s: %s", cell.title, type(error).__name__, error, exc_info=error)
                results[number] = error
                # Tables show it as failed; that this does not work either is no news.
                with contextlib.suppress(Exception):
                    start(cfg, cell).abort(status="FAILED")
    if learners:
        outcomes = train.run(
            list(learners.values()),
            teachers={name: network for name, network in staff.items() if isinstance(network, UNet)},
            feed=build.feed(configs[0], seed=configs[0].seed),
            compute=compute,
        )
        for number, values in zip(learners, outcomes, strict=True):
            results[number] = values if isinstance(values, Exception) else values["test/dice"]
    return [results[number] for number in range(len(configs))]


def obtain_teachers(configs: list[DictConfig], compute: train.Compute) -> dict[str, UNet | Exception]:
    """The Teachers of these cells by fingerprint; those that are not in the store are trained, together if they can be.

    Args:
        configs: of any cells; the Student baseline needs none.
        compute: device and precision.
    """
    wanted = {cells.teacher_cell(cfg).fingerprint: cfg for cfg in configs if cfg.path.kd_path is not None}
    own = list(wanted.values())
    found: dict[str, UNet | Exception] = {}
    for group in grid.group_by([cells.batches_key(cfg, seed=cfg.teacher.seed) for cfg in own]):
        members = [own[position] for position in group]
        found |= teachers.obtain(
            [_new_teacher(cfg) for cfg in members],
            feed=build.feed(members[0], seed=members[0].teacher.seed),
            compute=compute,
        )
        gc.collect()
        train.give_back_memory()
    return found


def _new_teacher(cfg: DictConfig) -> teachers.Wanted:
    cell, network = cells.teacher_cell(cfg), build.teacher_network(cfg)
    return teachers.Wanted(cell, network, lambda: build.teacher_learner(cfg, cell, partial(start, cfg), network))


def start(cfg: DictConfig, own: Cell) -> Run:
    """Write down what a cell is beside its results, and open its MLflow run."""
    checkpoint.write_json(own.folder / "split.json", cells.split_ids(cfg))
    checkpoint.write_json(own.folder / "settings.json", {"settings": own.settings, "evidence": own.evidence})
    return cells.tracker(cfg).start(own, sweep=cfg.sweep_name, params=cells.params(cfg), tags=build.tags(cfg))
