"""Allowed values of the configuration, checked for every job of a sweep before the first one starts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from kdsweep.core.errors import InputError


def is_number(value: Any) -> bool:
    """Return whether it is an int or float, neither a bool nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Return whether it is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_device(value: Any) -> bool:
    """Return whether it names a device: auto, cpu, cuda or cuda:NUMBER."""
    return re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(value)) is not None


# key, what is allowed in words, the test
RULES: list[tuple[str, str, Callable[[Any], bool]]] = [
    ("seed", "a whole number from 0 to 4294967295", lambda v: is_whole(v) and 0 <= v < 2**32),
    ("split", "0, 1 or 2", lambda v: is_whole(v) and 0 <= v <= 2),
    ("device", "auto, cpu, cuda or cuda:NUMBER", lambda v: is_device(v)),
    ("retry_failed", "true or false", lambda v: isinstance(v, bool)),
    ("deterministic", "true or false", lambda v: isinstance(v, bool)),
    ("precision", "fp32 or bf16", lambda v: v in ("fp32", "bf16")),
    ("image_size", "a multiple of 32, at least 64", lambda v: is_whole(v) and v >= 64 and v % 32 == 0),
    ("train.epochs", "a whole number >= 1", lambda v: is_whole(v) and v >= 1),
    ("train.batch_size", "a whole number >= 1", lambda v: is_whole(v) and v >= 1),
    ("train.lr", "a number > 0", lambda v: is_number(v) and v > 0),
    ("train.patience", "a whole number >= 1", lambda v: is_whole(v) and v >= 1),
    ("train.monitor", "loss or dice", lambda v: v in ("loss", "dice")),
    ("train.workers", "auto or a whole number >= 0", lambda v: v == "auto" or (is_whole(v) and v >= 0)),
    ("teacher.lr", "a number > 0", lambda v: is_number(v) and v > 0),
    ("teacher.seed", "a whole number from 0 to 4294967295", lambda v: is_whole(v) and 0 <= v < 2**32),
    ("teacher_aug.train_view", "weak or strong", lambda v: v in ("weak", "strong")),
    ("teacher_aug.distill_view", "weak or strong", lambda v: v in ("weak", "strong")),
    ("kd.weight", "a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1),
    ("kd.temperature", "a number > 0", lambda v: is_number(v) and v > 0),
    ("kd.teacher_precision", "fp32 or bf16", lambda v: v in ("fp32", "bf16")),
    ("kd.align", "warp or none", lambda v: v in ("warp", "none")),
    ("views.shift", "a number from 0 to 0.5", lambda v: is_number(v) and 0 <= v <= 0.5),
    ("views.scale", "a number from 0 to 0.9", lambda v: is_number(v) and 0 <= v <= 0.9),
    ("views.rotate_deg", "a number from 0 to 180", lambda v: is_number(v) and 0 <= v <= 180),
    ("views.dropout", "a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1),
    ("views.probability", "a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1),
    ("views.noise_std", "two numbers, 0 <= first <= second <= 1", lambda v: _is_range(v)),
    ("data.count", "a whole number >= 4", lambda v: v is None or (is_whole(v) and v >= 4)),  # phantoms alone have one
    ("data.load_size", "null or a whole number >= image_size", lambda v: v is None or (is_whole(v) and v >= 64)),
    ("student.decoder_channels", "five whole numbers >= 1", lambda v: _is_five_widths(v)),
    ("teacher.decoder_channels", "five whole numbers >= 1", lambda v: _is_five_widths(v)),
    ("path.kd_path.inner_channels", "a whole number >= 1", lambda v: v is None or (is_whole(v) and v >= 1)),
    ("path.kd_path.kernel_size", "an odd number >= 1", lambda v: v is None or (is_whole(v) and v >= 1 and v % 2 == 1)),
    ("store", "the name of a folder", lambda v: isinstance(v, str) and bool(v)),
    ("data.allow_empty_masks", "true or false", lambda v: v is None or isinstance(v, bool)),
    ("sweep_name", "a name of letters, digits, blank . _ -", lambda v: isinstance(v, str) and _is_name(v)),
]


def _is_range(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_number, value)):
        return False
    return 0 <= value[0] <= value[1] <= 1


def _is_five_widths(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 5 and all(is_whole(v) and v >= 1 for v in value)


def _is_name(value: str) -> bool:
    return 0 < len(value) <= 200 and all(c.isalnum() or c in " ._-" for c in value)


def check(values: dict[str, Any]) -> None:
    """Raise InputError for the first value out of its range: one line with key, value and what is allowed.

    Args:
        values: the flat resolved configuration, by dotted key.
    """
    for key, allowed, is_allowed in RULES:
        if not is_allowed(values.get(key)):
            shown = " ".join(str(values.get(key)).split())  # one line, whatever was typed
            raise InputError(f"{key}={shown} is not allowed: it must be {allowed}")
    size = values["data.load_size"]
    if size is not None and size < values["image_size"]:
        raise InputError(f"data.load_size={size} is not allowed: image_size={values['image_size']} is cropped from it")
