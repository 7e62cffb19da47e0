"""Errors of values and references in one line: the key that holds the value, the value, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

REFERENCE = re.compile(r"\$\{(\.*)([\w.]+)\}")  # a value that is another key's, such as ${seed}, ${.epochs}
KEYS = "keys with values"


def of_value(
    error: ValidationError, values: Mapping[str, Any], *, root: type[BaseModel], source: Callable[[str], str]
) -> str:
    """Return the error that the user can correct, of all that a configuration has.

    A value that other keys refer to is an error of each of them. The line names the key that holds it.

    Args:
        error: of pydantic.
        values: the configuration.
        root: its schema.
        source: gives the key that holds the value of a key.
    """
    found = error.errors(include_url=False, include_context=False)
    lines = [(*_locate(each["loc"], root), each["type"]) for each in found]
    keys, allowed, kind = next((line for line in lines if source(".".join(line[0])) == ".".join(line[0])), lines[0])
    key = ".".join(keys)
    if kind == "extra_forbidden":
        return f"{key} is not a key of the configuration; it has: {allowed}"
    if kind == "missing":
        return f"{key} is missing: give it on the command line, {key}=..."
    value = reduce(lambda inner, name: inner[name], keys, values)  # of a list all, where an entry is wrong
    key = source(key)
    line = f"{key}={typed(value)} is not allowed: it must be {allowed}"
    if kind == "string_type" and isinstance(value, int | float):
        line += f"; quotes within quotes make it text: '{key}=\"...\"'"
    return line


def typed(value: Any) -> str:
    """Return a value as it is typed, in one line."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), " ".join(str(value).split()))


def _locate(place: tuple[int | str, ...], node: type[BaseModel]) -> tuple[list[str], str]:
    """Return the key of pydantic's location of an error, and what is allowed there; of an unknown key its neighbors."""
    keys: list[str] = []
    allowed, is_name = "", False
    for part in place:
        if is_name:  # the user's own, such as that of a method's term
            keys.append(str(part))
            is_name = False
            continue
        fields = {field.alias or name: field for name, field in node.model_fields.items()}
        if part not in fields:
            return [*keys, str(part)], ", ".join(fields)
        keys.append(str(part))
        field = fields[str(part)]
        kinds = [field.annotation, *get_args(field.annotation)]
        below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        allowed = field.description or KEYS
        if not below:
            break
        node, is_name = below[0], get_origin(field.annotation) is dict
    return keys, allowed


def source_of(cfg: DictConfig, key: str) -> str:
    """Return the key that holds the value of a key: for ``teacher.seed``, which is ``${seed}``, that is seed."""
    for _ in range(10):  # references that lead back to themselves are errors of their own
        match = REFERENCE.fullmatch(str(raw(cfg, key)))
        if match is None:
            break
        above = key.split(".")[: -len(match[1])] if match[1] else []
        key = ".".join([*above, match[2]])
    return key


def raw(cfg: DictConfig, key: str) -> Any:
    """Return the value of a key as it was given, references as they are; None if there is no such key."""
    values = OmegaConf.to_container(cfg, resolve=False)
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return None
        values = values[part]
    return values


def of_reference(error: OmegaConfBaseException, cfg: DictConfig | None = None) -> str:
    """Return an error of OmegaConf: a value that is missing, or that refers to what cannot be.

    Args:
        error: the exception.
        cfg: the configuration.
    """
    key, text = str(error.full_key or error.key), reason(error)
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{match[1]} is missing: give it on the command line, {match[1]}=..."
    if cfg is None:
        return f"{key}: {text}"
    if match := re.search(r"node `([\w.]+)` is not a container", text):
        return f"{match[1]}={typed(raw(cfg, match[1]))} is not allowed: it must be {KEYS}"
    if "Recursive interpolation" in text:
        text = "it refers to itself; give it a value"
    return f"{key}={raw(cfg, key)} cannot be read: {text}"


def reason(error: BaseException) -> str:
    """Return what an error of OmegaConf says, without its lines on keys and types."""
    return " ".join(str(error).partition("\n    full_key:")[0].split())


def of_target(error: BaseException) -> str:
    """Return why Hydra cannot make what ``_target_`` names: the first error, which it wraps in its own."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {reason(error).partition(', set env var')[0]}"
