"""The grid: a cell, its name in the paper, and the fingerprint of everything that determines its result.

Pure Python, no torch: names and fingerprints must be cheap.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kdsweep.core.files import below

PACKAGE = "kdsweep"

# Raise it by one whenever equal settings, data and seeds give other weights or scores than before: another
# augmentation, loss, initialization, order of training images, optimizer, metric, or a new default that no setting
# names. Every finished cell is computed again then. tests/test_golden.py notices such a change and is recorded again.
RESULTS_VERSION = 2

DISTILLED, BASELINE, TEACHER = "distilled", "baseline", "teacher"
STUDENTS, ROLES = (DISTILLED, BASELINE), (DISTILLED, BASELINE, TEACHER)
Params = Mapping[str, Any]  # a flat configuration: values or, as MLflow keeps them, strings


@dataclass(frozen=True)
class Decides:
    """Metadata of a field of the schema: the cells whose results the key decides, with all keys below it.

    It does so ``by`` its value; the content of what it names; the name of the cell; the place of files whose content
    counts, which is private; or a reference, by other keys, whose values count.
    """

    roles: tuple[str, ...] | None = None  # () for a key of the machine or the command, None for those of the node above
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # only if other keys have these values
    unless: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # not if other keys have these values
    by: str = "value"
    places: tuple[str, ...] = ()  # arguments of a function or class that are by="place"
    factor: bool = False  # of the grid, whose values are compared

    def applies(self, role: str, params: Params) -> bool:
        """Return whether the key decides results of a role under a flat configuration."""

        def hold(values: Mapping[str, tuple[str, ...]]) -> bool:
            return all(str(params.get(key)) in allowed for key, allowed in values.items())

        return role in (self.roles or ()) and hold(self.when) and not (self.unless and hold(self.unless))


@dataclass(frozen=True)
class Cell:
    """One training with its result: one Hydra job, one MLflow run, one folder. Teachers are cells of role ``teacher``.

    ``variant`` has values of further keys that the sweep varies, as far as they distinguish this cell from others.
    """

    role: str  # distilled, baseline (the Student alone) or teacher
    notation: str  # the paper's name, such as HReg_KLD_WAug, Student, Teacher_WAug
    split: int  # number of the split in its protocol: its index, or its fold
    seed: int  # of initialization, shuffling and views
    settings: dict[str, Any]  # the values that decide the result
    input_digests: dict[str, str]  # of data, weights files, the Teacher, the user's code; and the results version
    store: Path = field(compare=False)  # folder of all runs
    sources: dict[str, str] = field(default_factory=dict, compare=False)  # settings that name the inputs
    variant: dict[str, str] = field(default_factory=dict, compare=False)
    teacher: Cell | None = field(default=None, compare=False)  # of a distilled Student
    members: Mapping[str, Cell] = field(default_factory=dict, compare=False)  # Teachers of which it is the mean

    @cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint: equal ones mean the same result, so it is computed once."""
        return digest([self.role, self.notation, self.split, self.seed, self.settings, self.input_digests])

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
        """Return its key within a sweep: a later cell with the same key (an image was replaced) replaces it."""
        return f"{self.notation}/split{self.split}/seed{self.seed}/{digest([self.settings, self.sources])[:8]}"

    @cached_property
    def folder(self) -> Path:
        """Return the folder of its files, named by its fingerprint, so that the same command finds them again."""
        return run_folder(self.store, vars(self) | {"fingerprint": self.fingerprint})


def run_folder(store: Path, run: Mapping[Any, Any]) -> Path:
    """Return the folder of a cell from its role, notation, split, seed and fingerprint."""
    parent = store / ("teachers" if run["role"] == "teacher" else "cells")
    return below(parent, f"{run['notation']}-split{run['split']}-seed{run['seed']}-{run['fingerprint'][:10]}")


def folders_named(store: Path, run: str) -> list[Path]:
    """Return the folders of the cells that a name means, sorted.

    Args:
        store: folder of all runs.
        run: ``NOTATION/splitK``, ``NOTATION/splitK/seedS``, or the name of a folder.
    """
    name = re.fullmatch(r"([^/]+)/split(\d+)(?:/seed(\d+))?", run)
    if name is None and (not run or Path(run).name != run):
        return []
    stem = f"{glob.escape(name[1])}-split{name[2]}-seed{name[3] or '*'}-*" if name else glob.escape(run)
    return sorted(folder for kind in ("cells", "teachers") for folder in (store / kind).glob(stem))


def weights_file(role: str) -> str:
    """Return the name of the file of a finished cell's weights, in its folder."""
    return f"{'teacher' if role == TEACHER else 'student'}.safetensors"


def notation(compared: str, view: str) -> str:
    """Return the paper's name of a cell or Teacher (Table 3): ``HReg_KLD`` + ``_WAug`` for the Teacher's weak view."""
    return f"{compared}_WAug" if view == "weak" else compared


def is_under(key: str, names: tuple[str, ...]) -> bool:
    """Return whether a dotted key is one of these, or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def variant_label(variant: dict[str, str]) -> str:
    """Return a variant as text, such as ``train.lr=0.001, kd.weight=0.9``."""
    return ", ".join(f"{key}={value}" for key, value in variant.items())


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
    """Divide positions into parts of at most ``largest`` and nearly equal size, alike ones (by position) together."""
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
    return sorted(set(re.findall(r'"_target_": "([^"]+)"', json.dumps(settings, ensure_ascii=False))))


def without_modules(settings: Any) -> Any:
    """Return nested settings in which a ``_target_`` of this package is its last word alone.

    A class that moves to another module is the same class: RESULTS_VERSION says whether its results are.
    """
    return json.loads(re.sub(rf'("_target_": "){PACKAGE}\.[^"]*?([^".]+")', r"\1\2", json.dumps(settings)))
