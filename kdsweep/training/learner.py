"""A learner: one network in training, with its optimizer, early stopping, checkpoint and distillation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdsweep.core.device import Stopwatch
from kdsweep.core.errors import CellError
from kdsweep.core.files import DamagedError, remove_parts
from kdsweep.distill import losses
from kdsweep.distill.distillation import Distillation, ViewPair, gradient_ratio, matched_weight
from kdsweep.models.unet import Outputs, UNet
from kdsweep.store import cell_folder, checkpoint
from kdsweep.training.meter import Columns, EpochMeter, not_finite, to_host

log = logging.getLogger(__name__)

RATIO_EVERY = 10  # epochs: to measure the gradients' ratio takes one more backward pass

# By name what the learning rate is multiplied by, of the share of all steps that lies behind. Sources: Loshchilov and
# Hutter, SGDR, ICLR 2017 (cosine); Chen et al., DeepLab, TPAMI 40, 2018 (poly, power 0.9).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "poly": lambda progress: (1 - progress) ** 0.9,
}


class DivergedError(CellError):
    """A loss term is no longer a finite number."""


@dataclass
class Learner:
    """One network in training, with its own optimizer, early stopping, best checkpoint and run.

    Attributes:
        title: its name in messages.
        role: ``distilled``, ``baseline`` or ``teacher``.
        network: trained in place.
        view: the view that it sees in training, ``weak`` or ``strong``.
        distillation: None for a network that learns from the masks alone.
        lr: Adam's learning rate, at the start.
        epochs: the maximum.
        patience: epochs without improvement of the monitored value after which it stops.
        folder: of its files.
        fused: have Adam step all parameters in few kernels: for CUDA, where it matters.
        supervised: the loss of logits and mask.
        schedule: how the rate falls to 0 in the course of ``epochs``, see SCHEDULES.
        monitor: the validation value that decides the best epoch: ``loss`` (KD term included) or ``dice``.
        nsd_tolerance_px: of the normalized surface Dice of its test images.
        best_loss: lowest monitored value so far, which is 1 - Dice for ``dice``.
        best_epoch: the epoch of that value, from 0.
        best: the state of the modules after that epoch.
        epoch: number of the last whole epoch.
        means: of the steps taken in the epoch that has begun.
        kd_weight: of the KD term now.
        gradient_ratios: KD to supervised gradient at the encoder, of the epoch's steps in which it was measured.
        watches: that have measured work of the epoch that has begun, and have not been read.
        history: values of each whole epoch.
        times_ms: when each of them ended.
        seconds: what each of them took: its steps, its validation, and its Teacher's forwards as if it were alone.
        spent_s: the same of the epoch that has begun, as far as its watches have been read.
        failure: the error that ended it early.
        is_pruned: whether it has been ended early as a trial that has no prospects.
        whole: whether it can be saved: its checkpoint has been read and no step is half done.
        doing: the part of a step that is running, for messages.
    """

    title: str
    role: str
    network: UNet
    view: str
    distillation: Distillation | None
    lr: float
    epochs: int
    patience: int
    folder: Path
    fused: bool = False
    supervised: Callable[..., Tensor] = losses.cross_entropy
    schedule: str = "constant"
    monitor: str = "loss"
    nsd_tolerance_px: float = 2.0
    best_loss: float = math.inf
    best_epoch: int = -1
    best: dict[str, Any] | None = None
    epoch: int = -1
    means: EpochMeter = field(default_factory=EpochMeter)
    gradient_ratios: list[Tensor] = field(default_factory=list)
    watches: list[Stopwatch] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    times_ms: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    spent_s: float = 0.0
    failure: Exception | None = None
    is_pruned: bool = False
    whole: bool = False
    doing: str = ""

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, fused=self.fused or None)
        fixed = self.distillation.weight if self.distillation else None
        self.kd_weight: float | Tensor = 0.5 if fixed is None else fixed

    def modules(self) -> dict[str, nn.Module]:
        """Return the network and, if it is taught, its KD paths."""
        terms = self.distillation.terms if self.distillation else {}
        several = len(terms) > 1
        paths = {f"kd_path.{name}" if several else "kd_path": term.kd_path for name, term in terms.items()}
        return {"network": self.network, **paths}

    @property
    def device(self) -> torch.device:
        """Return the device of its network."""
        return next(self.network.parameters()).device

    @property
    def stages(self) -> set[str]:
        """Return the stages of its network that its losses take."""
        return {"logits"} | (self.distillation.stages if self.distillation else set())

    def parameters(self) -> list[nn.Parameter]:
        """Return everything that is trained: the parameters of the network and of the KD path."""
        return [parameter for module in self.modules().values() for parameter in module.parameters()]

    def state_bytes(self) -> int:
        """Return the approximate size of its checkpoint: weights, best weights, two moments of Adam."""
        return 4 * sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    @property
    def stopped(self) -> bool:
        """Return whether it has failed, been pruned, trained all its epochs or run out of patience."""
        if self.failure is not None or self.is_pruned:
            return True
        return self.epoch + 1 >= self.epochs or self.epoch - self.best_epoch >= self.patience

    def train(self) -> None:
        """Put the network and the KD path into training mode."""
        for module in self.modules().values():
            module.train()

    def evaluate(self) -> None:
        """Put the network and the KD path into evaluation mode."""
        for module in self.modules().values():
            module.eval()

    @property
    def steps(self) -> int:
        """Return the number of batches that it has learned from in the current epoch."""
        return len(self.means.counts)

    def is_due(self, epoch: int) -> bool:
        """Return whether it trains this epoch next; a resumed learner may be behind or ahead of the others."""
        return not self.stopped and self.epoch + 1 == epoch

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Mark the learner as half changed; if it is interrupted inside, it is not saved."""
        self.whole = False
        yield
        self.whole = True

    def terms(self, outputs: Outputs, taught: Outputs | None, views: ViewPair) -> dict[str, Tensor]:
        """Return the loss terms of one batch and their weighted sum ``loss`` (PAPER, Eq. I)."""
        self.doing = "supervised term"
        supervised = self.supervised(logits=outputs.logits, mask=views.student_mask)
        if self.distillation is None or taught is None:
            return {"loss": supervised, "supervised": supervised}
        self.doing = "kd term"
        found = self.distillation.values(student=outputs, teacher=taught, views=views)
        weight = self.kd_weight
        return {"loss": weight * found["kd"] + (1 - weight) * supervised, **found, "supervised": supervised}

    def read_watches(self) -> float:
        """Return the seconds of the epoch that has begun; on CUDA the host waits for its last kernel."""
        self.spent_s += sum(watch.seconds() for watch in self.watches)
        self.watches = []
        return self.spent_s

    def set_rate(self, progress: float) -> None:
        """Set the learning rate of the next step, which depends on the share of all steps that lies behind alone."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * SCHEDULES[self.schedule](progress)

    def backward(self, terms: dict[str, Tensor]) -> None:
        """Compute the gradients of a batch; in some steps, measure how strongly the KD term acts.

        That is in the first step of the first epoch and of every tenth one after it. With a matched weight every step
        of the first epoch is measured, and sets the weight of the next. With a weight of 0 or 1 there is one term
        alone, and no ratio.
        """
        kd = self.distillation
        is_matching = kd is not None and kd.weight is None and self.epoch < 0
        is_measured = self.steps == 0 and (self.epoch + 1) % RATIO_EVERY == 0
        if kd is None or kd.weight in (0, 1) or not (is_matching or is_measured):
            terms["loss"].backward()
            return
        terms["loss"].backward(retain_graph=True)
        encoder = list(self.network.encoder.parameters())
        self.gradient_ratios.append(gradient_ratio(terms["kd"], weight=self.kd_weight, parameters=encoder))
        if is_matching:
            self.kd_weight = matched_weight(torch.stack(self.gradient_ratios), ratio=kd.ratio)

    def kd_columns(self) -> Columns:
        """Return what was measured of the KD term in the epoch that has begun, on the device."""
        ratios = {"gradient_ratio": torch.stack(self.gradient_ratios)} if self.gradient_ratios else {}
        return ratios | ({"kd_weight": self.kd_weight.reshape(1)} if isinstance(self.kd_weight, Tensor) else {})

    def kd_values(self, columns: Columns) -> dict[str, float]:
        """Return the values of ``kd_columns`` for the history.

        Args:
            columns: on the host.
        """
        matched = {"train/kd_weight": float(columns["kd_weight"])} if "kd_weight" in columns else {}
        if "gradient_ratio" not in columns:
            return matched
        weight = matched.get("train/kd_weight", self.kd_weight)
        mean = float(columns["gradient_ratio"].log().mean().exp())
        return {"train/kd_gradient_ratio": float(weight / (1 - weight) * mean), **matched}

    def check_finite(self, columns: Columns, part: str) -> None:
        """Raise DivergedError if a value is not a finite number.

        Args:
            columns: values of an epoch's steps, on the host.
            part: ``train`` or ``val``.
        """
        if (bad := not_finite(columns)) is not None:
            name, value, step = bad
            where = f"epoch {self.epoch + 2}, {'step' if part == 'train' else 'validation batch'} {step + 1}"
            raise DivergedError(f"{self.title}: {part}/{name} is {value} in {where}; a lower lr may help")

    def end_epoch(self, values: dict[str, float]) -> None:
        """Record an epoch's values, and keep the weights if they are the best so far."""
        with self.changing():
            self.epoch += 1
            self.means = EpochMeter()
            if "train/kd" in values:  # with fixed weights the ratio of the two terms decides the experiment
                ratio = values["train/kd"] / max(values["train/supervised"], 1e-12)
                values = {**values, "train/kd_to_supervised": ratio}
            self.gradient_ratios = []
            self.history.append({"epoch": self.epoch, **values})
            self.times_ms.append(cell_folder.now_ms())
            self.seconds.append(self.read_watches())
            self.spent_s = 0.0
            monitored = values["val/loss"] if self.monitor == "loss" else 1 - values["val/dice"]
            if monitored < self.best_loss:
                self.best_loss, self.best_epoch = monitored, self.epoch
                self._keep_best()

    def _keep_best(self) -> None:
        now = {name: module.state_dict() for name, module in self.modules().items()}
        pairs = [(value.detach(), torch.empty_like(value)) for state in now.values() for value in state.values()]
        for dtype in {value.dtype for value, _ in pairs}:  # those of one type are copied by few kernels
            values, copies = zip(*(pair for pair in pairs if pair[0].dtype == dtype), strict=True)
            torch._foreach_copy_(copies, values)
        kept = iter(pairs)
        self.best = {name: {key: next(kept)[1] for key in state} for name, state in now.items()}

    def restore_best(self) -> None:
        """Put the weights of the best epoch back."""
        if self.best is None:
            raise RuntimeError(f"{self.title}: no epoch of it was validated")
        for name, module in self.modules().items():
            module.load_state_dict(self.best[name])

    def save(self) -> None:
        """Write the checkpoint, from which training goes on as if never interrupted, then the progress."""
        (columns,) = to_host([self.means.columns()], self.device)
        self.check_finite(columns, "train")  # else what has diverged could never be trained again
        training = {
            "modules": {name: module.state_dict() for name, module in self.modules().items()},
            "optimizer": self.optimizer.state_dict(),
            "means": self.means.state(),
            "gradient_ratios": self.gradient_ratios,
            "kd_weight": self.kd_weight,
            "spent_s": self.read_watches(),
        }
        self._write({**self._outcome(), "training": training})

    def save_outcome(self) -> None:
        """Write a checkpoint of what is needed after training: the best weights (the KD path's too), the history."""
        self._write({**self._outcome(), "training": None})

    def _outcome(self) -> dict[str, Any]:
        names = ("epoch", "history", "times_ms", "seconds", "best", "best_loss", "best_epoch")
        return {name: getattr(self, name) for name in names}

    def _write(self, state: dict[str, Any]) -> None:
        checkpoint.save_state(self.folder / checkpoint.CHECKPOINT, state)
        cell_folder.write_progress(
            self.folder, epochs=self.epochs, history=self.history, times_ms=self.times_ms, seconds=self.seconds
        )

    def resume(self) -> bool:
        """Go on from the last checkpoint, or from the one before if it is damaged; return whether there was one.

        Raises:
            CellError: the checkpoint belongs to another cell.
        """
        remove_parts(self.folder)
        for name in (checkpoint.CHECKPOINT, checkpoint.PREVIOUS):
            file = self.folder / name
            try:
                state = checkpoint.load_state(file, self.device)  # what is restored is combined with what is new
            except FileNotFoundError:
                continue
            except DamagedError as error:
                log.warning("%s; %s goes on from an earlier checkpoint, or anew", error, self.title)
                continue
            try:
                self._load(state)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                text = " ".join(str(error).split())[:200]
                raise CellError(
                    f"{file}: not a checkpoint of {self.title} ({text}); delete it to start anew"
                ) from error
            return True
        return False

    def _load(self, state: dict[str, Any]) -> None:
        state = {"seconds": [], **state}  # the first checkpoints had none
        for name in self._outcome():
            setattr(self, name, state[name])
        if (training := state["training"]) is not None:
            for name, module in self.modules().items():
                module.load_state_dict(training["modules"][name])
            self.optimizer.load_state_dict(training["optimizer"])
            self.means.load(training["means"])
            self.gradient_ratios = list(training.get("gradient_ratios", []))
            self.kd_weight = training.get("kd_weight", self.kd_weight)
            self.spent_s = training.get("spent_s", 0.0)
