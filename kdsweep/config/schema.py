"""The schema of the configuration: type and range of each key, and the results that it decides.

Comments in conf/ say what a key means.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from kdsweep.config.fields import (
    Call,
    Classes,
    Count,
    Device,
    Folder,
    Index,
    Monitor,
    Name,
    Node,
    Positive,
    Precision,
    Range,
    Schedule,
    Seed,
    Share,
    Supervised,
    SweepName,
    Text,
    View,
    Window,
    rule,
)
from kdsweep.config.grid import DISTILLED, ROLES, STUDENTS, TEACHER, Decides
from kdsweep.config.networks import TRAINED_HERE, UNSET, NetworkNode, TeacherNode, logits_of

LOCAL = Decides(())  # of the machine or the command
PLACE = Decides(ROLES, by="place")
NAME_OF_CELL, REFERENCE = Decides(by="name"), Decides(by="reference")
PATH_AND_LOSS = {"method.name": ("none", "None")}  # are compared, not the terms of a method
DRAWN, NO_FILE = {"split.protocol": ("paper", "holdout")}, {"split.protocol": ("paper", "holdout", "kfold")}
MSE = dict.fromkeys(("loss.logits._target_", "loss.hidden._target_"), ("kdsweep.distill.losses.mse",))


class KDPathNode(Node, extra="allow"):
    """``path.kd_path``: the class of a KD path and its arguments, here those of the shipped classes."""

    target: Text = Field(alias="_target_")
    stage: Text | None = "encoder.5"
    teacher_stage: Text | None = None
    inner_channels: Count | None = None
    kernel_size: Annotated[Count, rule(lambda number: number % 2, "be odd")] | None = None


class PathNode(Node, extra="allow"):
    """``path``: which maps of Teacher and Student are compared; without ``kd_path`` there is no distillation."""

    name: Annotated[Name, NAME_OF_CELL]
    notation: Annotated[Name, NAME_OF_CELL]
    representation: Annotated[Literal["logits", "hidden"] | None, Decides(when=PATH_AND_LOSS)] = None
    kd_path: Annotated[KDPathNode | None, Decides(when=PATH_AND_LOSS)]


class LossNode(Node, extra="allow"):
    """``loss``: a function for each representation that it compares."""

    name: Annotated[Name, NAME_OF_CELL]
    logits: Annotated[Call | None, Decides(when=PATH_AND_LOSS | {"path.representation": ("logits",)})] = None
    hidden: Annotated[Call | None, Decides(when=PATH_AND_LOSS | {"path.representation": ("hidden",)})] = None


class TermNode(Node):
    """``method.terms.NAME``: one comparison of a method."""

    path: KDPathNode
    loss: Call
    weight: Positive


class MethodNode(Node):
    """``method``: a method of the literature, its comparisons and their published weights; none is path and loss."""

    name: Annotated[Name, NAME_OF_CELL]
    notation: Annotated[Name | None, NAME_OF_CELL]
    supervised: Annotated[Positive, REFERENCE]  # by kd.weight
    kd_weight: Annotated[Share | Literal["published"], REFERENCE]
    terms: dict[str, TermNode]

    def shares(self) -> dict[str, float]:
        """Return each comparison's share of the KD term: its published weight over the sum of all."""
        total = sum(term.weight for term in self.terms.values())
        return {name: term.weight / total for name, term in self.terms.items()}


class TeacherAugNode(Node):
    """``teacher_aug``: the view of a Teacher in its training and in distillation."""

    train_view: Annotated[View, Decides((DISTILLED, TEACHER), when=TRAINED_HERE)]
    distill_view: View


class TrainNode(Node):
    """``train``: how networks are trained."""

    epochs: Annotated[Count, Decides(STUDENTS), Decides((TEACHER,), when=TRAINED_HERE | {"teacher.epochs": UNSET})]
    batch_size: Count
    lr: Annotated[Positive, Decides(STUDENTS)]
    patience: Annotated[Count, Decides(STUDENTS), Decides((TEACHER,), when=TRAINED_HERE | {"teacher.patience": UNSET})]
    monitor: Annotated[Monitor, Decides(STUDENTS)]
    supervised: Annotated[
        Supervised, Decides(STUDENTS), Decides((TEACHER,), when=TRAINED_HERE | {"teacher.supervised": UNSET})
    ] = "bce"
    schedule: Annotated[
        Schedule, Decides(STUDENTS), Decides((TEACHER,), when=TRAINED_HERE | {"teacher.schedule": UNSET})
    ] = "constant"
    last_batch: Literal["smaller", "drop", "fill"] = "smaller"
    workers: Annotated[Literal["auto"] | Index, LOCAL]


class KDNode(Node):
    """``kd``: the KD term."""

    weight: Share | Literal["matched", "published"]
    lambda_: Annotated[float, Field(ge=0)] | None = Field(None, alias="lambda")
    ratio: Annotated[Positive, Decides(when={"kd.weight": ("matched",)})]
    temperature: Annotated[Positive, Decides(when=PATH_AND_LOSS, unless=MSE, by="reference")]
    teacher_precision: Precision
    align: Annotated[Literal["warp", "none"], Decides(unless={"teacher_aug.distill_view": ("strong",)})]
    resize: bool = False


class ViewsNode(Node):
    """``views``: ranges of the strong view, and whether both are mirrored."""

    shift: float = Field(ge=0, le=0.5)
    scale: float = Field(ge=0, le=0.9)
    rotate_deg: float = Field(ge=0, le=180)
    noise_std: Range
    dropout: Share
    probability: Share
    contrast: Share = 0.0
    flip: Share = 0.0


class SplitNode(Node):
    """``split``: which images are for training, validation and test; each protocol has its keys (conf/split/)."""

    protocol: Literal["paper", "holdout", "kfold", "file"]
    index: Annotated[Index | None, Decides(unless={"split.protocol": ("kfold",)}, by="name")] = None
    folds: Annotated[Annotated[int, Field(ge=2)] | None, Decides(unless=DRAWN, by="content")] = None
    fold: Annotated[Index | None, Decides(unless=DRAWN, by="name")] = None
    file: Annotated[Text | None, Decides(unless=NO_FILE, by="content")] = None
    group: Annotated[Text | None, Decides(unless={"split.protocol": ("paper",)}, by="content")] = None
    allow_leakage: Annotated[bool, Decides(unless=NO_FILE, by="content")] = False

    @property
    def number(self) -> int:
        """Return the number by which runs, folders and tables name the split: its index or its fold."""
        return self.index if self.index is not None else self.fold or 0

    def in_words(self) -> str:
        """Return the protocol without the number, such as ``5 folds, by group (patients.csv)``, for footnotes."""
        drawn = {
            "paper": "the paper's random splits",
            "holdout": "held out at random",
            "kfold": f"{self.folds} folds",
            "file": f"as {Path(str(self.file)).name} lists them",
        }[self.protocol]
        leakage = ", although groups are on both sides (split.allow_leakage)" if self.allow_leakage else ""
        return f"{drawn}, {f'by group ({Path(self.group).name})' if self.group else 'by image'}{leakage}"


class DataNode(Node, extra="allow"):
    """``data``: the data set; ``source`` is its class and arguments, among them a user's."""

    name: Name
    source: Annotated[Call, Decides(places=("root", "cache_dir"))]
    load_size: Annotated[int, Field(ge=64)] | None = None
    allow_empty_masks: Annotated[bool | None, LOCAL] = None
    window: Window | None = None
    classes: Classes | None = None
    # 100,000 images take 43 GiB of memory at image_size=224: a larger number is a typing error.
    count: Annotated[Annotated[int, Field(ge=4, le=100_000)] | None, REFERENCE] = None
    root: Annotated[Any, PLACE] = None


class ScoresNode(Node):
    """``scores``: how test images are scored."""

    nsd_tolerance_px: Positive
    each_epoch: Annotated[bool, LOCAL] = False


class StatsNode(Node):
    """``stats``: options of the tables."""

    margin_points: Positive


class TrackingNode(Node):
    """``tracking``: where MLflow keeps the scores."""

    uri: Text | None
    experiment: Text


class Settings(Node):
    """The configuration of one cell, without Hydra's part."""

    method: Annotated[MethodNode, Decides((DISTILLED,), factor=True)]
    path: Annotated[PathNode, Decides((DISTILLED,), factor=True)]
    loss: Annotated[LossNode, Decides((DISTILLED,), factor=True)]
    teacher_aug: Annotated[TeacherAugNode, Decides((DISTILLED,), factor=True)]
    data: Annotated[DataNode, Decides(ROLES)]
    teacher: Annotated[TeacherNode, Decides((DISTILLED, TEACHER))]
    student: Annotated[NetworkNode, Decides(STUDENTS)]
    train: Annotated[TrainNode, Decides(STUDENTS), Decides((TEACHER,), when=TRAINED_HERE)]
    kd: Annotated[KDNode, Decides((DISTILLED,))]
    views: Annotated[ViewsNode, Decides(STUDENTS), Decides((TEACHER,), when=TRAINED_HERE)]
    scores: Annotated[ScoresNode, Decides(ROLES)]
    stats: Annotated[StatsNode, LOCAL]
    tracking: Annotated[TrackingNode, LOCAL]
    profile: Annotated[Name, Decides(ROLES)]
    weights: Annotated[Text, PLACE]
    split: Annotated[SplitNode, Decides(ROLES, by="content", factor=True)]
    seed: Annotated[Seed, Decides(STUDENTS, by="name", factor=True)]
    device: Annotated[Device, LOCAL]
    precision: Annotated[Precision, Decides(ROLES)]
    deterministic: Annotated[bool, Decides(ROLES)]
    retry_failed: Annotated[bool, LOCAL]
    image_size: Annotated[Annotated[int, Field(ge=64, multiple_of=32)], Decides(ROLES)]
    store: Annotated[Folder, LOCAL]
    sweep_name: Annotated[SweepName, LOCAL]

    @property
    def load_size(self) -> int:
        """Return the side in pixels of the images that crops are taken from: by default 256 for 224, in that ratio."""
        return self.data.load_size or round(self.image_size * 256 / 224)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of several classes; empty for one."""
        return tuple(self.data.classes or ())

    @property
    def logits(self) -> int:
        """Return the number of logits of a pixel: one for one class, else one for each and one for the background."""
        return logits_of(self.class_names)

    @property
    def teacher_epochs(self) -> int:
        """Return the most epochs that the Teacher is trained, those of an ensemble added up; 0 if it comes trained."""
        if members := self.members:
            return sum(member.teacher_epochs for member in members.values())
        return 0 if self.teacher.trained is not None else self.teacher.epochs or self.train.epochs

    @property
    def teacher_patience(self) -> int:
        """Return the epochs without improvement after which the Teacher's training stops."""
        return self.teacher.patience or self.train.patience

    @property
    def members(self) -> dict[str, Settings]:
        """Return the settings with each Teacher of an ensemble alone, by name; empty for a single Teacher."""
        if not self.teacher.ensemble:
            return {}
        nodes = {"teacher": self.teacher.model_copy(update={"ensemble": None}), **self.teacher.ensemble}
        return {name: self.model_copy(update={"teacher": node}) for name, node in nodes.items()}

    @property
    def teacher_recipe(self) -> tuple[str, str]:
        """Return the supervised loss and the schedule of the Teacher's training, by default those of all networks."""
        return self.teacher.supervised or self.train.supervised, self.teacher.schedule or self.train.schedule

    @property
    def is_distilled(self) -> bool:
        """Return whether the Student is distilled: there is a method or a path."""
        return bool(self.method.terms) or self.path.kd_path is not None

    @property
    def kd_weight(self) -> float | None:
        """Return the weight w of the KD term, with 1 - w of the supervised one; None if it is to be matched.

        ``kd.lambda`` L with a supervised 1 is w = L / (1 + L): Adam's steps do not depend on the loss's scale. A
        method's published weights are the same with L = their sum / the supervised one.
        """
        if self.kd.lambda_ is not None:
            return self.kd.lambda_ / (1 + self.kd.lambda_)
        if self.kd.weight == "published":
            total = sum(term.weight for term in self.method.terms.values())
            return total / (self.method.supervised + total)
        return None if self.kd.weight == "matched" else float(self.kd.weight)
