"""Networks of several classes in use: masks of indices, an ONNX file of K + 1 probabilities, their card and scores."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from PIL import Image
from small import STUDENT
from test_predict import CPU, SIZE, finish, noise, run

from kdsweep import cli
from kdsweep.core.device import placed
from kdsweep.core.palette import BACKGROUND, class_colors
from kdsweep.data.class_maps import read_class_map
from kdsweep.data.loaders import EvalPart
from kdsweep.evaluation import scoring
from kdsweep.export import card, onnx_file, predict, quantize
from kdsweep.export import model as models
from kdsweep.store import cell_folder, sweep_file
from kdsweep.tracking import mirror
from kdsweep.training.outcome import PREDICTIONS, SCORES

CLASSES = "+data.classes={benign: benign, malignant: malignant}"
FIRST, SECOND = class_colors(2)


@pytest.fixture(scope="module")
def finished(empty_store, tmp_path_factory):
    """A store with an untrained Student of two classes, in MLflow, as a sweep leaves it."""
    store = tmp_path_factory.mktemp("classes") / "store"
    shutil.copytree(empty_store, store)
    cell = finish(store, "data.count=9", CLASSES, *STUDENT)
    scores = {"image": cell_folder.read_split(cell.folder)["test"], "dice": [0.5, 0.25]}
    scores |= {"dice_benign": [0.5, np.nan], "dice_malignant": [0.5, 0.25]}
    pd.DataFrame(scores).to_csv(cell.folder / SCORES, index=False)
    (cell.folder / PREDICTIONS).touch()
    files = ["student.safetensors", SCORES, PREDICTIONS]
    cell_folder.write_finished(cell.folder, values={"test/dice": 0.375}, files=files)
    sweep_file.add(store, "study", cells=[cell], teachers=[])
    mirror.Tracker(store=store, uri=None).sync(cell_folder.read(cell.folder), sweep="study")
    return store, cell


@pytest.fixture(scope="module")
def model(finished):
    loaded = models.load_model(finished[1].folder)
    placed(loaded.network, CPU)
    return loaded


@pytest.fixture(scope="module")
def content(model):
    return onnx_file.to_onnx(model)


def test_on_images_of_the_networks_size_it_is_what_testing_computes(model):
    pictures = noise(4, SIZE, SIZE, 3)
    masks = torch.zeros(4, 1, SIZE, SIZE, dtype=torch.uint8)
    part = EvalPart(["a"] * 4, ["b"] * 4, torch.from_numpy(pictures), masks, class_names=model.class_names)
    tested = scoring.predict(model.network, part, compute=CPU).numpy()
    each = [predict.probabilities(model.network, picture, image_size=SIZE, compute=CPU) for picture in pictures]
    assert set(np.unique(tested)) == {0, 1, 2}
    np.testing.assert_allclose(np.sum(each, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(predict.predicted(np.stack(each)), tested)


def test_masks_hold_indices_and_say_what_they_mean(finished, model, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    picture, out = noise(71, 93, 3), tmp_path / "out"
    Image.fromarray(picture).save(tmp_path / "images" / "a.png")
    assert run("--run", finished[1].folder, "--images", tmp_path / "images", "--out", out) == 0
    assert f"of 1 of 1 images, predictions.csv and classes.csv to {out}" in capsys.readouterr().out
    probability = predict.probabilities(model.network, picture, image_size=SIZE, compute=CPU)
    expected = probability.argmax(axis=0)
    assert probability.shape == (3, 71, 93)
    assert set(np.unique(expected)) == {0, 1, 2}
    with Image.open(out / "a_mask.png") as mask:
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), expected)
        colors = np.array([BACKGROUND, FIRST, SECOND])
        np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), colors[expected])
    for codes in ([1, 2], [FIRST, SECOND]):  # as data.classes reads it
        np.testing.assert_array_equal(read_class_map(out / "a_mask.png", codes), expected)
    legend = pd.read_csv(out / "classes.csv").to_numpy().tolist()
    assert legend == [[0, "background", "#000000"], [1, "benign", "#E69F00"], [2, "malignant", "#56B4E9"]]
    (row,) = pd.read_csv(out / "predictions.csv").to_dict("records")
    for index, name in enumerate(("benign", "malignant"), start=1):
        assert row[f"area_px_{name}"] == (expected == index).sum()
        mean = probability[index][expected == index].mean()
        assert row[f"mean_probability_{name}"] == pytest.approx(mean, abs=1e-6)


def test_a_row_of_the_table_worked_out_by_hand():
    # Classes 0 1 / 2 2: the columns of background, benign, malignant.
    probability = np.array([[[0.6, 0.2], [0.1, 0.0]], [[0.3, 0.5], [0.2, 0.4]], [[0.1, 0.3], [0.7, 0.6]]], np.float32)
    names = predict.columns(["benign", "malignant"])
    row = dict(zip(names, predict.measure("a.png", probability), strict=True))
    assert names[:4] == ["image", "width", "height", "area_px_benign"]
    assert list(row.values())[:7] == ["a.png", 2, 2, 1, "25.0000", "0.500000", "0.500000"]
    assert row["area_px_malignant"] == 2
    assert (row["mean_probability_malignant"], row["max_probability_malignant"]) == ("0.650000", "0.700000")
    absent = np.stack([probability[0] + 1, probability[1], probability[2]])
    assert predict.measure("b.png", absent)[3:7] == [0, "0.0000", "", "0.500000"]


def test_each_class_is_outlined_in_its_color():
    image, mask = np.full((20, 30, 3), 7, np.uint8), np.zeros((20, 30), np.uint8)
    mask[2:6, 2:9], mask[10:16, 12:20] = 2, 1
    drawn = predict.draw(image, mask)
    for index, color in enumerate((FIRST, SECOND), start=1):
        line = (drawn == color).all(axis=2)
        assert line.any()
        assert (mask[line] == index).all()


def test_the_onnx_file_gives_the_probabilities_of_background_and_classes(model, content):
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    images = torch.cat([predict.prepare(noise(70, 90, 3, seed=i), image_size=SIZE) for i in range(3)])
    (result,) = session.run(["probabilities"], {"images": images.numpy()})
    with torch.no_grad():
        expected = model.network(images).logits.softmax(dim=1).numpy()
    assert result.shape == (3, 3, SIZE, SIZE)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["kdsweep.classes"]) == ["background", "benign", "malignant"]
    assert about["kdsweep.output"].startswith("probabilities of each pixel, a channel per name of kdsweep.classes")
    assert "kdsweep.threshold" not in about


def one_hot(indices):
    """Probabilities (1, 3, 4, 4) of which these indices (4, 4) are the highest."""
    return np.eye(3, dtype=np.float32)[indices].transpose(2, 0, 1)[None]


def test_the_dice_that_is_compared_is_the_mean_over_classes(model):
    mask, prediction = np.zeros((4, 4), int), np.zeros((4, 4), int)
    mask[:2], prediction[:2] = 1, 1
    prediction[3, :2] = 2
    line = onnx_file.compare_dice(model, one_hot(prediction), torch.from_numpy(mask.astype(np.uint8))[None, None])
    assert line.startswith("WARNING: mean Dice 0.5000 there, but recorded 0.3750"), "of the Dice 1 and 0"


def test_in_integers_the_softmax_stays_and_dice_is_the_mean_over_classes(finished, model, content, monkeypatch):
    monkeypatch.setattr(onnx_file, "to_onnx", lambda _: content)
    small, scores, _ = quantize.compare_forms(model, store=finished[0], data_root=None, count=3)
    graph = onnx.load_from_string(small).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    (softmax,) = (node for node in graph.node if node.op_type == "Softmax")
    assert makers[graph.output[0].name] == "Softmax", "no rounding behind it"
    assert softmax.output[0] == graph.output[0].name
    images, masks, _ = models.split_images(model, "test", store=finished[0], data_root=None)
    assert masks.max() > 0
    predictions = onnx_file.onnx_probabilities(onnx_file.open_session(small), images).argmax(axis=1)
    for dice, prediction, mask in zip(scores["int8"], predictions, masks[:, 0].numpy(), strict=True):
        present = [index for index in (1, 2) if ((prediction == index) | (mask == index)).any()]
        each = [
            2 * ((prediction == k) & (mask == k)).sum() / ((prediction == k).sum() + (mask == k).sum()) for k in present
        ]
        assert dice == pytest.approx(np.mean(each), abs=1e-6)


def test_the_card_names_the_classes_and_scores_each(model):
    printed = card.card(model, b"content", name="student.onnx")
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in printed.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        ["all test images", "2", "37.50 ± 17.68"],
        ["class benign", "1", "50.00 ± nan"],
        ["class malignant", "2", "37.50 ± 17.68"],
    ]
    assert "the probabilities (N, 3, 64, 64) of background, benign, malignant of" in printed
    assert "2 lesion classes (benign, malignant), 2D images" in printed


def score(finished, small_busi, *words):
    store = str(finished[0])
    return cli.main(["score", "profile=quick", "data=busi", f"data.root={small_busi}", *words, "--store", store])


@pytest.mark.parametrize(
    ("words", "names"),
    [([], "null"), (["+data.classes={malignant: malignant, benign: benign}"], r"[malignant, benign]")],
)
def test_another_data_set_needs_the_same_classes_in_the_same_order(finished, small_busi, capsys, words, names):
    assert score(finished, small_busi, *words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f"data.classes: the data set has {names}, the networks of sweep study have [benign, malignant]; name their "
        "classes, in their order"
    )
    assert not (finished[1].folder / "external").exists()


def test_a_network_of_one_class_refuses_data_of_several(empty_store, small_busi, tmp_path, capsys):
    store = shutil.copytree(empty_store, tmp_path / "store")
    cell = finish(store, *STUDENT)
    (cell.folder / PREDICTIONS).touch()
    sweep_file.add(store, "study", cells=[cell], teachers=[])
    mirror.Tracker(store=store, uri=None).sync(cell_folder.read(cell.folder), sweep="study")
    assert score((store,), small_busi, CLASSES) == 1
    assert "has [benign, malignant], the networks of sweep study have null" in capsys.readouterr().err


def test_scores_on_another_data_set_have_the_classes(finished, small_busi):
    assert score(finished, small_busi, CLASSES) == 0
    (file,) = (finished[1].folder / "external").iterdir()
    scores = pd.read_csv(file)
    assert len(scores) == 25
    parts = scores[["dice_benign", "dice_malignant"]]
    assert parts.notna().any(axis=None)
    np.testing.assert_allclose(parts.mean(axis=1), scores["dice"])
