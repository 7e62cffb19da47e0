"""Show how good a Student of which size gets, with and without distillation: Dice against parameters and latency.

A sweep over Students (``+experiment=capacity``) has the scores; parameters, MACs and latency are measured, once on a
machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import torch

from kdsweep.config.grid import is_under
from kdsweep.core.errors import InputError
from kdsweep.evaluation import costs
from kdsweep.evaluation.latency import REPEATS, WARM_UP
from kdsweep.results import notes
from kdsweep.results.formats import DASH, number, p, with_interval
from kdsweep.results.frame import VALIDATION, variants
from kdsweep.results.table import MODEL, SETTINGS, Column, Options, Table, estimate
from kdsweep.results.tables import table4
from kdsweep.results.tables.table5 import network_of

if TYPE_CHECKING:
    from pathlib import Path

    from kdsweep.tracking.reader import Sweep

HEADING = "Capacity. Test DSC of Students of several sizes, with and without distillation"
COSTS = {"parameters": "parameters", "latency": "cpu_1_thread_median_ms"}  # the two fronts: column of the cost
MEASURED = ["parameters", "macs", "cpu_1_thread_median_ms", "cpu_1_thread_p95_ms"]
OF_SCORES = ["gap", "mean_dice_percent", "std_dice_percent", VALIDATION]
TO_STUDENT = ("difference_points", "low_points", "high_points", "p", "p_holm", "p_methods", "p_methods_holm")
COLUMNS = [
    SETTINGS,
    MODEL,
    Column("parameters", "Parameters (M)", lambda count: number(count / 1e6), narrow=True),
    Column("macs", "MACs (G)", lambda count: number(count / 1e9, ".3f")),
    Column("cpu_1_thread_median_ms", "CPU, 1 thread (ms)", number, narrow=True),
    estimate("mean_dice_percent", "DSC %", narrow=True),
    Column(TO_STUDENT[:3], "to Student of that size", with_interval, narrow=True),
    Column("p_holm", "p (Holm)", p, narrow=True),
    Column(
        tuple(f"on_{name}_front" for name in COSTS),
        "Pareto front",
        lambda *on: " and ".join(name for name, is_on in zip(COSTS, on, strict=True) if is_on) or DASH,
    ),
]


def applies(sweep: Sweep, store: Path | None = None) -> bool:
    """Return whether a sweep compares several Students."""
    return any(is_under(key, ("student",)) and not key.endswith(".weights") for key in sweep.varied)


def make(sweep: Sweep, options: Options) -> Table:
    """Make the table."""
    frame = numbers(sweep, scores=table4.numbers(sweep, test=options.test), store=options.store)
    sizes = " and ".join(f"{size} x {size}" for size in sorted(set(frame["image_size"])))
    below = [
        *notes.provenance(sweep),
        f"Latency: {costs.cpu_name()}, 1 thread, PyTorch {torch.__version__}, one image of {sizes}, fp32, untrained "
        f"weights (which cost the same), median of {REPEATS} forward passes after {WARM_UP} to warm up.",
        "to Student of that size: paired mean difference and 95 % interval of these networks, percentage points; p of "
        "the paired test over images, Holm over all rows.",
        "Pareto front: no other row has as few parameters (or as low a latency) and a higher DSC. It is a description "
        "of these scores: rows on it need not differ from their neighbors beyond what another training would change.",
    ]
    return Table(HEADING, frame.assign(test=options.test), COLUMNS, notes=below)


def numbers(sweep: Sweep, *, scores: pd.DataFrame, store: Path | None = None, repeats: int = REPEATS) -> pd.DataFrame:
    """Return a row per Student and model: its cost, Dice (%), difference to the plain Student of that size (points).

    Sorted by parameters. For each of COSTS a column says whether the row is on the Pareto front: no other row costs as
    little or less and has a higher Dice. Teachers have no row; scores is Table 4 of the sweep; the store
    keeps what was measured.

    Raises:
        InputError: the sweep has one Student only.
    """
    networks = {label: _student(part) for label, part in variants(sweep).items()}
    if len(set(networks.values())) < 2:
        raise InputError(
            f"sweep {sweep.name} has one Student: student=NAME,NAME compares several (+experiment=capacity)"
        )
    cost = pd.DataFrame(
        {"settings": label, "encoder": network.name, "image_size": network.image_size}
        | costs.measure(network, store=store, repeats=repeats)
        for label, network in networks.items()
    )
    of_scores = {name: name for name in OF_SCORES} | {f"student_{name}": name for name in TO_STUDENT}
    students = scores.loc[~scores["notation"].str.startswith("Teacher"), ["settings", "notation", *of_scores]]
    table = students.rename(columns=of_scores).merge(cost, on="settings")
    table = table[["settings", "notation", "encoder", "image_size", *MEASURED, *of_scores.values()]]
    for name, column in COSTS.items():
        table[f"on_{name}_front"] = on_front(table[column].astype(float), table["mean_dice_percent"])
    table = table.astype({"parameters": "Int64", "macs": "Int64"})
    return table.sort_values(["parameters", "settings"], kind="stable", ignore_index=True)


def on_front(cost: pd.Series, gain: pd.Series) -> pd.Series:
    """Return which points of a lower cost and higher gain no other one dominates; a point with NaN is on no front."""
    beaten = [
        bool(((cost <= its_cost) & (gain >= its_gain) & ((cost < its_cost) | (gain > its_gain))).any())
        for its_cost, its_gain in zip(cost, gain, strict=True)
    ]
    return ~pd.Series(beaten, index=cost.index) & gain.notna()


def _student(part: Sweep) -> costs.Network:
    network = network_of(part.runs[part.runs["role"] != "teacher"], group="student")
    if network is None:
        raise InputError(f"sweep {part.name}: its runs do not record their Students")
    return network
