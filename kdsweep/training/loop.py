"""The loop over a group of learners: every batch and every Teacher forward is made once and serves them all.

A Teacher, the Student baseline and a distilled Student are all learners. Groups of one and of thirteen run the same
code, and each learner gets the weights and scores that it would have had alone and without any interruption.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from kdsweep.core import logs, signals
from kdsweep.core.device import Compute, Stopwatch, is_device_error, is_out_of_memory
from kdsweep.core.errors import CellError, one_line
from kdsweep.core.progress import Progress
from kdsweep.data.loaders import Feed
from kdsweep.data.views import normalize
from kdsweep.distill.distillation import TeacherForward, ViewPair
from kdsweep.evaluation import metrics, scoring
from kdsweep.models import unet
from kdsweep.models.unet import Outputs, UNet
from kdsweep.store import cell_folder
from kdsweep.training import guard
from kdsweep.training.checkpoint_schedule import CheckpointSchedule
from kdsweep.training.learner import Learner
from kdsweep.training.meter import EpochMeter, to_host, weighted_means

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]


class StepError(CellError):
    """An error inside a training step; the message names the epoch, step and term."""


class FrozenTeachers:
    """The frozen Teachers of a group, and the only place where a Teacher's forward is called.

    On two CPU cores 93 % of a Teacher's forward is convolution at the rate of a plain matrix product (224 x 224, batch
    16: 3.5 s, in bf16 1.7 s): folding its batch norms gains 3 %, torch.compile nothing in bf16, for 40 s of compiling.
    What pays is bf16, channels-last memory (3.5 s instead of 3.6) and few forwards. Weights are kept in the precision
    that they compute in: autocast would round frozen ones anew at each forward.

    Args:
        teachers: by name.
        compute: device and precision.
    """

    def __init__(self, teachers: Mapping[str, UNet], compute: Compute) -> None:
        self.teachers, self.compute = teachers, compute
        self.watches: dict[TeacherForward, Stopwatch] = {}  # of the last forward of each
        self._rounded: dict[str, UNet] = {}
        for name, network in teachers.items():
            if network.training or any(parameter.requires_grad for parameter in network.parameters()):
                raise ValueError(f"Teacher {name} is not frozen in eval mode")

    def teach(self, learners: list[Learner], images: Mapping[str, Tensor]) -> dict[TeacherForward, Outputs]:
        """Run each forward that these learners need once, no further than the last stage that one of them takes.

        Args:
            learners: those still in training.
            images: normalized images (N, 3, H, W) by view.
        """
        needed: dict[TeacherForward, set[str]] = {}
        for learner in learners:
            if (taught := learner.distillation) is not None:
                needed.setdefault(taught.forward, set()).update(taught.teacher_stages)
        with torch.inference_mode():
            return {forward: self._forward(forward, images, stages) for forward, stages in needed.items()}

    def _forward(self, forward: TeacherForward, images: Mapping[str, Tensor], stages: set[str]) -> Outputs:
        watch = self.watches[forward] = Stopwatch(self.compute.device)
        network = self.teachers[forward.teacher]
        if forward.precision == "bf16":
            if forward.teacher not in self._rounded:
                self._rounded[forward.teacher] = unet.in_bfloat16(network)
            network = self._rounded[forward.teacher]
        with self.compute.autocast(forward.precision):
            outputs: Outputs = network(images[forward.view], stages)
        watch.stop()
        return outputs


def fit(
    learners: list[Learner],
    *,
    teachers: Mapping[str, UNet],
    feed: Feed,
    compute: Compute,
    stopped: Callable[[Learner], None] = lambda _: None,
    prune: Callable[[int], list[Learner]] = lambda _: [],
) -> None:
    """Train a group until every learner has stopped.

    A learner that fails, for example with a loss that is not finite, is left out from then on; the others go on
    unchanged. A resumed learner joins at the first batch that it has not seen.

    Args:
        learners: trained in place; each becomes what it would have become alone.
        teachers: frozen networks by the names that the learners' forwards use.
        feed: training and validation images.
        compute: device and precision.
        stopped: called with each learner that has had its last epoch.
        prune: called at the beginning and after each epoch, with the number of epochs that all learners have completed;
            those that it returns have had their last epoch.
    """
    frozen, schedule = FrozenTeachers(teachers, compute), CheckpointSchedule()
    validation = list(scoring.eval_batches(feed.validation, compute))  # uploaded and normalized once, for all
    taught = [frozen.teach(learners, views) for views, _ in validation]
    first = min(learner.epoch for learner in learners) + 1
    most = max(learner.epochs for learner in learners)
    label = label_of(learners)
    _prune(prune(first), stopped)
    with Progress(label, epochs=most, done=first) as progress:
        for epoch in range(first, most):
            due = [learner for learner in learners if learner.is_due(epoch)]
            if not due and all(learner.stopped for learner in learners):
                break
            train_epoch(due, epoch, frozen=frozen, feed=feed, compute=compute, schedule=schedule)
            # The number after those of the steps: validation draws what no step does, alone and in a group the same.
            seed = feed.train.step_seed(epoch, len(feed.train))
            validate(due, validation, taught, seed=seed, compute=compute)
            for learner in (own for own in due if own.failure is None and own.stopped):
                stopped(learner)
            _prune(prune(epoch + 1), stopped)
            progress.update([learner.history[-1]["val/dice"] for learner in due if learner.history])
    share = schedule.spent_s / (time.monotonic() - schedule.started_s)
    log.info("%s: checkpoints took %.1f s, %.1f %% of the time", label, schedule.spent_s, 100 * share)


def _prune(learners: list[Learner], stopped: Callable[[Learner], None]) -> None:
    for learner in (own for own in learners if not own.stopped):
        learner.is_pruned = True
        log.info("%s: pruned after epoch %d", learner.title, learner.epoch + 1, extra=logs.FILE_ONLY)
        stopped(learner)


@contextmanager
def isolated(learner: Learner) -> Iterator[None]:
    """Let an error inside end this learner, with the traceback in its log, and not its group.

    What is passed on: a lack of memory, since fewer learners at a time may fit; and the loss of the device, of which
    another learner may be the cause.
    """
    with logs.about(learner.folder):
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error) or is_device_error(error):
                raise
            fail(learner, error)


def fail(learner: Learner, error: Exception) -> None:
    """End a learner early, and log and record the error."""
    learner.failure = error
    line = one_line(error)
    lead = "" if line.startswith(learner.title) else f"{learner.title}: "
    log.error("%s%s; traceback in %s", lead, line, learner.folder, exc_info=error)
    cell_folder.write_failed(learner.folder, line)


def train_epoch(
    learners: list[Learner],
    epoch: int,
    *,
    frozen: FrozenTeachers,
    feed: Feed,
    compute: Compute,
    schedule: CheckpointSchedule | None = None,
) -> None:
    """Train all learners on one pass over the training images; with a schedule, write checkpoints in between.

    The Students step one after the other, which on two CPU cores is the fastest way (224 x 224, batch 16): stacked
    under torch.func.vmap they take 1.7 to 3.7 times as long, torch.compile gains nothing (455 ms a step instead of
    450, for 60 s of compiling), a fused Adam under 1 %. CUDA graphs are not tried: no device was at hand to measure.
    """
    first = min((learner.steps for learner in learners), default=0)
    batches = enumerate(feed.train.epoch(epoch, first=first), start=first)
    number = first
    while any(learner.failure is None for learner in learners):
        with _shared(f"epoch {epoch + 1}, step {number + 1}, data"):
            number, batch = next(batches, (number, None))
        if batch is None:
            return
        active = [learner for learner in learners if learner.failure is None and learner.steps == number]
        on_device = {name: values.to(compute.device, non_blocking=True) for name, values in batch.items()}
        images = {view: normalize(on_device[view]) for view in _views(active)}
        with _shared(f"epoch {epoch + 1}, step {number + 1}, Teacher's forward"):
            teacher_outputs = frozen.teach(active, images)
        for learner in active:
            signals.check()
            with _turn(learner, f"step {number + 1}", seed=feed.train.step_seed(epoch, number)):
                watch = Stopwatch(compute.device)
                learner.set_rate((epoch + number / len(feed.train)) / learner.epochs)
                _step(learner, on_device, images, teacher_outputs, compute)
                watch.stop()
                learner.watches.append(watch)
                if learner.distillation is not None:
                    learner.watches.append(frozen.watches[learner.distillation.forward])
        number += 1
        if schedule is not None and (turn := schedule.next([own for own in active if own.failure is None])) is not None:
            with isolated(turn):
                schedule.save(turn)
        signals.check()


@contextmanager
def _shared(where: str) -> Iterator[None]:
    """Add to an error in shared work where it came up, in one line even if it is from a loader's process."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        line = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else one_line(error)
        raise StepError(f"{where}: {line}") from error


def _views(learners: list[Learner]) -> set[str]:
    """Return the views that these learners need."""
    return {learner.view for learner in learners} | {
        learner.distillation.forward.view for learner in learners if learner.distillation
    }


def _step(
    learner: Learner, batch: Batch, images: Batch, teacher_outputs: dict[TeacherForward, Outputs], compute: Compute
) -> None:
    taught, mask = None, batch[f"{learner.view}_mask"][:, None]
    views = ViewPair(theta=None, student_mask=mask, teacher_mask=mask)
    if (kd := learner.distillation) is not None:
        taught = teacher_outputs[kd.forward]
        if kd.forward.view != learner.view:
            views = ViewPair(batch["theta"], student_mask=mask, teacher_mask=batch[f"{kd.forward.view}_mask"][:, None])
    with learner.changing():
        learner.doing = "forward"
        with compute.autocast():
            outputs = learner.network(images[learner.view], learner.stages)
            terms = learner.terms(outputs, taught, views)
        learner.doing = "backward"
        learner.backward(terms)
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)  # now: a group holds the gradients of one learner at a time
        learner.means.add(terms, len(batch["theta"]))


@contextmanager
def _turn(learner: Learner, where: str, *, seed: int) -> Iterator[None]:
    """Open a learner's turn: neither the others nor an interruption change what it draws, and it changes nothing else.

    An error inside ends the learner alone, and names where in the training it came up.
    """
    epoch = learner.epoch + 2
    with isolated(learner):
        try:
            with guard.confined(seed):
                yield
                learner.doing = "afterwards"
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, CellError):
                raise
            place = f"epoch {epoch}, {where}, {learner.doing}"
            raise StepError(f"{learner.title}: {place}: {one_line(error)}") from error


def validate(
    learners: list[Learner],
    validation: list[tuple[Batch, Tensor]],
    taught: list[dict[TeacherForward, Outputs]],
    *,
    seed: int,
    compute: Compute,
) -> None:
    """End the epoch with the means over the validation images, which Teacher and Student see complete, unaugmented.

    The forwards of all learners are queued before the values of all are read: the host waits once.
    """
    validated = []
    for learner in (own for own in learners if own.failure is None):
        signals.check()
        with _turn(learner, "validation", seed=seed):
            validated.append((learner, validation_values(learner, validation, taught, compute)))
    validated = [(learner, means) for learner, means in validated if learner.failure is None]
    parts = [(learner.means.columns(), means.columns(), learner.kd_columns()) for learner, means in validated]
    with _shared("validation"):
        columns = iter(to_host([own for part in parts for own in part], compute.device))
    for learner, means in validated:
        train, val, kd = (next(columns) for _ in range(3))
        with _turn(learner, "validation", seed=seed):
            learner.check_finite(train, "train")
            learner.check_finite(val, "val")
            values = weighted_means(train, learner.means.counts, "train/") | weighted_means(val, means.counts, "val/")
            learner.end_epoch(values | learner.kd_values(kd))


def validation_values(
    learner: Learner,
    validation: list[tuple[Batch, Tensor]],
    taught: list[dict[TeacherForward, Outputs]],
    compute: Compute,
) -> EpochMeter:
    """Return the values of a learner over the validation images, on the device."""
    watch, means, kd = Stopwatch(compute.device), EpochMeter(), learner.distillation
    learner.evaluate()
    with torch.no_grad(), compute.autocast():
        for (views, mask), teacher_outputs in zip(validation, taught, strict=True):
            learner.doing = "forward"
            outputs = learner.network(views["strong"], learner.stages)
            same = ViewPair(theta=None, student_mask=mask, teacher_mask=mask)
            terms = learner.terms(outputs, teacher_outputs[kd.forward] if kd else None, same)
            dice = metrics.mean_dice(logits=outputs.logits, mask=mask)
            means.add({**terms, "dice": dice}, len(mask))
    learner.train()
    watch.stop()
    learner.watches.append(watch)
    return means


def label_of(learners: list[Learner]) -> str:
    """Return a group's name, such as ``13 Students of split 0 seed 0``, or the title of a single learner."""
    if len(learners) == 1:
        return learners[0].title
    places = {learner.title.partition(" ")[2].partition(" (")[0] for learner in learners}
    kind = "Teachers" if all(learner.title.startswith("Teacher") for learner in learners) else "Students"
    return f"{len(learners)} {kind} of {', '.join(sorted(places))}"
