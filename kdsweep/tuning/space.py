"""The search space: for each key that is tuned its values, as Optuna's distributions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from kdsweep.config import decisions, grid
from kdsweep.core.errors import InputError

Space = dict[str, BaseDistribution]

KEY = "hydra.sweeper.search"
FORMS = "a list of values, {log: [LOW, HIGH]}, {range: [LOW, HIGH]} or {int: [LOW, HIGH]}"
# What is compared; the arguments of a path or a loss may be tuned.
COMPARED = ("method", "path", "loss", "teacher_aug")
# What decides which images a trial sees, how long it is trained and by what it is judged is equal for all trials.
MEASURES = ("train.epochs", "train.patience", "train.monitor", "teacher.monitor", "scores")
FIXED = ("split", "seed", "teacher.seed", "profile", "data", "deterministic", *MEASURES)


def read(search: Mapping[str, Any]) -> Space:
    """Return the distributions of a search space, by key.

    Args:
        search: of the sweeper, keys nested or joined by dots, such as ``{"train.lr": {"log": [1e-4, 1e-2]}}``; a key
            without values (null) is not tuned.

    Raises:
        InputError: a key is not to be tuned, or its values are none.
    """
    space = {}
    for key, values in _leaves(search):
        if values is None:
            continue
        if key in space:
            raise InputError(f"{KEY}: {key} stands there twice, nested and joined by dots")
        if key in COMPARED or grid.is_under(key, FIXED) or decisions.is_neutral(key):
            raise InputError(f"{KEY}: {key} is not to be tuned: it is equal for all trials; sweep it instead")
        space[key] = _distribution(key, values)
    return space


def _leaves(search: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return keys and values: what is a mapping with other words than FORMS has goes on below."""
    found = []
    for name, value in search.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and not set(value) & {"log", "range", "int"}:
            found += _leaves(value, f"{key}.")
        else:
            found.append((key, value))
    return found


def _distribution(key: str, values: Any) -> BaseDistribution:
    if isinstance(values, list | tuple):
        if not values or not all(isinstance(value, str | int | float) for value in values):
            raise InputError(f"{KEY}: {key}={values} is not allowed: it must be {FORMS}")
        if len(set(values)) < len(values):
            raise InputError(f"{KEY}: {key}={values} is not allowed: a value stands there twice")
        return CategoricalDistribution(list(values))
    if not isinstance(values, Mapping) or len(values) != 1:
        raise InputError(f"{KEY}: {key}={values} is not allowed: it must be {FORMS}")
    ((form, ends),) = values.items()
    numbers = (int,) if form == "int" else (int, float)
    if not isinstance(ends, list | tuple) or len(ends) != 2 or not all(type(end) in numbers for end in ends):
        what = "two whole numbers" if form == "int" else "two numbers"
        raise InputError(f"{KEY}: {key}={values} is not allowed: {form} takes {what}, [LOW, HIGH]")
    low, high = ends
    if low >= high:
        raise InputError(f"{KEY}: {key}={values} is not allowed: the first number must be the smaller one")
    if form == "log" and low <= 0:
        raise InputError(f"{KEY}: {key}={values} is not allowed: a log range begins above 0")
    if form == "int":
        return IntDistribution(low, high)
    return FloatDistribution(float(low), float(high), log=form == "log")


def ends(space: Space) -> dict[str, list[Any]]:
    """Return by key the values that bound a space: each of a list, the two ends of a range."""
    return {key: _ends(distribution) for key, distribution in space.items()}


def _ends(distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, FloatDistribution | IntDistribution):
        return [distribution.low, distribution.high]
    raise TypeError(f"no distribution of this module: {distribution}")


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether a distribution could give a value."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    low, high = _ends(distribution)
    return isinstance(value, int | float) and low <= value <= high


def used(space: Space, *, role: str, params: Mapping[str, Any]) -> Space:
    """Return the part of a space that one method uses: a Student without distillation has no ``kd.weight``.

    What a Teacher is trained with is tuned once, as the Teacher's own study: all methods then learn from that one. A
    key of its own that is tuned takes the place of the Students' (``teacher.schedule`` that of ``train.schedule``).

    Args:
        space: the whole.
        role: ``distilled``, ``baseline`` or ``teacher``.
        params: the method's flat configuration.
    """
    tuned = {**params, **(dict.fromkeys(space, "tuned") if role == "teacher" else {})}
    used = {key: own for key, own in space.items() if decisions.decides(key, role=role, params=tuned)}
    return {key: own for key, own in used.items() if role != "distilled" or not grid.is_under(key, ("teacher",))}


def in_words(space: Space) -> dict[str, str]:
    """Return a space as text, for a study's storage and for messages: ``{"train.lr": "log 0.0001 to 0.01"}``."""
    return {key: _in_words(distribution) for key, distribution in space.items()}


def _in_words(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(str(choice) for choice in distribution.choices)
    low, high = _ends(distribution)
    scale = "log " if isinstance(distribution, FloatDistribution) and distribution.log else ""
    return f"{scale}{low:g} to {high:g}"
