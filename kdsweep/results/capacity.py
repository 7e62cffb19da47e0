"""Show how good a Student of which size gets, with and without distillation: Dice against parameters and latency.

A sweep over Students (``+experiment=capacity``) has the scores; parameters, MACs and latency are measured, once on a
machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from kdsweep.core.errors import InputError
from kdsweep.evaluation.latency import REPEATS, WARM_UP
from kdsweep.results import costs, formats
from kdsweep.results.frame import VALIDATION, variants

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

COSTS = {"parameters": "parameters", "latency": "cpu_1_thread_median_ms"}  # the two fronts: column of the cost
MEASURED = ["parameters", "macs", "cpu_1_thread_median_ms", "cpu_1_thread_p95_ms"]
OF_SCORES = ["gap", "mean_dice_percent", "std_dice_percent", VALIDATION]
TO_STUDENT = ["difference_points", "low_points", "high_points", "p", "p_holm", "p_methods", "p_methods_holm"]


def capacity(sweep: Sweep, *, scores: pd.DataFrame, store: Path | None = None, repeats: int = REPEATS) -> pd.DataFrame:
    """Return a row per Student and model: its cost, Dice (%), difference to the plain Student of that size (points).

    Args:
        sweep: its runs record their networks.
        scores: Table 4 of the sweep, column settings first.
        store: folder of the runs, which keeps what was measured.
        repeats: timed forward passes of each network.

    Returns:
        Sorted by parameters; columns settings, notation, image_size, parameters, macs, cpu_1_thread_median_ms,
        cpu_1_thread_p95_ms, those of Table 4, and for each of COSTS whether the row is on the Pareto front: no other
        row costs as little or less and has a higher Dice. Teachers have no row.

    Raises:
        InputError: the sweep has one Student only.
    """
    networks = {label: _student(part) for label, part in variants(sweep).items()}
    if len(set(networks.values())) < 2:
        raise InputError(
            f"sweep {sweep.name} has one Student: student=NAME,NAME compares several (+experiment=capacity)"
        )
    rows = []
    for row in scores[~scores["notation"].str.startswith("Teacher")].to_dict("records"):
        network = networks[row["settings"]]
        cost = costs.measure(network, store=store, repeats=repeats)
        own = {name: row[name] for name in OF_SCORES} | {name: row[f"student_{name}"] for name in TO_STUDENT}
        place = {"settings": row["settings"], "notation": row["notation"], "encoder": network.encoder}
        rows.append({**place, "image_size": network.image_size, **{name: cost[name] for name in MEASURED}, **own})
    table = pd.DataFrame(rows).astype({"parameters": "Int64", "macs": "Int64"})
    for name, column in COSTS.items():
        table[f"on_{name}_front"] = on_front(table[column].astype(float), table["mean_dice_percent"])
    return table.sort_values(["parameters", "settings"], kind="stable", ignore_index=True)


def on_front(cost: pd.Series, gain: pd.Series) -> pd.Series:
    """Return which points of a lower cost and higher gain no other one dominates; a point with NaN is on no front."""
    beaten = [
        bool(((cost <= own) & (gain >= best) & ((cost < own) | (gain > best))).any())
        for own, best in zip(cost, gain, strict=True)
    ]
    return ~pd.Series(beaten, index=cost.index) & gain.notna()


def _student(part: Sweep) -> costs.Network:
    found = costs.network_of(part.runs[part.runs["role"] != "teacher"], group="student")
    if found is None:
        raise InputError(f"sweep {part.name}: its runs do not record their Students")
    return found


def format_capacity(table: pd.DataFrame) -> pd.DataFrame:
    """Return the strings of the table."""
    differences = zip(table["difference_points"], table["low_points"], table["high_points"], strict=True)
    columns = {
        "Settings": table["settings"],
        "Model": table["notation"],
        "Parameters (M)": [formats.number(count / 1e6) for count in table["parameters"]],
        "MACs (G)": [formats.number(count / 1e9, ".3f") for count in table["macs"]],
        "CPU, 1 thread (ms)": table["cpu_1_thread_median_ms"].map(formats.number),
        "DSC %": [
            formats.or_gap(formats.number(mean), gap)
            for mean, gap in zip(table["mean_dice_percent"], table["gap"], strict=True)
        ],
        "to Student of that size": [
            formats.DASH if pd.isna(mean) else f"{formats.points(mean)} ({formats.interval(low=low, high=high)})"
            for mean, low, high in differences
        ],
        "p (Holm)": table["p_holm"].map(formats.p),
        "Pareto front": [
            " and ".join(name for name, there in zip(COSTS, on, strict=True) if there) or formats.DASH
            for on in table[[f"on_{name}_front" for name in COSTS]].itertuples(index=False)
        ],
    }
    return pd.DataFrame(columns)


def notes(table: pd.DataFrame) -> list[str]:
    """Return the footnotes."""
    sizes = " and ".join(f"{size} x {size}" for size in sorted(set(table["image_size"])))
    return [
        f"Latency: {costs.cpu_name()}, 1 thread, PyTorch {torch.__version__}, one image of {sizes}, fp32, untrained "
        f"weights (which cost the same), median of {REPEATS} forward passes after {WARM_UP} to warm up.",
        "to Student of that size: paired mean difference and 95 % interval of these networks, percentage points; p of "
        "the paired test over images, Holm over all rows.",
        "Pareto front: no other row has as few parameters (or as low a latency) and a higher DSC. It is a description "
        "of these scores: rows on it need not differ from their neighbors beyond what another training would change.",
    ]
