"""The scores of a sweep, arranged: runs by split and seed, tested images, gaps, settings; refuses mixed options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec

import pandas as pd

from kdsweep.config.decisions import used_by
from kdsweep.config.grid import variant_label
from kdsweep.core.errors import InputError
from kdsweep.data import run_data
from kdsweep.results.mixing import rank, refuse_conflicts, refuse_mixing
from kdsweep.results.paper import in_order
from kdsweep.results.stats import PLACE

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

P = ParamSpec("P")
KEY_OF_MARGIN, MARGIN_POINTS = "stats.margin_points", 2.0
VALIDATION = "mean_val_dice_percent"  # a column of Table 4
NOT_RUN = "not run"
PAPER_RATIO = 0.20 / 0.64  # test images per training image


@dataclass(frozen=True)
class Scores:
    """The scores of a sweep without further keys, or of one setting of a sweep that varies some."""

    sweep: Sweep  # the runs and scores as recorded
    runs: pd.DataFrame  # as ``placed_runs`` returns them
    images: pd.DataFrame  # a row per finished run and test image, as ``scored_images`` returns them

    @classmethod
    def of(cls, sweep: Sweep) -> Scores:
        """Arrange a sweep.

        Raises:
            InputError: the sweep is empty or mixed, or the scores of a run are incomplete.
        """
        runs = placed_runs(sweep)
        return cls(sweep, runs, scored_images(runs=runs, scores=sweep.scores))

    @property
    def notations(self) -> list[str]:
        """The notations of the runs: baselines, the paper's cells, others."""
        return in_order(set(self.runs["notation"]))

    def gaps(self, notations: list[str]) -> dict[str, str]:
        """Return why each notation has no number, or ""."""
        return gaps(runs=self.runs, scored=self.images, notations=notations)

    def complete(self, why: dict[str, str]) -> pd.DataFrame:
        """Return the images of the notations without a gap."""
        return self.images[self.images["notation"].map(why) == ""]

    def of_teachers(self, cells: pd.DataFrame) -> pd.DataFrame:
        """Return the images of the Teachers that these cells learnt from."""
        links = cells[["teacher", *PLACE]].drop_duplicates().rename(columns={"teacher": "fingerprint"})
        return self.images.drop(columns="teacher").merge(links)


# ---- settings ------------------------------------------------------------------------------------------------------


def variants(sweep: Sweep) -> dict[str, Sweep]:
    """Split a sweep by the values of the further keys that it varies, each part with its Students and Teachers.

    Returns:
        By label, such as ``train.lr=0.001``, in the order of the values; one part, labelled "", if it varies none.

    Raises:
        InputError: the sweep is empty, or mixes options that determine results and that it does not vary.
    """
    refuse_mixing(sweep)
    is_teacher = sweep.runs["role"] == "teacher"
    cells, teachers = sweep.runs[~is_teacher], sweep.runs[is_teacher]
    keys = list(dict.fromkeys(key for variant in sweep.runs["variant"] for key in variant))
    settings = [_setting(keys, *run) for run in zip(cells["role"], cells["variant"], cells["params"], strict=True)]
    different = {variant_label(setting): setting for setting in settings}
    complete = {  # the Student alone may use a part of the keys; it serves all settings that contain this part
        label: setting
        for label, setting in different.items()
        if not any(setting.items() < other.items() for other in different.values())
    }
    if len(complete) < 2:
        return {"": replace(sweep, varied=()) if sweep.varied else sweep}  # the same, whose numbers may be there
    parts = {}
    for label, setting in sorted(complete.items(), key=lambda each: [rank(value) for value in each[1].values()]):
        chosen = cells[[each.items() <= setting.items() for each in settings]]
        used = teachers[teachers["fingerprint"].isin(chosen["teacher"])]
        parts[label] = replace(sweep, runs=pd.concat([chosen, used], ignore_index=True), varied=())
    return parts


def _setting(keys: list[str], role: str, variant: dict[str, str], params: dict[str, str]) -> dict[str, str]:
    """Return the values of these keys that decide a cell's result."""
    values = params | variant
    return used_by(role, {key: values[key] for key in keys if key in values}, params)


def each_variant(make: Callable[Concatenate[Scores, P], pd.DataFrame]) -> Callable[Concatenate[Sweep, P], pd.DataFrame]:
    """Let a function that makes a table of scores make one of a sweep: its variants one after the other.

    With several variants ``settings`` is the first column, and rows that no variant requested are left out. It raises
    InputError if the sweep is empty or mixed, or the scores of a run are incomplete.
    """

    @wraps(make)
    def numbers(sweep: Sweep, *args: P.args, **kwargs: P.kwargs) -> pd.DataFrame:
        tables = {label: make(Scores.of(part), *args, **kwargs) for label, part in variants(sweep).items()}
        if len(tables) == 1:
            return tables[""]
        stacked = pd.concat(tables, names=["settings"]).reset_index("settings").reset_index(drop=True)
        if "notation" in stacked:
            requested = stacked.loc[stacked["gap"] != NOT_RUN, "notation"]
            stacked = stacked[stacked["notation"].isin(requested)].reset_index(drop=True)
        return stacked

    return numbers


def class_names(sweep: Sweep) -> tuple[str, ...]:
    """Return the names of a sweep's classes; empty for one class."""
    return next((names for params in sweep.runs["params"] if (names := run_data.class_names(params))), ())


def of_seeds(sweep: Sweep, seeds: Sequence[int] | None) -> Sweep:
    """Return the part of a sweep with cells of these seeds and the Teachers that they learn from; all of it for None.

    Raises:
        InputError: the sweep has no such seed.
    """
    if seeds is None:
        return sweep
    runs = sweep.runs
    has_seed = (runs["role"] != "teacher") | ~runs["fingerprint"].isin(runs["teacher"])  # else that of its cells
    existing = sorted(set(runs.loc[has_seed, "seed"]))
    if missing := [seed for seed in seeds if seed not in existing]:
        raise InputError(f"--seeds {missing[0]}: not in sweep {sweep.name}; it has {', '.join(map(str, existing))}")
    kept = has_seed & runs["seed"].isin(seeds)
    runs = runs[kept | runs["fingerprint"].isin(runs.loc[kept, "teacher"])].reset_index(drop=True)
    scores, external = (
        table[table["fingerprint"].isin(runs["fingerprint"])].reset_index(drop=True) if len(table) else table
        for table in (sweep.scores, sweep.external)
    )
    return replace(sweep, runs=runs, scores=scores, external=external)


# ---- runs and images -----------------------------------------------------------------------------------------------


def placed_runs(sweep: Sweep) -> pd.DataFrame:
    """Return the sweep's runs, with each Teacher in every (split, seed) whose cells learn from it.

    Several seeds of the cells may share one Teacher; it then has a row in each of them.

    Raises:
        InputError: the sweep is empty, mixes options that determine results, or holds two results for one cell.
    """
    refuse_mixing(sweep)
    runs = place_teachers(sweep.runs)
    refuse_conflicts(runs, sweep=sweep.name)
    return runs


def place_teachers(runs: pd.DataFrame) -> pd.DataFrame:
    """Return runs with each Teacher in every (split, seed) whose cells learn from it, else in that of its training."""
    is_teacher = runs["role"] == "teacher"
    links = runs[["teacher", *PLACE]].rename(columns={"teacher": "fingerprint"})
    alone = runs.loc[is_teacher & ~runs["fingerprint"].isin(links["fingerprint"]), ["fingerprint", *PLACE]]
    places = pd.concat([links, alone]).drop_duplicates()
    return pd.concat([runs[~is_teacher], runs[is_teacher].drop(columns=PLACE).merge(places)], ignore_index=True)


def scored_images(*, runs: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row per finished run and test image, sorted: the order of the records changes no digit.

    Column group: that of ``split.group``, else the image itself. Column test_to_train: test images for each training
    image in the split; the paper's shares where no run of the split recorded it.
    """
    finished = runs[runs["status"] == "FINISHED"]
    recorded = finished["tags"].map(_test_to_train).astype(float).groupby(finished["split"])
    finished = finished.assign(test_to_train=recorded.transform("max").fillna(PAPER_RATIO))  # all runs are paired by it
    group = scores["group"].fillna(scores["image"]) if "group" in scores else scores["image"]
    scores = scores[["fingerprint", "image", "dice"]].assign(group=group)
    columns = ["fingerprint", "notation", *PLACE, "teacher", "test_to_train"]
    scored = finished[columns].merge(scores)
    broken = scored[scored["dice"].isna() | scored.duplicated(["fingerprint", *PLACE, "image"])]
    if not broken.empty:
        first = broken.iloc[0]
        raise InputError(
            f"{first['notation']} split {first['split']} image {first['image']}: "
            "dice must be one number for each test image; delete this run and run it again"
        )
    return scored.sort_values(["notation", *PLACE, "image"], ignore_index=True)


def _test_to_train(tags: dict[str, str]) -> float:
    train, _, test = map(float, tags.get("kdsweep.split_images", "nan/nan/nan").split("/"))
    return test / train


def gaps(*, runs: pd.DataFrame, scored: pd.DataFrame, notations: list[str]) -> dict[str, str]:
    """Return why each row has no number, or "": it needs every (split, seed) that any run of the sweep requests.

    A mean over fewer splits than its neighbor's would compare different images, so there is none.
    """
    is_empty = (runs["status"] == "FINISHED") & ~runs["fingerprint"].isin(scored["fingerprint"])
    runs = runs.assign(status=runs["status"].mask(is_empty, "no scores").str.lower())
    requested = runs[PLACE].drop_duplicates().sort_values(PLACE).astype(int)
    seeds = " seed " + requested["seed"].astype(str) if requested["seed"].nunique() > 1 else ""
    requested = requested.assign(name=requested["split"].astype(str) + seeds)
    return {name: _gap(runs[runs["notation"] == name], requested=requested) for name in notations}


def _gap(runs: pd.DataFrame, *, requested: pd.DataFrame) -> str:
    if runs.empty:
        return NOT_RUN
    absent = "not trained" if (runs["role"] == "teacher").all() else "not requested"
    states = requested.merge(runs[[*PLACE, "status"]].drop_duplicates(), how="left").fillna({"status": absent})
    by_state = states[states["status"] != "finished"].groupby("status")["name"]
    return "; ".join(f"{state}: split {', '.join(names)}" for state, names in by_state)


def margin_of(sweep: Sweep) -> float:
    """Return ``stats.margin_points`` of the run begun last; the default for runs that recorded none."""
    recorded = [params for params in sweep.runs.sort_values("started_ms")["params"] if KEY_OF_MARGIN in params]
    return float(recorded[-1][KEY_OF_MARGIN]) if recorded else MARGIN_POINTS
