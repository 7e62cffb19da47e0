"""Check the real networks before anything is trained: errors, a rehearsal of each kind of cell, seconds of a step.

A rehearsal is all that a training does, with untrained networks and two images of each part of the split, so that no
code of a cell runs for the first time after hours.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from kdsweep.config import grid, identity, inputs
from kdsweep.config.identity import Job
from kdsweep.config.schema import Settings
from kdsweep.core.device import Compute, find_device, give_back_memory, is_out_of_memory, placed, usable_precision
from kdsweep.core.errors import CellError, InputError, one_line
from kdsweep.data.loaders import EvalPart, Feed
from kdsweep.evaluation import latency, scoring
from kdsweep.models import networks
from kdsweep.store import cell_folder, checkpoint
from kdsweep.sweep import plan
from kdsweep.sweep.estimate import Preview
from kdsweep.training import build, guard, loop, outcome
from kdsweep.training.learner import DivergedError, Learner

IMAGES = 2


def preview(jobs: Sequence[Job], *, devices: Sequence[str] = (), elsewhere: str = "", times: bool = True) -> Preview:
    """Check and rehearse cells that represent all that wait; if ``times``, time a step of the first one's networks.

    They train on these devices of this machine, by default those that the configurations name, or on the machines
    ``elsewhere``, whose devices cannot be seen from here.

    Raises:
        InputError: one of the cells cannot be trained.
    """
    if elsewhere:
        names, device = {job.settings.device: [elsewhere] for job in jobs}, "auto"
        jobs = [replace(job, settings=job.settings.model_copy(update={"device": device})) for job in jobs]
    else:
        for name in devices:
            find_device(name)
        names = {job.settings.device: list(devices) or build.devices(job.settings) for job in jobs}
        device = names[jobs[0].settings.device][0]
        for job in jobs:
            build.compute(job.settings)
    check(jobs)
    rehearse(jobs, device)
    return Preview(names, **(_timed(jobs, device) if times else {}))


def check(jobs: Sequence[Job]) -> None:
    """Raise InputError for the first of these cells that could not be trained: networks, weights, images."""
    for job in jobs:
        build.check_networks(job.settings)
    for settings in {identity.batches_key(job.settings, seed=0): job.settings for job in reversed(jobs)}.values():
        build.feed(settings, seed=settings.seed)


def _compute(settings: Settings, device: str) -> Compute:
    """Return where and how numbers are computed on this machine, which may lack the precision of the settings."""
    on = find_device(device)
    return Compute(on, usable_precision(settings.precision, on), deterministic=settings.deterministic)


def _timed(jobs: Sequence[Job], device: str) -> dict[str, Any]:
    """Return the times of a ``Preview``."""
    first = jobs[0].settings
    compute = _compute(first, device)
    compute.prepare()
    on = compute.device
    # On a CPU a step takes as long as its images together; on CUDA a small batch takes as long as a large one.
    batch = first.train.batch_size if on.type == "cuda" else min(4, first.train.batch_size)
    timed: dict[str, Any] = {"image_size": first.image_size, "compute": compute, "images": batch}
    student = latency.time_step_s(build.student_network(first, weights="none"), **timed)
    teacher = latency.StepTime(0.0, 0.0)
    if teachers := plan.teachers(jobs):
        network = build.teacher_network(teachers[0][1].settings, weights="none")
        teacher = latency.time_step_s(network, **timed, forward_only=not plan.missing_teachers(jobs))
        del network
    give_back_memory()
    ids = inputs.split_ids(first)
    images = len(ids["train"])
    measured = len(ids["validation"]) + (len(ids["test"]) if first.scores.each_epoch else 0)  # after each epoch
    return {
        "timed_on": str(on),
        "student_epoch_s": images * student.train + measured * student.forward,
        "teacher_epoch_s": images * teacher.train + measured * teacher.forward,
        "forward_epoch_s": images * teacher.forward,
        "threads": torch.get_num_threads() if on.type == "cpu" else 0,
    }


# ---- the rehearsal ---------------------------------------------------------------------------------------------------


def rehearse(jobs: Sequence[Job], device: str) -> None:
    """Rehearse one cell of each kind on a device, those that can share their batches together.

    Values that are not finite do not count, since the networks are untrained.

    Raises:
        InputError: a cell fails.
    """
    first = {plan.kind_key(job.settings): job for job in reversed(jobs)}
    kinds = [replace(job, settings=_reduced(job.settings)) for job in reversed(first.values())]
    for positions in grid.group_by([identity.batches_key(job.settings, seed=job.settings.seed) for job in kinds]):
        _in_memory([kinds[position] for position in positions], _compute(kinds[positions[0]].settings, device))
    give_back_memory()


def _reduced(settings: Settings) -> Settings:
    train = {"batch_size": min(IMAGES, settings.train.batch_size), "workers": 0, "epochs": 1}
    small = {
        "train": settings.train.model_copy(update=train),
        "student": settings.student.model_copy(update={"weights": "none"}),
        "teacher": settings.teacher.model_copy(update={"weights": "none"}),
    }
    return settings.model_copy(update=small)


def _in_memory(jobs: list[Job], compute: Compute) -> None:
    """Rehearse cells together, or in halves if the memory is too small; one that does not fit alone fails later."""
    try:
        _rehearse(jobs, compute)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        give_back_memory()
        half = len(jobs) // 2
        for part in (jobs[:half], jobs[half:]) if half else ():
            _in_memory(part, compute)


def _rehearse(jobs: list[Job], compute: Compute) -> None:
    """Train, validate and test cells in a temporary folder, and read all files back."""
    compute.prepare()
    feed = _feed(jobs[0].settings)
    teachers = {cell.fingerprint: build.teacher_network(job.settings) for cell, job in plan.teachers(jobs)}
    frozen = loop.FrozenTeachers(
        {key: networks.freeze(placed(network, compute)) for key, network in teachers.items()}, compute
    )
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # the folders that the lines name are gone soon, and an error is raised
    try:
        with tempfile.TemporaryDirectory(prefix="kdsweep-") as store:
            learners = [_learner(job, Path(store), compute) for job in jobs]
            loop.train_epoch(learners, 0, frozen=frozen, feed=feed, compute=compute)
            validation = list(scoring.eval_batches(feed.validation, compute))
            maps = [frozen.teach(learners, views) for views, _ in validation]
            loop.validate(learners, validation, maps, seed=feed.train.step_seed(0, 1), compute=compute)
            for learner in learners:
                _finish(learner, feed.test, compute, batch=feed.train.batches.batch_size)
    finally:
        logging.disable(before)


def _feed(settings: Settings) -> Feed:
    """Return the first images of each part."""
    feed = build.feed(settings, seed=settings.seed)
    feed.train.batches.indices = feed.train.batches.indices[: feed.train.batches.batch_size]
    parts = (
        {
            name: values if name == "class_names" else values[:IMAGES]
            for name, values in vars(part).items()
            if values is not None
        }
        for part in (feed.validation, feed.test)
    )
    return Feed(feed.train, *(EvalPart(**part) for part in parts))


def _learner(job: Job, store: Path, compute: Compute) -> Learner:
    cell = replace(job.cell, store=store)
    build.describe(job.settings, cell)
    learner = build.learner(job.settings, cell)
    placed(learner.trained, compute)
    return learner


def _finish(learner: Learner, part: EvalPart, compute: Compute, *, batch: int) -> None:
    """Test a cell and read its files as later commands do; raise InputError if that or its training fails."""
    if learner.failure is None:
        with guard.isolated(learner):
            _check_gradient(learner, batch=batch)
            outcome.finish(learner, part=part, compute=compute)
            _read_back(learner, part)
    if learner.failure is not None and not isinstance(learner.failure, DivergedError):
        line = one_line(learner.failure)
        raise InputError(f"the rehearsal before the training fails: {line}") from learner.failure
    shutil.rmtree(learner.folder)  # one at a time: together they may be larger than the temporary disk


def _check_gradient(learner: Learner, *, batch: int) -> None:
    """Raise CellError if the KD term does not reach the Student, as that of a method that compares images, of one."""
    weight, ratio = float(learner.kd_weight), learner.history[0].get("train/kd_gradient_ratio", math.nan)
    if 0 < weight < 1 and ratio * (1 - weight) / weight < 1.5e-6:  # 1e-6 is recorded for zero
        raise CellError(f"{learner.title}: its KD term has no gradient in batches of {batch} (train.batch_size)")


def _read_back(learner: Learner, part: EvalPart) -> None:
    folder = learner.folder
    if cell_folder.read_finished(folder) is None or not learner.resume():
        raise RuntimeError(f"{folder}: what was written cannot be read")
    checkpoint.load_network(folder / grid.weights_file(learner.role), learner.network)
    masks = checkpoint.load_predictions(folder / cell_folder.PREDICTIONS)
    if not len(pd.read_csv(folder / cell_folder.SCORES)) == len(masks) == len(part.ids):
        raise RuntimeError(f"{folder}: not as many images as were written")
