"""The search space: for each key that is tuned its values, as Optuna's distributions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from kdsweep.config import decisions, grid
from kdsweep.core.errors import InputError

Space = dict[str, BaseDistribution]

KEY = "hydra.sweeper.search"
FORMS = (
    "a list of unlike values, or with LOW below HIGH {log: [LOW, HIGH]} (from above 0), {range: [LOW, HIGH]} or "
    "{int: [LOW, HIGH]} (whole numbers)"
)
# What is compared; the arguments of a path or a loss may be tuned.
COMPARED = ("method", "path", "loss", "teacher_aug")
# What decides which images a trial sees, how long it is trained and by what it is chosen is equal for all trials.
MEASURES = ("train.epochs", "train.patience", "train.monitor", "teacher.monitor", "scores")
FIXED = ("split", "seed", "teacher.seed", "profile", "data", "deterministic", *MEASURES)


def read(search: Mapping[str, Any]) -> Space:
    """Return the distributions of a search space, such as ``{"train.lr": {"log": [1e-4, 1e-2]}}``, by key.

    Keys are nested or joined by dots; one without values (null) is not tuned.

    Raises:
        InputError: a key must not be tuned, or its values are of no form.
    """
    space: Space = {}
    for key, values in _leaves(search):
        if values is None:
            continue
        if key in space:
            raise InputError(f"{KEY}: {key} is there twice, nested and joined by dots")
        if key in COMPARED or grid.is_under(key, FIXED) or decisions.kind(key) in ("place", "local"):
            raise InputError(f"{KEY}: {key} is not to be tuned: it is equal for all trials; sweep it instead")
        space[key] = _distribution(key, values)
    return space


def _leaves(search: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in search.items():
        if isinstance(value, Mapping) and value and not value.keys() & {"log", "range", "int"}:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _distribution(key: str, values: Any) -> BaseDistribution:
    match values:
        case [_, *_] if all(isinstance(each, str | int | float) for each in values) and len(set(values)) == len(values):
            return CategoricalDistribution(list(values))
        case {"int": [int(low), int(high)], **more} if not more and low < high:
            return IntDistribution(low, high)
        case {"range": [int() | float() as low, int() | float() as high], **more} if not more and low < high:
            return FloatDistribution(low, high)
        case {"log": [int() | float() as low, int() | float() as high], **more} if not more and 0 < low < high:
            return FloatDistribution(low, high, log=True)
    raise InputError(f"{KEY}: {key}={values} is not allowed: it must be {FORMS}")


def ends(values: BaseDistribution) -> list[Any]:
    """Return the values that bound a distribution: each of a list, the two ends of a range."""
    return list(getattr(values, "choices", ())) or [getattr(values, end) for end in ("low", "high")]


def contains(values: BaseDistribution, value: Any) -> bool:
    """Return whether a distribution could give a value."""
    if isinstance(values, CategoricalDistribution):
        return value in values.choices
    low, high = ends(values)
    return isinstance(value, int | float) and low <= value <= high


def used(space: Space, *, role: str, params: Mapping[str, Any]) -> Space:
    """Return the part of a space that one method uses: a Student without distillation has no ``kd.weight``.

    What a Teacher is trained with is tuned once, in the Teacher's study: all methods then learn from that one. A
    key of the Teacher that is tuned replaces the Students' (``teacher.schedule`` replaces ``train.schedule``).
    ``params`` is the method's flat configuration.
    """
    tuned = {**params, **(dict.fromkeys(space, "tuned") if role == "teacher" else {})}
    used = {key: values for key, values in space.items() if decisions.decides(key, role=role, params=tuned)}
    return {key: used[key] for key in used if role != "distilled" or not grid.is_under(key, ("teacher",))}


def in_words(values: BaseDistribution) -> str:
    """Return a distribution as text, for a study's storage and for messages, such as ``log 0.0001 to 0.01``."""
    if isinstance(values, CategoricalDistribution):
        return ", ".join(map(str, values.choices))
    low, high = ends(values)
    return f"{'log ' if getattr(values, 'log', False) else ''}{low:g} to {high:g}"
