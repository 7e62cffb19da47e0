"""The scores of a sweep, arranged: runs by split and seed, tested images, gaps, settings; refuses mixed options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.config.decisions import used_by
from kdsweep.config.grid import variant_label
from kdsweep.core.errors import InputError
from kdsweep.results.mixing import refuse_conflicts, refuse_mixing
from kdsweep.results.paper import in_order
from kdsweep.results.stats import PLACE

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

KEY_OF_MARGIN, MARGIN_POINTS = "stats.margin_points", 2.0
VALIDATION = "mean_val_dice_percent"  # a column of Table 4
NOT_RUN = "not run"


@dataclass(frozen=True)
class Scores:
    """The scores of a sweep without further keys, or of one setting of a sweep that varies some.

    Attributes:
        sweep: the runs and scores as recorded.
        runs: as ``placed_runs`` returns them.
        images: a row per finished run and test image, as ``scored_images`` returns them.
    """

    sweep: Sweep
    runs: pd.DataFrame
    images: pd.DataFrame

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


def variants(sweep: Sweep) -> dict[str, Sweep]:
    """Split a sweep by the values of the further keys that it varies, each part with its Students and Teachers.

    Returns:
        By label, such as ``train.lr=0.001``, in the order of the values; one part, labelled "", if it varies none.

    Raises:
        InputError: the sweep is empty, or mixes options that determine results and that it does not vary.
    """
    refuse_mixing(sweep)
    runs = sweep.runs.assign(variant=pd.Series(_variants(sweep), index=sweep.runs.index, dtype=object))
    is_teacher = runs["role"] == "teacher"
    by_label = {variant_label(variant): variant for variant in runs.loc[~is_teacher, "variant"]}
    complete = {  # the Student alone may use a part of the keys; it serves all settings that contain this part
        label: variant
        for label, variant in by_label.items()
        if not any(variant.items() < other.items() for other in by_label.values())
    }
    parts = {}
    for label in sorted(complete, key=lambda label: [_rank(value) for value in complete[label].values()]):
        setting = complete[label].items()
        serves = pd.Series([variant.items() <= setting for variant in runs["variant"]], index=runs.index, dtype=bool)
        cells = runs[~is_teacher & serves]
        teachers = runs[is_teacher & runs["fingerprint"].isin(cells["teacher"])]
        parts[label] = replace(sweep, runs=pd.concat([cells, teachers], ignore_index=True), varied=())
    return parts if len(parts) > 1 else {"": replace(sweep, varied=())}


def each_variant(sweep: Sweep, make: Callable[[Scores], pd.DataFrame]) -> pd.DataFrame:
    """Make a table of each variant and stack them, with a first column ``settings`` if there are several.

    With several, rows that no variant requested are left out.
    """
    parts = variants(sweep)
    tables = [make(Scores.of(part)) for part in parts.values()]
    if len(tables) == 1:
        return tables[0]
    for label, table in zip(parts, tables, strict=True):
        table.insert(0, "settings", label)
    stacked = pd.concat(tables, ignore_index=True)
    if "notation" in stacked:
        requested = stacked.loc[stacked["gap"] != NOT_RUN, "notation"]
        stacked = stacked[stacked["notation"].isin(requested)].reset_index(drop=True)
    return stacked


def _variants(sweep: Sweep) -> list[dict[str, str]]:
    keys = dict.fromkeys(key for variant in sweep.runs["variant"] for key in variant)
    found: list[dict[str, str]] = []
    for variant, params, role in zip(sweep.runs["variant"], sweep.runs["params"], sweep.runs["role"], strict=True):
        values = params | variant
        values = {key: values[key] for key in keys if key in values}
        found.append({} if role == "teacher" else used_by(role, values, params))
    return found


def _rank(value: str) -> tuple[bool, float, str]:
    """Return a sort key that puts numbers, by size, before words."""
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def of_seeds(sweep: Sweep, seeds: Sequence[int] | None) -> Sweep:
    """Return the part of a sweep with cells of these seeds and the Teachers that they learn from; all of it for None.

    Raises:
        InputError: the sweep has no such seed.
    """
    if seeds is None:
        return sweep
    runs = sweep.runs
    by_own_seed = (runs["role"] != "teacher") | ~runs["fingerprint"].isin(runs["teacher"])
    there = sorted(set(runs.loc[by_own_seed, "seed"]))
    if unknown := [seed for seed in seeds if seed not in there]:
        raise InputError(f"--seeds {unknown[0]}: not in sweep {sweep.name}; it has {', '.join(map(str, there))}")
    kept = by_own_seed & runs["seed"].isin(seeds)
    runs = runs[kept | runs["fingerprint"].isin(runs.loc[kept, "teacher"])].reset_index(drop=True)
    scores, external = (
        table[table["fingerprint"].isin(runs["fingerprint"])].reset_index(drop=True) if len(table) else table
        for table in (sweep.scores, sweep.external)
    )
    return replace(sweep, runs=runs, scores=scores, external=external)


def placed_runs(sweep: Sweep) -> pd.DataFrame:
    """Return the sweep's runs, with each Teacher in every (split, seed) whose cells learn from it.

    Several seeds of the cells may share one Teacher; it then has a row in each of them.

    Raises:
        InputError: the sweep is empty, mixes options that determine results, or holds two results for one cell.
    """
    refuse_mixing(sweep)
    is_teacher = sweep.runs["role"] == "teacher"
    teachers = sweep.runs[is_teacher]
    links = sweep.runs[["teacher", *PLACE]].rename(columns={"teacher": "fingerprint"})
    alone = teachers.loc[~teachers["fingerprint"].isin(links["fingerprint"]), ["fingerprint", *PLACE]]
    places = pd.concat([links, alone]).drop_duplicates()
    runs = pd.concat([sweep.runs[~is_teacher], teachers.drop(columns=PLACE).merge(places)], ignore_index=True)
    refuse_conflicts(runs, sweep=sweep.name)
    return runs


def scored_images(*, runs: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row per finished run and test image, sorted: the order of the records changes no digit.

    Column group: that of ``split.group``, else the image itself. Column test_to_train: test images for each training
    image in the split; the paper's shares where no run of the split recorded it.
    """
    finished = runs[runs["status"] == "FINISHED"]
    known = pd.Series([_test_to_train(tags) for tags in finished["tags"]], index=finished.index, dtype=float)
    ratio = known.groupby(finished["split"]).transform("max").fillna(0.20 / 0.64)
    finished = finished.assign(test_to_train=ratio)  # one for all runs of a split: they are paired by it
    groups = scores["group"].fillna(scores["image"]) if "group" in scores else scores["image"]
    scores = scores.assign(group=groups)
    columns = ["fingerprint", "notation", *PLACE, "teacher", "test_to_train"]
    scored = finished[columns].merge(scores[["fingerprint", "image", "group", "dice"]])
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


def margin_of(sweep: Sweep) -> float:
    """Return ``stats.margin_points`` of the run begun last; the default for runs that recorded none."""
    known = sweep.runs[sweep.runs["params"].map(lambda params: KEY_OF_MARGIN in params).astype(bool)]
    return float(known.sort_values("started_ms")["params"].iloc[-1][KEY_OF_MARGIN]) if len(known) else MARGIN_POINTS


def gaps(*, runs: pd.DataFrame, scored: pd.DataFrame, notations: list[str]) -> dict[str, str]:
    """Return why each row has no number, or "": it needs every (split, seed) that any run of the sweep asked for.

    A mean over fewer splits than its neighbor's would compare different images, so there is none.
    """
    asked = sorted(set(zip(runs["split"], runs["seed"], strict=True)))
    empty = (runs["status"] == "FINISHED") & ~runs["fingerprint"].isin(scored["fingerprint"])
    runs = runs.assign(status=runs["status"].mask(empty, "no scores"))
    return {name: _gap(runs[runs["notation"] == name], asked=asked) for name in notations}


def _gap(runs: pd.DataFrame, *, asked: list[tuple[int, int]]) -> str:
    if runs.empty:
        return NOT_RUN
    states: dict[tuple[int, int], set[str]] = {}
    for split, seed, status in zip(runs["split"], runs["seed"], runs["status"], strict=True):
        states.setdefault((split, seed), set()).add(status)
    places: dict[str, list[str]] = {}
    unasked = "not trained" if (runs["role"] == "teacher").all() else "not asked"
    several_seeds = len({seed for _, seed in asked}) > 1
    for split, seed in asked:
        for status in sorted(states.get((split, seed), {unasked}) - {"FINISHED"}):
            places.setdefault(status.lower(), []).append(f"{split} seed {seed}" if several_seeds else f"{split}")
    return "; ".join(f"{status}: split {', '.join(where)}" for status, where in sorted(places.items()))
