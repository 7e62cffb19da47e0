"""Students in 8-bit integers: what was calibrated on which images, the same Dice as by hand, numbers by SciPy."""

import functools
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_rel
from test_predict import finish

from kdsweep import cli
from kdsweep.core.errors import InputError
from kdsweep.evaluation import metrics
from kdsweep.export import model as models
from kdsweep.export import onnx_file, quantize
from kdsweep.results.table import Table
from kdsweep.store import cell_folder, sweep_file
from kdsweep.tracking import mirror, reader
from kdsweep.training.outcome import PREDICTIONS


@pytest.fixture(scope="module")
def store(empty_store, tmp_path_factory):
    """A store with an untrained Student and a cell of one split, in MLflow, as a sweep leaves it."""
    store = tmp_path_factory.mktemp("quantize") / "store"
    shutil.copytree(empty_store, store)
    tracker = mirror.Tracker(store=store, uri=None)
    cells = [finish(store, "data.count=25", *one) for one in ([], ["path=L", "loss=mse"])]
    sweep_file.add(store, "study", cells=cells, teachers=[])
    for cell in cells:
        (cell.folder / PREDICTIONS).touch()
        tracker.sync(cell_folder.read(cell.folder), sweep="study")
    return store


@pytest.fixture(scope="module")
def sweep(store):
    return reader.read_sweep(store=store, uri=None, name=None)


@pytest.fixture(scope="module")
def model(store):
    return models.load_model(models.find_folder("Student/split0", store=store, uri=None))


@pytest.fixture(scope="module", autouse=True)
def exported_once():
    """Each network's ONNX file is made once: tests/export/test_onnx.py checks it, and it takes 10 s of a CPU."""
    export = onnx_file.to_onnx
    contents = functools.cache(lambda folder: export(models.load_model(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "to_onnx", lambda model: contents(model.folder))
        yield


@pytest.fixture(scope="module")
def forms(model, store):
    return quantize.compare_forms(model, store=store, data_root=None, count=4)


def test_the_file_is_in_integers_and_close_to_the_network(model, store, forms):
    content, _, cost = forms
    kinds = {onnx.TensorProto.DataType.Name(one.data_type) for one in onnx.load_from_string(content).graph.initializer}
    assert {"INT8", "UINT8"} <= kinds
    assert cost["int8_mb"] < 0.5 * cost["fp32_mb"]
    images, _, _ = models.split_images(model, "train", store=store, data_root=None, count=4)
    returned = onnx_file.onnx_probabilities(onnx_file.open_session(content), images)
    with torch.no_grad():
        expected = np.concatenate([onnx_file.Probabilities(model.network)(image).numpy() for image in images])
    assert 0 < np.abs(returned - expected).max() < 0.1


def convolutions(content):
    """The weights (output channel, product) of each convolution of an ONNX file in 8-bit integers."""
    arrays = [onnx.numpy_helper.to_array(one) for one in onnx.load_from_string(content).graph.initializer]
    return [one.reshape(len(one), -1).astype(int) for one in arrays if one.dtype == np.int8 and one.ndim == 4]


def without_vnni(weights):
    """Each output channel's largest sum on a processor that adds products in pairs, in 16 bits, and the exact one."""
    activations = np.where(weights > 0, 255, 0)  # of 8 bits, as any image may give them
    products = np.pad(activations * weights, ((0, 0), (0, weights.shape[1] % 2)))
    pairs = products.reshape(len(weights), -1, 2).sum(axis=2)
    return pairs.clip(-(2**15), 2**15 - 1).sum(axis=1), products.sum(axis=1)


def test_processors_without_vnni_compute_the_same(model, store, forms, monkeypatch):
    from onnxruntime import quantization

    returned = convolutions(forms[0])
    assert len(returned) > 30
    for weights in returned:
        saturating, exact = without_vnni(weights)
        assert saturating.tolist() == exact.tolist()
    quantize_static = quantization.quantize_static
    eight_bits = lambda *args, **options: quantize_static(*args, **{**options, "reduce_range": False})  # noqa: E731
    monkeypatch.setattr(quantization, "quantize_static", eight_bits)
    images, _, _ = models.split_images(model, "train", store=store, data_root=None, count=4)
    sums = [without_vnni(weights) for weights in convolutions(quantize.to_int8(onnx_file.to_onnx(model), images))]
    assert any((saturating < exact).any() for saturating, exact in sums)


def test_the_ranges_are_those_of_training_images_alone(model, store, monkeypatch):
    seen = []
    monkeypatch.setattr(quantize, "to_int8", lambda content, images: seen.extend(images) or content)
    quantize.compare_forms(model, store=store, data_root=None, count=3)
    every, _, _ = models.split_images(model, "train", store=store, data_root=None)
    assert len(every) == len(cell_folder.read_split(model.folder)["train"])
    assert all(torch.equal(one, every[number * len(every) // 3]) for number, one in enumerate(seen))
    assert len(seen) == 3


def test_dice_is_that_of_each_form_on_the_test_images(model, store, forms):
    content, scores, _ = forms
    images, masks, _ = models.split_images(model, "test", store=store, data_root=None)
    assert scores["image"].tolist() == cell_folder.read_split(model.folder)["test"]
    for name, file in {"fp32": onnx_file.to_onnx(model), "int8": content}.items():
        returned = onnx_file.onnx_probabilities(onnx_file.open_session(file), images)
        mask, prediction = masks.bool().numpy(), returned > 0.5
        dice = 2 * (mask & prediction).sum(axis=(1, 2, 3)) / (mask.sum(axis=(1, 2, 3)) + prediction.sum(axis=(1, 2, 3)))
        assert scores[name].tolist() == pytest.approx(dice.tolist(), abs=1e-6)
    assert metrics.overlap(prediction=masks.bool(), mask=masks)["dice"].mean() == 1


def test_the_numbers_of_the_table():
    rng, images = np.random.default_rng(0), [f"image{number}" for number in range(30)]
    one = {"split": 0, "seed": 0, "image": images, "group": images, "test_to_train": 0.3}
    parts = []
    for name in ("Student", "L_MSE"):
        fp32 = rng.uniform(0.3, 0.9, 30)
        parts.append(pd.DataFrame({"notation": name, **one, "fp32": fp32, "int8": fp32 - rng.uniform(0, 0.1, 30)}))
    cost = pd.DataFrame(
        {"notation": ["Student", "L_MSE"], "fp32_mb": [4.0, 5.0], "int8_mb": [1.0, 2.0], "fp32_ms": 3.0, "int8_ms": 1.0}
    )
    table = quantize.quantized(pd.concat(parts, ignore_index=True), cost).set_index("notation")
    student, cell = parts
    assert table.loc["Student", "int8_difference_points"] == pytest.approx(
        100 * (student["int8"] - student["fp32"]).mean()
    )
    assert table.loc["Student", "int8_p"] == pytest.approx(ttest_rel(student["int8"], student["fp32"]).pvalue)
    for name in ("fp32", "int8"):
        expected = 100 * (cell[name] - student[name]).mean()
        assert table.loc["L_MSE", f"student_{name}_difference_points"] == pytest.approx(expected)
        assert table.loc["L_MSE", f"student_{name}_p"] == pytest.approx(ttest_rel(cell[name], student[name]).pvalue)
    assert table.loc["L_MSE", "int8_mb"] == 2
    text = Table("Quantized", table.reset_index(), quantize.COLUMNS).text().set_index("Model")
    assert text.loc["Student", "to Student, int8"] == "\N{EN DASH}"
    assert text.loc["L_MSE", "MB int8"] == "2.00"


def test_the_command(store, tmp_path, capsys):
    arguments = ["--store", str(store), "--models", "Student,L_MSE_WAug", "--calibrate", "3", "--out", str(tmp_path)]
    assert cli.main(["quantize", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "2 networks of sweep study to 8-bit integers" in printed
    table = pd.read_csv(tmp_path / "quantized.csv").set_index("notation")
    assert table.index.tolist() == ["Student", "L_MSE_WAug"]
    assert len(list(tmp_path.glob("*.int8.onnx"))) == 2
    onnx.checker.check_model(onnx.load(next(tmp_path.glob("Student*.int8.onnx"))))


def test_of_a_sweep_over_sizes_only_the_best_settings_are_taken(sweep):
    parts = [
        sweep.runs.assign(variant=[{"student": name}] * 2, fingerprint=sweep.runs["fingerprint"] + name, val_dice=dice)
        for name, dice in (("small", 0.9), ("large", 0.8))
    ]
    runs = pd.concat(parts, ignore_index=True).assign(teacher="")
    scores = pd.concat(
        [sweep.scores.assign(fingerprint=sweep.scores["fingerprint"] + name) for name in ("small", "large")]
    )
    varied = replace(sweep, runs=runs, scores=scores, varied=("student",))
    chosen = quantize.chosen_runs(varied, models=None)
    assert chosen["notation"].tolist() == ["Student", "L_MSE_WAug"]
    assert set(chosen["fingerprint"].str[64:]) == {"small"}


def test_what_is_refused(sweep, store, capsys, tmp_path):
    with pytest.raises(
        InputError, match=r"--models H_MSE: sweep study has no finished run of it; it has L_MSE_WAug, Student"
    ):
        quantize.chosen_runs(sweep, models=["H_MSE"])
    assert cli.main(["quantize", "--store", str(store), "--out", str(tmp_path), "--calibrate", "0"]) == 2
    assert "--calibrate: 0 is not in the range x>=1" in capsys.readouterr().err
