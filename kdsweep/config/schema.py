"""The schema of the configuration: type and range of each key, and the results that it decides.

Pydantic checks it, which MLflow and Albumentations bring anyway: OmegaConf's structured configurations have types but
no ranges. Comments in conf/ say what a key means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from kdsweep.config import grid, messages
from kdsweep.config.grid import DISTILLED, ROLES, STUDENTS, TEACHER, UNSET, Decides, Params
from kdsweep.config.user_code import canonical
from kdsweep.core.errors import InputError

LOCAL = Decides(())  # of the machine or the command
CONTENT = Decides(by="content")
PLACE = Decides(ROLES, by="place")
NAME_OF_CELL = Decides((DISTILLED,), by="name")


def _is_term(params: Params) -> bool:
    """Return whether path and loss are compared, not what a method brings."""
    return str(params.get("method.name", "none")) == "none"


def _compares(representation: str) -> Callable[[Params], bool]:
    return lambda params: _is_term(params) and params.get("path.representation") == representation


def _has_temperature(params: Params) -> bool:
    """Return whether the loss takes ``kd.temperature``; a user's own may."""
    loss = f"loss.{params.get('path.representation')}"
    is_shipped = str(params.get(f"{loss}._target_", "")).startswith(f"{grid.PACKAGE}.")
    return _is_term(params) and (not is_shipped or f"{loss}.temperature" in params)


def _is_matched(params: Params) -> bool:
    return params.get("kd.weight") == "matched"


def _views_differ(params: Params) -> bool:
    return params.get("teacher_aug.distill_view") != "strong"


def _of_protocol(*protocols: str) -> Callable[[Params], bool]:
    return lambda params: str(params.get("split.protocol", "file")) in (*protocols, "file")


def _number(*protocols: str) -> Decides:
    """Return the marker of a key that numbers the splits of some protocols."""
    return Decides(ROLES, when=_of_protocol(*protocols), by="name")


def _images(*protocols: str) -> Decides:
    """Return the marker of a key that chooses the images of some protocols' splits, which count."""
    return Decides(ROLES, when=_of_protocol(*protocols), by="content")


def _unless_own(name: str) -> Decides:
    """Return the marker of a key of ``train`` that decides the Teacher's result unless the Teacher has its own."""
    return Decides((TEACHER,), when=lambda params: str(params.get(f"teacher.{name}")) in UNSET)


def _ordered(pair: list[float]) -> list[float]:
    if pair != sorted(pair):
        raise ValueError("the first number is larger than the second")
    return pair


def _odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError("even")
    return number


def _known_stage(name: str) -> str:
    if name not in STAGES:
        raise ValueError("no stage")
    return name


def _named(name: str, longest: int = 80) -> str:
    # It becomes a folder, a file, a key and a filter of MLflow; of a loss in capitals.
    if not re.fullmatch(NAME, name) or max(len(text.encode()) for text in (name, name.upper())) > longest:
        raise ValueError("not a name")
    return name


def _without_home(folder: str) -> str:
    if folder.startswith("~"):
        raise ValueError("a ~ that nothing replaces")
    return folder


def _as_text(value: Any) -> Any:
    return str(value) if type(value) is int else value  # 2024 on the command line


# The description is what an error says that a value must be.
Switch = Annotated[bool, Field(description="true or false")]
Count = Annotated[int, Field(ge=1, description="a whole number >= 1")]
Odd = Annotated[int, Field(ge=1), AfterValidator(_odd), Field(description="an odd number >= 1")]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="a whole number from 0 to 4294967295")]
NonNegative = Annotated[float, Field(ge=0, description="a number >= 0")]
Positive = Annotated[float, Field(gt=0, description="a number > 0")]
Share = Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")]
STAGES = (*(f"encoder.{n}" for n in range(1, 6)), *(f"decoder.{n}" for n in range(1, 6)), "logits")
STAGE_WORDS = "encoder.1 to encoder.5, decoder.1 to decoder.5, or logits"
Stage = Annotated[str, AfterValidator(_known_stage), Field(description=STAGE_WORDS)]
View = Annotated[Literal["weak", "strong"], Field(description="weak or strong")]
Precision = Annotated[Literal["fp32", "tf32", "bf16"], Field(description="fp32, tf32 or bf16")]
Widths = Annotated[list[Count], Field(min_length=5, max_length=5, description="five whole numbers >= 1")]
Monitor = Literal["loss", "dice"]
Text = Annotated[str, Field(min_length=1, description="a word")]
NAME = r"\w[\w .-]*"
NAME_RULE = "made of letters, digits, blank . _ -, the first a letter, a digit or _, in all at most"
Name = Annotated[str, BeforeValidator(_as_text), AfterValidator(_named), Field(description=f"{NAME_RULE} 80 bytes")]
SweepName = Annotated[
    str,
    BeforeValidator(_as_text),
    AfterValidator(partial(_named, longest=200)),
    Field(description=f"{NAME_RULE} 200 bytes"),
]
Call = Annotated[dict[str, Any], AfterValidator(canonical)]  # a function or class by _target_, and its arguments


class Node(BaseModel):
    """A part of the configuration. Types are strict: 1.0 is no whole number, "1" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    def plain(self) -> dict[str, Any]:
        """Return it as dicts, lists and plain values, without what was not given."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class OpenNode(Node):
    """A part that may have keys of its user's own."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _canonical(cls, values: Any) -> Any:
        """Bring the numbers of the user's own keys into one form; declared keys have their types."""
        if not isinstance(values, dict):
            return values
        declared = {field.alias or name for name, field in cls.model_fields.items()}
        return {**canonical(values), **{key: value for key, value in values.items() if key in declared}}


class KDPathNode(OpenNode):
    """``path.kd_path``: the class of a KD path and its arguments."""

    target: Text = Field(alias="_target_")
    stage: Stage | None = Field("encoder.5", description=STAGE_WORDS)  # of the shipped classes
    teacher_stage: Stage | None = Field(None, description=STAGE_WORDS)
    inner_channels: Count | None = Field(None, description="a whole number >= 1")
    kernel_size: Odd | None = Field(None, description="an odd number >= 1")


class PathNode(OpenNode):
    """``path``: what of Teacher and Student is compared; no ``kd_path`` is no distillation."""

    name: Annotated[Name, NAME_OF_CELL]
    notation: Annotated[Name, NAME_OF_CELL]
    representation: Annotated[Literal["logits", "hidden"] | None, Decides((DISTILLED,), when=_is_term)] = Field(
        None, description="logits or hidden"
    )
    kd_path: Annotated[KDPathNode | None, Decides((DISTILLED,), when=_is_term)]


class LossNode(OpenNode):
    """``loss``: a function for each representation that it compares."""

    name: Annotated[Name, NAME_OF_CELL]
    logits: Annotated[Call | None, Decides((DISTILLED,), when=_compares("logits"))] = None
    hidden: Annotated[Call | None, Decides((DISTILLED,), when=_compares("hidden"))] = None


class TermNode(Node):
    """``method.terms.NAME``: one comparison of a method."""

    path: KDPathNode
    loss: Call
    weight: float = Field(gt=0, description="a number > 0")


class MethodNode(Node):
    """``method``: a method of the literature, its comparisons and their published weights; none is path and loss."""

    name: Annotated[Name, NAME_OF_CELL]
    notation: Annotated[Name | None, NAME_OF_CELL] = Field(description=f"null, or {NAME_RULE} 80 bytes")
    supervised: Annotated[Positive, Decides((DISTILLED,), by="reference")]  # by kd.weight
    kd_weight: Annotated[Share | Literal["published"], Decides((DISTILLED,), by="reference")] = Field(
        description="a number from 0 to 1, or published"
    )
    terms: dict[str, TermNode]

    @property
    def published_weight(self) -> float:
        """Return the weight w of the KD term: w to 1 - w as the weights of all terms to the supervised one."""
        total = sum(term.weight for term in self.terms.values())
        return total / (self.supervised + total)

    def shares(self) -> dict[str, float]:
        """Return each comparison's share of the KD term: its published weight over the sum of all."""
        total = sum(term.weight for term in self.terms.values())
        return {name: term.weight / total for name, term in self.terms.items()}


class TeacherAugNode(Node):
    """``teacher_aug``: what a Teacher sees in its own training and in distillation."""

    train_view: Annotated[View, Decides((DISTILLED, TEACHER))]
    distill_view: Annotated[View, Decides((DISTILLED,))]


class NetworkNode(Node):
    """``student`` and ``teacher``: a U-Net and its weights."""

    encoder: Text
    decoder_channels: Widths
    weights: Text = Field(description="imagenet, none, or the name of a file")
    imagenet: Annotated[Text | None, CONTENT] = None
    imagenet_package: Annotated[Text | None, CONTENT] = None


class TeacherNode(NetworkNode):
    """``teacher``: also how it is trained."""

    seed: Annotated[Seed, Decides((DISTILLED, TEACHER), by="content", factor=True)]
    lr: Positive
    monitor: Monitor = Field("loss", description="loss or dice")
    epochs: Count | None = Field(None, description="null or a whole number >= 1")
    supervised: Literal["bce", "bce_dice"] | None = Field(None, description="null, bce or bce_dice")
    schedule: Literal["constant", "cosine", "poly"] | None = Field(None, description="null, constant, cosine or poly")


class TrainNode(Node):
    """``train``: how networks are trained."""

    epochs: Annotated[Count, Decides(STUDENTS), _unless_own("epochs")]
    batch_size: Count
    lr: Annotated[Positive, Decides(STUDENTS)]
    patience: Count
    monitor: Annotated[Monitor, Decides(STUDENTS)] = Field(description="loss or dice")
    supervised: Annotated[Literal["bce", "bce_dice"], Decides(STUDENTS), _unless_own("supervised")] = Field(
        "bce", description="bce or bce_dice"
    )
    schedule: Annotated[Literal["constant", "cosine", "poly"], Decides(STUDENTS), _unless_own("schedule")] = Field(
        "constant", description="constant, cosine or poly"
    )
    last_batch: Literal["smaller", "drop", "fill"] = Field("smaller", description="smaller, drop or fill")
    workers: Annotated[Literal["auto"] | Annotated[int, Field(ge=0)], LOCAL] = Field(
        description="auto or a whole number >= 0"
    )


class KDNode(Node):
    """``kd``: the KD term."""

    weight: Share | Literal["matched", "published"] = Field(description="a number from 0 to 1, matched, or published")
    lambda_: NonNegative | None = Field(None, alias="lambda", description="a number >= 0")
    ratio: Annotated[Positive, Decides((DISTILLED,), when=_is_matched)]
    temperature: Annotated[Positive, Decides((DISTILLED,), when=_has_temperature, by="reference")]
    teacher_precision: Precision
    align: Annotated[Literal["warp", "none"], Decides((DISTILLED,), when=_views_differ)] = Field(
        description="warp or none"
    )


class ViewsNode(Node):
    """``views``: ranges of the strong view."""

    shift: float = Field(ge=0, le=0.5, description="a number from 0 to 0.5")
    scale: float = Field(ge=0, le=0.9, description="a number from 0 to 0.9")
    rotate_deg: float = Field(ge=0, le=180, description="a number from 0 to 180")
    noise_std: Annotated[list[Share], Field(min_length=2, max_length=2), AfterValidator(_ordered)] = Field(
        description="two numbers, 0 <= first <= second <= 1"
    )
    dropout: Share
    probability: Share


class SplitNode(Node):
    """``split``: which images are for training, validation and test; each protocol has its own keys (conf/split/)."""

    protocol: Literal["paper", "holdout", "kfold", "file"] = Field(description="paper, holdout, kfold or file")
    index: Annotated[Annotated[int, Field(ge=0)] | None, _number("paper", "holdout")] = Field(
        None, description="a whole number >= 0"
    )
    folds: Annotated[Annotated[int, Field(ge=2)] | None, _images("kfold")] = Field(
        None, description="a whole number >= 2"
    )
    fold: Annotated[Annotated[int, Field(ge=0)] | None, _number("kfold")] = Field(
        None, description="a whole number >= 0"
    )
    file: Annotated[Text | None, _images()] = Field(None, description="the name of a .csv or .json file")
    group: Annotated[Text | None, _images("holdout", "kfold")] = Field(
        None, description="a regular expression, a column, or the name of a .csv file"
    )
    allow_leakage: Annotated[Switch, _images()] = False

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
            "file": f"as {self.file} lists them",
        }[self.protocol]
        torn = ", although groups are on both sides (split.allow_leakage)" if self.allow_leakage else ""
        return f"{drawn}, {f'by group ({self.group})' if self.group else 'by image'}{torn}"


class DataNode(OpenNode):
    """``data``: the data set; ``source`` is its class and arguments, among them the user's own."""

    name: Name
    source: Annotated[Call, Decides(ROLES, places=("root", "cache_dir"))]
    load_size: int | None = Field(None, ge=64, description="null or a whole number >= image_size")
    allow_empty_masks: Annotated[bool | None, LOCAL] = Field(None, description="true or false")
    # 100,000 images take 43 GiB of memory at image_size=224: a larger number is a typing error.
    count: Annotated[int | None, Decides(ROLES, by="reference")] = Field(
        None, ge=4, le=100_000, description="a whole number from 4 to 100000"
    )
    root: Annotated[Any, PLACE] = None


class ScoresNode(Node):
    """``scores``: how test images are scored."""

    nsd_tolerance_px: Positive


class StatsNode(Node):
    """``stats``: what the tables ask of the scores."""

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
    train: Annotated[TrainNode, Decides(ROLES)]
    kd: Annotated[KDNode, Decides((DISTILLED,))]
    views: Annotated[ViewsNode, Decides(ROLES)]
    scores: Annotated[ScoresNode, Decides(ROLES)]
    stats: Annotated[StatsNode, LOCAL]
    tracking: Annotated[TrackingNode, LOCAL]
    profile: Annotated[Name, Decides(ROLES)]
    weights: Annotated[Text, PLACE] = Field(description="imagenet, none, or the name of a file")
    split: Annotated[SplitNode, Decides(ROLES, by="content", factor=True)]
    seed: Annotated[Seed, Decides(STUDENTS, by="name", factor=True)]
    device: Annotated[str, LOCAL] = Field(
        pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:NUMBER"
    )
    precision: Annotated[Precision, Decides(ROLES)]
    deterministic: Annotated[Switch, Decides(ROLES)]
    retry_failed: Annotated[Switch, LOCAL]
    image_size: Annotated[int, Decides(ROLES)] = Field(
        ge=64, multiple_of=32, description="a multiple of 32, at least 64"
    )
    store: Annotated[str, BeforeValidator(_as_text), AfterValidator(_without_home), LOCAL] = Field(
        min_length=1, description="the name of a folder; for ~ write ${oc.env:HOME}"
    )
    sweep_name: Annotated[SweepName, LOCAL]

    @property
    def load_size(self) -> int:
        """Return the side in pixels of the images that crops are taken from: by default 256 for 224, in that ratio."""
        return self.data.load_size or default_load_size(self.image_size)

    @property
    def teacher_epochs(self) -> int:
        """Return the most epochs that the Teacher is trained."""
        return self.teacher.epochs or self.train.epochs

    @property
    def teacher_recipe(self) -> tuple[str, str]:
        """Return the supervised loss and the schedule of the Teacher's training: its own, or those of all networks."""
        return self.teacher.supervised or self.train.supervised, self.teacher.schedule or self.train.schedule

    @property
    def is_taught(self) -> bool:
        """Return whether the Student is distilled: a method is given, or a path."""
        return bool(self.method.terms) or self.path.kd_path is not None

    @property
    def kd_weight(self) -> float | None:
        """Return the weight of the KD term beside 1 - it of the supervised one; None if it is to be matched.

        ``kd.lambda`` L is the weight beside a supervised 1: with Adam, whose steps do not depend on the loss's scale,
        that is L / (1 + L).
        """
        if self.kd.lambda_ is not None:
            return self.kd.lambda_ / (1 + self.kd.lambda_)
        if self.kd.weight == "published":
            return self.method.published_weight
        return None if self.kd.weight == "matched" else float(self.kd.weight)


def default_load_size(image_size: int) -> int:
    """Return the ``load_size`` of a configuration that has none: 256 for 224, and in that ratio."""
    return round(image_size * 256 / 224)


def read(values: Mapping[str, Any], *, source: Callable[[str], str] = str) -> Settings:
    """Check a configuration and return it with its types.

    Args:
        values: nested dicts of resolved plain values.
        source: gives the key that holds the value of a key which refers to it: an error names that one.

    Raises:
        InputError: for the first wrong value, in one line with its key, the value and what is allowed.
    """
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise InputError(messages.of_value(error, values, root=Settings, source=source)) from None
    _check_keys(settings, source)
    _check_split(settings.split)
    if settings.kd.lambda_ is not None and settings.kd.weight != settings.method.kd_weight:
        both = f"kd.weight={settings.kd.weight} and kd.lambda={settings.kd.lambda_:g}"
        raise InputError(f"{both} are two spellings of one weight: give one of them")
    if settings.kd.weight == "published" and not settings.method.terms:
        raise InputError("kd.weight=published is not allowed: path and loss have none; give a number, or a method")
    size = settings.data.load_size
    if size is not None and size < settings.image_size:
        raise InputError(f"data.load_size={size} is not allowed: image_size={settings.image_size} is cropped from it")
    return settings


def _check_keys(settings: Settings, source: Callable[[str], str]) -> None:
    """Raise InputError for a key that MLflow does not take as the name of a parameter, or a number that is not finite.

    Both can come up in keys of the user, of which the schema knows neither name nor type.
    """
    for key, value in grid.flatten(settings.plain()).items():
        if not re.fullmatch(NAME, key) or len(key.encode()) > 200:
            raise InputError(f"{key} is not allowed as a key: it must be {NAME_RULE} 200 bytes")
        numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, float)]
        if not all(map(math.isfinite, numbers)):
            raise InputError(f"{source(key)}={value} is not allowed: it must be finite")


def _check_split(split: SplitNode) -> None:
    """Raise InputError if keys of a split do not go together."""
    if split.protocol == "paper" and split.index not in (0, 1, 2):
        raise InputError(f"split.index={split.index} is not allowed: the paper has 0, 1 and 2; split=holdout has more")
    if split.protocol == "kfold" and (split.fold or 0) >= (split.folds or 0):
        raise InputError(f"split.fold={split.fold} is not allowed: split.folds={split.folds} are counted from 0")
    if split.protocol == "file" and split.file is None:
        raise InputError("split.file is missing: give the .csv or .json file on the command line, split.file=...")
