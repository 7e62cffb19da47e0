"""Table 5: costs and Dice of Teacher, Student and best cell on this machine, next to published numbers.

All costs are measured, once on a machine (``evaluation.costs``); only the published numbers are constants.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from kdsweep.config import identity
from kdsweep.config.networks import logits_of
from kdsweep.core.device import usable_cores
from kdsweep.data import run_data
from kdsweep.evaluation import costs
from kdsweep.evaluation.latency import REPEATS, WARM_UP
from kdsweep.results import notes
from kdsweep.results.formats import DASH, number
from kdsweep.results.mixing import distinct_values
from kdsweep.results.paper import DUAL_TEACHER, PAPER_PARAMETERS_MILLIONS, PUBLISHED, SOURCE
from kdsweep.results.stats import NAN, PLACE
from kdsweep.results.table import Column, Options, Table, estimate
from kdsweep.results.tables import table4

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

HEADING = "Table 5. What the networks cost"
BEST = "best cell"
TIMINGS = {"cpu_1_thread": "CPU, 1 thread (ms)", "cpu_all_threads": "CPU, all threads (ms)", "cuda": "CUDA (ms)"}
COUNTS = ["image_size", "parameters", "macs"]
MEASURED = [f"{name}_{part}_ms" for name in TIMINGS for part in ("median", "p95")] + ["file_mb", "mean_dice_percent"]
MEASURED += ["published_parameters_millions", "published_gflops", "published_dice_percent"]


def _latency(median: float, slow: float) -> str:
    """Format a median and, in brackets, its 95th percentile."""
    form = ".1f" if median >= 100 else ".2f"
    return DASH if pd.isna(median) else f"{median:{form}} ({slow:{form}})"


def _model(name: str, kind: str) -> str:
    return f"{name} ({BEST})" if kind == BEST != name else name


def _short(value: float) -> str:
    return number(value, "g")


COLUMNS = [
    Column(("notation", "kind"), "Model", _model, narrow=True),
    Column("parameters", "Parameters (M)", lambda count: number(count / 1e6), narrow=True),
    Column("macs", "MACs (G)", lambda count: number(count / 1e9), narrow=True),
    Column("file_mb", "Weights (MB)", number),
    *(
        Column((f"{name}_median_ms", f"{name}_p95_ms"), title, _latency, narrow=name != "cpu_all_threads", needs=needs)
        for (name, title), needs in zip(TIMINGS.items(), ("", "", "cuda_median_ms"), strict=True)
    ),
    estimate("mean_dice_percent", "DSC %", narrow=True),
    Column("published_parameters_millions", "Parameters (M, published)", _short),
    Column("published_gflops", "GFLOPs (published)", _short),
    Column("published_dice_percent", "DSC % (published)", _short, narrow=True),
]


def make(sweep: Sweep, options: Options) -> Table:
    """Make the table, of the setting with the best cell where a sweep has several."""
    part, scores = table4.best_variant(sweep, table4.numbers(sweep))
    frame = numbers(part, store=options.store, scores=scores)
    return Table(HEADING, frame, COLUMNS, notes=footnotes(part, frame, scores=scores))


def numbers(sweep: Sweep, *, store: Path, scores: pd.DataFrame, repeats: int = REPEATS) -> pd.DataFrame:
    """Return costs and Dice (%) of Teacher, Student and best cell, then the networks that others published.

    Costs do not depend on weights, so unfinished runs have them too; a row without any run has none.

    Args:
        sweep: without further keys.
        store: folder of the runs with the files of weights, which keeps what was measured.
        scores: Table 4 of the sweep.
        repeats: timed forward passes, after WARM_UP more.
    """
    names = set(sweep.runs["notation"])
    teacher = "Teacher_WAug" if "Teacher_WAug" in names and "Teacher" not in names else "Teacher"
    best = next(iter(table4.ranked(scores)["notation"]), "")
    scores = scores.set_index("notation")
    runs = sweep.runs.assign(unfinished=sweep.runs["status"] != "FINISHED")
    runs = runs.sort_values(["unfinished", *PLACE, "fingerprint"])
    rows: list[dict[str, object]] = []
    for role, notation in {"teacher": teacher, "student": "Student", "cell": best}.items():
        trained = runs[runs["notation"] == notation]
        network = network_of(trained, group="teacher" if role == "teacher" else "student")
        cost = costs.measure(network, store=store, repeats=repeats) if network else {}
        row: dict[str, object] = {
            "notation": notation or BEST,
            "kind": BEST if role == "cell" else role,
            "gap": scores["gap"].get(notation, "not run") if notation else "no finished cell",
            "image_size": network.image_size if network else pd.NA,
            "file_mb": _file_mb(trained, store=store),
            "mean_dice_percent": scores["mean_dice_percent"].get(notation, NAN),
            "published_parameters_millions": PAPER_PARAMETERS_MILLIONS[role],
            "published_dice_percent": scores["paper_mean_dice_percent"].get(notation, NAN),
            "source": f"{SOURCE}, text and Table 4",
        }
        rows.append(row | cost)
    for name, published in PUBLISHED.items():
        figures = {f"published_{key}": value for key, value in published._asdict().items()}
        rows.append({"notation": name, "kind": "published", "gap": "", "source": published.source, **figures})
    table = pd.DataFrame(rows).reindex(columns=["notation", "kind", "gap", *COUNTS, *MEASURED, "source"])
    return table.astype(dict.fromkeys(COUNTS, "Int64") | dict.fromkeys(MEASURED, "float"))


def network_of(runs: pd.DataFrame, *, group: str) -> costs.Network | None:
    """Return the network of the first run that records it, preferring a finished one (``runs`` has these first)."""
    for params in runs["params"]:
        architecture = identity.architecture(params, group)
        if architecture is None or "image_size" not in params:
            continue
        if architecture.network or architecture.decoder_channels:  # else an incomplete record
            return costs.Network(
                architecture.as_json(), int(params["image_size"]), logits_of(run_data.class_names(params))
            )
    return None


def _file_mb(runs: pd.DataFrame, *, store: Path) -> float:
    """Return the size of a run's weights in 10^6 bytes; NaN if they are not in this store."""
    for run in runs.to_dict("records"):
        parent, name = ("teachers", "teacher") if run["role"] == "teacher" else ("cells", "student")
        for file in store.glob(f"{parent}/*-{run['fingerprint'][:10]}/{name}.safetensors"):
            return file.stat().st_size / 1e6
    return NAN


def footnotes(sweep: Sweep, table: pd.DataFrame, *, scores: pd.DataFrame, repeats: int = REPEATS) -> list[str]:
    """Return the notes on conditions, choice of the best cell, gaps, sources of published numbers."""
    profile, data = ("".join(distinct_values(sweep.runs, key)) or DASH for key in ("profile", "data"))
    sizes = " and ".join(f"{size} x {size}" for size in sorted(set(table["image_size"].dropna())))
    cuda = torch.cuda.get_device_name() if table["cuda_median_ms"].notna().any() else "not timed"
    lines = [
        f"Measured here: {costs.cpu_name()}, 1 thread and {usable_cores()} threads, CUDA {cuda}, PyTorch "
        f"{torch.__version__}; a batch of 1 image of {sizes or 'unknown size'}, fp32, channels-last, untrained weights "
        f"(which cost the same), median and 95th percentile of {repeats} forward passes after {WARM_UP} to warm up. "
        "MACs are those of convolutions and matrix products.",
        f"DSC: profile {profile}, data {data}, sweep {sweep.name}.",
    ]
    lines += [notes.QUICK] if profile == "quick" else []
    if cells := len(table4.ranked(scores)):
        lines.append(f"Best cell: chosen of {cells} finished ones by its mean DSC on the validation images.")
    return [
        *lines,
        *notes.gaps(table),
        f"Published: {SOURCE} (Teacher: about 96 M; the rows of others as its Table 5 quotes them; one Titan Xp) and "
        f"{DUAL_TEACHER}. Other networks, hardware, data and splits; FLOPs are not MACs; without latency.",
    ]
