"""The loop over a group of learners: every batch and every Teacher forward is made once and serves them all.

A Teacher, the Student baseline and a distilled Student are all learners. Groups of one and of thirteen run the same
code, and each learner gets the weights and scores that it would have had alone and without any interruption.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kdsweep.core import signals
from kdsweep.core.device import Compute, Stopwatch
from kdsweep.core.progress import counted
from kdsweep.data.loaders import Feed
from kdsweep.data.views import normalize
from kdsweep.distill.distillation import TeacherForward, ViewPair
from kdsweep.evaluation import metrics, scoring
from kdsweep.models import networks
from kdsweep.models.networks import Network, Outputs
from kdsweep.training import guard
from kdsweep.training.learner import Learner
from kdsweep.training.meter import EpochMeter, to_host, weighted_means

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Forwards = dict[TeacherForward, Outputs]


class FrozenTeachers:
    """The frozen Teachers of a group by fingerprint; a Teacher's forward is called here alone.

    Weights are kept in the precision that they compute in: autocast would round frozen ones at each forward.
    """

    def __init__(self, teachers: Mapping[str, Network], compute: Compute) -> None:
        self.teachers, self.compute = teachers, compute
        self.watches: dict[TeacherForward, Stopwatch] = {}  # of the last forward of each
        self._rounded: dict[str, Network] = {}
        for name, network in teachers.items():
            if network.training or any(parameter.requires_grad for parameter in network.parameters()):
                raise ValueError(f"Teacher {name} is not frozen in eval mode")

    def teach(self, learners: list[Learner], images: Mapping[str, Tensor]) -> Forwards:
        """Run each forward that these learners need once, no further than the last stage that one of them takes.

        ``images`` are normalized ones (N, 3, H, W) by view.
        """
        needed: dict[TeacherForward, set[str]] = {}
        for kd in (learner.distillation for learner in learners if learner.distillation):
            needed.setdefault(kd.forward, set()).update(kd.teacher_stages)
        with torch.inference_mode():
            return {forward: self._forward(forward, images, stages) for forward, stages in needed.items()}

    def _forward(self, forward: TeacherForward, images: Mapping[str, Tensor], stages: set[str]) -> Outputs:
        watch = self.watches[forward] = Stopwatch(self.compute.device)
        network = self.teachers[forward.teacher]
        if forward.precision == "bf16":
            if forward.teacher not in self._rounded:
                self._rounded[forward.teacher] = networks.in_bfloat16(network)
            network = self._rounded[forward.teacher]
        with self.compute.autocast(forward.precision):
            outputs: Outputs = network(images[forward.view], stages)
        watch.stop()
        return outputs


class CheckpointSchedule:
    """When learners are saved: as often as takes at most a share of the time since the start."""

    def __init__(self, share: float = 0.05) -> None:
        self.share, self.started_s = share, time.monotonic()
        self.spent_s = self.saved_bytes = 0.0
        self.saved_s: dict[Path, float] = {}

    def next(self, learners: list[Learner]) -> Learner | None:
        """Return the learner that was saved longest ago if there is time for a checkpoint, else None."""
        stalest = min(learners, key=lambda learner: self.saved_s.get(learner.folder, 0.0), default=None)
        if stalest is None:
            return None
        rate = self.saved_bytes / self.spent_s if self.spent_s else 2e8  # bytes per second; a guess before the first
        expected_s = stalest.state_bytes() / rate
        return stalest if self.spent_s + expected_s <= self.share * (time.monotonic() - self.started_s) else None

    def save(self, learner: Learner) -> None:
        """Write a learner's checkpoint and count its time."""
        start_s = time.monotonic()
        learner.save()
        self.saved_s[learner.folder] = time.monotonic()
        self.spent_s += self.saved_s[learner.folder] - start_s
        self.saved_bytes += learner.state_bytes()


def fit(
    learners: list[Learner],
    *,
    teachers: Mapping[str, Network],
    feed: Feed,
    compute: Compute,
    after: Callable[[int], None] = lambda _: None,
) -> None:
    """Train a group until every learner has stopped; each becomes what it would have become alone.

    A learner that fails is left out from then on, and the others continue unchanged. A resumed learner joins at the
    first batch that it has not seen. ``teachers`` are frozen networks by fingerprint; ``after`` is called at the
    beginning and after each epoch, with the number of epochs that all learners have completed.
    """
    most, label = max(learner.epochs for learner in learners), label_of(learners)
    first = min((learner.epoch + 1 for learner in learners if not learner.stopped), default=most)
    after(first)
    active = [learner for learner in learners if not learner.stopped]
    if not active:
        return
    frozen, schedule = FrozenTeachers(teachers, compute), CheckpointSchedule()
    validation = list(scoring.eval_batches(feed.validation, compute))  # uploaded and normalized once, for all
    forwards = [frozen.teach(active, views) for views, _ in validation]
    test = list(scoring.eval_batches(feed.test, compute)) if any(each.tests_each_epoch for each in active) else []
    with counted(label, unit="epoch", total=most, done=first, write=log.info) as count:
        for epoch in range(first, most):
            if all(learner.stopped for learner in active):
                break
            due = [learner for learner in active if not learner.stopped and learner.epoch + 1 == epoch]
            train_epoch(due, epoch, frozen=frozen, feed=feed, compute=compute, schedule=schedule)
            # The number after those of the steps: validation draws what no step does, alone and in a group the same.
            seed = feed.train.step_seed(epoch, len(feed.train))
            validate(due, validation, forwards, seed=seed, compute=compute, test=test)
            after(epoch + 1)
            dices = [learner.history[-1]["val/dice"] for learner in due if learner.history]
            count(val_dice=f"{max(dices, default=0.0):.3f}")
    share = schedule.spent_s / (time.monotonic() - schedule.started_s)
    log.info("%s: checkpoints took %.1f s, %.1f %% of the time", label, schedule.spent_s, 100 * share)


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

    The Students step one after the other: stacked under torch.func.vmap they take longer, torch.compile gains nothing.
    """
    number = min((learner.steps for learner in learners), default=0)
    batches = feed.train.epoch(epoch, first=number)
    while active := [learner for learner in learners if learner.failure is None]:
        step = f"step {number + 1}"
        with guard.shared(f"epoch {epoch + 1}, {step}, data"):
            batch = next(batches, None)
        if batch is None:
            return
        active = [learner for learner in active if learner.steps == number]
        on_device = {name: values.to(compute.device, non_blocking=True) for name, values in batch.items()}
        images = {view: normalize(on_device[view]) for view in set[str]().union(*(learner.views for learner in active))}
        with guard.shared(f"epoch {epoch + 1}, {step}, Teacher's forward"):
            forwards = frozen.teach(active, images)
        for learner in active:
            signals.check()
            with guard.turn(learner, step, seed=feed.train.step_seed(epoch, number)):
                watch = Stopwatch(compute.device)
                learner.set_rate((epoch + number / len(feed.train)) / learner.epochs)
                _step(learner, on_device, images, forwards, compute)
                watch.stop()
                of_teacher = [frozen.watches[learner.distillation.forward]] if learner.distillation else []
                learner.watches += [watch, *of_teacher]
        number += 1
        if schedule and (next_saved := schedule.next([each for each in active if each.failure is None])) is not None:
            with guard.isolated(next_saved):
                schedule.save(next_saved)
        signals.check()


def _step(learner: Learner, batch: Batch, images: Batch, forwards: Forwards, compute: Compute) -> None:
    mask = batch[f"{learner.view}_mask"][:, None]
    views, teacher_outputs = ViewPair(theta=None, student_mask=mask, teacher_mask=mask), None
    if (kd := learner.distillation) is not None:
        teacher_outputs = forwards[kd.forward]
        if kd.forward.view != learner.view:
            views = ViewPair(batch["theta"], student_mask=mask, teacher_mask=batch[f"{kd.forward.view}_mask"][:, None])
    learner.can_save = False
    learner.doing = "forward"
    with compute.autocast():
        outputs = learner.network(images[learner.view], learner.stages)
        terms = learner.terms(outputs, teacher_outputs, views)
    learner.doing = "backward"
    learner.backward(terms)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)  # now: a group holds the gradients of one learner at a time
    learner.means.add(terms, len(batch["theta"]))
    learner.can_save = True


def validate(
    learners: list[Learner],
    validation: list[tuple[Batch, Tensor]],
    forwards: list[Forwards],
    *,
    seed: int,
    compute: Compute,
    test: Sequence[tuple[Batch, Tensor]] = (),
) -> None:
    """End the epoch with the means over the validation images, which Teacher and Student see complete, unaugmented.

    The forwards of all learners are queued before the values of all are read: the host waits once. Learners with
    ``tests_each_epoch`` get their mean Dice on the test images as well.
    """
    validated: list[tuple[Learner, EpochMeter, EpochMeter]] = []
    for learner in (each for each in learners if each.failure is None):
        signals.check()
        with guard.turn(learner, "validation", seed=seed):
            means = validation_values(learner, validation, forwards, compute)
            tested = test_values(learner, test if learner.tests_each_epoch else (), compute)
            validated.append((learner, means, tested))
    validated = [each for each in validated if each[0].failure is None]
    with guard.shared("validation"):
        parts = [part.columns() for each in validated for part in each]
        columns = iter(to_host(parts, compute.device))
    for learner, means, tested in validated:
        train, val, by_epoch = next(columns), next(columns), next(columns)
        with guard.turn(learner, "validation", seed=seed):
            values = learner.values(train, val, means.counts)
            learner.end_epoch(values | weighted_means(by_epoch, tested.counts, "test/"))


def validation_values(
    learner: Learner, validation: list[tuple[Batch, Tensor]], forwards: list[Forwards], compute: Compute
) -> EpochMeter:
    """Return the values of a learner over the validation images, on the device."""
    watch, means, kd = Stopwatch(compute.device), EpochMeter(), learner.distillation
    learner.trained.eval()
    with torch.no_grad(), compute.autocast():
        for (views, mask), teacher_outputs in zip(validation, forwards, strict=True):
            learner.doing = "forward"
            outputs = learner.network(views["strong"], learner.stages)
            same = ViewPair(theta=None, student_mask=mask, teacher_mask=mask)
            terms = learner.terms(outputs, teacher_outputs[kd.forward] if kd else None, same)
            dice = metrics.mean_dice(logits=outputs.logits, mask=mask)
            means.add({**terms, "dice": dice}, len(mask))
    learner.trained.train()
    watch.stop()
    learner.watches.append(watch)
    return means


def test_values(learner: Learner, test: Sequence[tuple[Batch, Tensor]], compute: Compute) -> EpochMeter:
    """Return the mean Dice of a learner over the test images as ``dice_by_epoch``, on the device."""
    means = EpochMeter()
    learner.trained.eval()
    with torch.no_grad(), compute.autocast():
        for views, mask in test:
            logits = learner.network(views["strong"]).logits
            means.add({"dice_by_epoch": metrics.mean_dice(logits=logits, mask=mask)}, len(mask))
    learner.trained.train()
    return means


def label_of(learners: list[Learner]) -> str:
    """Return a group's name, such as ``13 Students of split 0 seed 0``, or the title of a single learner."""
    if len(learners) == 1:
        return learners[0].title
    of = sorted({learner.title.partition(" ")[2].partition(" (")[0] for learner in learners})
    kind = "Teachers" if all(learner.title.startswith("Teacher") for learner in learners) else "Students"
    return f"{len(learners)} {kind} of {', '.join(of)}"
