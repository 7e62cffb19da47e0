"""The loop over a group of learners: every batch and every Teacher forward is made once and serves them all.

A Teacher, the Student baseline and a distilled Student are all learners; a group of one or of thirteen is the same
code, and each learner's weights and scores are those that it would have had alone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from kdsweep import checkpoint, logs, metrics
from kdsweep.learner import Learner, Lesson
from kdsweep.loaders import EvalPart, Feed
from kdsweep.models import Outputs, UNet
from kdsweep.progress import Progress
from kdsweep.views import normalise

log = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)
PREDICTIONS = "test_predictions.npz"


@dataclass(frozen=True)
class Compute:
    """Where and how the numbers are computed.

    Attributes:
        device: of networks and batches.
        precision: ``fp32``, or ``bf16`` for autocast of the forward passes.
        deterministic: have CUDA choose algorithms that give the same bits every time.
        eval_batch: images per forward outside training; results do not depend on the Student's batch.
    """

    device: torch.device
    precision: str
    deterministic: bool = False
    eval_batch: int = 16

    def autocast(self, precision: str | None = None) -> AbstractContextManager[None]:
        """The context of every forward pass, of this or another precision."""
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=(precision or self.precision) == "bf16"
        )
        return context

    def prepare(self) -> None:
        """Set the process up; before anything else is computed."""
        keep_freed_memory()
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is used first
        torch.use_deterministic_algorithms(self.deterministic)


class Staff:
    """The frozen Teachers of a group, and the only place where a Teacher's forward is called.

    On two CPU cores 93 % of a Teacher's forward is convolution at the rate of a plain matrix product (224 x 224, batch
    16: 3.5 s, in bf16 1.7 s): folding its batch norms gains 3 %, torch.compile nothing in bf16, for 40 s of compiling.
    What pays is bf16, channels-last memory (3.5 s instead of 3.6) and few forwards.

    Args:
        teachers: by name.
        compute: where and how.
    """

    def __init__(self, teachers: Mapping[str, UNet], compute: Compute) -> None:
        self.teachers, self.compute = teachers, compute
        for name, network in teachers.items():
            if network.training or any(parameter.requires_grad for parameter in network.parameters()):
                raise ValueError(f"Teacher {name} is not frozen in eval mode")

    def teach(self, learners: list[Learner], images: Mapping[str, Tensor]) -> dict[Lesson, Outputs]:
        """What these learners need: each lesson once, encoder only where that is enough.

        Args:
            learners: those still in training.
            images: normalised images (N, 3, H, W) by view.
        """
        needed: dict[Lesson, bool] = {}
        for learner in learners:
            if (taught := learner.distillation) is not None:
                needed[taught.lesson] = needed.get(taught.lesson, False) or bool(taught.kd_path.needs_logits)
        with torch.inference_mode():
            return {lesson: self._forward(lesson, images, logits=logits) for lesson, logits in needed.items()}

    def _forward(self, lesson: Lesson, images: Mapping[str, Tensor], *, logits: bool) -> Outputs:
        teacher = self.teachers[lesson.teacher]
        with self.compute.autocast(lesson.precision):
            if logits:
                outputs: Outputs = teacher(images[lesson.view])
                return outputs
            hidden = teacher.hidden(images[lesson.view])
            return Outputs(logits=hidden.new_empty(0), hidden=hidden)


class Means:
    """Running means over images, kept on the device: reading a value here would make the device wait every step."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, Tensor], count: int) -> None:
        """Add the means of a batch of ``count`` images."""
        self.count += count
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double() * count

    def read(self, prefix: str) -> dict[str, float]:
        """The means so far as plain numbers, names led by ``prefix``."""
        return {prefix + name: (value / self.count).item() for name, value in self.sums.items()}


def fit(learners: list[Learner], *, teachers: Mapping[str, UNet], feed: Feed, compute: Compute) -> None:
    """Train a group until every learner has stopped; their best checkpoints lie in their folders then.

    A learner that fails, be it that a loss term is not finite, is left out from there on; the others do not notice.

    Args:
        learners: trained in place; each is what it would have become alone.
        teachers: frozen networks by the names that the learners' lessons use.
        feed: training and validation images.
        compute: device and precision.
    """
    compute.prepare()
    staff = Staff(teachers, compute)
    for learner in learners:
        for module in learner.modules().values():
            placed(module, compute)
    taught = [staff.teach(learners, views) for views, _ in _eval_batches(feed.validation, compute)]
    most = max(learner.epochs for learner in learners)
    label = learners[0].title if len(learners) == 1 else f"{len(learners)} learners"
    with Progress(label, epochs=most) as progress:
        for epoch in range(most):
            if not (active := [learner for learner in learners if not learner.stopped]):
                break
            trained = train_epoch(active, epoch, staff=staff, feed=feed, compute=compute)
            validated = _validate(active, taught, feed=feed, compute=compute)
            for learner in (own for own in active if own.failure is None):
                with alone(learner):
                    learner.end_epoch(trained[learner.folder].read("train/") | validated[learner.folder].read("val/"))
            progress.update([learner.history[-1]["val/dice"] for learner in active if learner.history])


@contextmanager
def alone(learner: Learner) -> Iterator[None]:
    """Work on one learner: what goes wrong inside ends this one with its traceback in its own log, not its group."""
    with logs.about(learner.folder):
        try:
            yield
        except Exception as error:
            fail(learner, error)


def fail(learner: Learner, error: Exception) -> None:
    """End a learner before its time; its run is closed as FAILED."""
    learner.failure = error
    text = " ".join(str(error).split())
    log.error("%s: %s: %s; traceback in %s", learner.title, type(error).__name__, text, learner.folder, exc_info=error)
    _abort(learner, status="FAILED")


def placed(module: Module, compute: Compute) -> Module:
    """The module on the device in channels-last memory, which is faster on CPU and CUDA.

    Every network is placed so, trained now or read from a file: the other memory format sums in another order.
    """
    return module.to(compute.device).to(memory_format=torch.channels_last)


def train_epoch(
    learners: list[Learner], epoch: int, *, staff: Staff, feed: Feed, compute: Compute
) -> dict[Path, Means]:
    """One pass over the training images for all learners: their running means by folder.

    The Students step one after the other, which on two CPU cores is the fastest way (224 x 224, batch 16): stacked
    under torch.func.vmap they take 1.7 to 3.7 times as long, torch.compile gains nothing (455 ms a step instead of
    450, for 60 s of compiling), a fused Adam under 1 %. CUDA graphs are not tried: no device was at hand to measure.
    """
    means = {learner.folder: Means() for learner in learners}
    for number, batch in enumerate(feed.train.epoch(epoch)):
        active = [learner for learner in learners if learner.failure is None]
        on_device = {name: values.to(compute.device, non_blocking=True) for name, values in batch.items()}
        images = {view: normalise(on_device[view]) for view in _views(active)}
        lessons = staff.teach(active, images)
        for learner in active:
            with alone(learner):
                # What a loss or network draws is its own too: neither the others nor an interruption change it.
                torch.manual_seed(feed.train.step_seed(epoch, number))
                terms = _step(learner, on_device, images, lessons, compute)
                means[learner.folder].add(terms, len(on_device["theta"]))
    return means


def _views(learners: list[Learner]) -> set[str]:
    """The views that somebody still needs."""
    return {learner.view for learner in learners} | {
        learner.distillation.lesson.view for learner in learners if learner.distillation
    }


def _step(
    learner: Learner,
    batch: dict[str, Tensor],
    images: dict[str, Tensor],
    lessons: dict[Lesson, Outputs],
    compute: Compute,
) -> dict[str, Tensor]:
    taught, theta = None, None
    if (kd := learner.distillation) is not None:
        taught = lessons[kd.lesson]
        theta = batch["theta"] if kd.lesson.view != learner.view else None
    with compute.autocast():
        outputs = learner.network(images[learner.view])
        terms = learner.terms(outputs, batch[f"{learner.view}_mask"][:, None], taught, theta)
    terms["loss"].backward()
    learner.optimiser.step()
    learner.optimiser.zero_grad(set_to_none=True)  # now, so that a group holds the gradients of one learner at a time
    return {name: term.detach() for name, term in terms.items()}


def _validate(
    learners: list[Learner], taught: list[dict[Lesson, Outputs]], *, feed: Feed, compute: Compute
) -> dict[Path, Means]:
    """Means over the validation images, which Teacher and Student see alike: whole, unaugmented."""
    means = {learner.folder: Means() for learner in learners}
    for learner in learners:
        learner.evaluate()
    with torch.no_grad():
        for (views, mask), lessons in zip(_eval_batches(feed.validation, compute), taught, strict=True):
            for learner in learners:
                if learner.failure is None:
                    with alone(learner), compute.autocast():
                        outputs = learner.network(views["strong"])
                        kd = learner.distillation
                        terms = learner.terms(outputs, mask, lessons[kd.lesson] if kd else None, None)
                        dice = metrics.mean_dice(logits=outputs.logits, mask=mask)
                        means[learner.folder].add({**terms, "dice": dice}, len(mask))
    for learner in learners:
        learner.train()
    return means


def _eval_batches(part: EvalPart, compute: Compute) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Normalised whole images under both views' names (they are the same here), with their masks."""
    for images, masks in part.batches(compute.eval_batch):
        ready = normalise(images.to(compute.device))
        yield {"strong": ready, "weak": ready}, masks.to(compute.device)


def predict(network: UNet, part: EvalPart, *, compute: Compute) -> Tensor:
    """Predictions (N, 1, H, W) bool of whole images on the CPU: probability above 0.5."""
    network.eval()
    with torch.no_grad(), compute.autocast():
        return torch.cat([(network(views["strong"]).logits > 0).cpu() for views, _ in _eval_batches(part, compute)])


def score(predictions: Tensor, part: EvalPart) -> pd.DataFrame:
    """One row per image: image, label, dice, iou, precision, sensitivity, hd95_px (see metrics.py)."""
    table = pd.DataFrame(metrics.per_image(prediction=predictions, mask=part.masks))
    table.insert(0, "image", part.ids)
    table.insert(1, "label", part.labels)
    return table


def conclude(learner: Learner, *, feed: Feed, compute: Compute) -> dict[str, float]:
    """Test the best checkpoint, write its files, then record them; the marker comes last.

    Returns:
        The final values, ``test/dice`` among them.
    """
    learner.restore_best()
    predictions = predict(learner.network, feed.test, compute=compute)
    table = score(predictions, feed.test)
    values = {f"test/{name}": float(table[name].mean()) for name in metrics.SCORES}
    values["test/dice_std"] = float(table["dice"].std())
    values["test/trivial_dice"] = metrics.trivial_dice(feed.test.masks)
    values |= {"best_epoch": float(learner.best_epoch), "epochs": float(learner.epoch + 1)}
    folder = learner.folder
    exported = "teacher" if learner.role == "teacher" else "student"
    checkpoint.save_network(folder / f"{exported}.safetensors", learner.network)
    checkpoint.write_text(folder / "history.csv", pd.DataFrame(learner.history).to_csv(index=False))
    checkpoint.save_predictions(folder / PREDICTIONS, predictions[:, 0].numpy(), ids=feed.test.ids)
    checkpoint.write_text(folder / "test_scores.csv", table.to_csv(index=False))
    learner.run.finish(values, [folder / name for name in ("test_scores.csv", PREDICTIONS, "split.json")])
    checkpoint.write_json(folder / checkpoint.FINISHED, {"run_id": learner.run.run_id, **values})
    log.info(
        "%s: test Dice %.4f ± %.4f over %d images (best epoch %d of %d)",
        learner.title,
        values["test/dice"],
        values["test/dice_std"],
        len(table),
        learner.best_epoch + 1,
        learner.epoch + 1,
    )
    return values


def run(
    learners: list[Learner], *, teachers: Mapping[str, UNet], feed: Feed, compute: Compute
) -> list[dict[str, float] | Exception]:
    """Train a group, then test each learner: final values, or what ended it, in the learners' order.

    Arguments as for ``fit``. Whatever ends it early closes the open runs: KILLED if the user or the system stopped it,
    else FAILED.
    """
    results: dict[Path, dict[str, float] | Exception] = {}
    try:
        for learner in learners:
            with logs.about(learner.folder):
                _introduce(learner, feed=feed, compute=compute)
        fit(learners, teachers=teachers, feed=feed, compute=compute)
        for learner in learners:
            if learner.failure is None:
                with alone(learner):
                    results[learner.folder] = conclude(learner, feed=feed, compute=compute)
    except Exception as error:  # of what they share: batches, a Teacher's forward
        for learner in learners:
            if learner.failure is None and learner.folder not in results:
                fail(learner, error)
    except BaseException:
        for learner in learners:
            if learner.failure is None and learner.folder not in results:
                _abort(learner, status="KILLED")
        raise
    return [learner.failure or results[learner.folder] for learner in learners]


def _introduce(learner: Learner, *, feed: Feed, compute: Compute) -> None:
    log.info(
        "%s: %.2f M parameters, at most %d epochs of %d batches, %d training images, %s, %s",
        learner.title,
        sum(parameter.numel() for parameter in learner.parameters()) / 1e6,
        learner.epochs,
        len(feed.train),
        feed.train.image_count,
        compute.device,
        compute.precision,
    )


def _abort(learner: Learner, *, status: str) -> None:
    try:
        learner.run.abort(status=status)
    except Exception as error:  # what ended the training is what the user must hear of
        log.warning("%s: its run stays open, it could not be closed as %s: %s", learner.title, status, error)


def keep_freed_memory() -> None:
    """Let glibc keep freed activations instead of giving them back each step: 1.4 to 2 times faster on CPU.

    Results stay the same bit for bit. Elsewhere than on glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(ctypes.c_int(-3), ctypes.c_int(1 << 30))  # M_MMAP_THRESHOLD
        mallopt(ctypes.c_int(-1), ctypes.c_int(2**31 - 1))  # M_TRIM_THRESHOLD


def give_back_memory() -> None:
    """Return to the system what ``keep_freed_memory`` held back: training a Teacher takes several times a Student's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))
