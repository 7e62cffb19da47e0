"""A Teacher is trained once per fingerprint, then read by every cell and later sweep of the store."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from kdsweep import checkpoint, models, train
from kdsweep.grid import Cell
from kdsweep.learner import Learner
from kdsweep.loaders import Feed
from kdsweep.models import UNet

log = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """A Teacher that is needed.

    Attributes:
        cell: of role ``teacher``.
        network: a new one of its architecture.
        learner: opens the learner (and its run) that trains the network; called only if that is needed.
    """

    cell: Cell
    network: UNet
    learner: Callable[[], Learner]


def obtain(wanted: list[Wanted], *, feed: Feed, compute: train.Compute) -> dict[str, UNet | Exception]:
    """Trained and frozen Teachers by fingerprint: read from the store, or trained and scored now, as one group.

    Args:
        wanted: Teachers that can share their batches.
        feed: the split's images.
        compute: device and precision.

    Returns:
        For each the network, or what ended its training.
    """
    found: dict[str, UNet | Exception] = {}
    missing = [teacher for teacher in wanted if checkpoint.read_finished(teacher.cell.folder) is None]
    if missing:
        log.info("%s: not in the store yet, so trained first", ", ".join(teacher.cell.title for teacher in missing))
        learners = [teacher.learner() for teacher in missing]
        results = train.run(learners, teachers={}, feed=feed, compute=compute)
        failures = zip(missing, results, strict=True)
        found = {teacher.cell.fingerprint: error for teacher, error in failures if isinstance(error, Exception)}
    for cell, network, _ in wanted:
        if cell.fingerprint not in found:
            log.info("%s: read from %s", cell.title, cell.folder)
            checkpoint.load_network(cell.folder / "teacher.safetensors", network)
            found[cell.fingerprint] = models.freeze(train.placed(network, compute))
    return found
