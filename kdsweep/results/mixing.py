"""Refuse sweeps whose runs differ in what determines results, beyond the keys that they vary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.config.decisions import decides, kind
from kdsweep.config.grid import is_under
from kdsweep.core.errors import InputError
from kdsweep.results.stats import PLACE

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

REMEDY = "add sweep_name=NAME to the command whose results belong in one table; finished cells are not run again"
# Defaults of keys that earlier versions did not record.
ADDED = {"kd.lambda": "None", "teacher.monitor": "loss", "teacher.epochs": "None"}


def known_values(runs: pd.DataFrame, key: str) -> list[str]:
    """Return the sorted distinct known values of a column."""
    return sorted(set(runs[key]) - {""})  # a run that never started has no known value


def refuse_mixing(sweep: Sweep) -> None:
    """Refuse a sweep without runs, or whose runs differ in what determines results and is not varied.

    Raises:
        InputError: naming keys, values and cells.
    """
    if sweep.runs.empty:
        raise InputError(f"sweep {sweep.name} has no runs: start with `python -m kdsweep -m +experiment=table4`")
    for key in ("profile", "data", "results_version"):
        values = [f"{key}={value}" for value in known_values(sweep.runs, key)]
        if len(values) > 1:
            raise InputError(f"sweep {sweep.name} mixes {' and '.join(values)}: {REMEDY}")
    protocols = known_values(sweep.runs, "split_protocol")
    if len(protocols) > 1 and not any(key.startswith("split.") for key in sweep.varied):
        raise InputError(f"sweep {sweep.name} mixes splits ({' and '.join(protocols)}): {REMEDY}")
    if not sweep.varied:  # else each value's runs are checked as a part of their own
        _refuse_two(sweep.runs, "data_digest", what=f"sweep {sweep.name} mixes different images of one name")
        for notation, runs in sweep.runs.groupby("notation"):  # a user's loss is in its own cells alone
            _refuse_two(runs, "user_code", what=f"sweep {sweep.name} mixes two states of your own code in {notation}")
    mixed = _mixed_params(sweep.runs, besides=sweep.varied + sweep.tuned)
    if mixed:
        raise InputError(f"sweep {sweep.name} mixes {', '.join(mixed[:3])}: {REMEDY}")


def _refuse_two(runs: pd.DataFrame, digest: str, *, what: str) -> None:
    known = runs[runs[digest] != ""].sort_values(["notation", *PLACE]).drop_duplicates(digest)
    if len(known) > 1:
        roots = [params.get("data.root") for params in known["params"]]
        where = [
            f"{value[:8]} ({notation} split {split}{f', data.root={root}' if root and digest == 'data_digest' else ''})"
            for value, notation, split, root in zip(
                known[digest], known["notation"], known["split"], roots, strict=True
            )
        ]
        raise InputError(f"{what}: digests {' and '.join(where[:2])}: {REMEDY}")


def _mixed_params(runs: pd.DataFrame, *, besides: tuple[str, ...]) -> list[str]:
    """List params that should have one value, such as ``KEY=1 (L_MSE split 0) and KEY=2 (Student split 0)``.

    Teachers are left out: their params are those of the cell that first trained them.
    """
    known = runs[(runs["role"] != "teacher") & runs["params"].map(bool)]  # no params: the run never started
    known = known.sort_values(["role", "notation", *PLACE, "fingerprint"], ascending=[False, *[True] * 4])
    rows = list(zip(known["role"], known["params"], known["notation"], known["split"], strict=True))
    mixed = []
    for key in sorted(set().union(*known["params"])):
        if kind(key) != "setting" or is_under(key, besides):
            continue
        first: dict[str, str] = {}
        for role, params, notation, split in rows:
            if decides(key, role=role, params=params):
                first.setdefault(params.get(key, ADDED.get(key, "unset")), f"({notation} split {split})")
        if len(first) > 1:
            mixed.append(" and ".join([f"{key}={value} {where}" for value, where in first.items()][:2]))
    return mixed


def refuse_conflicts(runs: pd.DataFrame, *, sweep: str) -> None:
    """Refuse two different finished runs of one cell.

    Raises:
        InputError: naming the cell and the keys that differ.
    """
    finished = runs[runs["status"] == "FINISHED"].sort_values("fingerprint")
    counts = finished.groupby(["notation", *PLACE])["fingerprint"].nunique()
    for notation, split, seed in counts.index[counts > 1]:
        cell = (finished["notation"] == notation) & (finished["split"] == split) & (finished["seed"] == seed)
        same = finished[cell]
        one, other = same["params"].iloc[0], same["params"].iloc[1]
        keys = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
        role = same["role"].iloc[0]
        keys = [key for key in keys if kind(key) != "local" and decides(key, role=role, params=one)]
        shown = ", ".join(f"{key}={one.get(key, 'unset')} and {other.get(key, 'unset')}" for key in keys[:3])
        shown = shown or "equal options, so the code, the data or a weights file changed"
        raise InputError(
            f"sweep {sweep} has two different finished runs of {notation} split {split} seed {seed} ({shown}): {REMEDY}"
        )
