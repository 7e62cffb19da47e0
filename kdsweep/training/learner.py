"""A learner: one network in training, with its optimizer, early stopping, checkpoint and distillation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
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
from kdsweep.models.networks import Network, Outputs
from kdsweep.store import cell_folder, checkpoint
from kdsweep.training.meter import Columns, EpochMeter, weighted_means

log = logging.getLogger(__name__)

RATIO_EVERY = 10  # epochs: to measure the gradients' ratio takes one more backward pass
OUTCOME = ("epoch", "history", "times_ms", "seconds", "best", "best_loss", "best_epoch")  # attributes in a checkpoint

# By name the factor of the learning rate at a share of all steps. Sources: Loshchilov and Hutter, SGDR, ICLR 2017
# (cosine); Chen et al., DeepLab, TPAMI 40, 2018 (poly, power 0.9).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "poly": lambda progress: (1 - progress) ** 0.9,
}


class DivergedError(CellError):
    """A loss term is no longer a finite number."""


@dataclass
class Learner:
    """One network in training: a Teacher, the Student alone or a distilled Student.

    A checkpoint holds all of it, so that a resumed learner becomes what it would have become without a break.
    """

    title: str  # in messages
    role: str  # ``distilled``, ``baseline`` or ``teacher``
    network: Network
    view: str  # that it sees in training, ``weak`` or ``strong``
    distillation: Distillation | None  # None for a network that learns from the masks alone
    lr: float  # Adam's, at the start
    epochs: int  # the maximum; 0 for a Teacher that comes trained
    patience: int  # epochs without improvement of the monitored value after which it stops
    folder: Path
    fused: bool = False  # Adam steps all parameters in few kernels: for CUDA, where it matters
    supervised: Callable[..., Tensor] = losses.cross_entropy
    schedule: str = "constant"  # how the rate falls in the course of ``epochs``, see SCHEDULES
    monitor: str = "loss"  # the validation value that decides the best epoch: ``loss`` (KD term included) or ``dice``
    nsd_tolerance_px: float = 2.0
    tests_each_epoch: bool = False  # measure the Dice on the test images after each epoch too, which chooses nothing

    epoch: int = -1  # number of the last complete epoch
    history: list[dict[str, float]] = field(default_factory=list)  # values of each complete epoch
    times_ms: list[int] = field(default_factory=list)  # when each of them ended
    seconds: list[float] = field(default_factory=list)  # of each: its steps, validation and Teacher's forwards if alone
    best_loss: float = math.inf  # lowest monitored value, which is 1 - Dice for ``dice``
    best_epoch: int = -1
    best: dict[str, Any] | None = None  # states of the modules after that epoch

    means: EpochMeter = field(default_factory=EpochMeter)  # of the steps of the epoch that has begun
    gradient_ratios: list[Tensor] = field(default_factory=list)  # KD to supervised, in its steps that measured it
    watches: list[Stopwatch] = field(default_factory=list)  # of work in it, not read yet
    spent_s: float = 0.0  # in it, as far as its watches have been read

    failure: Exception | None = None
    result: dict[str, float] = field(default_factory=dict)  # final values of one that has stopped and was tested
    is_pruned: bool = False  # ended early as a trial
    can_save: bool = False  # its checkpoint has been read and no step is half done
    doing: str = ""  # the part of a step that is running, for messages

    def __post_init__(self) -> None:
        terms = self.distillation.terms if self.distillation else {}
        paths = {f"kd_path.{name}" if len(terms) > 1 else "kd_path": term.kd_path for name, term in terms.items()}
        self.modules: dict[str, nn.Module] = {"network": self.network, **paths}
        self.trained = nn.ModuleList(self.modules.values())
        self.optimizer = torch.optim.Adam(self.trained.parameters(), lr=self.lr, fused=self.fused or None)
        fixed = self.distillation.weight if self.distillation else None
        self.kd_weight: float | Tensor = 0.5 if fixed is None else fixed  # of the KD term now

    @property
    def stages(self) -> set[str]:
        """Return the stages of the network that its losses take."""
        return {"logits"} | (self.distillation.stages if self.distillation else set())

    @property
    def views(self) -> set[str]:
        """Return the views of an image that a step takes, its Teacher's among them."""
        return {self.view} | ({self.distillation.forward.view} if self.distillation else set())

    @property
    def stopped(self) -> bool:
        """Return whether it has failed, been pruned, trained all its epochs or run out of patience."""
        if self.failure is not None or self.is_pruned:
            return True
        return self.epoch + 1 >= self.epochs or self.epoch - self.best_epoch >= self.patience

    @property
    def steps(self) -> int:
        """Return the number of batches that it has learned from in the current epoch."""
        return len(self.means.counts)

    def state_bytes(self) -> int:
        """Return the approximate size of its checkpoint: weights, best weights, two moments of Adam."""
        return 4 * sum(parameter.numel() * parameter.element_size() for parameter in self.trained.parameters())

    def set_rate(self, progress: float) -> None:
        """Set the learning rate of the next step by the share of all steps that have been taken."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * SCHEDULES[self.schedule](progress)

    def terms(self, outputs: Outputs, teacher_outputs: Outputs | None, views: ViewPair) -> dict[str, Tensor]:
        """Return the loss terms of one batch and their weighted sum ``loss`` (PAPER, Eq. I)."""
        self.doing = "supervised term"
        supervised = self.supervised(logits=outputs.logits, mask=views.student_mask)
        if self.distillation is None or teacher_outputs is None:
            return {"loss": supervised, "supervised": supervised}
        self.doing = "kd term"
        values = self.distillation.values(student=outputs, teacher=teacher_outputs, views=views)
        is_first = torch.is_grad_enabled() and self.epoch < 0 and self.steps == 0
        for name, value in values.items():
            is_number = isinstance(value, Tensor) and value.numel() == 1
            if not is_number or (is_first and not value.requires_grad):
                raise TypeError(f"{name}: the loss must return a tensor of one number that depends on the Student")
        weight = self.kd_weight
        return {"loss": weight * values["kd"] + (1 - weight) * supervised, **values, "supervised": supervised}

    def backward(self, terms: dict[str, Tensor]) -> None:
        """Compute the gradients of a batch; in some steps, measure how strongly the KD term acts.

        These are the first step of every RATIO_EVERY-th epoch and, for a matched weight, every step of the first epoch,
        which sets the weight of the next step. With a weight of 0 or 1 there is one term alone, and no ratio.
        """
        kd = self.distillation
        is_matching = kd is not None and kd.weight is None and self.epoch < 0
        is_due = is_matching or (self.steps == 0 and (self.epoch + 1) % RATIO_EVERY == 0)
        if kd is None or kd.weight in (0, 1) or not is_due:
            terms["loss"].backward()
            return
        terms["loss"].backward(retain_graph=True)
        parameters = self.network.measured_parameters()
        self.gradient_ratios.append(gradient_ratio(terms["kd"], weight=self.kd_weight, parameters=parameters))
        if is_matching:
            self.kd_weight = matched_weight(torch.stack(self.gradient_ratios), ratio=kd.ratio)

    def columns(self) -> Columns:
        """Return what the steps of the epoch that has begun measured, on the device."""
        ratios = {"gradient_ratio": torch.stack(self.gradient_ratios)} if self.gradient_ratios else {}
        weight = {"kd_weight": self.kd_weight.reshape(1)} if isinstance(self.kd_weight, Tensor) else {}
        return self.means.columns() | ratios | weight

    def values(self, train: Columns, val: Columns, val_counts: Sequence[int]) -> dict[str, float]:
        """Return an epoch's values for the history, from ``columns`` and those of the validation batches, on the host.

        Raises:
            DivergedError: a value is not a finite number.
        """
        measured = {name: train.pop(name) for name in ("gradient_ratio", "kd_weight") if name in train}
        self.check_finite(train, "step")
        self.check_finite(val, "validation batch")
        values = weighted_means(train, self.means.counts, "train/") | weighted_means(val, val_counts, "val/")
        weight = float(measured.get("kd_weight", self.kd_weight))
        if "gradient_ratio" in measured:
            mean = float(measured["gradient_ratio"].log().mean().exp())
            values["train/kd_gradient_ratio"] = weight / (1 - weight) * mean
        if "kd_weight" in measured:
            values["train/kd_weight"] = weight
        if "train/kd" in values:  # with fixed weights the ratio of the two terms decides the experiment
            values["train/kd_to_supervised"] = values["train/kd"] / max(values["train/supervised"], 1e-12)
        return values

    def check_finite(self, columns: Columns, batch: str) -> None:
        """Raise DivergedError if a value on the host is not a finite number."""
        part = "train" if batch == "step" else "val"
        bad = {name: ~values.isfinite() for name, values in columns.items()}
        first = {name: int(flags.nonzero()[0]) for name, flags in bad.items() if flags.any()}
        if first:  # a weighted sum is not finite if a term of it is: the term says more
            name = min(first, key=lambda name: (first[name], name == "loss"))
            where = f"epoch {self.epoch + 2}, {batch} {first[name] + 1}"
            value = float(columns[name][first[name]])
            raise DivergedError(f"{self.title}: {part}/{name} is {value} in {where}; a lower lr may help")

    def end_epoch(self, values: dict[str, float]) -> None:
        """Record an epoch's values, and keep the weights if they are the best so far."""
        self.can_save = False
        self.epoch += 1
        self.means, self.gradient_ratios = EpochMeter(), []
        self.history.append({"epoch": self.epoch, **values})
        self.times_ms.append(cell_folder.now_ms())
        self.seconds.append(self.read_watches())
        self.spent_s = 0.0
        monitored = values["val/loss"] if self.monitor == "loss" else 1 - values["val/dice"]
        if monitored < self.best_loss:
            self.best_loss, self.best_epoch = monitored, self.epoch
            self._keep_best()
        self.can_save = True

    def read_watches(self) -> float:
        """Return the seconds of the epoch that has begun; on CUDA the host waits for its last kernel."""
        self.spent_s += sum(watch.seconds() for watch in self.watches)
        self.watches = []
        return self.spent_s

    def _keep_best(self) -> None:
        now = self._states()
        self.best = {name: {key: torch.empty_like(each) for key, each in state.items()} for name, state in now.items()}
        pairs = [(self.best[name][key], value) for name, state in now.items() for key, value in state.items()]
        for dtype in {value.dtype for _, value in pairs}:  # those of one type are copied by few kernels
            copies, values = zip(*(pair for pair in pairs if pair[1].dtype == dtype), strict=True)
            torch._foreach_copy_(copies, values)

    def _states(self) -> dict[str, dict[str, Any]]:
        return {name: module.state_dict() for name, module in self.modules.items()}

    def _load_states(self, states: dict[str, dict[str, Any]]) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(states[name])

    def restore_best(self) -> None:
        """Put the weights of the best epoch back; a network that came trained keeps its weights."""
        if self.best is not None:
            self._load_states(self.best)
        elif self.epochs:
            raise RuntimeError(f"{self.title}: no epoch of it was validated")

    def save(self) -> None:
        """Write the checkpoint, from which training resumes as if never interrupted, then the progress."""
        columns = self.means.columns()
        # What has diverged is not saved, else it could never be trained again.
        self.check_finite({name: values.cpu() for name, values in columns.items()}, "step")
        training = {
            "modules": self._states(),
            "optimizer": self.optimizer.state_dict(),
            "means": {"counts": self.means.counts, "steps": columns},
            "gradient_ratios": self.gradient_ratios,
            "kd_weight": self.kd_weight,
            "spent_s": self.read_watches(),
        }
        self._write(training)

    def save_outcome(self) -> None:
        """Write a checkpoint of what is needed after training: the best weights (the KD path's too), the history."""
        self._write(None)

    def _write(self, training: dict[str, Any] | None) -> None:
        state = {name: getattr(self, name) for name in OUTCOME}
        checkpoint.save_state(self.folder / checkpoint.CHECKPOINT, {**state, "training": training})
        cell_folder.write_progress(
            self.folder, epochs=self.epochs, history=self.history, times_ms=self.times_ms, seconds=self.seconds
        )

    def resume(self) -> bool:
        """Read the last checkpoint, or the one before if it is damaged; return whether there was one.

        Raises:
            CellError: the checkpoint belongs to another cell.
        """
        remove_parts(self.folder)
        for file in (self.folder / checkpoint.CHECKPOINT, self.folder / checkpoint.PREVIOUS):
            try:
                device = next(self.network.parameters()).device
                state = checkpoint.load_state(file, device)  # what is restored is combined with what is new
            except FileNotFoundError:
                continue
            except DamagedError as error:
                log.warning("%s; %s resumes from an earlier checkpoint, or starts again", error, self.title)
                continue
            try:
                self._load(state)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                text = " ".join(str(error).split())[:200]
                message = f"{file}: not a checkpoint of {self.title} ({text}); delete it to start again"
                raise CellError(message) from error
            return True
        return False

    def _load(self, state: dict[str, Any]) -> None:
        for name in OUTCOME:
            setattr(self, name, state[name])
        if (training := state["training"]) is not None:
            self._load_states(training["modules"])
            self.optimizer.load_state_dict(training["optimizer"])
            self.means.load(training["means"]["steps"], training["means"]["counts"])
            for name in ("gradient_ratios", "kd_weight", "spent_s"):
                setattr(self, name, training[name])
