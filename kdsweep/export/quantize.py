"""Quantize exported Students to 8-bit integers, and compare Dice, file size and latency before and after.

Usage: ``python -m kdsweep quantize [--sweep NAME] [--models Student,HReg_MSE_WAug] --out DIR``. Static quantization by
ONNX Runtime: weights and activations, whose ranges are read off images of each run's training part. Each network is
then scored on its own test images, in both forms, by the same runtime.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kdsweep.config.grid import run_folder
from kdsweep.core.errors import InputError, command
from kdsweep.core.files import write_bytes
from kdsweep.core.options import add_sweep
from kdsweep.core.progress import plural, track
from kdsweep.evaluation import latency, metrics
from kdsweep.export import onnx as export
from kdsweep.export import predict
from kdsweep.export.predict import Model
from kdsweep.results import costs, dsc, formats, tables
from kdsweep.results.frame import placed_runs, scored_images
from kdsweep.results.stats import OF_IMAGE, PLACE, compare, pair
from kdsweep.store import cell_folder

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

CALIBRATION = 64  # images
RUNTIME = {"fp32": "float32", "int8": "int8"}


# ---- one network ---------------------------------------------------------------------------------------------------


class _Batches:
    """Images (1, 3, S, S), one by one, as ONNX Runtime's calibration asks for them."""

    def __init__(self, images: list[Tensor]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input of the network, None after the last."""
        image = next(self._images, None)
        return None if image is None else {export.INPUT: np.ascontiguousarray(image.numpy())}


def to_int8(content: bytes, images: list[Tensor]) -> bytes:
    """Return an ONNX file in 8-bit integers: a scale per channel of each weight, one per map of each activation.

    The batch norms are folded into the convolutions first. The sigmoid at the end stays in float32. Weights use 7 of
    the 8 bits: processors without VNNI add two products of 8-bit numbers in 16 bits, which 255 * 127 * 2 exceeds and
    255 * 64 * 2 does not. So the file computes the same on all of them.

    Args:
        content: an ONNX file of ``export.to_onnx``.
        images: each (1, 3, S, S), normalized; they settle the ranges of the activations (smallest to largest value).
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as scratch:
        plain, folded, small = (Path(scratch, f"{name}.onnx") for name in ("plain", "folded", "small"))
        plain.write_bytes(content)
        quant_pre_process(plain, folded)
        sigmoids = [node.name for node in onnx.load(folded).graph.node if node.op_type == "Sigmoid"]
        quantization.quantize_static(
            folded,
            small,
            _Batches(images),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=sigmoids[-1:],
        )
        return small.read_bytes()


def compare_forms(
    model: Model, *, store: Path, data_root: Path | None, count: int
) -> tuple[bytes, pd.DataFrame, dict[str, float]]:
    """Quantize a network and score both forms on its test images.

    Args:
        model: the network of a finished run.
        store: folder of the runs.
        data_root: folder of the images, if they were moved.
        count: images that settle the ranges.

    Returns:
        The ONNX file in 8-bit integers; per test image the Dice of both forms, columns image, fp32, int8 (fractions);
        and by column what both forms cost: fp32_mb, int8_mb (10^6 bytes), fp32_ms, int8_ms (one image on one thread).
    """
    inputs = export.run_inputs(model, store=store, data_root=data_root)
    assert inputs.masks is not None
    content = export.to_onnx(model)
    seen = export.run_inputs(model, store=store, data_root=data_root, part="train", count=count)
    small = to_int8(content, seen.images)
    scores: dict[str, Any] = {"image": cell_folder.read_split(model.folder)["test"]}
    cost: dict[str, float] = {}
    for name, file in {"fp32": content, "int8": small}.items():
        session = export.open_session(file)
        found = export.onnx_probabilities(session, inputs.images)
        prediction = torch.from_numpy(found > predict.THRESHOLD)
        scores[name] = metrics.overlap(prediction=prediction, mask=inputs.masks)["dice"]
        image = {export.INPUT: np.ascontiguousarray(inputs.images[0].numpy())}
        timed = latency.time_ms(session.run, [export.OUTPUT], image, device=torch.device("cpu"), threads=1)
        cost |= {f"{name}_mb": len(file) / 1e6, f"{name}_ms": timed[0]}
    return small, pd.DataFrame(scores), cost


# ---- a sweep -------------------------------------------------------------------------------------------------------


def chosen_runs(sweep: Sweep, scores: pd.DataFrame, *, store: Path, models: list[str] | None) -> pd.DataFrame:
    """Return the finished runs of these models, by default of Student and of the best distilled student.

    Args:
        sweep: one without further keys.
        scores: its Table 4, by which the best is that of the highest validation Dice.
        store: folder of the runs.
        models: notations.

    Returns:
        Rows of the sweep's runs, column folder: of each.

    Raises:
        InputError: a model has no finished run.
    """
    if models is None:
        best = costs.whole_cells(scores)
        if not best:
            raise InputError(f"sweep {sweep.name} has no distilled student that is finished; --models names others")
        models = ["Student", best[0]]
    done = sweep.runs[(sweep.runs["status"] == "FINISHED") & (sweep.runs["role"] != "teacher")]
    for name in models:
        if name not in set(done["notation"]):
            known = ", ".join(sorted(set(done["notation"]))) or "none"
            raise InputError(f"--models {name}: sweep {sweep.name} has no finished run of it; it has {known}")
    runs = done[done["notation"].isin(models)].drop_duplicates("fingerprint")
    order = pd.Series({name: number for number, name in enumerate(models)})
    runs = runs.assign(order=runs["notation"].map(order)).sort_values(["order", *PLACE], ignore_index=True)
    folders = [run_folder(store, run) for run in runs.to_dict("records")]
    return runs.assign(folder=pd.Series(folders, dtype=object))


def quantized(scores: pd.DataFrame, cost: pd.DataFrame) -> pd.DataFrame:
    """Return the table: a row per model with Dice (%), paired differences (points), size and latency of both forms.

    Args:
        scores: a row per run and test image; columns notation, split, seed, image, group, test_to_train, fp32, int8
            (fractions).
        cost: a row per run; columns notation, fp32_mb, int8_mb, fp32_ms, int8_ms.
    """
    rows = []
    for notation, own in scores.groupby("notation", sort=False):
        row: dict[str, object] = {"notation": notation, "n_images": own["image"].nunique()}
        row |= {f"{name}_dice_percent": 100 * own[name].mean() for name in RUNTIME}
        row |= _difference("int8", _form(own, "int8"), _form(own, "fp32"))
        if notation != "Student":
            plain = scores[scores["notation"] == "Student"]
            for name in RUNTIME:
                row |= _difference(f"student_{name}", _form(own, name), _form(plain, name))
        rows.append(row | cost[cost["notation"] == notation].drop(columns="notation").median().to_dict())
    return pd.DataFrame(rows)


def _form(scores: pd.DataFrame, name: str) -> pd.DataFrame:
    return scores[["notation", *PLACE, "image", *OF_IMAGE]].assign(dice=scores[name])


def _difference(prefix: str, ours: pd.DataFrame, baseline: pd.DataFrame) -> dict[str, object]:
    found = compare(pair(ours=ours, baseline=baseline), test="ttest")
    return {f"{prefix}_{key}": found[key] for key in ("difference_points", "low_points", "high_points", "p")}


def format_quantized(table: pd.DataFrame) -> pd.DataFrame:
    """Return the strings of the table."""

    def difference(prefix: str) -> Iterator[str]:
        if f"{prefix}_difference_points" not in table:
            return
        columns = (table[f"{prefix}_{key}"] for key in ("difference_points", "low_points", "high_points"))
        for mean, low, high in zip(*columns, strict=True):
            yield formats.DASH if pd.isna(mean) else f"{formats.points(mean)} ({formats.interval(low=low, high=high)})"

    columns: dict[str, Any] = {"Model": table["notation"]}
    for name, title in RUNTIME.items():
        columns[f"DSC % {title}"] = table[f"{name}_dice_percent"].map(formats.number)
    columns["int8 - float32, points"] = list(difference("int8"))
    for name, title in RUNTIME.items():
        columns[f"to Student, {title}"] = list(difference(f"student_{name}")) or formats.DASH
    for name, title in RUNTIME.items():
        columns[f"MB {title}"] = table[f"{name}_mb"].map(formats.number)
    for name, title in RUNTIME.items():
        columns[f"ms {title}"] = table[f"{name}_ms"].map(formats.number)
    return pd.DataFrame(columns)


def notes(*, sweep: Sweep, runs: int, count: int) -> list[str]:
    """Return the footnotes."""
    import onnxruntime

    return [
        f"{plural(runs, 'network')} of sweep {sweep.name}, each on the test images of its own split. Points: paired "
        "mean differences with the 95 % interval of these networks, images as clusters, seeds averaged.",
        f"int8: static quantization by ONNX Runtime {onnxruntime.__version__} (QDQ; weights per channel in 7 "
        "bits, so that processors without VNNI compute the same, activations from the smallest to the largest value on "
        f"{count} training images of the split), no training afterwards.",
        f"ms: one image on one thread of {costs.cpu_name()}, median of {latency.REPEATS}, then over the networks; "
        "float32 is the same file before quantization, in the same runtime.",
    ]


# ---- the command ---------------------------------------------------------------------------------------------------


def make(sweep: Sweep, *, store: Path, models: list[str] | None, data_root: Path | None, count: int, out: Path) -> str:
    """Quantize the runs of these models, write their files and the table, and return the table in Markdown.

    Raises:
        InputError: a run or an image is missing, or the folder cannot be written to.
    """
    sweep, ranking = dsc.best_variant(sweep, dsc.table4(sweep))  # of a sweep over settings: the best ones
    runs = chosen_runs(sweep, ranking, store=store, models=models)
    sys.stdout.write(f"{plural(len(runs), 'network')} of sweep {sweep.name} to 8-bit integers in {out}\n")
    sys.stdout.flush()
    scores, costs_of = [], []
    for run in track(runs.to_dict("records"), what="quantizing", unit="network", total=len(runs)):
        model = predict.load_model(run["folder"])
        small, dice, cost = compare_forms(model, store=store, data_root=data_root, count=count)
        _write(out / f"{run['folder'].name}.int8.onnx", small)
        scores.append(dice.assign(fingerprint=run["fingerprint"]))
        costs_of.append({"notation": run["notation"], **cost})
    known = scored_images(runs=placed_runs(sweep), scores=sweep.scores)  # with groups and sizes of the splits
    table = quantized(pd.concat(scores).merge(known, on=["fingerprint", "image"]), pd.DataFrame(costs_of))
    told = notes(sweep=sweep, runs=len(runs), count=count)
    text = tables.to_markdown(title="Quantized. Students in 8-bit integers", text=format_quantized(table), notes=told)
    _write(out / "quantized.md", text.encode())
    _write(out / "quantized.csv", table.assign(sweep=sweep.name).to_csv(index=False).encode())
    return f"{text}\nwrote {out / 'quantized'}.md, .csv and {plural(len(runs), 'ONNX file')}\n"


def _write(file: Path, content: bytes) -> None:
    try:
        write_bytes(file, content)
    except OSError as error:
        raise InputError(f"--out {file.parent}: cannot write there ({error.strerror})") from error


@command
def main(argv: list[str] | None = None) -> None:
    """Quantize Students of a sweep."""
    parser = argparse.ArgumentParser(
        prog="python -m kdsweep quantize", description="Students in 8-bit integers, and what that costs in Dice."
    )
    add_sweep(parser)
    parser.add_argument("--models", help="notations, comma between them (Student and the best distilled student)")
    parser.add_argument(
        "--calibrate", type=int, default=CALIBRATION, help=f"training images to calibrate on ({CALIBRATION})"
    )
    parser.add_argument("--data-root", type=Path, help="where the sweep's images lie now (where they lay then)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the ONNX files and the table")
    options = parser.parse_args(argv)
    export.check_installed()
    if options.calibrate < 1:
        raise InputError(f"--calibrate {options.calibrate}: must be at least 1 image")
    from kdsweep.tracking.reader import read_sweep  # loads mlflow: seconds that --help need not wait for

    sweep = read_sweep(store=options.store, uri=options.tracking_uri, name=options.sweep)
    models = options.models.split(",") if options.models else None
    count, out = options.calibrate, options.out
    told = make(sweep, store=options.store, models=models, data_root=options.data_root, count=count, out=out)
    sys.stdout.write(told)
