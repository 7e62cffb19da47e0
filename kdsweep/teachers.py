"""A Teacher is trained once per fingerprint, then read by every cell and later sweep of the store."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kdsweep import checkpoint, models, train
from kdsweep.grid import Cell
from kdsweep.learner import Learner
from kdsweep.loaders import Feed
from kdsweep.models import UNet

log = logging.getLogger(__name__)


def obtain(cell: Cell, *, network: UNet, start: Callable[[UNet], Learner], feed: Feed, compute: train.Compute) -> UNet:
    """The trained Teacher of a fingerprint, frozen: read from the store, or trained and scored now.

    Args:
        cell: of role ``teacher``.
        network: a new one of the Teacher's architecture.
        start: opens the learner (and its run) that trains the network; called only if that is needed.
        feed: the split's images.
        compute: device and precision.
    """
    finished = checkpoint.read_finished(cell.folder)
    if finished is None:
        log.info("%s: not in the store yet, so it is trained first", cell.title)
        train.run([start(network)], teachers={}, feed=feed, compute=compute)
    else:
        log.info("%s: read from %s (run %s)", cell.title, cell.folder, finished["run_id"])
    checkpoint.load_network(cell.folder / "teacher.safetensors", network)
    return models.freeze(train.placed(network, compute))
