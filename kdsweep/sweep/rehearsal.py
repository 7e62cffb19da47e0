"""A rehearsal of trainings: all that they do, with untrained networks and two images of each part of the split.

So that no code of a cell's runs for the first time after hours of training.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig

from kdsweep.config import identity
from kdsweep.core.device import Compute, give_back_memory, is_out_of_memory, placed
from kdsweep.core.errors import InputError, one_line
from kdsweep.data.loaders import EvalPart, Feed
from kdsweep.evaluation import scoring
from kdsweep.models import unet
from kdsweep.models.unet import UNet
from kdsweep.runs import checkpoint, records
from kdsweep.training import factory, group, loop, outcome
from kdsweep.training.learner import DivergedError, Learner

IMAGES = 2


def rehearse(configs: list[DictConfig], compute: Compute) -> None:
    """Train, validate and test cells that can share their batches, in a temporary folder, and read all files back.

    Values that are not finite do not count, since the networks are untrained. What does not fit into the memory is
    rehearsed in halves; a single cell that does not is left to its training, which names the remedy.

    Raises:
        InputError: one of them fails.
    """
    try:
        _rehearse([_reduced(cfg) for cfg in configs], compute)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        give_back_memory()
        half = len(configs) // 2
        for part in (configs[:half], configs[half:]) if half else ():
            rehearse(part, compute)


def _reduced(cfg: DictConfig) -> DictConfig:
    small = copy.deepcopy(cfg)
    small.train.batch_size, small.train.workers, small.train.epochs = min(IMAGES, cfg.train.batch_size), 0, 1
    small.student.weights = small.teacher.weights = "none"
    return small


def _rehearse(configs: list[DictConfig], compute: Compute) -> None:
    compute.prepare()
    feed = _feed(configs[0])
    frozen = loop.FrozenTeachers(_untrained_teachers(configs, compute), compute)
    with tempfile.TemporaryDirectory(prefix="kdsweep-") as store, _silenced(), _one_thread():
        learners = [_learner(cfg, Path(store), compute) for cfg in configs]
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


def _feed(cfg: DictConfig) -> Feed:
    feed = factory.feed(cfg, seed=cfg.seed)
    feed.train.batches.indices = feed.train.batches.indices[: feed.train.batches.batch_size]
    return Feed(feed.train, _first(feed.validation), _first(feed.test))


def _first(part: EvalPart) -> EvalPart:
    few = {name: values[:IMAGES] for name, values in vars(part).items() if values is not None}
    return EvalPart(**few)


def _untrained_teachers(configs: list[DictConfig], compute: Compute) -> dict[str, UNet]:
    """Return a network by each Teacher's fingerprint; those of one architecture are one network."""
    networks: dict[str, UNet] = {}
    teachers = {}
    for cfg in configs:
        if identity.read(cfg).is_taught:
            kind = f"{cfg.teacher.encoder} {cfg.teacher.decoder_channels}"
            if kind not in networks:
                networks[kind] = unet.freeze(placed(factory.teacher_network(cfg), compute))
            teachers[identity.teacher_cell(cfg).fingerprint] = networks[kind]
    return teachers


def _learner(cfg: DictConfig, store: Path, compute: Compute) -> Learner:
    cell = replace(identity.cell(cfg), store=store)
    group.describe(cfg, cell)
    learner = factory.learner(cfg, cell)
    for module in learner.modules().values():
        placed(module, compute)
    return learner


def _read_back(learner: Learner, part: EvalPart) -> None:
    """Read the files of a finished cell as later commands do."""
    folder = learner.folder
    if records.read_finished(folder) is None or not learner.resume():
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
