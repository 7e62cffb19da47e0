"""Derive from the markers of the schema which results each key decides; keys are joined by dots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from kdsweep.config import grid
from kdsweep.config.grid import Decides, Params
from kdsweep.config.schema import Settings


@dataclass(frozen=True)
class Key:
    """A key of the schema."""

    decides: tuple[Decides, ...]
    default: Any
    is_node: bool  # it holds other keys, not a value


def _keys(model: type[BaseModel], prefix: str = "", above: tuple[Decides, ...] = ()) -> Iterator[tuple[str, Key]]:
    for name, field in model.model_fields.items():
        key, kind = f"{prefix}{field.alias or name}", field.annotation
        decided = tuple(each for each in field.metadata if isinstance(each, Decides))
        if above:
            roles, factor = above[0].roles, above[0].factor
            marked = [replace(each, factor=factor or each.factor) for each in decided]
            decided = tuple(each if each.roles is not None else replace(each, roles=roles) for each in marked) or above
        node = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        yield key, Key(decided, field.default, is_node=node is not None)
        if node is not None:
            yield from _keys(node, f"{key}.", decided)


KEYS = dict(_keys(Settings))
LEAVES = {key: each for key, each in KEYS.items() if not each.is_node}
PLACES = tuple((key, name) for key, each in LEAVES.items() for marker in each.decides for name in marker.places)


@cache
def _markers(key: str) -> tuple[Decides, ...]:
    """Return the markers of a key, of all keys below it, or of the node that a user adds it to."""
    below = [each for name, each in LEAVES.items() if name.startswith(f"{key}.")]
    above = [each for name, each in KEYS.items() if grid.is_under(key, (name,))]
    return tuple(marker for each in below or above[-1:] for marker in each.decides)


def is_declared(key: str) -> bool:
    """Return whether a key is one of the schema, or an argument in it, not one that a user adds to a node."""
    return key in KEYS or any(grid.is_under(key, (name,)) for name in LEAVES)


def decides(key: str, *, role: str, params: Params) -> bool:
    """Return whether a key, or one below it, decides the results of a role; yes for a key of another version's.

    ``params`` is the flat configuration of a cell.
    """
    markers = _markers(key)
    return not markers or any(each.applies(role, params) for each in markers)


def default(key: str) -> str:
    """Return the default of a key as MLflow would keep it, ``unset`` if it has none."""
    each = KEYS.get(key)
    return "unset" if each is None or each.default is PydanticUndefined else str(each.default)


@cache
def kind(key: str) -> str:
    """Return the kind of a key.

    Returns:
        ``local``: of the machine or the command, it decides no result. ``place``: of files, whose content counts.
        ``name``: a factor by which a cell is named or numbered, such as path or split.index. ``factor``: below such
        a factor; ``cell.*`` are the factors as MLflow shows them. ``setting``: all others.
    """
    markers = _markers(key)
    if any(grid.is_under(key, (f"{name}.{place}",)) for name, place in PLACES):
        return "place"
    if not markers:
        return "factor" if key.startswith("cell.") else "setting"
    if not any(each.roles for each in markers):
        return "local"
    if all(not each.roles or each.by == "place" for each in markers):
        return "place"
    if not all(each.factor for each in markers):
        return "setting"
    return "name" if "." not in key or all(each.by == "name" for each in markers) else "factor"


def used_by(role: str, variant: Mapping[str, str], params: Params) -> dict[str, str]:
    """Return the part of a variant that decides a cell's result: the Student alone has no ``kd.weight``."""
    return {key: value for key, value in variant.items() if decides(key, role=role, params=params)}


def varied_keys(params: list[dict[str, Any]]) -> list[str]:
    """Return the keys that decide results, are not factors, and differ between flat configurations."""
    keys = sorted({key for each in params for key in each if kind(key) == "setting"})
    return [key for key in keys if len({str(each.get(key)) for each in params}) > 1]


def deciding(settings: Settings, role: str) -> dict[str, Any]:
    """Return the values that decide the result of a cell, by key: those that differ from the schema's defaults."""
    values = _unified(settings)
    params, decided = grid.flatten(values), {}
    for key, each in LEAVES.items():
        section, _, name = key.rpartition(".")
        value = (values[section] if section else values).get(name, each.default)
        if value != each.default and any(of.by == "value" and of.applies(role, params) for of in each.decides):
            decided[key] = value
    for key, place in PLACES:
        decided[key] = {name: value for name, value in decided[key].items() if name != place}
    return decided


def _unified(settings: Settings) -> dict[str, Any]:
    """Return plain values of settings in which each choice that can be written in several ways is written in one."""
    values = settings.plain()
    supervised, schedule = settings.teacher_recipe
    path = settings.path.kd_path
    if path is not None and path.target.startswith(f"{grid.PACKAGE}."):
        values["path"]["kd_path"] = path.model_dump(by_alias=True, exclude_unset=True, exclude_defaults=True)
    for name, share in settings.method.shares().items():
        values["method"]["terms"][name]["weight"] = share
    values["data"] |= {"load_size": settings.load_size}
    if settings.data.classes:
        values["data"]["classes"] = list(settings.data.classes.items())  # their order is that of the logits
    values["teacher"] |= {"epochs": settings.teacher_epochs, "supervised": supervised, "schedule": schedule}
    if settings.teacher.patience == settings.train.patience:
        values["teacher"]["patience"] = None  # train.patience, which then decides
    values["kd"] |= {"weight": "matched" if settings.kd_weight is None else settings.kd_weight, "lambda": None}
    for network in (values["student"], values["teacher"]):
        if network["weights"] not in ("imagenet", "none"):
            network["weights"] = "file"
    return values
