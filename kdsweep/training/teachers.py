"""Teachers: each is trained once per fingerprint, then read by every cell and later sweep of the store."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from kdsweep.config.grid import Cell
from kdsweep.core.device import Compute, placed
from kdsweep.data.loaders import Feed
from kdsweep.models import unet
from kdsweep.models.unet import UNet
from kdsweep.runs import checkpoint, records
from kdsweep.training import runner

log = logging.getLogger(__name__)

WEIGHTS = "teacher.safetensors"
LOOK_EVERY_S = 1.0


class Wanted(NamedTuple):
    """A Teacher that is needed.

    Attributes:
        cell: its cell, of role ``teacher``.
        network: makes a new network of its architecture.
        learner: makes the learner that trains it; called only if that is needed.
    """

    cell: Cell
    network: Callable[[], UNet]
    learner: runner.Maker


def obtain(wanted: list[Wanted], *, feed: Feed, compute: Compute) -> dict[str, UNet | Exception]:
    """Return trained and frozen Teachers by fingerprint, from the store or trained and scored now as one group.

    Wait for those that another command is training.

    Args:
        wanted: Teachers that can share their batches.
        feed: the split's images.
        compute: device and precision.

    Returns:
        The network of each, or the error that ended its training.
    """
    found: dict[str, UNet | Exception] = {}
    told = False
    while lacking := [teacher for teacher in wanted if teacher.cell.fingerprint not in found]:
        for teacher in lacking:
            if (network := _read(teacher, compute)) is not None:
                found[teacher.cell.fingerprint] = network
        lacking = [teacher for teacher in lacking if teacher.cell.fingerprint not in found]
        with contextlib.ExitStack() as held:
            mine = []
            for teacher in lacking:
                try:
                    mine += [teacher] if records.hold(held, teacher.cell.folder) else []
                except OSError as error:  # a folder that cannot be written to
                    found[teacher.cell.fingerprint] = error
            missing = [teacher for teacher in mine if records.read_finished(teacher.cell.folder) is None]
            if missing:
                log.info("%s: not in the store yet, so trained first", _titles(missing))
                makers = [teacher.learner for teacher in missing]
                results = runner.run_divided(makers, teachers={}, feed=feed, compute=compute)
                failures = zip(missing, results, strict=True)
                found |= {
                    teacher.cell.fingerprint: error for teacher, error in failures if isinstance(error, Exception)
                }
        if not mine and any(teacher.cell.fingerprint not in found for teacher in lacking):
            if not told:
                log.info("%s: another command trains it; waiting for that", _titles(lacking))
            told = True
            time.sleep(LOOK_EVERY_S)
    return found


def _read(teacher: Wanted, compute: Compute) -> UNet | None:
    folder = teacher.cell.folder
    if records.read_finished(folder) is None:
        return None
    if not records.check_file(folder, WEIGHTS):
        records.forget_finished(folder, folder / WEIGHTS)
        return None
    log.info("%s: read from %s", teacher.cell.title, folder)
    network = teacher.network()
    checkpoint.load_network(folder / WEIGHTS, network)
    return unet.freeze(placed(network, compute))


def _titles(wanted: list[Wanted]) -> str:
    return ", ".join(teacher.cell.title for teacher in wanted)
