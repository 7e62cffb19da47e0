"""The grid: a cell, its name in the paper, and the fingerprint of everything that determines its result.

Pure Python, no torch: names and fingerprints must be cheap.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kdsweep.core.files import below

PACKAGE = "kdsweep"

# Raise it by one whenever equal settings, data and seeds give other weights or scores than before: another
# augmentation, loss, initialization, order of training images, optimizer, metric, or a new default that no setting
# names. Every finished cell is computed again then. tests/test_golden.py notices such a change and is recorded anew
# with it. What only moves, renames, logs, speeds up or reports does not raise it.
RESULTS_VERSION = 1

# Keys of the configuration, each with all below it. FACTORS: those of the grid. LOCAL: what decides no result.
# SOURCES: where the images and the weights come from; their content counts (weights stands in student.weights and
# teacher.weights).
FACTORS = ("cell", "method", "path", "loss", "teacher_aug", "split", "seed", "teacher.seed")
LOCAL = ("device", "retry_failed", "stats", "store", "sweep_name", "tracking", "train.workers")
SOURCES = ("data.root", "data.source.root", "data.source.cache_dir", "weights")
UNSET = ("None", "null", "")  # a key without a value, as values and as MLflow keep it
NEUTRAL = (*LOCAL, *SOURCES)
NAMES = (
    "method",
    "path",
    "loss",
    "teacher_aug",
    "split",
    "split.index",
    "split.fold",
    "seed",
)  # factors by which a cell is named


@dataclass(frozen=True)
class Cell:
    """One training with its result: one Hydra job, one MLflow run, one folder. Teachers are cells of role ``teacher``.

    Attributes:
        role: ``distilled``, ``baseline`` (the Student alone) or ``teacher``.
        notation: the paper's name, such as ``HReg_KLD_WAug``, ``Student``, ``Teacher_WAug``.
        split: number of the split in its protocol: its index, or its fold.
        seed: of initialization, shuffling and views.
        settings: what the user chose and the result depends on, as plain nested values.
        evidence: what lies outside the configuration: results version; digests of data, weights files, the Teacher, the
            user's own code.
        store: folder that holds all runs.
        sources: what the user typed for that: folders and files by key, the Teacher's seed.
        variant: values of the further keys that the sweep varies, as far as they tell this cell from others.
        teacher: of a distilled Student.
    """

    role: str
    notation: str
    split: int
    seed: int
    settings: dict[str, Any]
    evidence: dict[str, str]
    store: Path = field(compare=False)
    sources: dict[str, str] = field(default_factory=dict, compare=False)
    variant: dict[str, str] = field(default_factory=dict, compare=False)
    teacher: Cell | None = field(default=None, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint: equal ones mean the same result, so it is computed once."""
        return digest([self.role, self.notation, self.split, self.seed, self.settings, self.evidence])

    @property
    def run_name(self) -> str:
        """Return the name of the MLflow run, such as ``HReg_KLD_WAug/split0``."""
        return f"{self.notation}/split{self.split}"

    @property
    def title(self) -> str:
        """Return its name in messages, such as ``HReg_KLD_WAug split 0 seed 0``, with its variant in brackets."""
        name = f"{self.notation} split {self.split} seed {self.seed}"
        return f"{name} ({variant_label(self.variant)})" if self.variant else name

    @property
    def key(self) -> str:
        """Return its key within a sweep: its name, and a digest of all that the user chose.

        A later computation with the same key (an image was replaced) replaces it in the sweep.
        """
        return f"{self.notation}/split{self.split}/seed{self.seed}/{digest([self.settings, self.sources])[:8]}"

    @cached_property
    def folder(self) -> Path:
        """Return the folder of its files, named by its fingerprint, so that the same command finds them again."""
        return run_folder(self.store, vars(self) | {"fingerprint": self.fingerprint})


def run_folder(store: Path, run: Mapping[Any, Any]) -> Path:
    """Return the folder of a cell of which role, notation, split, seed and fingerprint are known."""
    parent = store / ("teachers" if run["role"] == "teacher" else "cells")
    return below(parent, f"{run['notation']}-split{run['split']}-seed{run['seed']}-{run['fingerprint'][:10]}")


def notation(compared: str, distill_view: str) -> str:
    """Return the paper's name of a cell (Table 3): ``HReg_KLD`` + ``_WAug`` for a weakly augmented Teacher."""
    return f"{compared}{weak_suffix(distill_view)}"


def teacher_notation(train_view: str) -> str:
    """Return ``Teacher``, or ``Teacher_WAug`` for one trained on weak views."""
    return f"Teacher{weak_suffix(train_view)}"


def weak_suffix(view: str) -> str:
    """Return ``_WAug`` for the weak view, as the paper writes it."""
    return "_WAug" if view == "weak" else ""


def is_under(key: str, names: tuple[str, ...]) -> bool:
    """Return whether a dotted key is one of these, or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def variant_label(variant: dict[str, str]) -> str:
    """Return a variant as text, such as ``train.lr=0.001, kd.weight=0.9``."""
    return ", ".join(f"{key}={value}" for key, value in variant.items())


def unused(role: str, params: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that a run is given and that cannot matter for its result.

    Args:
        role: ``distilled``, ``baseline`` or ``teacher``.
        params: its flat configuration, as values or, as MLflow keeps them, as strings.
    """
    of_others = _of_other_protocols(str(params.get("split.protocol", "")))
    if role == "baseline":
        return (*of_others, "method", "path", "loss", "teacher_aug", "teacher", "kd")
    if role == "teacher":
        # The recipe is that of train where the Teacher has none of its own.
        has_own = [key for key in ("supervised", "schedule") if str(params.get(f"teacher.{key}")) not in UNSET]
        of_student = ("method", "path", "loss", "teacher_aug", "student", "kd", "train.lr", "train.monitor", "seed")
        return (*of_others, *of_student, *(f"train.{key}" for key in has_own))
    idle = list(of_others)
    if params.get("teacher_aug.distill_view") == "strong":  # nothing to align
        idle.append("kd.align")
    if params.get("kd.weight") != "matched":
        idle.append("kd.ratio")
    if params.get("method.name", "none") != "none":
        return (*idle, "path", "loss", "kd.temperature")
    idle += [f"loss.{other}" for other in ("logits", "hidden") if other != params.get("path.representation")]
    loss = f"loss.{params.get('path.representation')}"
    own = str(params.get(f"{loss}._target_", "")).startswith(f"{PACKAGE}.")
    if own and f"{loss}.temperature" not in params:
        idle.append("kd.temperature")
    return tuple(idle)


def _of_other_protocols(protocol: str) -> tuple[str, ...]:
    """Return the keys of a split that its protocol does not have (conf/split/)."""
    own = {"paper": "index", "holdout": "index group", "kfold": "folds fold group"}.get(protocol)
    names = ("index", "folds", "fold", "file", "group", "allow_leakage")
    return tuple(f"split.{name}" for name in names if own is not None and name not in own.split())


def used_by(role: str, variant: dict[str, str], params: Mapping[str, Any]) -> dict[str, str]:
    """Return the part of a variant that matters for a run: a Student without distillation has no ``kd.weight``."""
    idle = unused(role, params)
    return {key: value for key, value in variant.items() if not is_under(key, idle)}


def varied_keys(params: list[dict[str, Any]]) -> list[str]:
    """Return the keys whose values differ between flat configurations, beyond the factors and NEUTRAL."""
    keys = sorted({key for own in params for key in own if not is_under(key, FACTORS + NEUTRAL)})
    return [key for key in keys if len({str(own.get(key)) for own in params}) > 1]


def swept_keys(typed: list[list[str]]) -> list[str]:
    """Return the keys to which several jobs' command lines give different values, beyond NAMES and LOCAL.

    Args:
        typed: the overrides of each job, such as ``["path=L", "train.lr=1e-3"]``.
    """
    jobs = [dict(word.lstrip("+").partition("=")[::2] for word in words) for words in typed]
    keys = dict.fromkeys(key for job in jobs for key in job if key not in NAMES and not is_under(key, LOCAL))
    return [key for key in keys if len({job.get(key) for job in jobs}) > 1]


def digest(value: Any) -> str:
    """Return the SHA-256 of a value made of dicts, lists, strings, numbers and None, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def group_by(keys: list[str]) -> list[list[int]]:
    """Return the positions of equal keys together, in the order in which the keys first appear."""
    groups: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return list(groups.values())


def divide(group: list[int], *, largest: int, likeness: list[str]) -> list[list[int]]:
    """Divide a lockstep group into parts of at most ``largest`` members and nearly equal size.

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
    """Flatten nested dicts into one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def targets(settings: Any) -> list[str]:
    """Return every ``_target_`` in nested settings, sorted: the code that a configuration names."""
    if isinstance(settings, dict):
        own = [settings["_target_"]] if isinstance(settings.get("_target_"), str) else []
        return sorted({*own, *(name for value in settings.values() for name in targets(value))})
    if isinstance(settings, list):
        return sorted({name for value in settings for name in targets(value)})
    return []


def without_places(settings: Any) -> Any:
    """Return nested settings in which a ``_target_`` of this package is its last word alone.

    A class that moves to another module is the same class: what its results are, RESULTS_VERSION says.
    """
    if isinstance(settings, dict):
        kept = {key: without_places(value) for key, value in settings.items()}
        target = kept.get("_target_")
        if isinstance(target, str) and target.startswith(f"{PACKAGE}."):
            kept["_target_"] = target.rpartition(".")[2]
        return kept
    return [without_places(value) for value in settings] if isinstance(settings, list) else settings
