"""Refuse sweeps whose runs differ in what determines results, beyond the keys that they vary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.config.decisions import decides, default, kind
from kdsweep.config.grid import is_under
from kdsweep.core.errors import InputError
from kdsweep.results.stats import PLACE

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

REMEDY = "add sweep_name=NAME to the command whose results belong in one table; finished cells are not run again"


def distinct_values(runs: pd.DataFrame, key: str) -> list[str]:
    """Return the sorted distinct values of a column; "" is the value of a run that never started."""
    return sorted(set(runs[key]) - {""})


def rank(value: str) -> tuple[bool, float, str]:
    """Return a sort key that puts numbers, by size, before words."""
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def refuse_mixing(sweep: Sweep) -> None:
    """Refuse a sweep without runs, or whose runs differ in what determines results and is not varied.

    Raises:
        InputError: naming keys, values and cells.
    """
    if sweep.runs.empty:
        raise InputError(f"sweep {sweep.name} has no runs: start with `python -m kdsweep -m +experiment=table4`")
    mixes = f"sweep {sweep.name} mixes"
    for key in ("profile", "data", "results_version"):
        _refuse_several([f"{key}={value}" for value in distinct_values(sweep.runs, key)], what=mixes)
    if not any(key.startswith("split.") for key in sweep.varied):
        protocols = distinct_values(sweep.runs, "split_protocol")
        if len(protocols) > 1:
            raise InputError(f"{mixes} splits ({' and '.join(protocols)}): {REMEDY}")
    if not sweep.varied:  # else each value's runs are checked as a part
        _refuse_several(_digests(sweep.runs, "data_digest"), what=f"{mixes} different images of one name: digests")
        for notation, runs in sweep.runs.groupby("notation"):  # a user's loss is in the cells that it names
            what = f"{mixes} two states of your code in {notation}: digests"
            _refuse_several(_digests(runs, "user_code"), what=what)
    if mixed := _mixed_params(sweep.runs, except_for=sweep.varied + sweep.tuned):
        raise InputError(f"{mixes} {', '.join(mixed[:3])}: {REMEDY}")


def _refuse_several(values: list[str], *, what: str) -> None:
    if len(values) > 1:
        raise InputError(f"{what} {' and '.join(values)}: {REMEDY}")


def _digests(runs: pd.DataFrame, key: str) -> list[str]:
    """Return up to two distinct digests of a column, each with the first cell that has it."""
    first = runs[runs[key] != ""].sort_values(["notation", *PLACE]).drop_duplicates(key).head(2)
    roots = [params.get("data.root") if key == "data_digest" else None for params in first["params"]]
    cells = zip(first[key], first["notation"], first["split"], roots, strict=True)
    return [f"{value[:8]} ({name} split {k}{f', data.root={root}' if root else ''})" for value, name, k, root in cells]


def _mixed_params(runs: pd.DataFrame, *, except_for: tuple[str, ...]) -> list[str]:
    """List params that should have one value, such as ``KEY=1 (L_MSE split 0) and KEY=2 (Student split 0)``.

    Teachers are left out: their params are those of the cell that first trained them.
    """
    begun = runs[(runs["role"] != "teacher") & runs["params"].map(bool)]
    begun = begun.sort_values(["role", "notation", *PLACE, "fingerprint"], ascending=[False, *[True] * 4])
    rows = list(zip(begun["role"], begun["params"], begun["notation"], begun["split"], strict=True))
    mixed = []
    for key in sorted(set().union(*begun["params"])):
        if kind(key) != "setting" or is_under(key, except_for):
            continue
        first: dict[str, str] = {}
        for role, params, notation, split in rows:
            if decides(key, role=role, params=params):
                value = params.get(key, default(key))  # of a key that an earlier version did not have
                first.setdefault(value, f"({notation} split {split})")
        if len(first) > 1:
            mixed.append(" and ".join([f"{key}={value} {where}" for value, where in first.items()][:2]))
    return mixed


def refuse_conflicts(runs: pd.DataFrame, *, sweep: str) -> None:
    """Refuse two different finished runs of one cell.

    Raises:
        InputError: naming the cell and the keys that differ.
    """
    finished = runs[runs["status"] == "FINISHED"].sort_values("fingerprint").drop_duplicates(["fingerprint", *PLACE])
    rivals = finished[finished.duplicated(["notation", *PLACE], keep=False)]
    for (notation, split, seed), cell in rivals.groupby(["notation", *PLACE]):
        one, other, *_ = cell["params"]
        keys = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
        role = cell["role"].iloc[0]
        keys = [key for key in keys if kind(key) != "local" and decides(key, role=role, params=one)]
        shown = ", ".join(f"{key}={one.get(key, 'unset')} and {other.get(key, 'unset')}" for key in keys[:3])
        shown = shown or "equal options, so the code, the data or a weights file changed"
        raise InputError(
            f"sweep {sweep} has two different finished runs of {notation} split {split} seed {seed} ({shown}): {REMEDY}"
        )
