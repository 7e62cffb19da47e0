"""The part of the schema on networks: which they are, their weights, and how a Teacher is trained or comes trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from kdsweep.config.fields import (
    Call,
    Count,
    Deviations,
    Index,
    Means,
    Monitor,
    Name,
    Node,
    Positive,
    Schedule,
    Seed,
    Supervised,
    Text,
)
from kdsweep.config.grid import Decides

CONTENT = Decides(by="content")
UNSET = ("None", "null", "")  # a key without a value, as values and as MLflow keeps it
TRAINED_HERE = {"teacher.trained": UNSET}  # a Teacher that comes trained does without all keys of training
STAGES = (*(f"encoder.{n}" for n in range(1, 6)), *(f"decoder.{n}" for n in range(1, 6)), "logits")  # of a U-Net


def logits_of(class_names: Sequence[str]) -> int:
    """Return the number of logits of a pixel for several classes by name, or for one class without a name."""
    return len(class_names) + 1 if class_names else 1


class InputNode(Node):
    """``student.input`` and ``teacher.input``: the images that a module expects; null: as for ImageNet, of any size."""

    mean: Means | None = None
    std: Deviations | None = None
    size: Count | None = None


class Architecture(Node):
    """A network without its weights: a U-Net by its encoder, or any module by ``network``."""

    encoder: Text | None = None
    decoder_channels: Annotated[list[Count], Field(min_length=5, max_length=5)] | None = None
    network: Call | None = None
    stages: dict[str, Text] | None = None
    output: Text | Index | None = None
    input: InputNode | None = None

    @property
    def name(self) -> str:
        """Return its name: of the encoder, or the last word of the module's target."""
        return self.encoder or str((self.network or {}).get("_target_")).rpartition(".")[2]

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Return the stages whose maps can be compared."""
        return STAGES if self.network is None else (*(self.stages or ()), "logits")

    def as_json(self) -> str:
        """Return it as text, equal for equal networks."""
        return json.dumps(self.model_dump(include=set(Architecture.model_fields)), sort_keys=True)


class NetworkNode(Architecture):
    """``student`` and ``teacher``: a network and its weights."""

    weights: Text  # imagenet, none or a file
    imagenet: Annotated[Text | None, CONTENT] = None
    imagenet_package: Annotated[Text | None, CONTENT] = None


class TeacherNode(NetworkNode):
    """``teacher``: also how it is trained, or where its trained weights are."""

    weights: Annotated[Text, Decides(when=TRAINED_HERE)]
    trained: Annotated[Text | None, CONTENT] = None
    ensemble: Annotated[dict[Name, TeacherNode] | None, CONTENT] = None
    seed: Annotated[Seed, Decides(when=TRAINED_HERE, by="content", factor=True)]
    lr: Annotated[Positive, Decides(when=TRAINED_HERE)]
    monitor: Annotated[Monitor, Decides(when=TRAINED_HERE)] = "loss"
    epochs: Annotated[Count | None, Decides(when=TRAINED_HERE)] = None
    patience: Annotated[Count | None, Decides(when=TRAINED_HERE)] = None
    supervised: Annotated[Supervised | None, Decides(when=TRAINED_HERE)] = None
    schedule: Annotated[Schedule | None, Decides(when=TRAINED_HERE)] = None

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Return the stages whose maps can be compared: of an ensemble the logits alone."""
        return ("logits",) if self.ensemble else super().stage_names
