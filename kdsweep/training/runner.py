"""A group from its checkpoints to its results: begin or resume, train, test, save what is left if it is interrupted."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kdsweep.core import logs, signals
from kdsweep.core.device import Compute, give_back_memory, is_device_error, is_out_of_memory, placed
from kdsweep.core.errors import CellError, DeviceError, InputError, one_line
from kdsweep.data.loaders import Feed
from kdsweep.models.unet import UNet
from kdsweep.training.learner import Learner
from kdsweep.training.loop import fail, fit, isolated, label_of
from kdsweep.training.outcome import finish

log = logging.getLogger(__name__)

Values = dict[str, float]
Maker = Callable[[], Learner | Exception]


class Pruning(Protocol):
    """Decides which trials of a group end early; see ``tuning/pruning.py``."""

    def begin(self) -> Callable[[int, Mapping[Path, Sequence[tuple[float, float]]]], set[Path]]:
        """Return a function that is called at the beginning and after each epoch, and returns the trials that end.

        Its arguments are the number of epochs that all trials in training have completed, and by folder the validation
        Dice and seconds of each epoch of a trial, without those that failed.
        """


def run(
    learners: list[Learner],
    *,
    teachers: Mapping[str, UNet],
    feed: Feed,
    compute: Compute,
    pruning: Pruning | None = None,
) -> list[Values | Exception]:
    """Train a group from its checkpoints on and test each learner; return its final values or error, in order.

    If Ctrl-C, SIGTERM or a lack of memory ends the training, the learners are saved first.

    Args:
        learners: as for ``fit``.
        teachers: as for ``fit``.
        feed: as for ``fit``.
        compute: as for ``fit``.
        pruning: of trials, which are not tested: they are saved, and have the values of the validation alone.

    Raises:
        DeviceError: the device failed. A fresh process can go on from the checkpoints.
    """
    results: dict[Path, Values] = {}
    leaving = pruning.begin() if pruning is not None else None

    def conclude(learner: Learner) -> None:
        with isolated(learner):
            if pruning is None:
                values = results[learner.folder] = finish(learner, part=feed.test, compute=compute)
                score = f"test Dice {values['test/dice']:.4f} ± {values['test/dice_std']:.4f}"
                epochs = f"best epoch {learner.best_epoch + 1} of {learner.epoch + 1}"
                log.info("%s: %s over %d images (%s)", learner.title, score, len(feed.test.ids), epochs)
                return
            learner.save() if learner.is_pruned else learner.save_outcome()
            best = learner.history[learner.best_epoch]["val/dice"] if learner.history else math.nan
            results[learner.folder] = {"best/val_dice": best}

    def prune(epochs: int) -> list[Learner]:
        if leaving is None:
            return []
        sound = {own.folder: own for own in learners if own.failure is None}
        dice = {folder: [row["val/dice"] for row in own.history] for folder, own in sound.items()}
        leave = leaving(epochs, {name: list(zip(dice[name], own.seconds, strict=True)) for name, own in sound.items()})
        return [sound[folder] for folder in leave]

    try:
        compute.prepare()
        with signals.deferred():
            _begin_all(learners, feed=feed, compute=compute)
            for learner in (own for own in learners if own.stopped and own.failure is None):
                conclude(learner)  # it was interrupted after its last epoch
            if going := [learner for learner in learners if not learner.stopped]:
                fit(going, teachers=teachers, feed=feed, compute=compute, stopped=conclude, prune=prune)
            else:
                prune(learners[0].epochs)  # which reports their last epochs if it was interrupted before that
    except BaseException as error:
        _settle([own for own in learners if own.failure is None and own.folder not in results], error)
    return [learner.failure or results[learner.folder] for learner in learners]


def _settle(learners: list[Learner], error: BaseException) -> None:
    """Fail the learners for an error in what they share; if it ends the training, save them and raise it instead."""
    if is_device_error(error):  # nothing can be read from it any more: each goes on from its last checkpoint
        signals.check()
        raise DeviceError(f"the device failed ({one_line(error)})") from error
    if (
        signals.pending()
        or not isinstance(error, Exception)
        or isinstance(error, InputError)
        or is_out_of_memory(error)
    ):
        _save(learners)
        signals.check()
        raise error
    for learner in learners:  # of a batch, a Teacher's forward
        with logs.about(learner.folder):
            fail(learner, error)


def run_divided(
    makers: list[Maker],
    *,
    teachers: Mapping[str, UNet],
    feed: Feed,
    compute: Compute,
    pruning: Pruning | None = None,
) -> list[Values | Exception]:
    """Do as ``run`` does with as many learners at a time as fit into memory: a group that does not is halved.

    Args:
        makers: make the learners or return the error; each half goes on from the group's checkpoints.
        teachers: as for ``fit``.
        feed: as for ``fit``.
        compute: as for ``fit``.
        pruning: as for ``run``; trials of a half compare with what has been reported until they are asked about.
    """
    shared: dict[str, Any] = {"teachers": teachers, "feed": feed, "compute": compute, "pruning": pruning}
    made = [make() for make in makers]
    learners = [own for own in made if isinstance(own, Learner)]
    try:
        outcomes = iter(run(learners, **shared) if learners else [])
        return [next(outcomes) if isinstance(own, Learner) else own for own in made]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if len(learners) == 1:
            lack = CellError(
                f"{learners[0].title}: out of memory on {compute.device}; a smaller train.batch_size helps"
            )
            lack.__cause__ = error
            with logs.about(learners[0].folder):
                fail(learners[0], lack)
            return [lack if isinstance(own, Learner) else own for own in made]
        log.warning("out of memory with %d learners on %s: divided in two", len(learners), compute.device)
    del learners, made
    give_back_memory()
    half = len(makers) // 2
    parts = (makers[:half], makers[half:])
    return [own for part in parts for own in run_divided(part, **shared)]


def _begin_all(learners: list[Learner], *, feed: Feed, compute: Compute) -> None:
    """Place and resume each learner and log how; a group has one line on the screen."""
    extra = _extra(learners)
    what = f"at most {max(learner.epochs for learner in learners)} epochs of {len(feed.train)} batches, "
    what += f"{feed.train.image_count} training images, {compute.device}, {compute.precision}"
    resumed = 0
    for learner in learners:
        signals.check()
        with isolated(learner):
            if _begin(learner, compute):
                resumed += 1
                line = f"goes on after epoch {learner.epoch + 1} and {learner.steps} steps"
            else:
                line = f"{sum(parameter.numel() for parameter in learner.parameters()) / 1e6:.2f} M parameters, {what}"
            log.info("%s: %s", learner.title, line, extra=extra)
    if extra:
        begun = f"; {resumed} go on from their checkpoints" if resumed else ""
        log.info("%s: %s%s", label_of(learners), what, begun, extra=logs.SCREEN_ONLY)


def _begin(learner: Learner, compute: Compute) -> bool:
    """Place and resume a learner; return whether it goes on from a checkpoint."""
    for module in learner.modules().values():
        placed(module, compute)
    resumed = learner.resume()
    learner.whole = True  # not before: a half-read state must not replace its checkpoint
    return resumed


def _save(learners: list[Learner]) -> None:
    """Save the learners that no step has left half changed; the others keep their last checkpoint."""
    saved = 0
    for learner in learners:
        with logs.about(learner.folder):
            try:
                if learner.whole:
                    learner.save()
                    saved += 1
                    where = learner.epoch + 2, learner.steps
                    log.info("%s: saved in epoch %d after %d steps", learner.title, *where, extra=_extra(learners))
            except Exception as error:
                log.warning("%s: its last checkpoint stays, this one failed: %s", learner.title, one_line(error))
    if len(learners) > 1:
        log.info("%s: %d saved", label_of(learners), saved, extra=logs.SCREEN_ONLY)


def _extra(learners: list[Learner]) -> dict[str, str] | None:
    """Return ``extra`` of a line that each learner logs: a group's lines go to the files alone."""
    return logs.FILE_ONLY if len(learners) > 1 else None
