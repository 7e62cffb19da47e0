"""A trained network as ONNX: the same probabilities, for any batch, and what the file says about itself."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from PIL import Image
from test_predict import CPU, SIZE, copy, damage, finish, noise

from kdsweep import cli
from kdsweep.config import composition, identity, inputs
from kdsweep.config.grid import Cell
from kdsweep.core.errors import InputError
from kdsweep.data import sources
from kdsweep.data.images import load_images, read_entry, resize_mask
from kdsweep.data.loaders import EvalPart
from kdsweep.evaluation import scoring
from kdsweep.evaluation.costs import cpu_name
from kdsweep.export import model as models
from kdsweep.export import onnx_file, predict
from kdsweep.store import cell_folder, checkpoint
from kdsweep.training import build


@pytest.fixture(scope="module")
def cell(tmp_path_factory) -> Cell:
    return finish(tmp_path_factory.mktemp("finished"))


def retest(folder: Path, dice: float) -> None:
    """Have the run record another test Dice."""
    cell_folder.write_finished(folder, values={"test/dice": dice}, files=["student.safetensors"])


@pytest.fixture(scope="module")
def of_busi(small_busi, tmp_path_factory) -> tuple[Cell, float]:
    """A finished run of files, and the test Dice that it recorded as testing computes it."""
    store = tmp_path_factory.mktemp("busi")
    each = ["profile=quick", "path=none", "device=cpu", "data=busi", f"data.root={small_busi}", f"store={store}"]
    cfg = composition.compose(each)
    cell = identity.cell(cfg)
    cell_folder.describe(cell, split=inputs.split_ids(cfg), params=identity.params(cfg), tags=build.tags(cfg))
    checkpoint.save_network(cell.folder / "student.safetensors", build.student_network(cfg))
    scores = {"image": cell_folder.read_split(cell.folder)["test"], "dice": 0.5}
    pd.DataFrame(scores).to_csv(cell.folder / "test_scores.csv", index=False)
    retest(cell.folder, 0.5)
    images = load_images(sources.Busi(small_busi), load_size=SIZE, image_size=SIZE)
    ids = json.loads((cell.folder / "split.json").read_text())["test"]
    chosen = [images.ids.index(image_id) for image_id in ids]
    pictures, masks = (torch.from_numpy(array[chosen]) for array in (images.eval_images, images.eval_masks))
    part = EvalPart(ids, [images.labels[i] for i in chosen], pictures, masks[:, None])
    predictions = scoring.predict(models.load_model(cell.folder).network, part, compute=CPU)
    dice = float(scoring.score(predictions, part, nsd_tolerance_px=2.0)["dice"].mean())
    retest(cell.folder, dice)
    return cell, dice


@pytest.fixture(scope="module")
def exported(cell) -> Path:
    file = cell.store / "new" / "student.onnx"
    assert cli.main(["export", "--run", "Student/split0", "--store", str(cell.store), "--out", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def content(exported) -> bytes:
    return exported.read_bytes()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_batch_of_any_size_gives_the_networks_probabilities(cell, exported, batch):
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    model = models.load_model(cell.folder)
    images = torch.cat([predict.prepare(noise(70, 90, 3, seed=i), image_size=SIZE) for i in range(batch)])
    (result,) = session.run(["probabilities"], {"images": images.numpy()})
    with torch.no_grad():
        expected = torch.sigmoid(model.network(images).logits).numpy()
    assert result.shape == (batch, 1, SIZE, SIZE)
    assert result.std() > 0.01
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


def test_the_file_says_where_it_is_from_and_how_images_are_prepared(cell, exported):
    proto = onnx.load(exported)
    onnx.checker.check_model(proto, full_check=True)
    reported = {entry.key.removeprefix("kdsweep."): entry.value for entry in proto.metadata_props}
    steps = reported.pop("preprocessing").split("; ")
    assert reported.pop("output").startswith("probability of lesion")
    assert reported == {
        "notation": "Student",
        "split": "0",
        "seed": "0",
        "role": "baseline",
        "fingerprint": cell.fingerprint,
        "source_run": cell.folder.name,
        "encoder": "mobilenetv3_small_trimmed",
        "image_size": str(SIZE),
        "threshold": "0.5",
    }
    assert "subtract the mean (0.485, 0.456, 0.406), divide by the standard deviation (0.229, 0.224, 0.225)" in steps
    assert any(step.startswith(f"resize the complete image to {SIZE} x {SIZE}") for step in steps)
    assert (
        str(Path(onnx_file.__file__).parent.parent).encode() not in exported.read_bytes()
    )  # no paths of this computer
    assert sorted(file.name for file in exported.parent.iterdir()) == ["student.md", "student.onnx"]


def test_the_preprocessing_that_it_reports_is_the_one_that_is_done():
    image = noise(SIZE, SIZE, 3)
    by_hand = (image / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    result = predict.prepare(image, image_size=SIZE)
    np.testing.assert_allclose(result[0].numpy(), by_hand.transpose(2, 0, 1), rtol=0, atol=1e-5)


def test_it_reports_parity_and_latency(cell, content, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_file, "to_onnx", lambda _: content)
    (tmp_path / "images").mkdir()
    Image.fromarray(noise(91, 77)).save(tmp_path / "images" / "a.png")
    out = tmp_path / "a.onnx"
    threads = torch.get_num_threads()
    call = ["--run", str(cell.folder), "--out", str(out), "--images", str(tmp_path / "images")]
    assert cli.main(["export", *call]) == 0
    first, latency, last = capsys.readouterr().out.splitlines()
    name = "Student split 0 seed 0 (mobilenetv3_small_trimmed, 64 x 64)"
    assert first == f"{name} to ONNX opset 18: {out}"
    assert latency.startswith(f"one image on one thread of {cpu_name()}, median of 50: ONNX Runtime ")
    assert last.startswith(f"wrote {out} (")
    assert last.endswith(f"on 1 images of {tmp_path / 'images'}, allowed 1e-04")
    assert torch.get_num_threads() == threads
    (tmp_path / "images" / "b.png").touch()
    assert cli.main(["export", *call]) == 1
    assert "b.png is not a readable image" in capsys.readouterr().err


# ---- on the run's test images --------------------------------------------------------------------------------------


@pytest.fixture
def made(content, tmp_path, monkeypatch, capsys):
    """Calls the command with the export done already; its lines, or the one with which it ends."""
    monkeypatch.setattr(onnx_file, "to_onnx", lambda _: content)

    def make(folder: Path, *arguments: object) -> list[str]:
        words = ["--run", folder, "--store", tmp_path / "store", "--out", tmp_path / "a.onnx", *arguments]
        code = cli.main(["export", *map(str, words)])
        printed = capsys.readouterr()
        assert printed.err.count("\n") == code
        return (printed.err or printed.out).splitlines()

    return make


def test_both_cells_have_the_network_of_the_exported_file(cell, of_busi):
    ours, others = (models.load_model(one.folder).network.state_dict() for one in (cell, of_busi[0]))
    assert all(torch.equal(ours[key], others[key]) for key in ours)


def test_by_default_it_compares_on_the_runs_test_images_and_reproduces_their_dice(of_busi, made):
    cell, dice = of_busi
    assert 0.01 < dice < 0.99
    _, _, last = made(cell.folder)
    result = f"mean Dice {dice:.4f} there, recorded {dice:.4f}"
    assert last.endswith(f" on the run's 5 test images (busi), allowed 1e-04; {result}")


def test_the_test_images_are_those_of_the_split(of_busi, small_busi, tmp_path):
    cell, _ = of_busi
    images, masks, _ = models.split_images(models.load_model(cell.folder), "test", store=tmp_path, data_root=None)
    entries = {entry.id: entry for entry in sources.Busi(small_busi).entries()}
    ids = json.loads((cell.folder / "split.json").read_text())["test"]
    for image_id, image, mask in zip(ids, images, masks, strict=True):
        picture, truth = read_entry(entries[image_id])
        torch.testing.assert_close(image, predict.prepare(picture, image_size=SIZE), rtol=0, atol=0)
        np.testing.assert_array_equal(mask[0].numpy(), resize_mask(truth, SIZE))


@pytest.mark.parametrize(
    ("precision", "cause"), [("fp32", "are these the images that it was tested on?"), ("bf16", "it was tested in bf16")]
)
def test_another_dice_than_the_recorded_one_is_reported_as_a_warning(of_busi, made, tmp_path, precision, cause):
    cell, dice = of_busi
    folder = copy(cell, tmp_path)
    about = json.loads((folder / "cell.json").read_text())
    about["params"]["precision"] = precision
    (folder / "cell.json").write_text(json.dumps(about))
    retest(folder, dice + 0.0009)
    assert made(folder)[-1].endswith(f"mean Dice {dice:.4f} there, recorded {dice + 0.0009:.4f}")
    for other in (dice + 0.0011, dice - 0.0011):
        retest(folder, other)
        reported = f"; WARNING: mean Dice {dice:.4f} there, but recorded {other:.4f} ({cause})"
        assert made(folder)[-1].endswith(reported)
    assert (tmp_path / "a.onnx").is_file()


def test_a_mean_dice_worked_out_by_hand(of_busi, tmp_path):
    folder = copy(of_busi[0], tmp_path)
    retest(folder, 0.75)
    result = np.array([[0.6, 0.5], [0.9, 0.1]], np.float32).reshape(2, 1, 1, 2)  # lesion, none; lesion, none
    masks = torch.tensor([[1, 1], [1, 0]]).reshape(2, 1, 1, 2)  # Dice 2/3 and 1
    reported = onnx_file.compare_dice(models.load_model(folder), result, masks)
    assert reported.startswith("WARNING: mean Dice 0.8333 there, but recorded 0.7500 ")
    model = models.load_model(folder)
    (folder / "finished.json").write_text("{}")
    with pytest.raises(InputError, match=r"finished\.json is damaged"):
        onnx_file.compare_dice(model, result, masks)


def test_images_that_were_moved_are_found_by_their_new_folder(of_busi, small_busi, made, tmp_path):
    cell, dice = of_busi
    folder = copy(cell, tmp_path)
    text = (folder / "cell.json").read_text()
    (folder / "cell.json").write_text(text.replace(str(small_busi), "/gone"))
    reported, _, _, last = made(folder)
    why = "the run's test images cannot be read: data.root=/gone: no such folder; name the folder that holds the images"
    instead = "compared on 4 phantoms instead (--data-root DIR names images that were moved)"
    assert reported == f"{why}; {instead}"
    assert last.endswith(" on 4 phantoms, allowed 1e-04")
    assert made(folder, "--data-root", small_busi)[-1].endswith(f"mean Dice {dice:.4f} there, recorded {dice:.4f}")


def test_a_folder_that_was_named_and_has_not_the_images_is_an_error(of_busi, made, tmp_path):
    (reported,) = made(of_busi[0].folder, "--data-root", tmp_path)
    assert reported.startswith(f"kdsweep: error: --data-root {tmp_path}: data.root={tmp_path}: no folder benign/")
    (reported,) = made(of_busi[0].folder, "--data-root", tmp_path, "--images", tmp_path)
    assert reported.endswith(": not together with --data-root; leave out one of them")
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "reported"),
    [
        ("cell.json", "kdsweep.data.Busi", "own_data.Clinic", "data.source=own_data.Clinic: only kdsweep.data.Udiat"),
        ("split.json", '"test"', '"tests"', r"split.json is missing or damaged"),
        ("split.json", '"benign (', '"gone (', "is not in the data set any more"),
    ],
)
def test_test_images_that_cannot_be_had_are_reported_with_the_reason(of_busi, made, tmp_path, file, old, new, reported):
    folder = copy(of_busi[0], tmp_path)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    first, _, _, last = made(folder)
    assert first.startswith("the run's test images cannot be read: ")
    assert reported in first
    assert "4 phantoms" in last


def test_phantoms_are_read_from_the_runs_own_store_or_drawn_anew(cell, made, tmp_path):
    assert "on the run's 1 test images (phantom), allowed 1e-04; " in made(cell.folder)[-1]
    folder = copy(cell, tmp_path / "elsewhere")
    assert "on the run's 1 test images (phantom), allowed 1e-04; " in made(folder)[-1]
    assert [entry.name for entry in (tmp_path / "elsewhere").iterdir()] == ["cells"]
    assert not (tmp_path / "store").exists()


# ---- what differs --------------------------------------------------------------------------------------------------


class Constant:
    """In place of ONNX Runtime: the same probability everywhere."""

    def __init__(self, value: float) -> None:
        self.value = value

    def run(self, _names, inputs):
        (images,) = inputs.values()
        return [np.full((len(images), 1, *images.shape[2:]), self.value, np.float32)]


@pytest.mark.parametrize("value", [0.5, 2.0, np.nan])
def test_a_file_that_computes_something_else_is_not_written(cell, made, tmp_path, monkeypatch, value):
    out = tmp_path / "a.onnx"
    out.write_text("an older one")
    monkeypatch.setattr(onnx_file, "open_session", lambda _: Constant(value))
    reported = made(cell.folder)[-1]
    assert "not written, probabilities of ONNX Runtime and PyTorch differ by up to" in reported
    assert reported.endswith("on the run's 1 test images (phantom); allowed are 1e-04")
    assert out.read_text() == "an older one"


def test_the_largest_difference_worked_out_by_hand():
    def network(images):
        return images[:, :1]

    images = [torch.tensor([0.2, 0.45]).expand(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.6)]
    result = onnx_file.onnx_probabilities(Constant(0.5), images)
    assert result.shape == (2, 1, 2, 2)
    assert onnx_file.largest_difference(result, network, images) == pytest.approx(0.3)
    result[1, 0, 1, 1] = np.nan
    assert onnx_file.largest_difference(result, network, images) == np.inf


def test_a_missing_package_bad_weights_and_a_bad_place_are_reported_in_one_line(
    cell, content, tmp_path, monkeypatch, capsys
):
    def refused(*arguments: object) -> str:
        assert cli.main(["export", *map(str, arguments)]) == 1
        printed = capsys.readouterr().err
        assert printed.startswith("kdsweep: error: ")
        assert printed.count("\n") == 1
        return printed

    monkeypatch.setattr(onnx_file, "to_onnx", lambda _: content)
    assert "is a folder" in refused("--run", cell.folder, "--out", tmp_path)
    (tmp_path / "file").touch()
    assert "a.onnx: Not a directory" in refused("--run", cell.folder, "--out", tmp_path / "file" / "a.onnx")
    folder = copy(cell, tmp_path)
    damage(folder / "student.safetensors")
    assert "checksum differs" in refused("--run", folder, "--out", tmp_path / "a.onnx")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name))
    reported = refused("--run", cell.folder, "--out", tmp_path / "a.onnx")
    assert reported == "kdsweep: error: ONNX export needs onnxscript: pip install 'kdsweep[export]'\n"
    assert not (tmp_path / "a.onnx").exists()
