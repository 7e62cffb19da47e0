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
from kdsweep.results.formats import DASH, ONE_SEED, number, on_methods, or_gap, points
from kdsweep.results.frame import Scores
from kdsweep.results.stats import NAN, adjusted, compare, pair, unknown
from kdsweep.results.table import MODEL, Column, Options, Table, brief, differences
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
    below = [*notes.provenance(tuning.chosen), *own_notes(tuning=tuning, table=frame, test=options.test)]
    return Table(HEADING, frame.assign(test=options.test), columns(frame), sentences(frame), below)


def columns(frame: pd.DataFrame) -> list[Column]:
    """Return the columns."""
    equal = duration(frame["equal_seconds"].iloc[0])
    return [
        MODEL,
        Column("configured_dice_percent", "DSC % as configured", number, narrow=True),
        Column("chosen_dice_percent", "DSC % tuned", number, narrow=True),
        *brief("", "points (95 % interval)"),
        Column(("difference_points", "gap"), "Difference, points", or_gap(points)),
        *differences(),
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
        raise InputError(f"{error}; the same command goes on with the tuning") from error
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
    sides = {"configured": Scores.of(tuning.configured), "chosen": Scores.of(tuning.chosen)}
    names = sides["configured"].notations
    why = {name: scores.gaps(names) for name, scores in sides.items()}
    progress = best_by_seconds(tuning.trials)
    equal_s = equal_seconds(progress)
    rows = []
    for notation in names:
        before, after = (scores.images[scores.images["notation"] == notation] for scores in sides.values())
        gap = why["configured"][notation] or why["chosen"][notation]
        row: dict[str, object] = {"notation": notation}
        for name, part in (("configured", before), ("chosen", after)):
            row[f"{name}_dice_percent"] = NAN if gap else 100 * part.groupby(["split", "image"])["dice"].mean().mean()
        if gap:
            measured = unknown(gap=gap)
        elif set(before["fingerprint"]) == set(after["fingerprint"]):  # the same networks: there is nothing to test
            measured = unknown(gap="") | {"difference_points": 0.0, "n_images": before["image"].nunique()}
        else:
            measured = {"gap": ""} | compare(pair(ours=after, baseline=before), test=test)
        own = tuning.trials[tuning.trials["notation"] == notation]
        reached = progress[progress["notation"] == notation]
        rows.append({**row, **measured, **_tried(own), **_at(reached, seconds=equal_s)})
    table = adjusted(pd.DataFrame(rows), family=pd.Series("methods", index=range(len(rows))))
    return table.assign(equal_seconds=equal_s).astype({"n_images": "Int64", "trials": "Int64"})


def _tried(trials: pd.DataFrame) -> dict[str, object]:
    """Return what a row of the table says of its method's trials."""
    if trials.empty:
        return {"chosen": "", "trials": pd.NA, "pruned": NAN, "failed": NAN, "seconds": NAN, "val_dice_percent": NAN}
    best = trials[trials["is_chosen"]].sort_values("split")
    settings = [
        f"split {split}: {'as configured' if number == 0 else variant_label(_rounded(params))}"
        for split, number, params in zip(best["split"], best["number"], best["params"], strict=True)
    ]
    seconds = trials["seconds"].map(sum).groupby(trials["split"]).sum()
    return {
        "chosen": "; ".join(settings),
        "trials": len(trials),
        "pruned": (trials["state"] == "PRUNED").mean(),
        "failed": (trials["state"] == "FAIL").mean(),
        "seconds": seconds.mean(),
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

    The trials of a round advance side by side, epoch by epoch; their seconds add up, each with its Teacher's forwards
    as if it had been alone, so that the count does not depend on which others shared them.

    Returns:
        A row per method, split, round and epoch: notation, split, seconds (so far), best_dice (so far, a fraction).
    """
    rows = []
    for (notation, split), own in trials.groupby(["notation", "split"]):
        spent_s, best = 0.0, 0.0
        for _, part in own.groupby("round"):
            for epoch in range(part["dice"].map(len).max()):
                here = part[part["dice"].map(len) > epoch]
                spent_s += sum(seconds[epoch] for seconds in here["seconds"])
                best = max([best, *(dice[epoch] for dice in here["dice"])])
                rows.append({"notation": notation, "split": split, "seconds": spent_s, "best_dice": best})
    return pd.DataFrame(rows, columns=["notation", "split", "seconds", "best_dice"])


def equal_seconds(progress: pd.DataFrame) -> float:
    """Return the seconds in which all methods have ended on some split: those of the cheapest one."""
    return float(progress.groupby(["notation", "split"])["seconds"].max().min()) if len(progress) else NAN


def sentences(table: pd.DataFrame) -> list[str]:
    """Return what the table supports: of each method whether tuning is shown to change it, and the order at the end."""
    known = table[table["p_methods_holm"].notna()]
    told = [on_methods(row, f"{row['notation']} tuned") for _, row in known.iterrows()]
    told = told or [f"Whether tuning changes a method beyond these networks: {ONE_SEED}."]
    known = table.dropna(subset="equal_dice_percent")
    if known.empty:
        return told
    first = known.sort_values("equal_dice_percent", ascending=False).iloc[0]
    seconds = duration(first["equal_seconds"])
    best = f"{first['notation']} has the best validation Dice ({first['equal_dice_percent']:.2f} %)"
    return [*told, f"With {seconds} of training for the trials of each method on a split, {best}; this is no test."]


def own_notes(*, tuning: Tuning, table: pd.DataFrame, test: str) -> list[str]:
    """Return the footnotes of the table."""
    trials = tuning.trials
    counts = trials.groupby(["notation", "split"]).size()
    each = f"{counts.min()}" if counts.nunique() == 1 else f"{counts.min()} to {counts.max()}"
    failed = int((trials["state"] == "FAIL").sum())
    same = bool((table["p"].isna() & (table["difference_points"] == 0)).any())
    return [
        f"{each} trials of each method on each split, chosen by validation Dice alone; the chosen settings were then "
        "trained with each seed and tested once. As configured: the same, without a choice.",
        "Distilled Students as configured learn from the Teacher as configured, tuned ones from the tuned Teacher.",
        "Training: seconds of all trials of a split, each with its Teacher's forwards as if it had been alone.",
        *([f"{failed} trials failed and count as trials."] if failed else []),
        *(["A difference of 0 without p: the settings as configured were chosen, the networks are the same."] * same),
        *notes.differences(table, test=test, families="over all methods with other settings"),
    ]
