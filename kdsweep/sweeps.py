"""What a sweep holds: its runs checked for mixing, each in its place, its scores, and its gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.errors import InputError
from kdsweep.stats import PLACE

if TYPE_CHECKING:
    from kdsweep.tracking import Sweep

# Params in which the runs of a sweep may differ, each name with all below it: the factors of the grid, and what decides
# no result (weights stands in student.weights and teacher.weights). UNUSED: what a role is given and does not use.
FACTORS = ("path", "loss", "teacher_aug", "split", "seed", "teacher.seed")
LOCAL = ("device", "retry_failed", "store", "sweep_name", "tracking", "train.workers", "data.root")
NEUTRAL = (*LOCAL, "data.source.root", "data.source.cache_dir", "weights")
UNUSED = {
    "cell": (),
    "student": ("path", "loss", "teacher_aug", "teacher", "kd"),
    "teacher": ("path", "loss", "teacher_aug", "student", "kd", "train.lr", "seed"),
}
REMEDY = "add sweep_name=NAME to the command whose results belong in one table; finished cells are not run again"


def placed_runs(sweep: Sweep) -> pd.DataFrame:
    """The sweep's runs, a Teacher under each (split, seed) whose cells learn from it, not under a seed of its own.

    Several seeds of the cells may share one Teacher; it then stands in each of them.

    Raises:
        InputError: the sweep is empty, mixes options that determine results, or holds two results for one cell.
    """
    _refuse_mixing(sweep)
    is_teacher = sweep.runs["role"] == "teacher"
    teachers = sweep.runs[is_teacher]
    links = sweep.runs[["teacher", *PLACE]].rename(columns={"teacher": "fingerprint"})
    alone = teachers.loc[~teachers["fingerprint"].isin(links["fingerprint"]), ["fingerprint", *PLACE]]
    places = pd.concat([links, alone]).drop_duplicates()
    runs = pd.concat([sweep.runs[~is_teacher], teachers.drop(columns=PLACE).merge(places)], ignore_index=True)
    _refuse_conflicts(runs, sweep=sweep.name)
    return runs


def scored_images(*, runs: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """One row per finished run and test image, sorted, so that the order of the records changes no digit."""
    finished = runs[runs["status"] == "FINISHED"]
    columns = ["fingerprint", "notation", *PLACE, "teacher"]
    scored = finished[columns].merge(scores[["fingerprint", "image", "dice"]])
    broken = scored[scored["dice"].isna() | scored.duplicated(["fingerprint", *PLACE, "image"])]
    if not broken.empty:
        first = broken.iloc[0]
        raise InputError(
            f"{first['notation']} split {first['split']} image {first['image']}: "
            "dice must be one number for each test image; delete this run and run it again"
        )
    return scored.sort_values(["notation", *PLACE, "image"], ignore_index=True)


def known_values(runs: pd.DataFrame, key: str) -> list[str]:
    """The sorted distinct values of a column, as far as they are known."""
    return sorted(set(runs[key]) - {""})  # what a run that never started would have had is not known


def _refuse_mixing(sweep: Sweep) -> None:
    if sweep.runs.empty:
        raise InputError(f"sweep {sweep.name} has no runs: start with `python -m kdsweep -m +experiment=table4`")
    for key in ("profile", "data"):  # each stands for many params
        values = [f"{key}={value}" for value in known_values(sweep.runs, key)]
        if len(values) > 1:
            raise InputError(f"sweep {sweep.name} mixes {' and '.join(values)}: {REMEDY}")
    mixed = _mixed_params(sweep.runs)
    if mixed:
        raise InputError(f"sweep {sweep.name} mixes {', '.join(mixed[:3])}: {REMEDY}")


def _mixed_params(runs: pd.DataFrame) -> list[str]:
    """The params that should have one value and do not, such as ``KEY=1 (L_MSE split 0) and KEY=2 (Student split 0)``.

    Not those of Teachers: theirs are the params of whichever cell first trained them.
    """
    known = runs[(runs["role"] != "teacher") & runs["params"].map(bool)]  # no params: the run never started
    known = known.sort_values(["role", "notation", *PLACE, "fingerprint"])
    mixed = []
    for key in sorted({key for params in known["params"] for key in params if not _under(key, FACTORS + NEUTRAL)}):
        users = known[[not _under(key, UNUSED[role]) for role in known["role"]]]
        first = users.assign(value=[params.get(key, "unset") for params in users["params"]]).drop_duplicates("value")
        if len(first) > 1:
            shown = zip(first["value"], first["notation"], first["split"], strict=True)
            mixed.append(" and ".join([f"{key}={value} ({name} split {split})" for value, name, split in shown][:2]))
    return mixed


def _under(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _refuse_conflicts(runs: pd.DataFrame, *, sweep: str) -> None:
    finished = runs[runs["status"] == "FINISHED"].sort_values("fingerprint")
    for (notation, split, seed), same in finished.groupby(["notation", *PLACE]):
        if same["fingerprint"].nunique() > 1:
            one, other = same["params"].iloc[0], same["params"].iloc[1]
            keys = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
            keys = [key for key in keys if not _under(key, NEUTRAL + UNUSED[same["role"].iloc[0]])]
            shown = ", ".join(f"{key}={one.get(key, 'unset')} and {other.get(key, 'unset')}" for key in keys[:3])
            shown = shown or "equal options, so the code, the data or a weights file changed"
            raise InputError(
                f"sweep {sweep} has two different finished runs of {notation} split {split} seed {seed} "
                f"({shown}): {REMEDY}"
            )


def gaps(*, runs: pd.DataFrame, scored: pd.DataFrame, notations: list[str]) -> dict[str, str]:
    """Why a row has no number, "" where it has one: it needs every (split, seed) that any run of the sweep asked for.

    A mean over fewer splits than its neighbour's would compare different images, so there is none.
    """
    asked = sorted(set(zip(runs["split"], runs["seed"], strict=True)))
    empty = (runs["status"] == "FINISHED") & ~runs["fingerprint"].isin(scored["fingerprint"])
    runs = runs.assign(status=runs["status"].mask(empty, "no scores"))
    return {name: _gap(runs[runs["notation"] == name], asked=asked) for name in notations}


def _gap(runs: pd.DataFrame, *, asked: list[tuple[int, int]]) -> str:
    if runs.empty:
        return "not run"
    places: dict[str, list[str]] = {}
    several_seeds = len({seed for _, seed in asked}) > 1
    for split, seed in asked:
        here = runs.loc[(runs["split"] == split) & (runs["seed"] == seed), "status"]
        for status in sorted(set(here) - {"FINISHED"}) if len(here) else ["not asked"]:
            places.setdefault(status.lower(), []).append(f"{split} seed {seed}" if several_seeds else f"{split}")
    return "; ".join(f"{status}: split {', '.join(where)}" for status, where in sorted(places.items()))
