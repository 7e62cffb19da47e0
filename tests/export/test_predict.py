"""Masks of one's own images, from a run that looks finished: its network has random weights, nothing is trained."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scans import PATIENT, deep_phantom, save_dicom

from kdsweep import cli
from kdsweep.config import composition, identity, inputs
from kdsweep.config.grid import Cell
from kdsweep.core.device import Compute, placed
from kdsweep.core.errors import InputError
from kdsweep.data.images import resize_image
from kdsweep.data.loaders import EvalPart
from kdsweep.data.pixels import read_gray_or_color
from kdsweep.evaluation import scoring
from kdsweep.export import model as models
from kdsweep.export import onnx_file, predict
from kdsweep.models.weights import read_weights
from kdsweep.store import cell_folder, checkpoint
from kdsweep.tracking import mirror
from kdsweep.training import build
from kdsweep.training.outcome import PREDICTIONS, SCORES

SIZE = 64
CPU = Compute(device=torch.device("cpu"), precision="fp32")


def finish(store: Path, *overrides: str, teacher: bool = False) -> Cell:
    """A finished Student (or the Teacher of a cell) of the quick profile whose weights were never trained."""
    path = [] if any(word.startswith("path=") for word in overrides) else ["path=none"]
    cfg = composition.compose(["profile=quick", *path, "device=cpu", "data.count=5", f"store={store}", *overrides])
    cell = identity.teacher_cell(cfg) if teacher else identity.cell(cfg)
    network = build.teacher_network(cfg) if teacher else build.student_network(cfg)
    file = f"{'teacher' if teacher else 'student'}.safetensors"
    cell_folder.describe(cell, split=inputs.split_ids(cfg), params=identity.params(cfg), tags=build.tags(cfg))
    checkpoint.save_network(cell.folder / file, network)
    scores = {"image": cell_folder.read_split(cell.folder)["test"], "dice": 0.5}
    pd.DataFrame(scores).to_csv(cell.folder / SCORES, index=False)
    cell_folder.write_finished(cell.folder, values={"test/dice": 0.5}, files=[file])
    return cell


@pytest.fixture(scope="module")
def cell(tmp_path_factory) -> Cell:
    return finish(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def model(cell) -> models.Model:
    returned = models.load_model(cell.folder)
    placed(returned.network, CPU)
    return returned


def noise(*shape: int, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def run(*arguments: object) -> int:
    return cli.main(["predict", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    """The one line with which a command ends."""
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("kdsweep: error: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of images of every mode and of odd sizes, the smallest below that of the network."""
    folder = tmp_path / "images"
    folder.mkdir()
    gray = noise(71, 93)
    Image.fromarray(gray).save(folder / "gray.png")
    Image.fromarray(gray).save(folder / "lossy.JPG")
    Image.fromarray(noise(33, 130, 3)).save(folder / "rgb.bmp")
    Image.fromarray(noise(64, 65, 4)).save(folder / "alpha.png")
    Image.fromarray(noise(90, 70, 2)).save(folder / "gray-alpha.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(folder / "deep.tif")
    Image.fromarray(noise(70, 101, 3)).quantize(16).save(folder / "palette.png")
    Image.fromarray(gray > 127).save(folder / "bits.png")
    return folder


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_on_images_of_the_networks_size_it_is_what_testing_computes(model):
    pictures = noise(6, SIZE, SIZE, 3)
    part = EvalPart(["a"] * 6, ["b"] * 6, torch.from_numpy(pictures), torch.zeros(6, 1, SIZE, SIZE, dtype=torch.uint8))
    tested = scoring.predict(model.network, part, compute=CPU)[:, 0].numpy()
    single = [predict.probabilities(model.network, picture, image_size=SIZE, compute=CPU) for picture in pictures]
    assert 0.01 < tested.mean() < 0.99
    np.testing.assert_array_equal(np.stack(single) > predict.THRESHOLD, tested)


def test_other_sizes_are_resized_as_test_images_and_their_probabilities_back(model):
    large = np.repeat(np.repeat(noise(SIZE, SIZE, 3), 3, axis=0), 2, axis=1)
    returned = predict.probabilities(model.network, large, image_size=SIZE, compute=CPU)
    small = predict.probabilities(model.network, resize_image(large, SIZE), image_size=SIZE, compute=CPU)
    assert returned.shape == (3 * SIZE, 2 * SIZE)
    np.testing.assert_allclose(returned[1::3, ::2][:, 1:], 0.75 * small[:, 1:] + 0.25 * small[:, :-1], atol=1e-5)


def test_a_row_of_the_table_worked_out_by_hand():
    probability = np.array([[0.1, 0.5, 0.6, 0.9], [0.2, 0.3, 0.4, 0.0]], np.float32)
    assert predict.measure("a.png", probability) == ["a.png", 4, 2, 2, "25.0000", "0.750000", "0.900000"]
    empty = np.full((2, 2), 0.5, np.float32)
    assert predict.measure("b.png", empty) == ["b.png", 2, 2, 0, "0.0000", "", "0.500000"]


def test_the_contour_is_drawn_on_the_image_and_nothing_else():
    image, mask = np.full((20, 30, 3), 7, np.uint8), np.zeros((20, 30), bool)
    np.testing.assert_array_equal(predict.draw(image, mask), image)
    mask[5:10, 10:20] = True
    drawn = (predict.draw(image, mask) == predict.CONTOUR).all(axis=2)
    inner = np.zeros_like(mask)
    inner[6:9, 11:19] = True
    np.testing.assert_array_equal(drawn, mask & ~inner)
    assert (image == 7).all()


# ---- a folder ------------------------------------------------------------------------------------------------------


def test_every_mode_and_size_gets_a_mask_an_overlay_and_a_row(cell, model, images, tmp_path, capsys):
    (images / "notes.txt").write_text("text")
    (images / "._gray.png").write_text("hidden")
    (images / "folder.png").mkdir()
    out = tmp_path / "new" / "out"
    assert run("--run", cell.folder, "--images", images, "--out", out) == 0
    first, last = capsys.readouterr().out.splitlines()
    name = "Student split 0 seed 0 (mobilenetv3_small_trimmed, 64 x 64)"
    assert first == f"{name}: 9 images of {images} on cpu"
    results = f"wrote masks and overlays of 9 of 9 images and predictions.csv to {out}"
    assert last == f"{results}; failed: 0; other files skipped: 3"
    table = pd.read_csv(out / "predictions.csv", index_col="image")
    files = [file for file in images.iterdir() if file.name in table.index]
    assert len(files) == len(table) == 9
    for file in files:
        image, row = read_gray_or_color(file), table.loc[file.name]
        name = file.name if file.stem == "deep" else file.stem  # deep.png and deep.tif
        mask = np.asarray(Image.open(out / f"{name}_mask.png"))
        probability = predict.probabilities(model.network, image, image_size=SIZE, compute=CPU)
        assert mask.shape == image.shape[:2] == (row["height"], row["width"])
        assert np.asarray(Image.open(out / f"{name}_overlay.png")).shape == image.shape
        np.testing.assert_array_equal(mask, np.where(probability > 0.5, 255, 0))
        assert row["area_px"] == (mask == 255).sum()
        assert row["area_percent"] == pytest.approx(100 * (mask == 255).mean(), abs=1e-4)
        mean = probability[mask == 255].mean() if mask.any() else math.nan
        assert row["mean_probability"] == pytest.approx(mean, abs=1e-6, nan_ok=True)
        assert row["max_probability"] == pytest.approx(probability.max(), abs=1e-6)
    assert len(list(out.iterdir())) == 2 * 9 + 1
    assert table["area_px"].gt(0).any()


def test_sixteen_bits_and_eight_give_the_same(cell, images, tmp_path):
    run("--run", cell.folder, "--images", images, "--out", tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "predictions.csv", index_col="image")
    for deep in ("deep.png", "deep.tif"):
        pd.testing.assert_series_equal(table.loc[deep], table.loc["gray.png"], check_names=False)


def test_images_are_read_through_the_window_of_the_training(tmp_path_factory, tmp_path):
    trained, out = finish(tmp_path_factory.mktemp("windowed"), "+data.window=[0,4080]"), tmp_path / "out"
    deep = deep_phantom()
    (tmp_path / "images").mkdir()
    Image.fromarray((deep / 16).round().astype(np.uint8)).save(tmp_path / "images" / "gray.png")
    Image.fromarray(deep).save(tmp_path / "images" / "deep.tif")
    save_dicom(tmp_path / "images" / "scan.dcm", deep, bits=12, WindowCenter=9, WindowWidth=3)
    assert run("--run", trained.folder, "--images", tmp_path / "images", "--out", out) == 0
    table = pd.read_csv(out / "predictions.csv", index_col="image")
    for name in ("deep.tif", "scan.dcm"):
        pd.testing.assert_series_equal(table.loc[name], table.loc["gray.png"], check_names=False)
    assert all(PATIENT.encode() not in file.read_bytes() for file in out.iterdir())
    steps = onnx_file.metadata(models.load_model(trained.folder))["kdsweep.preprocessing"]
    assert "three equal channels, more than 8 bit mapped from 0 to 4080 onto 0 to 255, clipped and rounded;" in steps


def test_images_that_fail_are_named_and_the_others_done(cell, images, tmp_path, capsys, monkeypatch):
    (images / "broken.png").write_bytes((images / "gray.png").read_bytes()[:200])
    (images / "empty.tif").touch()
    Image.fromarray(noise(40, 400)).save(images / "large.png")
    Image.fromarray(noise(40, 40)).save(images / "many.tif", save_all=True, append_images=[Image.new("L", (40, 40))])
    Image.fromarray(noise(40, 40)).save(images / f"{'n' * 249}.png")
    Image.fromarray(noise(40, 40)).save(images / "sc\udce9n.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7999)
    out = tmp_path / "out"
    assert run("--run", cell.folder, "--images", images, "--out", out) == 1
    printed = capsys.readouterr()
    expected = [
        "broken.png is not a readable image (image file is truncated; save it again or leave it out)",
        "empty.tif is not a readable image (its content is of no image format; save it again or leave it out)",
        "large.png is not a readable image (Image size (16000 pixels) exceeds limit of 15998 pixels, could be "
        "decompression bomb DOS attack; save it with fewer pixels)",
        "many.tif holds 2 pages or frames; save one of them as a separate file",
        f"{'n' * 249}.png: its name is too long for {'n' * 249}_overlay.png in {out}; shorten it",
        "sc\\xe9n.png is not a readable image (its name is not in UTF-8; rename it)",
    ]
    assert printed.err.splitlines() == [f"skipped: {images}/{line}" for line in expected]
    assert "of 9 of 15 images" in printed.out
    assert "; failed: 6;" in printed.out
    assert len(pd.read_csv(out / "predictions.csv")) == 9
    assert len(list(out.iterdir())) == 2 * 9 + 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [(MemoryError(), "MemoryError; save it with fewer pixels"), (RuntimeError("CUDA error: assert"), None)],
)
def test_a_lack_of_memory_ends_one_image_and_a_broken_device_all(
    cell, images, tmp_path, capsys, monkeypatch, error, expected
):
    probabilities = predict.probabilities

    def first_fails(network, image, **more):
        if image.shape == (64, 65, 3):  # alpha.png
            raise error
        return probabilities(network, image, **more)

    monkeypatch.setattr(predict, "probabilities", first_fails)
    call = ("--run", cell.folder, "--images", images, "--out", tmp_path / "out")
    assert run(*call) == 1
    (line,) = capsys.readouterr().err.splitlines()
    if expected is None:
        assert line.startswith("kdsweep: error: RuntimeError: CUDA error: assert")
        return
    assert line.startswith(f"skipped: {images}/alpha.png is not a readable image ({expected}")
    assert len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 8


def test_a_photograph_on_its_side_gets_an_upright_mask(cell, tmp_path):
    (tmp_path / "images").mkdir()
    exif, picture = Image.Exif(), Image.fromarray(noise(40, 90, 3))
    exif[0x112] = 6
    picture.save(tmp_path / "images" / "side.png", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "images" / "upright.png")
    assert run("--run", cell.folder, "--images", tmp_path / "images", "--out", tmp_path / "out") == 0
    for kind in ("mask", "overlay"):
        side, upright = (Image.open(tmp_path / "out" / f"{name}_{kind}.png") for name in ("side", "upright"))
        with side, upright:
            assert side.size == upright.size == (40, 90)
            np.testing.assert_array_equal(np.asarray(side), np.asarray(upright))


def test_masks_that_lie_beside_their_images_are_not_images(tmp_path):
    for name in ("benign (1)", "benign (1)_mask", "benign (1)_mask_1", "lone_mask"):
        Image.fromarray(noise(8, 8)).save(tmp_path / f"{name}.png")
    files, others = predict.list_images(tmp_path)
    assert list(files) == ["benign (1)", "lone_mask"]
    assert others == 2


def test_an_interrupt_leaves_the_table_of_what_is_done(cell, images, tmp_path, capsys, monkeypatch):
    calls, probabilities = [], predict.probabilities

    def third_is_interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return probabilities(*args, **kwargs)

    monkeypatch.setattr(predict, "probabilities", third_is_interrupted)
    out = tmp_path / "out"
    assert run("--run", cell.folder, "--images", images, "--out", out) == 130
    assert capsys.readouterr().err == "kdsweep: stopped; what is written so far stays\n"
    assert len(pd.read_csv(out / "predictions.csv")) == 2


def test_it_writes_only_where_nothing_is_lost(cell, images, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    call = ("--run", cell.folder, "--images", images, "--out")
    assert f"--out {out}: not empty" in refused(capsys, *call, out)
    assert f"--out {images}: is the folder of the images" in refused(capsys, *call, images, "--overwrite")
    assert f"--out {out / 'mine.txt'}: is a file" in refused(capsys, *call, out / "mine.txt")
    assert "Not a directory" in refused(capsys, *call, out / "mine.txt" / "deeper")
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    assert run(*call, out, "--overwrite") == run(*call, out, "--overwrite") == 0
    assert (out / "mine.txt").read_text() == "mine"
    assert len(list(out.iterdir())) == 2 * 9 + 2


def test_a_folder_without_images_and_a_device_that_is_not_there_are_reported(cell, images, tmp_path, capsys):
    call = ("--run", cell.folder, "--out", tmp_path / "out", "--images")
    (tmp_path / "empty").mkdir()
    assert "no images in it; expected files ending in .png" in refused(capsys, *call, tmp_path / "empty")
    assert "no such folder" in refused(capsys, *call, tmp_path / "nowhere")
    assert "device=tpu is not allowed" in refused(capsys, *call, images, "--device", "tpu")
    assert not (tmp_path / "out").exists()


def test_results_of_images_of_one_stem_do_not_meet(tmp_path):
    for name in ("x.png", "X.tif", "x.png.jpg", "y.png", "z.webp"):
        (tmp_path / name).touch()
    returned, _ = predict.list_images(tmp_path)
    assert {name: file.name for name, file in returned.items()} == {
        "X.tif": "X.tif",
        "x.png": "x.png",
        "x.png.jpg": "x.png.jpg",
        "y": "y.png",
        "z": "z.webp",
    }


# ---- the run -------------------------------------------------------------------------------------------------------


def find(run: object, store: Path) -> Path:
    return models.find_folder(str(run), store=store, uri=None)


def test_a_run_is_found_by_folder_and_by_name(cell):
    names = (cell.folder, cell.folder.name, "Student/split0", "Student/split0/seed0")
    assert [find(name, cell.store) for name in names] == [cell.folder] * 4


@pytest.mark.parametrize("name", ["Student/split1", "Student/split0/seed7", "S*/split0", "nothing", "../split0/x"])
def test_a_run_that_is_not_there_is_reported(cell, name):
    with pytest.raises(InputError, match=r"--run .*: (not in --store|no such folder with a cell.json)"):
        find(name, cell.store)


def copy(cell: Cell, store: Path, digest="0123456789") -> Path:
    name = cell.folder.name.rpartition("-")[0]
    return Path(shutil.copytree(cell.folder, store / "cells" / f"{name}-{digest}"))


def test_a_name_means_the_finished_run_and_two_of_them_are_not_guessed_between(cell, tmp_path):
    finished, other = copy(cell, tmp_path), copy(cell, tmp_path, "1111111111")
    with pytest.raises(InputError, match=r"2 finished runs have this name.*0123456789, .*1111111111"):
        find("Student/split0", tmp_path)
    for left, right in ((finished, other), (other, finished)):  # whichever comes first by its name
        (right / cell_folder.FINISHED).rename(tmp_path / "aside")
        assert find("Student/split0", tmp_path) == left
        (tmp_path / "aside").rename(right / cell_folder.FINISHED)
    for folder in (finished, other):
        (folder / cell_folder.FINISHED).unlink()
    with pytest.raises(InputError, match="not finished"):
        models.load_model(find("Student/split0", tmp_path))


def test_a_run_is_found_by_its_id_in_mlflow(cell, empty_store, tmp_path):
    shutil.copytree(empty_store, tmp_path, dirs_exist_ok=True)
    shutil.copytree(cell.store / "cells", tmp_path / "cells")
    folder = tmp_path / "cells" / cell.folder.name
    tracker = mirror.Tracker(store=tmp_path, uri=None)
    for name in SCORES, PREDICTIONS:
        (folder / name).touch()
    run_id = tracker.sync(cell_folder.read(folder), sweep="study")
    assert find(run_id, tmp_path) == folder
    with pytest.raises(InputError, match="MLflow does not give it"):
        find("0" * 32, tmp_path)
    client = mirror.MlflowClient(tracking_uri=mirror.store_uri(tmp_path, None))
    sweep = client.get_run(run_id).data.tags["mlflow.parentRunId"]
    with pytest.raises(InputError, match="is not one of a Student"):
        find(sweep, tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"its folder .* is not there"):
        find(run_id, tmp_path)


def test_asking_for_an_id_creates_no_store(tmp_path):
    with pytest.raises(InputError, match=r"has no mlflow\.db"):
        find("0" * 32, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_is_loaded_as_one(tmp_path):
    teacher = finish(tmp_path, "path=L", teacher=True)
    model = models.load_model(find(f"{teacher.notation}/split0", tmp_path))
    assert (model.encoder, model.network.training) == ("resnet18", False)
    stored = read_weights(teacher.folder / "teacher.safetensors")
    torch.testing.assert_close(model.network.state_dict(), stored, rtol=0, atol=0)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_what_is_damaged_is_refused_and_left_as_it_is(cell, images, tmp_path, capsys):
    folder = copy(cell, tmp_path)
    weights = folder / "student.safetensors"
    call = ("--run", folder, "--images", images, "--out", tmp_path / "out")
    damage(weights)
    assert f"{weights}: missing or damaged, its checksum differs" in refused(capsys, *call)
    weights.unlink()
    assert f"{weights}: missing or damaged" in refused(capsys, *call)
    assert (folder / cell_folder.FINISHED).exists()
    about = json.loads((folder / cell_folder.CELL).read_text())
    del about["tags"]["kdsweep.notation"]
    (folder / cell_folder.CELL).write_text(json.dumps(about))
    assert "cell.json is damaged" in refused(capsys, *call)
    (folder / cell_folder.CELL).write_text("{")
    assert "cell.json is damaged" in refused(capsys, *call)


def test_weights_of_another_network_are_refused(cell, tmp_path):
    folder = copy(cell, tmp_path)
    about = json.loads((folder / cell_folder.CELL).read_text())
    about["params"]["student.decoder_channels"] = [32, 32, 16, 16, 16]
    (folder / cell_folder.CELL).write_text(json.dumps(about))
    with pytest.raises(InputError, match="belongs to another network"):
        models.load_model(folder)


def test_loading_writes_nothing(cell):
    before = {file: file.stat().st_mtime_ns for file in cell.folder.rglob("*")}
    models.load_model(cell.folder)
    assert {file: file.stat().st_mtime_ns for file in cell.folder.rglob("*")} == before
