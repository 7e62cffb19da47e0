"""Compare each method as it was configured with what tuning chose; count its trials and their seconds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep.config.grid import variant_label
from kdsweep.core.errors import InputError
from kdsweep.core.progress import duration
from kdsweep.results import notes
from kdsweep.results.formats import DASH, number, on_methods, or_gap, points
from kdsweep.results.frame import Scores
from kdsweep.results.stats import NAN, adjusted, compare, pair
from kdsweep.results.table import MODEL, Column, Options, Table, differences
from kdsweep.store import sweep_file

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

HEADING = "Tuned. Each method as configured and as chosen, with equal budgets"


@dataclass(frozen=True)
class Tuning:
    """A sweep as it was configured, the same with what was chosen, and the trials between them."""

    configured: Sweep
    chosen: Sweep
    trials: pd.DataFrame  # of ``tuning.study.read_trials``


def applies(sweep: Sweep, store: Path) -> bool:
    """Return whether a sweep is one with chosen settings."""
    name = sweep_file.as_configured(store, sweep.name)
    return sweep.name != name and sweep_file.read(store, name).storage is not None


def make(sweep: Sweep, options: Options) -> Table:
    """Make the table."""
    tuning = read(sweep, store=options.store, uri=options.uri)
    frame = numbers(tuning, test=options.test)
    below = [*notes.provenance(tuning.chosen), *footnotes(tuning, frame, test=options.test)]
    return Table(HEADING, frame.assign(test=options.test), columns(frame), sentences(frame), below)


def columns(frame: pd.DataFrame) -> list[Column]:
    """Return the columns."""
    equal = duration(frame["equal_seconds"].iloc[0])
    change = Column(("difference_points", "gap"), "Difference, points", or_gap(points))
    return [
        MODEL,
        Column("configured_dice_percent", "DSC % as configured", number, narrow=True),
        Column("chosen_dice_percent", "DSC % tuned", number, narrow=True),
        *differences(change, brief="points (95 % interval)"),
        Column("chosen", "Chosen", lambda chosen: chosen or DASH),
        Column("trials", "Trials", partial(number, form="d")),
        Column("pruned", "pruned %", lambda share: number(100 * share, ".0f")),
        Column("seconds", "Training", lambda seconds: DASH if pd.isna(seconds) else duration(seconds)),
        Column("val_dice_percent", "validation DSC %", number),
        Column("equal_dice_percent", f"validation DSC % at {equal}", number),
    ]


def read(sweep: Sweep, *, store: Path, uri: str | None) -> Tuning:
    """Read what belongs to a tuned sweep, which is the one as configured or the one with the chosen settings.

    Raises:
        InputError: the sweep was not tuned, or not to its end.
    """
    from kdsweep.tracking.reader import read_sweep
    from kdsweep.tuning.study import read_studies, read_trials

    name = sweep_file.as_configured(store, sweep.name)
    if sweep_file.read(store, name).storage is None:
        raise InputError(f"sweep {name} was not tuned: `python -m kdsweep -m +experiment=tuned`")
    other = name if sweep.name != name else f"{name}{sweep_file.TUNED}"
    try:
        second = read_sweep(store=store, uri=uri, name=other)
    except InputError as error:
        raise InputError(f"{error}; the same command resumes the tuning") from error
    configured, chosen = (second, sweep) if sweep.name != name else (sweep, second)
    return Tuning(configured, chosen, read_trials(read_studies(store, name)))


def numbers(tuning: Tuning, *, test: str = "ttest") -> pd.DataFrame:
    """Return test Dice (%) of each method as configured and as chosen, the paired difference, and its trials.

    Returns:
        A row per method with the columns of ``stats.compare``, Holm's family is all methods for which other settings
        were chosen on some split (a difference of 0 without p for the others); chosen (values by split,
        in words), trials, pruned and failed (shares of them), seconds (of all trials of a split, mean over splits),
        val_dice_percent (of the chosen trial) and equal_dice_percent (best validation Dice of the trials up to
        equal_seconds, when the cheapest method has ended), means over splits.
    """
    configured, chosen = Scores.of(tuning.configured), Scores.of(tuning.chosen)
    names = configured.notations
    gaps, chosen_gaps = configured.gaps(names), chosen.gaps(names)
    progress = best_by_seconds(tuning.trials)
    equal_s = equal_seconds(progress)
    rows = []
    for name in names:
        sides = [scores.images[scores.images["notation"] == name] for scores in (configured, chosen)]
        trials, reached = (table[table["notation"] == name] for table in (tuning.trials, progress))
        compared = _compared(*sides, gap=gaps[name] or chosen_gaps[name], test=test)
        rows.append({"notation": name, **compared, **_tried(trials), **_at(reached, seconds=equal_s)})
    table = pd.DataFrame(rows)
    table = adjusted(table, family=pd.Series("methods", index=table.index))
    return table.assign(equal_seconds=equal_s).astype({"n_images": "Int64", "trials": "Int64"})


def _compared(before: pd.DataFrame, after: pd.DataFrame, *, gap: str, test: str) -> dict[str, object]:
    """Return Dice (%) of both sides and their difference; networks that are the same are not tested."""
    is_same = set(before["fingerprint"]) == set(after["fingerprint"])
    pairs = pd.DataFrame() if gap or is_same else pair(ours=after, baseline=before)
    row = {
        f"{side}_dice_percent": NAN if gap else 100 * images.groupby(["split", "image"])["dice"].mean().mean()
        for side, images in (("configured", before), ("chosen", after))
    }
    compared = row | {"gap": gap} | compare(pairs, test=test)
    if is_same and not gap:
        compared |= {"difference_points": 0.0, "n_images": before["image"].nunique()}
    return compared


def _tried(trials: pd.DataFrame) -> dict[str, object]:
    """Return what a row of the table says of its method's trials."""
    if trials.empty:
        return {"chosen": "", "trials": pd.NA, "pruned": NAN, "failed": NAN, "seconds": NAN, "val_dice_percent": NAN}
    best = trials[trials["is_chosen"]].sort_values("split")
    settings = [
        f"split {split}: {'as configured' if number == 0 else variant_label(_rounded(params))}"
        for split, number, params in zip(best["split"], best["number"], best["params"], strict=True)
    ]
    return {
        "chosen": "; ".join(settings),
        "trials": len(trials),
        "pruned": (trials["state"] == "PRUNED").mean(),
        "failed": (trials["state"] == "FAIL").mean(),
        "seconds": trials["seconds"].map(sum).groupby(trials["split"]).sum().mean(),
        "val_dice_percent": 100 * best["value"].mean(),
    }


def _rounded(params: dict[str, object]) -> dict[str, str]:
    return {key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in sorted(params.items())}


def _at(reached: pd.DataFrame, *, seconds: float) -> dict[str, float]:
    """Return the best validation Dice (%) of a method after so many seconds, the mean over its splits."""
    best = reached[reached["seconds"] <= seconds].groupby("split")["best_dice"].max()
    return {"equal_dice_percent": 100 * best.reindex(reached["split"].unique()).mean(skipna=False)}


def best_by_seconds(trials: pd.DataFrame) -> pd.DataFrame:
    """Return how good a method's trials became as they were trained.

    The trials of a round advance together, epoch by epoch; their seconds add up, each with its Teacher's forwards
    as if it had been alone, so that the count does not depend on which others shared them.

    Returns:
        A row per method, split, round and epoch: notation, split, seconds (so far), best_dice (so far, a fraction).
    """
    place = ["notation", "split"]
    epochs = trials[[*place, "round", "seconds", "dice"]].reset_index(drop=True).explode(["seconds", "dice"]).dropna()
    epochs = epochs.assign(epoch=epochs.groupby(level=0).cumcount()).astype({"seconds": float, "dice": float})
    rows = epochs.groupby([*place, "round", "epoch"], as_index=False).agg({"seconds": "sum", "dice": "max"})
    so_far = rows.groupby(place)
    return rows[place].assign(seconds=so_far["seconds"].cumsum(), best_dice=so_far["dice"].cummax())


def equal_seconds(progress: pd.DataFrame) -> float:
    """Return the seconds in which all methods have ended on some split: those of the cheapest one."""
    return float(progress.groupby(["notation", "split"])["seconds"].max().min()) if len(progress) else NAN


def sentences(table: pd.DataFrame) -> list[str]:
    """Return what the table supports: of each method whether tuning is shown to change it, and the order at the end."""
    tested = table[table["p_methods_holm"].notna()]
    lines = [f"These methods: {on_methods(tested, tested['notation'] + ' tuned')}."]
    for _, first in table.dropna(subset="equal_dice_percent").nlargest(1, "equal_dice_percent").iterrows():
        seconds = duration(first["equal_seconds"])
        best = f"{first['notation']} has the best validation Dice ({first['equal_dice_percent']:.2f} %)"
        each = f"With {seconds} of training for the trials of each method on a split"
        lines.append(f"{each}, {best}; this is not a test.")
    return lines


def footnotes(tuning: Tuning, table: pd.DataFrame, *, test: str) -> list[str]:
    """Return the notes on trials, Teachers, seconds and comparisons."""
    trials = tuning.trials
    counts = trials.groupby(["notation", "split"]).size()
    each = f"{counts.min()}" if counts.nunique() == 1 else f"{counts.min()} to {counts.max()}"
    failed = int((trials["state"] == "FAIL").sum())
    same = bool((table["p"].isna() & (table["difference_points"] == 0)).any())
    return [
        f"Trials: {each} of each method on each split, chosen by validation Dice alone; the chosen settings were then "
        "trained with each seed and tested once. As configured: the same, without a choice.",
        "Distilled Students as configured learn from the Teacher as configured, tuned ones from the tuned Teacher.",
        "Training: seconds of all trials of a split, each with its Teacher's forwards as if it had been alone.",
        *([f"{failed} trials failed and count as trials."] if failed else []),
        *(["A difference of 0 without p: the settings as configured were chosen, the networks are the same."] * same),
        *notes.differences(table, test=test, families="over all methods with other settings"),
    ]
