"""A trained network as ONNX: the same probabilities, for any batch, and what the file says about itself."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from test_predict import SIZE, copy, damage, finish, noise

from kdsweep import costs, export, predict
from kdsweep.errors import InputError
from kdsweep.grid import Cell


@pytest.fixture(scope="module")
def cell(tmp_path_factory) -> Cell:
    return finish(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def exported(cell) -> Path:
    file = cell.store / "new" / "student.onnx"
    assert export.main(["--run", "Student/split0", "--store", str(cell.store), "--out", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def content(cell) -> bytes:
    return export.to_onnx(predict.load_model(cell.folder))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_batch_of_any_size_gives_the_networks_probabilities(cell, exported, batch):
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    model = predict.load_model(cell.folder)
    images = torch.cat([predict.prepare(noise(70, 90, 3, seed=i), image_size=SIZE) for i in range(batch)])
    (found,) = session.run(["probabilities"], {"images": images.numpy()})
    with torch.no_grad():
        expected = torch.sigmoid(model.network(images).logits).numpy()
    assert found.shape == (batch, 1, SIZE, SIZE)
    assert found.std() > 0.01
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_file_says_where_it_is_from_and_how_images_are_prepared(cell, exported):
    proto = onnx.load(exported)
    onnx.checker.check_model(proto, full_check=True)
    told = {entry.key.removeprefix("kdsweep."): entry.value for entry in proto.metadata_props}
    steps = told.pop("preprocessing").split("; ")
    assert told.pop("output").startswith("probability of lesion")
    assert told == {
        "notation": "Student",
        "split": "0",
        "seed": "0",
        "role": "student",
        "fingerprint": cell.fingerprint,
        "source_run": cell.folder.name,
        "encoder": "mobilenetv3_small_trimmed",
        "image_size": str(SIZE),
        "threshold": "0.5",
    }
    assert "subtract the mean (0.485, 0.456, 0.406), divide by the standard deviation (0.229, 0.224, 0.225)" in steps
    assert any(step.startswith(f"resize the whole image to {SIZE} x {SIZE}") for step in steps)
    assert str(Path(export.__file__).parent).encode() not in exported.read_bytes()  # no paths of this computer
    assert [file.name for file in exported.parent.iterdir()] == ["student.onnx"]


def test_the_preprocessing_that_it_tells_is_the_one_that_is_done():
    image = noise(SIZE, SIZE, 3)
    by_hand = (image / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    found = predict.prepare(image, image_size=SIZE)
    np.testing.assert_allclose(found[0].numpy(), by_hand.transpose(2, 0, 1), rtol=0, atol=1e-5)


def test_it_tells_parity_and_latency(cell, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.fromarray(noise(91, 77)).save(tmp_path / "images" / "a.png")
    out = tmp_path / "a.onnx"
    threads = torch.get_num_threads()
    call = ["--run", str(cell.folder), "--out", str(out), "--images", str(tmp_path / "images")]
    assert export.main(call) == 0
    first, latency, last = capsys.readouterr().out.splitlines()
    name = "Student split 0 seed 0 (mobilenetv3_small_trimmed, 64 x 64)"
    assert first == f"{name} to ONNX opset 18: {out}"
    assert latency.startswith(f"one image on one thread of {costs.cpu_name()}, median of 50: ONNX Runtime ")
    assert last.startswith(f"wrote {out} (")
    assert last.endswith(f"on 1 images of {tmp_path / 'images'}, allowed 1e-04")
    assert torch.get_num_threads() == threads
    (tmp_path / "images" / "b.png").touch()
    assert export.main(call) == 1
    assert "b.png is not a readable image" in capsys.readouterr().err


class Constant:
    """In place of ONNX Runtime: the same probability everywhere."""

    def __init__(self, value: float) -> None:
        self.value = value

    def run(self, _names, inputs):
        (images,) = inputs.values()
        return [np.full((len(images), 1, *images.shape[2:]), self.value, np.float32)]


@pytest.mark.parametrize("value", [0.5, 2.0, np.nan])
def test_a_file_that_computes_something_else_is_not_written(cell, content, tmp_path, monkeypatch, value):
    out = tmp_path / "a.onnx"
    out.write_text("an older one")
    monkeypatch.setattr(export, "to_onnx", lambda _: content)
    monkeypatch.setattr(export, "open_session", lambda _: Constant(value))
    with pytest.raises(InputError, match="not written, probabilities of ONNX Runtime and PyTorch differ by up to"):
        export.make(predict.load_model(cell.folder), out=out, images=None)
    assert out.read_text() == "an older one"


def test_the_largest_difference_worked_out_by_hand():
    def network(images):
        return images[:, :1]

    inputs = [torch.tensor([0.2, 0.45]).expand(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.6)]
    assert export.largest_difference(Constant(0.5), network, inputs) == pytest.approx(0.3)
    assert export.largest_difference(Constant(np.nan), network, inputs) == np.inf


def test_without_a_folder_phantoms_and_noise_are_compared_on():
    first, again = (export.check_inputs(images=None, image_size=SIZE) for _ in range(2))
    assert [tuple(images.shape) for images in first] == [(1, 3, SIZE, SIZE)] * 8
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_durations_are_told_as_median_and_95th_percentile(monkeypatch):
    durations_s = [9.0] * export.WARM_UP + [number / 1000 for number in range(1, export.TIMED + 1)]
    ticks = iter(tick for duration_s in durations_s for tick in (0.0, duration_s))
    monkeypatch.setattr(export.time, "perf_counter", lambda: next(ticks))
    assert export.time_ms(lambda: None) == pytest.approx((25.5, 47.55))


def test_a_missing_package_bad_weights_and_a_bad_place_are_told_in_one_line(
    cell, content, tmp_path, monkeypatch, capsys
):
    def refused(*arguments: object) -> str:
        assert export.main([str(argument) for argument in arguments]) == 1
        printed = capsys.readouterr().err
        assert printed.startswith("kdsweep: error: ")
        assert printed.count("\n") == 1
        return printed

    monkeypatch.setattr(export, "to_onnx", lambda _: content)
    assert "is a folder" in refused("--run", cell.folder, "--out", tmp_path)
    (tmp_path / "file").touch()
    assert "cannot write there" in refused("--run", cell.folder, "--out", tmp_path / "file" / "a.onnx")
    folder = copy(cell, tmp_path)
    damage(folder / "student.safetensors")
    assert "checksum differs" in refused("--run", folder, "--out", tmp_path / "a.onnx")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name))
    told = refused("--run", cell.folder, "--out", tmp_path / "a.onnx")
    assert told == "kdsweep: error: ONNX export needs onnxscript: pip install 'kdsweep[export]'\n"
    assert not (tmp_path / "a.onnx").exists()
