"""The content of Table 5: costs of Teacher, Student and best cell on this machine, beside published figures.

All costs are measured, once on a machine (``evaluation.costs``); only the published figures are constants.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from kdsweep.core.device import usable_cores
from kdsweep.evaluation.costs import Network, cpu_name, measure
from kdsweep.evaluation.latency import REPEATS, WARM_UP
from kdsweep.results import formats
from kdsweep.results.formats import DASH
from kdsweep.results.frame import VALIDATION, known_values
from kdsweep.results.paper import BASELINES, DUAL_TEACHER, PAPER_PARAMETERS_MILLIONS, PUBLISHED, SOURCE
from kdsweep.results.stats import NAN, PLACE

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

BEST = "best cell"
TIMINGS = {"cpu_1_thread": "CPU, 1 thread (ms)", "cpu_all_threads": "CPU, all threads (ms)", "cuda": "CUDA (ms)"}
COUNTS = ["image_size", "parameters", "macs"]
COLUMNS = [f"{name}_{part}_ms" for name in TIMINGS for part in ("median", "p95")] + ["file_mb", "mean_dice_percent"]
COLUMNS += ["published_parameters_millions", "published_gflops", "published_dice_percent"]


def table5(sweep: Sweep, *, store: Path, scores: pd.DataFrame, repeats: int = REPEATS) -> pd.DataFrame:
    """Return Table 5: costs and Dice (%) of Teacher, Student and best cell, then the networks that others published.

    Costs do not depend on weights, so unfinished runs have them too; a row without any run has none.

    Args:
        sweep: its runs record their networks.
        store: folder of the runs, where the files of weights lie.
        scores: Table 4 of the sweep: columns notation, gap, mean_dice_percent, paper_mean_dice_percent.
        repeats: timed forward passes, after WARM_UP more.
    """
    names = set(sweep.runs["notation"])
    teacher = "Teacher_WAug" if "Teacher_WAug" in names and "Teacher" not in names else "Teacher"
    chosen = {"teacher": teacher, "student": "Student", "cell": next(iter(whole_cells(scores)), "")}
    scores = scores.set_index("notation")
    rows: list[dict[str, object]] = []
    ordered = sweep.runs.assign(unfinished=sweep.runs["status"] != "FINISHED")
    ordered = ordered.sort_values(["unfinished", *PLACE, "fingerprint"])
    for role, notation in chosen.items():
        runs = ordered[ordered["notation"] == notation]
        network = network_of(runs, group="teacher" if role == "teacher" else "student")
        row = {
            "notation": notation or BEST,
            "kind": BEST if role == "cell" else role,
            "gap": scores["gap"].get(notation, "not run") if notation else "no finished cell",
            "file_mb": _file_mb(runs, store=store),
            "mean_dice_percent": scores["mean_dice_percent"].get(notation, NAN),
            "published_parameters_millions": PAPER_PARAMETERS_MILLIONS[role],
            "published_dice_percent": scores["paper_mean_dice_percent"].get(notation, NAN),
            "source": f"{SOURCE}, text and Table 4",
        }
        cost = {"image_size": network.image_size, **measure(network, store=store, repeats=repeats)} if network else {}
        rows.append(row | cost)
    for name, figures in PUBLISHED.items():
        row = {f"published_{key}": value for key, value in figures._asdict().items()}
        rows.append({"notation": name, "kind": "published", "gap": "", "source": figures.source, **row})
    table = pd.DataFrame(rows).reindex(columns=[*COUNTS, *COLUMNS, "source", "notation", "kind", "gap"])
    table = table.astype(dict.fromkeys(COUNTS, "Int64") | dict.fromkeys(COLUMNS, "float"))
    return table[["notation", "kind", "gap", *COUNTS, *COLUMNS, "source"]]


def whole_cells(scores: pd.DataFrame) -> list[str]:
    """Return Table 4's distilled students without a gap, the highest validation Dice first, ties by name.

    Those that recorded none, in stores before results version 1, are left out: the test images are not for choosing.
    """
    whole = scores[(scores["gap"] == "") & ~scores["notation"].isin(BASELINES)].dropna(subset=VALIDATION)
    return whole.sort_values([VALIDATION, "notation"], ascending=[False, True])["notation"].tolist()


def network_of(runs: pd.DataFrame, *, group: str) -> Network | None:
    """Return the network of the first run that records it, preferring a finished one (``runs`` has these first)."""
    keys = [f"{group}.encoder", f"{group}.decoder_channels", "image_size"]
    told = [[params[key] for key in keys] for params in runs["params"] if params.keys() >= set(keys)]
    return Network(told[0][0], tuple(json.loads(told[0][1])), int(told[0][2])) if told else None  # MLflow: strings


def _file_mb(runs: pd.DataFrame, *, store: Path) -> float:
    """Return the size of a run's weights in 10^6 bytes; NaN if they are not in this store."""
    for run in runs.to_dict("records"):
        parent, name = ("teachers", "teacher") if run["role"] == "teacher" else ("cells", "student")
        for file in store.glob(f"{parent}/*-{run['fingerprint'][:10]}/{name}.safetensors"):
            return file.stat().st_size / 1e6
    return NAN


def _latency(median: float, slow: float) -> str:
    form = ".1f" if median >= 100 else ".2f"
    return DASH if pd.isna(median) else f"{median:{form}} ({slow:{form}})"


def format_table5(table: pd.DataFrame) -> pd.DataFrame:
    """Return the strings of Table 5; a latency is its median and in brackets its 95th percentile."""
    best = (table["kind"] == BEST) & (table["notation"] != BEST)
    columns = {
        "Model": table["notation"].where(~best, table["notation"] + f" ({BEST})"),
        "Parameters (M)": [formats.number(count / 1e6) for count in table["parameters"]],
        "MACs (G)": [formats.number(count / 1e9) for count in table["macs"]],
        "Weights (MB)": table["file_mb"].map(formats.number),
    }
    for name, title in TIMINGS.items():
        median, slow = table[f"{name}_median_ms"], table[f"{name}_p95_ms"]
        if name != "cuda" or median.notna().any():
            columns[title] = [_latency(*both) for both in zip(median, slow, strict=True)]
    dice = zip(table["mean_dice_percent"], table["gap"], strict=True)
    columns |= {
        "DSC %": [formats.or_gap(formats.number(mean), gap) for mean, gap in dice],
        "Parameters (M, published)": [formats.number(count, "g") for count in table["published_parameters_millions"]],
        "GFLOPs (published)": [formats.number(count, "g") for count in table["published_gflops"]],
        "DSC % (published)": [formats.number(mean, "g") for mean in table["published_dice_percent"]],
    }
    return pd.DataFrame(columns)


def notes(*, sweep: Sweep, table: pd.DataFrame, scores: pd.DataFrame, repeats: int = REPEATS) -> list[str]:
    """Return the footnotes: how Table 5 was measured, how the best cell was chosen, gaps, sources of published figures.

    The arguments are those of table5, and its result.
    """
    profile, data = ("".join(known_values(sweep.runs, key)) or DASH for key in ("profile", "data"))
    sizes = " and ".join(f"{size} x {size}" for size in sorted(set(table["image_size"].dropna())))
    cuda = torch.cuda.get_device_name() if table["cuda_median_ms"].notna().any() else "not timed"
    told = [
        f"Measured here: {cpu_name()}, 1 thread and {usable_cores()} threads, CUDA {cuda}, PyTorch {torch.__version__}"
        f"; a batch of 1 image of {sizes or 'unknown size'}, fp32, channels-last, untrained weights (which cost the "
        f"same), median and 95th percentile of {repeats} forward passes after {WARM_UP} to warm up. MACs are those of "
        "convolutions and matrix products.",
        f"DSC: profile {profile}, data {data}, sweep {sweep.name}.",
    ]
    told += ["A check of the machinery, not a result."] if profile == "quick" else []
    if cells := len(whole_cells(scores)):
        told.append(f"The best of {cells} finished cells is chosen by its mean DSC on the validation images.")
    missing = [f"{name} ({gap})" for name, gap in zip(table["notation"], table["gap"], strict=True) if gap]
    told += [f"Gaps: {'; '.join(missing)}."] if missing else []
    told.append(
        f"Published: {SOURCE} (Teacher: about 96 M; the rows of others as its Table 5 quotes them; one Titan Xp) and "
        f"{DUAL_TEACHER}. Other networks, hardware, data and splits; FLOPs are not MACs; no latency stands there."
    )
    return told
