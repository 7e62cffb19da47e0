"""The model card: its numbers are those of the run's folder; best is the best on the validation images."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from small import STUDENT
from test_predict import finish

from kdsweep import cli
from kdsweep.core.errors import InputError
from kdsweep.core.files import write_json
from kdsweep.export import card, onnx_file
from kdsweep.export import model as models
from kdsweep.store import cell_folder, sweep_file
from kdsweep.tracking import mirror
from kdsweep.training.outcome import PREDICTIONS, SCORES

DICE = [0.9, 0.4, 0.0, 0.7]


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    every = finish(tmp_path_factory.mktemp("card"), "path=L", "loss=mse")
    labels = ["benign", "malignant", "malignant", "benign"]
    table = pd.DataFrame({"image": list("abcd"), "label": labels, "dice": DICE, "iou": 0.5, "hd95_px": 3.0})
    table.to_csv(every.folder / SCORES, index=False)
    about = json.loads((every.folder / cell_folder.CELL).read_text())
    about["tags"]["kdsweep.split_protocol"] = "3 folds, by group (groups.csv)"
    write_json(every.folder / cell_folder.CELL, about)
    values = {"test/dice": 0.5, "best/val_dice": 0.625, "best_epoch": 6}
    cell_folder.write_finished(every.folder, values=values, files=["student.safetensors"])
    return every


def test_the_card_says_what_the_folder_holds(cell):
    printed = card.card(models.load_model(cell.folder), b"content", name="student.onnx")
    assert printed.startswith("# L_MSE_WAug: lesions in ultrasound images, 0.82 M parameters\n")
    assert hashlib.sha256(b"content").hexdigest() in printed
    rows = [re.sub(" +", " ", line) for line in printed.splitlines() if line.startswith("| ")]
    dice = pd.Series(DICE)
    assert f"| all test images | 4 | {100 * dice.mean():.2f} ± {100 * dice.std():.2f} |" in rows[1]
    assert "| benign | 2 | 80.00 ± 14.14 |" in rows[2]
    assert "On 2 of 4 test images its Dice is below 0.5, on 1 it is 0" in printed
    assert "Weights of epoch 7, the best on the validation images (Dice 62.50 % there)" in printed
    assert (
        "from a Teacher, a U-Net with the encoder resnet18, that sees weak views: path L, loss mse, weight 0.5."
        in printed
    )
    assert "It is not a medical device" in printed
    assert "no patients" in printed
    assert "(3 folds, by group (groups.csv), split 0)" in printed
    split = cell_folder.read_split(cell.folder)
    assert f"{len(split['train'])} images for train, {len(split['validation'])} images for validation" in printed


def test_a_damaged_record_is_named(cell, tmp_path):
    copy = shutil.copytree(cell.folder, tmp_path / "copy")
    (copy / SCORES).unlink()
    with pytest.raises(InputError, match=r"test_scores.csv is damaged"):
        card.card(models.load_model(copy), b"", name="student.onnx")


class Session:
    """In place of ONNX Runtime, which test_onnx.py has, and takes 10 s to export for: the network itself."""

    def __init__(self, model):
        self.network = onnx_file.Probabilities(model.network)

    def run(self, _names, inputs):
        with torch.no_grad():
            return [self.network(*map(torch.from_numpy, inputs.values())).numpy()]


def test_best_is_the_run_with_the_highest_validation_dice_of_the_best_cell(empty_store, tmp_path, monkeypatch, capsys):
    store = shutil.copytree(empty_store, tmp_path / "store")
    tracker = mirror.Tracker(store=store, uri=None)
    dice = {("mse", 0): 0.6, ("mse", 1): 0.7, ("kld", 0): 0.9, ("kld", 1): 0.2}  # mean 0.65 and 0.55
    cells = {key: finish(store, "path=L", f"loss={key[0]}", f"split=s{key[1]}", *STUDENT) for key in dice}
    sweep_file.add(store, "study", cells=list(cells.values()), teachers=[])
    for key, cell in cells.items():
        ids = cell_folder.read_split(cell.folder)["test"]
        test_dice = 0.99 if key == ("kld", 1) else 0.5
        pd.DataFrame({"image": ids, "dice": test_dice}).to_csv(cell.folder / SCORES, index=False)
        (cell.folder / PREDICTIONS).touch()
        values = {"test/dice": test_dice, "best/val_dice": dice[key], "best_epoch": 1}
        cell_folder.write_finished(cell.folder, values=values, files=["student.safetensors"])
        tracker.sync(cell_folder.read(cell.folder), sweep="study")
    result = models.find_folder("best", store=store, uri=None)
    assert result.resolve() == cells["mse", 1].folder.resolve()
    assert models.find_folder("best/study", store=store, uri=None) == result
    monkeypatch.setattr(onnx_file, "to_onnx", lambda model: str(model.folder.resolve()).encode())
    monkeypatch.setattr(onnx_file, "open_session", lambda content: Session(models.load_model(Path(content.decode()))))
    out = tmp_path / "model" / "student.onnx"
    assert cli.main(["export", "--run", "best", "--store", str(store), "--out", str(out)]) == 0
    assert "and its card student.md" in capsys.readouterr().out
    assert out.read_text(encoding="utf-8") == str(result.resolve())
    assert out.with_suffix(".md").read_text(encoding="utf-8").startswith("# L_MSE_WAug")
    with pytest.raises(InputError, match="sweep=none is not in this store"):
        models.find_folder("best/none", store=store, uri=None)
