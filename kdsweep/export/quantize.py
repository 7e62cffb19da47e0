"""Quantize exported Students to 8-bit integers, and compare Dice, file size and latency before and after.

Static quantization by ONNX Runtime: weights and activations, whose ranges are read off images of each run's training
part. Each network is then scored on its test images, in both forms, by the same runtime.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from kdsweep.config.grid import run_folder
from kdsweep.core.errors import InputError
from kdsweep.core.files import write_bytes, write_text
from kdsweep.core.progress import plural, track
from kdsweep.data import run_data
from kdsweep.evaluation import latency, metrics
from kdsweep.evaluation.costs import cpu_name
from kdsweep.export import onnx_file, predict
from kdsweep.export.model import Model, load_model, split_images
from kdsweep.results.formats import number
from kdsweep.results.frame import placed_runs, scored_images
from kdsweep.results.stats import OF_IMAGE, PLACE, compare, pair
from kdsweep.results.table import MODEL, Column, Table, with_interval
from kdsweep.results.tables import table4
from kdsweep.store import cell_folder

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

HEADING = "Quantized. Students in 8-bit integers"
FORMS = {"fp32": "float32", "int8": "int8"}
DIFFERENCE = ("difference_points", "low_points", "high_points", "p")


def to_int8(content: bytes, images: list[Tensor]) -> bytes:
    """Return an ONNX file in 8-bit integers: a scale per channel of each weight, one per map of each activation.

    The batch norms are folded into the convolutions first. The sigmoid or softmax at the end stays in float32. Weights
    use 7 of the 8 bits: processors without VNNI add two products of 8-bit numbers in 16 bits, which 255 * 127 * 2
    exceeds and 255 * 64 * 2 does not. So the file computes the same on all of them.

    Args:
        content: an ONNX file of ``onnx_file.to_onnx``.
        images: each (1, 3, S, S), normalized; they settle the ranges of the activations (smallest to largest value).
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as scratch:
        plain, folded, small = (Path(scratch, f"{name}.onnx") for name in ("plain", "folded", "small"))
        plain.write_bytes(content)
        quant_pre_process(plain, folded)
        nodes = onnx.load(folded).graph.node
        probabilities = [node.name for node in nodes if node.op_type in ("Sigmoid", "Softmax")]
        quantization.quantize_static(
            folded,
            small,
            SimpleNamespace(get_next=partial(next, map(onnx_file.feed, images), None)),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=probabilities[-1:],
        )
        return small.read_bytes()


def compare_forms(
    model: Model, *, store: Path, data_root: Path | None, count: int
) -> tuple[bytes, pd.DataFrame, dict[str, float]]:
    """Quantize a network on count training images and score both forms on its test images.

    Returns:
        The ONNX file in 8-bit integers; per test image the Dice of both forms (of several classes their mean), columns
        image, fp32, int8 (fractions); and by column what both forms cost: fp32_mb, int8_mb (10^6 bytes), fp32_ms,
        int8_ms (one image on one thread).
    """
    images, masks, _ = split_images(model, "test", store=store, data_root=data_root)
    content = onnx_file.to_onnx(model)
    small = to_int8(content, split_images(model, "train", store=store, data_root=data_root, count=count)[0])
    scores: dict[str, Any] = {"image": cell_folder.read_split(model.folder)["test"]}
    cost: dict[str, float] = {}
    for name, file in {"fp32": content, "int8": small}.items():
        session = onnx_file.open_session(file)
        prediction = torch.from_numpy(predict.predicted(onnx_file.onnx_probabilities(session, images)))
        scores[name] = metrics.overlap(prediction=prediction, mask=masks, class_names=model.class_names)["dice"]
        call = session.run, [onnx_file.OUTPUT], onnx_file.feed(images[0])
        cost[f"{name}_mb"] = len(file) / 1e6
        cost[f"{name}_ms"], _ = latency.time_ms(*call, device=torch.device("cpu"), threads=1)
    return small, pd.DataFrame(scores), cost


def chosen_runs(sweep: Sweep, *, models: list[str] | None) -> pd.DataFrame:
    """Return the finished runs of these models, by default of Student and of the best distilled student.

    The best is that of the highest validation Dice; of a sweep over settings, the best ones are taken.

    Raises:
        InputError: a model has no finished run.
    """
    sweep, ranking = table4.best_variant(sweep, table4.numbers(sweep))
    if models is None:
        best = table4.ranked(ranking)["notation"].tolist()
        if not best:
            raise InputError(f"sweep {sweep.name} has no distilled student that is finished; --models names others")
        models = ["Student", best[0]]
    done = sweep.runs[(sweep.runs["status"] == "FINISHED") & (sweep.runs["role"] != "teacher")]
    for name in models:
        if name not in set(done["notation"]):
            there = ", ".join(sorted(set(done["notation"]))) or "none"
            raise InputError(f"--models {name}: sweep {sweep.name} has no finished run of it; it has {there}")
    runs = placed_runs(sweep)
    runs = runs[runs["fingerprint"].isin(done["fingerprint"]) & runs["notation"].isin(models)]
    order = runs["notation"].map(models.index).rename("order")
    return runs.assign(order=order).sort_values(["order", *PLACE], ignore_index=True)


def quantized(scores: pd.DataFrame, cost: pd.DataFrame) -> pd.DataFrame:
    """Return the table: a row per model with Dice (%), paired differences (points), size and latency of both forms.

    Args:
        scores: a row per run and test image; columns notation, split, seed, image, group, test_to_train, fp32, int8
            (fractions).
        cost: a row per run; columns notation, fp32_mb, int8_mb, fp32_ms, int8_ms.
    """

    def of(notation: str, form: str) -> pd.DataFrame:
        rows = scores[scores["notation"] == notation]
        return rows[["notation", *PLACE, "image", *OF_IMAGE]].assign(dice=rows[form])

    def difference(prefix: str, ours: pd.DataFrame, baseline: pd.DataFrame) -> dict[str, object]:
        compared = compare(pair(ours=ours, baseline=baseline), test="ttest")
        return {f"{prefix}_{key}": compared[key] for key in DIFFERENCE}

    rows = []
    for name in scores["notation"].unique():
        scored = scores[scores["notation"] == name]
        row: dict[str, object] = {"notation": name, "n_images": scored["image"].nunique()}
        row |= {f"{form}_dice_percent": 100 * scored[form].mean() for form in FORMS}
        row |= difference("int8", of(name, "int8"), of(name, "fp32"))
        for form in FORMS if name != "Student" else ():
            row |= difference(f"student_{form}", of(name, form), of("Student", form))
        rows.append(row | cost[cost["notation"] == name].drop(columns="notation").median().to_dict())
    return pd.DataFrame(rows)


COLUMNS = [
    MODEL,
    *(Column(f"{form}_dice_percent", f"DSC % {title}", number) for form, title in FORMS.items()),
    Column(tuple(f"int8_{part}" for part in DIFFERENCE[:3]), "int8 - float32, points", with_interval),
    *(
        Column(tuple(f"student_{form}_{part}" for part in DIFFERENCE[:3]), f"to Student, {title}", with_interval)
        for form, title in FORMS.items()
    ),
    *(Column(f"{form}_mb", f"MB {title}", number) for form, title in FORMS.items()),
    *(Column(f"{form}_ms", f"ms {title}", number) for form, title in FORMS.items()),
]


def notes(*, sweep: Sweep, runs: int, count: int) -> list[str]:
    """Return the footnotes."""
    import onnxruntime

    names = run_data.class_names(sweep.runs.iloc[0]["params"])
    by_class = [f"DSC: mean over the classes ({', '.join(names)}) in an image's ground truth or prediction."]
    return [
        *(by_class if names else []),
        f"{plural(runs, 'network')} of sweep {sweep.name}, each on the test images of its split. Points: paired "
        "mean differences with the 95 % interval of these networks, images as clusters, seeds averaged.",
        f"int8: static quantization by ONNX Runtime {onnxruntime.__version__} (QDQ; weights per channel in 7 "
        "bits, so that processors without VNNI compute the same, activations from the smallest to the largest value on "
        f"{count} training images of the split), no training afterwards.",
        f"ms: one image on one thread of {cpu_name()}, median of {latency.REPEATS}, then over the networks; "
        "float32 is the same file before quantization, in the same runtime.",
    ]


def quantize(
    *,
    store: Path,
    out: Path,
    calibrate: int,
    uri: str | None = None,
    sweep: str | None = None,
    models: list[str] | None = None,
    data_root: Path | None = None,
) -> None:
    """Quantize the runs of these models, calibrated on so many images; write files and table, and print the table."""
    onnx_file.check_installed()
    from kdsweep.tracking.reader import read_sweep  # loads mlflow: seconds that a missing package need not wait for

    trained = read_sweep(store=store, uri=uri, name=sweep)
    runs = chosen_runs(trained, models=models)
    sys.stdout.write(f"{plural(len(runs), 'network')} of sweep {trained.name} to 8-bit integers in {out}\n")
    sys.stdout.flush()
    scores, costs_of = [], []
    for run in track(runs.to_dict("records"), what="quantizing", unit="network", total=len(runs)):
        folder = run_folder(store, run)
        small, dice, cost = compare_forms(load_model(folder), store=store, data_root=data_root, count=calibrate)
        write_bytes(out / f"{folder.name}.int8.onnx", small)
        scores.append(dice.assign(fingerprint=run["fingerprint"]))
        costs_of.append({"notation": run["notation"], **cost})
    images = scored_images(runs=runs, scores=trained.scores)  # with groups and sizes of the splits
    frame = quantized(pd.concat(scores).merge(images, on=["fingerprint", "image"]), pd.DataFrame(costs_of))
    table = Table(HEADING, frame, COLUMNS, notes=notes(sweep=trained, runs=len(runs), count=calibrate))
    text = table.markdown(HEADING)
    write_text(out / "quantized.md", text)
    write_text(out / "quantized.csv", frame.assign(sweep=trained.name).to_csv(index=False))
    sys.stdout.write(f"{text}\nwrote {out / 'quantized'}.md, .csv and {plural(len(runs), 'ONNX file')}\n")
