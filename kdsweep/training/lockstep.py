"""Learners in lockstep, from their checkpoints to their results: resumed, trained, pruned, tested, saved if stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from kdsweep.core import logs, signals
from kdsweep.core.device import Compute, is_device_error, is_out_of_memory, placed
from kdsweep.core.errors import DeviceError, InputError, one_line
from kdsweep.data.loaders import Feed
from kdsweep.models.networks import Network
from kdsweep.training.guard import isolated
from kdsweep.training.learner import Learner
from kdsweep.training.loop import fit, label_of
from kdsweep.training.outcome import end_trial, finish

log = logging.getLogger(__name__)

Outcome = dict[str, float] | Exception  # final values, or the error that ended the training
# Returns the folders of the trials that end, from the number of epochs that all have completed and, by folder of each
# trial that has not failed, the validation Dice and seconds of its epochs.
Decide = Callable[[int, Mapping[Path, Sequence[tuple[float, float]]]], set[Path]]


class Pruning(Protocol):
    """Decides which trials of a group end early; see ``tuning/pruning.py``."""

    def begin(self) -> Decide:
        """Return the function that is called at the beginning and after each epoch."""


def run(
    made: Sequence[Learner | Exception],
    *,
    teachers: Mapping[str, Network],
    feed: Feed,
    compute: Compute,
    pruning: Pruning | None = None,
) -> list[Outcome]:
    """Train a group from its checkpoints on and test each learner; return its final values or error, in order.

    If Ctrl-C, SIGTERM or a lack of memory ends the training, the learners are saved first. Errors in ``made`` are
    passed on. ``teachers`` are frozen networks by fingerprint. With ``pruning`` the learners are trials, which are
    saved and not tested: they have the values of the validation alone.
    """
    learners = [each for each in made if isinstance(each, Learner)]
    decide = pruning.begin() if pruning is not None else None
    for learner in learners:
        learner.tests_each_epoch &= pruning is None

    def end_stopped() -> None:
        for learner in (each for each in _unfinished(learners) if each.stopped):
            with isolated(learner):
                is_trial = pruning is not None
                learner.result = end_trial(learner) if is_trial else finish(learner, part=feed.test, compute=compute)

    def after(epochs: int) -> None:
        end_stopped()
        if decide is not None:
            _prune(learners, decide, epochs)
            end_stopped()

    try:
        compute.prepare()
        with signals.deferred():
            if learners:
                _begin(learners, feed=feed, compute=compute)
                fit(learners, teachers=teachers, feed=feed, compute=compute, after=after)
    except BaseException as error:
        _settle(_unfinished(learners), error)
    return [each if isinstance(each, Exception) else each.failure or each.result for each in made]


def _unfinished(learners: list[Learner]) -> list[Learner]:
    return [each for each in learners if each.failure is None and not each.result]


def _prune(learners: list[Learner], decide: Decide, epochs: int) -> None:
    """Stop the trials that the pruner ends after so many epochs."""
    sound = {each.folder: each for each in learners if each.failure is None}
    dice = {folder: [row["val/dice"] for row in each.history] for folder, each in sound.items()}
    curves = {folder: list(zip(dice[folder], each.seconds, strict=True)) for folder, each in sound.items()}
    for learner in (sound[folder] for folder in decide(epochs, curves) if not sound[folder].stopped):
        learner.is_pruned = True
        log.info("%s: pruned after epoch %d", learner.title, learner.epoch + 1, extra=logs.FILE_ONLY)


def _begin(learners: list[Learner], *, feed: Feed, compute: Compute) -> None:
    """Place and resume each learner and log how; a group has one line on the screen."""
    resumed = 0
    for learner in learners:
        signals.check()
        with isolated(learner):
            line = f"{sum(parameter.numel() for parameter in learner.trained.parameters()) / 1e6:.2f} M parameters"
            placed(learner.trained, compute)
            if learner.resume():
                resumed += 1
                line = f"resumes after epoch {learner.epoch + 1} and {learner.steps} steps"
            learner.can_save = True  # not before: a half-read state must not replace its checkpoint
            log.info("%s: %s", learner.title, line, extra=logs.FILE_ONLY)
    if not (epochs := max(learner.epochs for learner in learners)):
        return
    line = f"at most {epochs} epochs of {len(feed.train)} batches, "
    line += f"{feed.train.image_count} training images, {compute.device}, {compute.precision}"
    line += f"; {resumed} resume from checkpoints" if resumed else ""
    log.info("%s: %s", label_of(learners), line)


def _settle(learners: list[Learner], error: BaseException) -> None:
    """Fail the learners for an error in what they share; if it ends the training, save them and raise it instead."""
    if is_device_error(error):  # nothing can be read from it any more: each resumes from its last checkpoint
        signals.check()
        raise DeviceError(f"the device failed ({one_line(error)})") from error
    is_shared = isinstance(error, Exception) and not isinstance(error, InputError) and not is_out_of_memory(error)
    if signals.pending() or not is_shared:
        _save(learners)
        signals.check()
        raise error
    for learner in learners:  # of a batch, a Teacher's forward
        with isolated(learner):
            raise error


def _save(learners: list[Learner]) -> None:
    """Save the learners that no step has left half changed; the others keep their last checkpoint."""
    for learner in (each for each in learners if each.can_save):
        with logs.about(learner.folder):
            try:
                learner.save()
                where = learner.epoch + 2, learner.steps
                log.info("%s: saved in epoch %d after %d steps", learner.title, *where, extra=logs.FILE_ONLY)
            except Exception as error:
                log.warning("%s: its last checkpoint stays, this one failed: %s", learner.title, one_line(error))
    if learners:
        log.info("%s: %d saved", label_of(learners), sum(each.can_save for each in learners), extra=logs.SCREEN_ONLY)
