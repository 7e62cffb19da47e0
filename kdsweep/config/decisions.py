"""Derive from the fields of the schema which results each key decides; keys are joined by dots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pydantic import BaseModel

from kdsweep.config import grid
from kdsweep.config.grid import Decides, Params
from kdsweep.config.schema import KDPathNode, Settings


@dataclass(frozen=True)
class Key:
    """A key of the schema.

    Attributes:
        decides: the results that it decides.
        factor: whether it, or a node above it, is a factor of the grid.
        default: of the schema.
        is_node: whether it holds other keys, not a value.
    """

    decides: tuple[Decides, ...]
    factor: bool
    default: Any
    is_node: bool

    def applies(self, role: str, params: Params, *, by: str | None = None) -> bool:
        """Return whether the key decides the result of a cell, in a way if one is given."""
        return any(role in (own.roles or ()) and own.by == (by or own.by) and own.when(params) for own in self.decides)


def _keys(model: type[BaseModel], prefix: str = "", above: Key | None = None) -> Iterator[tuple[str, Key]]:
    for name, field in model.model_fields.items():
        key, kind = f"{prefix}{field.alias or name}", field.annotation
        found = [each for each in field.metadata if isinstance(each, Decides)]
        if above is not None:
            found = [each if each.roles is not None else replace(each, roles=above.decides[0].roles) for each in found]
        decided = tuple(found or (above.decides if above is not None else ()))
        factor = any(each.factor for each in found) or (above is not None and above.factor)
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not KDPathNode:
            node = Key(decided, factor, field.default, is_node=True)
            yield key, node
            yield from _keys(kind, f"{key}.", node)
        else:
            yield key, Key(decided, factor, field.default, is_node=False)


ALL_KEYS = dict(_keys(Settings))
KEYS = {key: own for key, own in ALL_KEYS.items() if not own.is_node}
PLACES = tuple((key, name) for key, own in KEYS.items() for each in own.decides for name in each.places)


@cache
def _related(key: str) -> tuple[Key, ...]:
    """Return the key of the schema that holds the value of a key, all below it, or the node that a user adds it to."""
    above = [own for name, own in ALL_KEYS.items() if grid.is_under(key, (name,))]
    below = [own for name, own in KEYS.items() if name.startswith(f"{key}.")]
    return tuple(below or above[-1:])


def is_declared(key: str) -> bool:
    """Return whether a key is one of the schema, not an additional one of a user."""
    return any(not own.is_node or key in ALL_KEYS for own in _related(key))


def decides(key: str, *, role: str, params: Params) -> bool:
    """Return whether a key, or one below it, decides the results of a role; yes for a key of another version's.

    Args:
        key: of the configuration.
        role: ``distilled``, ``baseline`` or ``teacher``.
        params: flat configuration of the cell.
    """
    return not _related(key) or any(own.applies(role, params) for own in _related(key))


def is_local(key: str) -> bool:
    """Return whether a key decides no result: it is of the machine or the command."""
    return bool(_related(key)) and not any(own.roles for each in _related(key) for own in each.decides)


def is_neutral(key: str) -> bool:
    """Return whether a key is local, or names a place of files, whose content alone counts."""
    related = [own for each in _related(key) for own in each.decides]
    of_call = any(grid.is_under(key, (f"{name}.{place}",)) for name, place in PLACES)
    return of_call or (bool(related) and all(not own.roles or own.by == "place" for own in related))


def is_factor(key: str) -> bool:
    """Return whether a key is one of a factor of the grid; ``cell.*`` are the factors as MLflow shows them."""
    return key.startswith("cell.") or (bool(_related(key)) and all(own.factor for own in _related(key)))


def names_cell(key: str) -> bool:
    """Return whether a key is a factor by which a cell is named or numbered, such as path or split.index."""
    is_group = "." not in key and is_factor(key)
    return is_group or (is_factor(key) and all(own.by == "name" for each in _related(key) for own in each.decides))


def used_by(role: str, variant: dict[str, str], params: Params) -> dict[str, str]:
    """Return the part of a variant that decides a cell's result: the Student alone has no ``kd.weight``."""
    return {key: value for key, value in variant.items() if decides(key, role=role, params=params)}


def varied_keys(params: list[dict[str, Any]]) -> list[str]:
    """Return the keys whose values differ between flat configurations, beyond the factors and neutral ones."""
    keys = sorted({key for own in params for key in own if not is_factor(key) and not is_neutral(key)})
    return [key for key in keys if len({str(own.get(key)) for own in params}) > 1]


def settled(settings: Settings) -> dict[str, Any]:
    """Return plain values of settings in which each choice that can be written in several ways is written in one."""
    values = settings.plain()
    supervised, schedule = settings.teacher_recipe
    path = settings.path.kd_path
    if path is not None and path.target.startswith(f"{grid.PACKAGE}."):
        values["path"]["kd_path"] = path.model_dump(by_alias=True, exclude_unset=True, exclude_defaults=True)
    for name, share in settings.method.shares().items():
        values["method"]["terms"][name]["weight"] = share
    values["data"] |= {"load_size": settings.load_size}
    values["teacher"] |= {"epochs": settings.teacher_epochs, "supervised": supervised, "schedule": schedule}
    values["kd"] |= {"weight": "matched" if settings.kd_weight is None else settings.kd_weight, "lambda": None}
    for network in (values["student"], values["teacher"]):
        if network["weights"] not in ("imagenet", "none"):
            network["weights"] = "file"
    return values


def deciding(settings: Settings, role: str) -> dict[str, Any]:
    """Return the values that decide the result of a cell, by key: those that differ from the schema's defaults."""
    values = settled(settings)
    params = grid.flatten(values)
    found = {}
    for key, own in KEYS.items():
        value = _value(values, key, own.default)
        if value != own.default and own.applies(role, params, by="value"):
            found[key] = value
    for key, name in PLACES:
        found[key] = {argument: own for argument, own in found[key].items() if argument != name}
    return found


def _value(values: dict[str, Any], key: str, default: Any) -> Any:
    """Return the value of a key in nested values."""
    section, _, name = key.rpartition(".")
    return (values[section] if section else values).get(name, default)
