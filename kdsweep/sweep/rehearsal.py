"""A rehearsal of trainings: all that they do, with untrained networks and two images of each part of the split.

So that no code of a cell's runs for the first time after hours of training.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from kdsweep.config.identity import Job
from kdsweep.config.schema import Settings
from kdsweep.core.device import Compute, give_back_memory, is_out_of_memory, placed
from kdsweep.core.errors import InputError, one_line
from kdsweep.data.loaders import EvalPart, Feed
from kdsweep.evaluation import scoring
from kdsweep.models import unet
from kdsweep.models.unet import UNet
from kdsweep.store import cell_folder, checkpoint
from kdsweep.training import build, group, loop, outcome
from kdsweep.training.learner import DivergedError, Learner

IMAGES = 2


def rehearse(jobs: list[Job], compute: Compute) -> None:
    """Train, validate and test cells that can share their batches, in a temporary folder, and read all files back.

    Values that are not finite do not count, since the networks are untrained. What does not fit into the memory is
    rehearsed in halves; a single cell that does not is left to its training, which names the remedy.

    Raises:
        InputError: one of them fails.
    """
    try:
        _rehearse([replace(job, settings=_reduced(job.settings)) for job in jobs], compute)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        give_back_memory()
        half = len(jobs) // 2
        for part in (jobs[:half], jobs[half:]) if half else ():
            rehearse(part, compute)


def _reduced(settings: Settings) -> Settings:
    train = {"batch_size": min(IMAGES, settings.train.batch_size), "workers": 0, "epochs": 1}
    small = {
        "train": settings.train.model_copy(update=train),
        "student": settings.student.model_copy(update={"weights": "none"}),
        "teacher": settings.teacher.model_copy(update={"weights": "none"}),
    }
    return settings.model_copy(update=small)


def _rehearse(jobs: list[Job], compute: Compute) -> None:
    compute.prepare()
    feed = _feed(jobs[0].settings)
    frozen = loop.FrozenTeachers(_untrained_teachers(jobs, compute), compute)
    with tempfile.TemporaryDirectory(prefix="kdsweep-") as store, _silenced(), _one_thread():
        learners = [_learner(job, Path(store), compute) for job in jobs]
        loop.train_epoch(learners, 0, frozen=frozen, feed=feed, compute=compute)
        validation = list(scoring.eval_batches(feed.validation, compute))
        taught = [frozen.teach(learners, views) for views, _ in validation]
        loop.validate(learners, validation, taught, seed=feed.train.step_seed(0, 1), compute=compute)
        for learner in learners:
            if learner.failure is None:
                with loop.isolated(learner):
                    outcome.finish(learner, part=feed.test, compute=compute)
                    _read_back(learner, feed.test)
            if learner.failure is not None and not isinstance(learner.failure, DivergedError):
                line = one_line(learner.failure)
                raise InputError(f"the rehearsal before the training fails: {line}") from learner.failure
            shutil.rmtree(learner.folder)  # one at a time: together they may be larger than the temporary disk


def _feed(settings: Settings) -> Feed:
    feed = build.feed(settings, seed=settings.seed)
    feed.train.batches.indices = feed.train.batches.indices[: feed.train.batches.batch_size]
    return Feed(feed.train, _first(feed.validation), _first(feed.test))


def _first(part: EvalPart) -> EvalPart:
    few = {name: values[:IMAGES] for name, values in vars(part).items() if values is not None}
    return EvalPart(**few)


def _untrained_teachers(jobs: list[Job], compute: Compute) -> dict[str, UNet]:
    """Return a network by each Teacher's fingerprint; those of one architecture are one network."""
    networks: dict[str, UNet] = {}
    teachers = {}
    for job in jobs:
        if (cell := job.cell.teacher) is not None:
            network = job.settings.teacher
            kind = f"{network.encoder} {network.decoder_channels}"
            if kind not in networks:
                networks[kind] = unet.freeze(placed(build.teacher_network(job.settings), compute))
            teachers[cell.fingerprint] = networks[kind]
    return teachers


def _learner(job: Job, store: Path, compute: Compute) -> Learner:
    cell = replace(job.cell, store=store)
    group.describe(job.settings, cell)
    learner = build.learner(job.settings, cell)
    for module in learner.modules().values():
        placed(module, compute)
    return learner


def _read_back(learner: Learner, part: EvalPart) -> None:
    """Read the files of a finished cell as later commands do."""
    folder = learner.folder
    if cell_folder.read_finished(folder) is None or not learner.resume():
        raise RuntimeError(f"{folder}: what was written cannot be read")
    checkpoint.load_network(folder / outcome.weights_file(learner.role), learner.network)
    masks = checkpoint.load_predictions(folder / outcome.PREDICTIONS)
    if not len(pd.read_csv(folder / outcome.SCORES)) == len(masks) == len(part.ids):
        raise RuntimeError(f"{folder}: not as many images as were written")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: for two images several are no faster, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _silenced() -> Iterator[None]:
    """Log nothing: the folders that the lines name are gone soon, and an error is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
