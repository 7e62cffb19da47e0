"""Types of the configuration's values: ranges and names, each with the rule that an error states."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from kdsweep.core.files import folded


def rule(holds: Callable[[Any], object], text: str) -> AfterValidator:
    """Return a check of a value; ``text`` completes the error "it must ..."."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(text)
        return value

    return AfterValidator(check)


def is_name(text: str, longest: int = 80) -> bool:
    """Return whether a text can be a folder, a file, a key and a filter of MLflow, also in capitals."""
    return bool(re.fullmatch(r"\w[\w .-]*", text)) and max(len(text.encode()), len(text.upper().encode())) <= longest


def are_class_codes(classes: Mapping[str, Any]) -> bool:
    """Return whether the codes of classes in a mask are of one kind and, as the names, differ by more than case."""
    kinds, codes = {type(code) for code in classes.values()}, [folded(str(code)) for code in classes.values()]
    names = {folded(name) for name in classes}
    return len(names) > 1 and len(kinds) == 1 and len({*codes, "[0, 0, 0]"}) == len(codes) + 1 == len(names) + 1


NAME_RULE = "be made of letters, digits, blank . _ -, the first a letter, a digit or _, at most 80 bytes (a sweep: 200)"
AS_TEXT = BeforeValidator(lambda value: str(value) if type(value) is int else value)  # 2024 on the command line

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Positive = Annotated[float, Field(gt=0)]
SHARES = "a number from 0 to 1"
Share = Annotated[float, rule(lambda number: 0 <= number <= 1, f"be {SHARES}"), Field(description=SHARES)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, AS_TEXT, rule(is_name, NAME_RULE)]
SweepName = Annotated[str, AS_TEXT, rule(partial(is_name, longest=200), NAME_RULE)]
Range = Annotated[list[Share], Field(min_length=2, max_length=2), rule(lambda pair: pair == sorted(pair), "ascend")]
Window = Annotated[list[float], Field(min_length=2, max_length=2), rule(lambda pair: pair[0] < pair[1], "ascend")]
Means = Annotated[list[float], Field(min_length=3, max_length=3)]  # of three channels
Deviations = Annotated[list[Positive], Field(min_length=3, max_length=3)]
DEVICES, DEVICE = "auto, cpu, cuda or cuda:NUMBER", re.compile(r"auto|cpu|cuda(:\d+)?")
Device = Annotated[str, rule(DEVICE.fullmatch, f"be {DEVICES}"), Field(description=DEVICES)]
Folder = Annotated[Text, AS_TEXT, rule(lambda name: name[0] != "~", "not begin with ~: write ${oc.env:HOME}")]
View = Literal["weak", "strong"]
Precision = Literal["fp32", "tf32", "bf16"]
Monitor = Literal["loss", "dice"]
Supervised = Literal["bce", "bce_dice"]
Schedule = Literal["constant", "cosine", "poly"]
Color = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]
CLASS_CODES = (
    "be two names or more, all with a value from 1, all with a color [r, g, b] but black or all with a label, "
    "no name or code twice, also in another case"
)
Classes = Annotated[
    dict[Name, Annotated[int, Field(ge=1, le=65535)] | Color | Text], rule(are_class_codes, CLASS_CODES)
]
Call = dict[str, Any]  # a function or class by _target_, and its arguments


class Node(BaseModel):
    """A part of the configuration. Types are strict: "1" is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    def plain(self) -> dict[str, Any]:
        """Return it as dicts, lists and plain values, without the keys that are not set."""
        return self.model_dump(by_alias=True, exclude_unset=True)
