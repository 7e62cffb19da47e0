"""The runs of a sweep, checked for mixed options and placed by split and seed; their scores and gaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.config.decisions import decides, kind, used_by
from kdsweep.config.grid import is_under, variant_label
from kdsweep.core.errors import InputError
from kdsweep.results.stats import PLACE

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

KEY_OF_MARGIN, MARGIN_POINTS = "stats.margin_points", 2.0
VALIDATION = "mean_val_dice_percent"  # a column of Table 4
# What runs from before these keys were there did, which is their default.
ADDED = {"kd.lambda": "None", "teacher.monitor": "loss", "teacher.epochs": "None"}
NOT_RUN = "not run"
REMEDY = "add sweep_name=NAME to the command whose results belong in one table; finished cells are not run again"


def variants(sweep: Sweep) -> dict[str, Sweep]:
    """Split a sweep by the values of the further keys that it varies, each part with its Students and Teachers.

    Returns:
        By label, such as ``train.lr=0.001``, in the order of the values; one part, labelled "", if it varies none.

    Raises:
        InputError: the sweep is empty, or mixes options that determine results and that it does not vary.
    """
    _refuse_mixing(sweep)
    runs = sweep.runs.assign(variant=pd.Series(_variants(sweep), index=sweep.runs.index, dtype=object))
    is_teacher = runs["role"] == "teacher"
    found = {variant_label(variant): variant for variant in runs.loc[~is_teacher, "variant"]}
    whole = {
        label: variant
        for label, variant in found.items()
        if not any(variant.items() < other.items() for other in found.values())
    }
    parts = {}
    for label in sorted(whole, key=lambda label: [_rank(value) for value in whole[label].values()]):
        serves = runs["variant"].map(partial(_is_part, whole=whole[label])).astype(bool)
        here = runs[~is_teacher & serves]
        teachers = runs[is_teacher & runs["fingerprint"].isin(here["teacher"])]
        parts[label] = replace(sweep, runs=pd.concat([here, teachers], ignore_index=True), varied=())
    return parts if len(parts) > 1 else {"": replace(sweep, varied=())}


def each_variant(sweep: Sweep, make: Callable[[Sweep], pd.DataFrame]) -> pd.DataFrame:
    """Make a table of each variant and stack them, with a first column ``settings`` if there are several.

    With several, rows that no variant asked for are left out.
    """
    parts = variants(sweep)
    if len(parts) == 1:
        return make(*parts.values())
    tables = [make(part) for part in parts.values()]
    for label, table in zip(parts, tables, strict=True):
        table.insert(0, "settings", label)
    whole = pd.concat(tables, ignore_index=True)
    if "notation" in whole:
        asked = whole.loc[whole["gap"] != NOT_RUN, "notation"]
        whole = whole[whole["notation"].isin(asked)].reset_index(drop=True)
    return whole


def _variants(sweep: Sweep) -> list[dict[str, str]]:
    """Return the variant of each run; a run that was asked for alone gets the values of its params."""
    keys = list(dict.fromkeys(key for variant in sweep.runs["variant"] for key in variant))
    found = []
    for given, params, role in zip(sweep.runs["variant"], sweep.runs["params"], sweep.runs["role"], strict=True):
        known = params | given
        found.append(
            used_by(role, {key: known[key] for key in keys if key in known}, params) if role != "teacher" else {}
        )
    return found


def _is_part(variant: dict[str, str], *, whole: dict[str, str]) -> bool:
    return variant.items() <= whole.items()


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


def known_values(runs: pd.DataFrame, key: str) -> list[str]:
    """Return the sorted distinct known values of a column."""
    return sorted(set(runs[key]) - {""})  # a run that never started has no known value


def margin_of(sweep: Sweep) -> float:
    """Return ``stats.margin_points`` of the run begun last; the default for runs that recorded none."""
    known = sweep.runs[sweep.runs["params"].map(lambda params: KEY_OF_MARGIN in params).astype(bool)]
    return float(known.sort_values("started_ms")["params"].iloc[-1][KEY_OF_MARGIN]) if len(known) else MARGIN_POINTS


def _refuse_mixing(sweep: Sweep) -> None:
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


def _refuse_conflicts(runs: pd.DataFrame, *, sweep: str) -> None:
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
