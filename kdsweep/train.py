"""The loop over a group of learners: every batch and every Teacher forward is made once and serves them all.

A Teacher, the Student baseline and a distilled Student are all learners; a group of one or of thirteen is the same
code, and each learner's weights and scores are those that it would have had alone.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from kdsweep import checkpoint, metrics
from kdsweep.learner import Learner
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
        eval_batch: images per forward outside training; results do not depend on the Student's batch.
    """

    device: torch.device
    precision: str
    eval_batch: int = 16

    def autocast(self) -> AbstractContextManager[None]:
        """The context of every forward pass."""
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        )
        return context


class Staff:
    """The frozen Teachers of a group, and the only place where a Teacher's forward is called.

    Args:
        teachers: by name.
        compute: where and how.
    """

    def __init__(self, teachers: Mapping[str, UNet], compute: Compute) -> None:
        self.teachers, self.compute = teachers, compute
        for name, network in teachers.items():
            if network.training or any(parameter.requires_grad for parameter in network.parameters()):
                raise ValueError(f"Teacher {name} is not frozen in eval mode")

    def teach(self, learners: list[Learner], images: Mapping[str, Tensor]) -> dict[tuple[str, str], Outputs]:
        """Outputs by (Teacher, view) for what these learners need: each pair once, encoder only where that is enough.

        Args:
            learners: those still in training.
            images: normalised images (N, 3, H, W) by view.
        """
        needed: dict[tuple[str, str], bool] = {}
        for learner in learners:
            if (taught := learner.distillation) is not None:
                key = (taught.teacher, taught.view)
                needed[key] = needed.get(key, False) or bool(taught.kd_path.needs_logits)
        with torch.no_grad(), self.compute.autocast():
            return {key: self._forward(key[0], images[key[1]], logits=logits) for key, logits in needed.items()}

    def _forward(self, name: str, images: Tensor, *, logits: bool) -> Outputs:
        teacher = self.teachers[name]
        if logits:
            outputs: Outputs = teacher(images)
            return outputs
        hidden = teacher.hidden(images)
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

    Args:
        learners: trained in place; each is what it would have become alone.
        teachers: frozen networks by the names that the learners' distillations use.
        feed: training and validation images.
        compute: device and precision.

    Raises:
        DivergedError: a loss term is not finite.
    """
    keep_freed_memory()
    staff = Staff(teachers, compute)
    for learner in learners:
        for module in learner.modules().values():
            placed(module, compute)
    lessons = [staff.teach(learners, views) for views, _ in _eval_batches(feed.validation, compute)]
    most = max(learner.epochs for learner in learners)
    label = learners[0].title if len(learners) == 1 else f"{len(learners)} learners"
    with Progress(label, epochs=most) as progress:
        for epoch in range(most):
            active = [learner for learner in learners if not learner.stopped]
            if not active:
                break
            values = _train_epoch(active, epoch, staff=staff, feed=feed, compute=compute)
            for learner in active:
                learner.end_epoch(values[id(learner)] | _validate(learner, lessons, feed=feed, compute=compute))
            progress.update(max(learner.history[-1]["val/dice"] for learner in active))


def placed(module: Module, compute: Compute) -> Module:
    """The module on the device in channels-last memory, which is faster on CPU and CUDA.

    Every network is placed so, trained now or read from a file: the other memory format sums in another order.
    """
    return module.to(compute.device).to(memory_format=torch.channels_last)


def _train_epoch(
    learners: list[Learner], epoch: int, *, staff: Staff, feed: Feed, compute: Compute
) -> dict[int, dict[str, float]]:
    means = {id(learner): Means() for learner in learners}
    views = {learner.view for learner in learners} | {
        learner.distillation.view for learner in learners if learner.distillation
    }
    for batch in feed.train.epoch(epoch):
        on_device = {name: values.to(compute.device, non_blocking=True) for name, values in batch.items()}
        images = {view: normalise(on_device[view]) for view in views}
        lessons = staff.teach(learners, images)
        for learner in learners:
            terms = _step(learner, on_device, images, lessons, compute)
            means[id(learner)].add(terms, len(on_device["theta"]))
    return {key: _with_ratio(mean.read("train/")) for key, mean in means.items()}


def _step(
    learner: Learner,
    batch: dict[str, Tensor],
    images: dict[str, Tensor],
    lessons: dict[tuple[str, str], Outputs],
    compute: Compute,
) -> dict[str, Tensor]:
    taught, theta = None, None
    if (kd := learner.distillation) is not None:
        taught = lessons[kd.teacher, kd.view]
        theta = batch["theta"] if kd.view != learner.view else None
    with compute.autocast():
        outputs = learner.network(images[learner.view])
        terms = learner.terms(outputs, batch[f"{learner.view}_mask"][:, None], taught, theta)
    learner.optimiser.zero_grad(set_to_none=True)
    terms["loss"].backward()
    learner.optimiser.step()
    return terms


def _validate(
    learner: Learner, lessons: list[dict[tuple[str, str], Outputs]], *, feed: Feed, compute: Compute
) -> dict[str, float]:
    """Means over the validation images, which Teacher and Student see alike: whole, unaugmented."""
    means = Means()
    learner.network.eval()
    with torch.no_grad(), compute.autocast():
        batches = _eval_batches(feed.validation, compute)
        for (views, mask), lesson in zip(batches, lessons, strict=True):
            outputs = learner.network(views["strong"])
            kd = learner.distillation
            taught = lesson[kd.teacher, kd.view] if kd else None
            terms = learner.terms(outputs, mask, taught, None)
            means.add({**terms, "dice": metrics.mean_dice(logits=outputs.logits, mask=mask)}, len(mask))
    learner.network.train()
    return means.read("val/")


def _eval_batches(part: EvalPart, compute: Compute) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Normalised whole images under both views' names (they are the same here), with their masks."""
    for images, masks in part.batches(compute.eval_batch):
        ready = normalise(images.to(compute.device))
        yield {"strong": ready, "weak": ready}, masks.to(compute.device)


def _with_ratio(values: dict[str, float]) -> dict[str, float]:
    """With fixed weights the ratio of the two terms decides the experiment, so it is recorded."""
    if "train/kd" not in values:
        return values
    return {**values, "train/kd_to_supervised": values["train/kd"] / max(values["train/supervised"], 1e-12)}


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
) -> list[dict[str, float]]:
    """Train a group, then test each learner: final values in the learners' order. Arguments as for ``fit``.

    Whatever ends it early closes the open runs: KILLED if the user or the system stopped it, else FAILED.
    """
    open_runs = list(learners)
    try:
        for learner in learners:
            size = sum(parameter.numel() for parameter in learner.parameters())
            log.info(
                "%s: %.2f M parameters, at most %d epochs of %d batches, %d training images, %s, %s",
                learner.title,
                size / 1e6,
                learner.epochs,
                len(feed.train),
                feed.train.image_count,
                compute.device,
                compute.precision,
            )
        fit(learners, teachers=teachers, feed=feed, compute=compute)
        values = []
        for learner in learners:
            values.append(conclude(learner, feed=feed, compute=compute))
            open_runs.remove(learner)
        return values
    except BaseException as error:
        for learner in open_runs:
            _abort(learner, status="FAILED" if isinstance(error, Exception) else "KILLED")
        raise


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
