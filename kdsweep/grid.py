"""The grid: a cell, its name in the paper, and the fingerprint of everything that determines its result.

Pure Python, no torch: names and fingerprints must be cheap.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import itertools
import json
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

# Keys of the configuration, each with all below it. FACTORS: those of the grid. NEUTRAL: what decides no result
# (weights stands in student.weights and teacher.weights). UNUSED: what a role is given and does not use.
FACTORS = ("cell", "path", "loss", "teacher_aug", "split", "seed", "teacher.seed")
LOCAL = ("device", "retry_failed", "store", "sweep_name", "tracking", "train.workers", "data.root", "variant")
NEUTRAL = (*LOCAL, "data.source.root", "data.source.cache_dir", "weights")
UNUSED = {
    "cell": (),
    "student": ("path", "loss", "teacher_aug", "teacher", "kd"),
    "teacher": ("path", "loss", "teacher_aug", "student", "kd", "train.lr", "train.monitor", "seed"),
}


@dataclass(frozen=True)
class Cell:
    """One training with its result: one Hydra job, one MLflow run, one folder. Teachers are cells of role ``teacher``.

    Attributes:
        role: ``cell`` (a distilled Student), ``student`` (the baseline) or ``teacher``.
        notation: the paper's name, such as ``HReg_KLD_WAug``, ``Student``, ``Teacher_WAug``.
        split: index of the random split.
        seed: of initialisation, shuffling and views.
        settings: what the user chose and the result depends on, as plain nested values.
        evidence: digests of what lies outside the configuration: data, code, weights files, the Teacher.
        store: folder that holds all runs.
        code: digest of each piece of code that the result depends on, by its name; evidence holds that of them all.
        variant: values of the further keys that the sweep varies, as far as the role uses them.
        teacher: of a distilled Student.
    """

    role: str
    notation: str
    split: int
    seed: int
    settings: dict[str, Any]
    evidence: dict[str, str]
    store: Path = field(compare=False)
    code: dict[str, str] = field(default_factory=dict, compare=False)
    variant: dict[str, str] = field(default_factory=dict, compare=False)
    teacher: Cell | None = field(default=None, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """Equal fingerprints mean the same result, so it is computed once."""
        return digest([self.role, self.notation, self.split, self.seed, self.settings, self.evidence])

    @property
    def run_name(self) -> str:
        """Name of the MLflow run, such as ``HReg_KLD_WAug/split0``."""
        return f"{self.notation}/split{self.split}"

    @property
    def title(self) -> str:
        """How messages call it, such as ``HReg_KLD_WAug split 0 seed 0``, and in brackets its variant if it has one."""
        name = f"{self.notation} split {self.split} seed {self.seed}"
        return f"{name} ({variant_label(self.variant)})" if self.variant else name

    @property
    def place(self) -> str:
        """What a sweep asks for; a later computation of the same place (new code, new data) takes its seat."""
        return f"{self.notation}/split{self.split}/seed{self.seed}/{digest(self.settings)[:8]}"

    @cached_property
    def folder(self) -> Path:
        """Where the cell's files lie: named by its fingerprint, so that the same command finds them again."""
        parent = "teachers" if self.role == "teacher" else "cells"
        return self.store / parent / f"{self.notation}-split{self.split}-seed{self.seed}-{self.fingerprint[:10]}"


def notation(*, path: str, loss: str, distill_view: str) -> str:
    """The paper's name of a cell (PAPER, Table 3): ``HReg`` + ``KLD`` + ``_WAug`` for a weakly augmented Teacher."""
    return f"{path}_{loss}{weak_suffix(distill_view)}"


def teacher_notation(train_view: str) -> str:
    """``Teacher``, or ``Teacher_WAug`` for one trained on weak views."""
    return f"Teacher{weak_suffix(train_view)}"


def weak_suffix(view: str) -> str:
    """``_WAug`` for the weak view, as the paper writes it."""
    return "_WAug" if view == "weak" else ""


def is_under(key: str, names: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of these, or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def variant_label(variant: dict[str, str]) -> str:
    """Such as ``train.lr=0.001, kd.weight=0.9``."""
    return ", ".join(f"{key}={value}" for key, value in variant.items())


def used_by(role: str, variant: dict[str, str]) -> dict[str, str]:
    """The part of a variant that a role uses: a Student without distillation has no ``kd.weight``."""
    return {key: value for key, value in variant.items() if not is_under(key, UNUSED[role])}


def varied_keys(params: list[dict[str, Any]]) -> list[str]:
    """Keys of flat configurations that do not have one value in all, beyond the factors and what decides no result."""
    keys = sorted({key for own in params for key in own if not is_under(key, FACTORS + NEUTRAL)})
    return [key for key in keys if len({str(own.get(key)) for own in params}) > 1]


def swept_keys(typed: list[list[str]]) -> list[str]:
    """Keys that the command lines of several jobs give different values, beyond the factors and the neutral ones.

    Args:
        typed: the overrides of each job, such as ``["path=L", "train.lr=1e-3"]``.
    """
    jobs = [dict(word.lstrip("+").partition("=")[::2] for word in words) for words in typed]
    keys = list(dict.fromkeys(key for job in jobs for key in job if not is_under(key, FACTORS + NEUTRAL)))
    return [key for key in keys if len({job.get(key) for job in jobs}) > 1]


def digest(value: Any) -> str:
    """SHA-256 of a value made of dicts, lists, strings, numbers and None; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def group_by(keys: list[str]) -> list[list[int]]:
    """Positions of equal keys together, in the order in which the keys first appear."""
    groups: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return list(groups.values())


def divide(group: list[int], *, largest: int, likeness: list[str]) -> list[list[int]]:
    """A lockstep group in parts of at most ``largest`` members and nearly equal size.

    Args:
        group: positions of the members.
        largest: members of a part.
        likeness: by position, what members of a part should have in common, such as their Teacher.
    """
    count = -(-len(group) // largest)
    ordered = sorted(group, key=lambda position: likeness[position])
    bounds = [round(len(group) * part / count) for part in range(count + 1)]
    return [sorted(ordered[start:end]) for start, end in itertools.pairwise(bounds)]


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def targets(settings: Any) -> list[str]:
    """Every ``_target_`` in nested settings, sorted: the code that a configuration names."""
    if isinstance(settings, dict):
        own = [settings["_target_"]] if isinstance(settings.get("_target_"), str) else []
        return sorted({*own, *(name for value in settings.values() for name in targets(value))})
    if isinstance(settings, list):
        return sorted({name for value in settings for name in targets(value)})
    return []


def code_digest(objects: list[str]) -> str:
    """Digest of ``code_parts``."""
    return digest(code_parts(objects))


def code_parts(objects: list[str]) -> dict[str, str]:
    """Digests of the code that makes a result: functions and classes with the module-level names that they reach.

    Comments, docstrings and layout do not count, nor does what is beside the named objects in their modules: adding
    a loss leaves finished cells finished.

    Args:
        objects: dotted names ``module.object``, in the project or outside.
    """
    return {name: _object_digest(name) for name in objects}


@cache
def _object_digest(name: str) -> str:
    module, _, attribute = name.rpartition(".")
    return _reachable(_tree(module), attribute)


@cache
def _tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return ast.parse(repr(module))  # compiled code has no source: its name must do
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _normal(tree: ast.AST) -> str:
    tree = ast.parse(ast.unparse(tree))  # a copy without comments, layout and line numbers
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[:] = body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _reachable(tree: ast.Module, name: str) -> str:
    defined = {key: node for node in tree.body for key in _names(node)}
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        key = waiting.pop()
        if key in found or key not in defined:
            continue
        found[key] = _normal(defined[key])
        waiting += [node.id for node in ast.walk(defined[key]) if isinstance(node, ast.Name)]
    return digest(found)


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):  # also A, B = 1, 2
        parts = [part for target in node.targets for part in ast.walk(target)]
        return [part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []
