"""A learner: one network in training with everything that is its own, and how it is taught."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kdsweep import checkpoint, losses
from kdsweep.kd_paths import KDPath
from kdsweep.models import Outputs, UNet
from kdsweep.views import warp


class Run(Protocol):
    """What the loop uses of experiment tracking; see tracking.py."""

    run_id: str

    def log_epoch(self, values: dict[str, float], epoch: int) -> None:
        """Record the values of one epoch."""

    def finish(self, values: dict[str, float], files: list[Path]) -> None:
        """Record the final values and files and close the run."""

    def abort(self, *, status: str) -> None:
        """Close the run as FAILED or KILLED."""


class Lesson(NamedTuple):
    """One forward of a Teacher that Students can share: who teaches, what it sees, how it computes.

    Attributes:
        teacher: name of the Teacher in the group.
        view: what the Teacher sees, ``weak`` or ``strong``.
        precision: of its forward, ``fp32`` or ``bf16``.
    """

    teacher: str
    view: str
    precision: str


class DivergedError(RuntimeError):
    """A loss term is no longer a finite number."""


@dataclass
class Distillation:
    """How a Student is taught.

    Attributes:
        kd_path: which tensors are compared.
        loss: of the compared maps, see losses.py.
        weight: of the KD term; the supervised term has 1 - weight (PAPER, Eq. I: 0.5 and 0.5).
        lesson: which forward of which Teacher it learns from.
        align: warp the maps of a weak view into the Student's frame; else compare them as they are.
    """

    kd_path: KDPath
    loss: Callable[..., Tensor]
    weight: float
    lesson: Lesson
    align: bool

    def term(self, *, student: Outputs, teacher: Outputs, theta: Tensor | None) -> Tensor:
        """The KD term of one batch; theta (N, 2, 3) is None where both saw the same view.

        The Teacher's outputs are copied first (about 1 ms): the originals serve other learners too, and tensors made
        under inference mode cannot take part in autograd, which a loss or path of the user's may ask for.
        """
        logits = teacher.logits.clone() if self.kd_path.needs_logits else teacher.hidden.new_empty(0)
        theirs = self.kd_path.teacher_map(Outputs(logits=logits, hidden=teacher.hidden.clone()))
        valid = torch.ones_like(theirs[:, :1], dtype=torch.bool)
        if theta is not None and self.align:
            theirs, valid = warp(theirs, theta=theta)
        return self.loss(student=self.kd_path.student_map(student), teacher=theirs, valid=valid)


@dataclass
class Learner:
    """One network in training, with its own optimiser, early stopping, best checkpoint and run.

    Attributes:
        title: how messages call it.
        role: ``cell``, ``student`` or ``teacher``.
        network: trained in place.
        view: what it sees in training, ``weak`` or ``strong``.
        distillation: None for a network that learns from the masks alone.
        lr: Adam's learning rate.
        epochs: at most so many.
        patience: epochs without a better validation loss after which it stops.
        folder: where its files go.
        run: where its values are recorded.
        failure: what ended it before its time.
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
    run: Run
    best_loss: float = math.inf
    best_epoch: int = -1
    epoch: int = -1
    history: list[dict[str, float]] = field(default_factory=list)
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.parameters(), lr=self.lr)

    def modules(self) -> dict[str, nn.Module]:
        """The network and, if it is taught, its KD path."""
        taught = {"kd_path": self.distillation.kd_path} if self.distillation else {}
        return {"network": self.network, **taught}

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained: the network's parameters and the KD path's own."""
        return [parameter for module in self.modules().values() for parameter in module.parameters()]

    @property
    def stopped(self) -> bool:
        """Whether it has failed, had its epochs or run out of patience."""
        if self.failure is not None:
            return True
        return self.epoch + 1 >= self.epochs or self.epoch - self.best_epoch >= self.patience

    def train(self) -> None:
        """Put the network and the KD path into training mode."""
        for module in self.modules().values():
            module.train()

    def evaluate(self) -> None:
        """Put them into evaluation mode."""
        for module in self.modules().values():
            module.eval()

    def terms(self, outputs: Outputs, mask: Tensor, taught: Outputs | None, theta: Tensor | None) -> dict[str, Tensor]:
        """The loss terms of one batch and their weighted sum ``loss`` (PAPER, Eq. I)."""
        supervised = losses.cross_entropy(logits=outputs.logits, mask=mask)
        if self.distillation is None or taught is None:
            return {"loss": supervised, "supervised": supervised}
        kd = self.distillation.term(student=outputs, teacher=taught, theta=theta)
        weight = self.distillation.weight
        return {"loss": weight * kd + (1 - weight) * supervised, "kd": kd, "supervised": supervised}

    def end_epoch(self, values: dict[str, float]) -> None:
        """Record an epoch's values, keep the checkpoint if it is the best so far."""
        self.epoch += 1
        for name, value in values.items():
            if not math.isfinite(value):
                raise DivergedError(f"{self.title}: {name} is {value} in epoch {self.epoch + 1}; a lower lr may help")
        if "train/kd" in values:  # with fixed weights the ratio of the two terms decides the experiment
            values = {**values, "train/kd_to_supervised": values["train/kd"] / max(values["train/supervised"], 1e-12)}
        self.history.append({"epoch": self.epoch, **values})
        self.run.log_epoch(values, self.epoch)
        if values["val/loss"] < self.best_loss:
            self.best_loss, self.best_epoch = values["val/loss"], self.epoch
            state = {name: module.state_dict() for name, module in self.modules().items()}
            checkpoint.save_state(self.folder / checkpoint.CHECKPOINT, {**state, "epoch": self.epoch})

    def restore_best(self) -> None:
        """Put the weights with the best validation loss back."""
        state = checkpoint.load_state(self.folder / checkpoint.CHECKPOINT)
        for name, module in self.modules().items():
            module.load_state_dict(state[name])
