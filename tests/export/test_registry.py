"""A network in MLflow's model registry: what is loaded from there is what was trained, and nothing else has changed."""

import itertools
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import mlflow
import numpy as np
import onnxruntime
import pytest
import torch
from small import STUDENT
from test_predict import SIZE, finish, noise

from kdsweep import cli
from kdsweep.config.grid import Cell
from kdsweep.core.errors import InputError
from kdsweep.data import phantom
from kdsweep.export import model as models
from kdsweep.export import onnx_file, predict
from kdsweep.store import cell_folder
from kdsweep.tracking import mirror
from kdsweep.training.outcome import PREDICTIONS, SCORES

NAME = "kdsweep-student"


@pytest.fixture(scope="module")
def cell(empty_store, tmp_path_factory) -> Cell:
    """A finished cell that is in the MLflow of its store."""
    cell = finish(Path(shutil.copytree(empty_store, tmp_path_factory.mktemp("registered") / "store")), *STUDENT)
    for name in SCORES, PREDICTIONS:
        (cell.folder / name).touch()
    mirror.Tracker(store=cell.store, uri=None).sync(cell_folder.read(cell.folder), sweep="study")
    return cell


@pytest.fixture(scope="module")
def content(cell) -> bytes:
    return onnx_file.to_onnx(models.load_model(cell.folder))


@pytest.fixture
def client(cell) -> mlflow.MlflowClient:
    uri = mirror.store_uri(cell.store, None)
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def call(cell, content, tmp_path, monkeypatch):
    """Exports and registers by the command, with the export done already."""
    monkeypatch.setattr(onnx_file, "to_onnx", lambda _: content)

    def export_and_register(name: str, *more: str) -> int:
        words = ["--run", str(cell.folder), "--out", str(tmp_path / "a.onnx"), "--register", name]
        return cli.main(["export", *words, *more])

    return export_and_register


def run_of(client, cell: Cell):
    (run,) = client.search_runs(["1"], f"tags.`kdsweep.fingerprint` = '{cell.fingerprint}'")
    return run


def probabilities(model: models.Model, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return torch.sigmoid(model.network(images).logits).numpy()


def test_what_is_registered_is_loaded_as_the_printed_line_says(cell, client, call, capsys, monkeypatch):
    before, uris = run_of(client, cell), (mlflow.get_tracking_uri(), mlflow.get_registry_uri())
    for version in (1, 2):
        assert call(NAME) == 0
        reported = capsys.readouterr().out.splitlines()[-1]
        place = mirror.store_uri(cell.store, None)
        loading = f'MLFLOW_TRACKING_URI={place} and mlflow.pyfunc.load_model("models:/{NAME}/{version}")'
        assert reported == f"registered {NAME} version {version}; to load it: {loading}"
    after = run_of(client, cell)
    assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri()) == uris
    assert mlflow.active_run() is None
    assert after.info.status == "FINISHED"
    assert after.info.end_time is not None
    assert (after.info, after.data.metrics, after.data.tags) == (before.info, before.data.metrics, before.data.tags)
    assert len(after.outputs.model_outputs) == 2

    monkeypatch.setenv("MLFLOW_TRACKING_URI", re.search(r"MLFLOW_TRACKING_URI=(\S+)", reported)[1])
    loaded = mlflow.pyfunc.load_model(re.search(r'load_model\("(.+)"\)', reported)[1])
    model = models.load_model(cell.folder)
    images = torch.cat([predict.prepare(noise(70, 90, 3, seed=i), image_size=SIZE) for i in range(3)])
    result = loaded.predict({"images": images.numpy()})["probabilities"]
    np.testing.assert_allclose(result, probabilities(model, images), rtol=0, atol=1e-4)
    assert result.std() > 0.01


def test_a_version_says_what_it_takes_and_from_which_run_it_is(cell, client, call, content):
    assert call("about") == 0
    version = client.get_model_version("about", "1")
    run = run_of(client, cell)
    assert version.run_id == run.info.run_id
    assert version.tags["kdsweep.fingerprint"] == cell.fingerprint
    folder = Path(client.get_model_version_download_uri("about", "1").removeprefix("file://"))
    about = mlflow.models.Model.load(str(folder))
    (images,), (output,) = about.signature.inputs.inputs, about.signature.outputs.inputs
    assert (images.name, images.shape, images.type) == ("images", (-1, 3, SIZE, SIZE), np.dtype("float32"))
    assert (output.name, output.shape, output.type) == ("probabilities", (-1, 1, SIZE, SIZE), np.dtype("float32"))
    assert about.run_id == run.info.run_id
    props = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).get_modelmeta()
    assert about.metadata == props.custom_metadata_map
    assert "subtract the mean (0.485" in about.metadata["kdsweep.preprocessing"]
    needs = {line.partition("==")[0] for line in (folder / "requirements.txt").read_text().split()}
    assert needs == {"mlflow", "onnx", "onnxruntime"}
    logged = client.get_logged_model(about.model_id)
    assert (logged.status, logged.source_run_id) == ("READY", run.info.run_id)
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "about", "version": 1}]


def test_variables_that_other_threads_read_meanwhile_do_no_harm(call):
    stop, interval = threading.Event(), sys.getswitchinterval()

    def read_many() -> None:
        for i in itertools.count():
            if stop.is_set():
                return
            os.environ[name := f"KDSWEEP_TEST_{i}"] = "x"
            os.environ.get(name)
            del os.environ[name]

    reader = threading.Thread(target=read_many)
    sys.setswitchinterval(1e-6)
    reader.start()
    try:
        assert call("meanwhile") == 0
    finally:
        stop.set()
        reader.join()
        sys.setswitchinterval(interval)


def test_the_example_is_a_phantom(cell, client, call):
    assert call("example") == 0
    folder = Path(client.get_model_version_download_uri("example", "1").removeprefix("file://"))
    ((name, image),) = json.loads((folder / "input_example.json").read_text()).items()
    gray = next(phantom.cohort(count=1, seed=0)).image
    drawn = predict.prepare(np.repeat(gray[..., None], 3, axis=2), image_size=SIZE)
    assert name == "images"
    np.testing.assert_allclose(np.array(image), drawn.numpy(), rtol=0, atol=1e-5)


def test_a_model_that_comes_back_changed_leaves_no_version(cell, client, content):
    model = models.load_model(cell.folder)
    for weights in model.network.parameters():
        weights.data.zero_()
    with pytest.raises(
        InputError, match=r"--register changed: not registered, the model that MLflow loads differs by .*1e-04"
    ):
        onnx_file.register_model(model, content, name="changed", store=cell.store, uri=None)
    assert client.search_registered_models("name = 'changed'") == []
    assert {logged.status for logged in client.search_logged_models(["1"])} <= {"READY"}


def test_a_failed_version_leaves_the_earlier_ones(cell, client, call, capsys, monkeypatch):
    names = {"MLFLOW_TRACKING_URI", "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert call("kept") == 0
    assert not names & os.environ.keys()  # both are set meanwhile
    monkeypatch.setattr(mlflow.pyfunc, "load_model", lambda _: 1 / 0)
    monkeypatch.setenv("MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING", "true")
    assert call("kept") == 1
    assert os.environ["MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING"] == "true"
    assert "--register kept: MLflow at sqlite:" in capsys.readouterr().err
    assert [int(version.version) for version in client.search_model_versions("name = 'kept'")] == [1]


def test_a_run_that_mlflow_does_not_have_and_a_bad_name_are_reported_in_one_line(
    cell, client, call, content, tmp_path, capsys
):
    def refused(name: str, *more: str) -> str:
        assert call(name, *more) == 1
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        return printed

    assert "--register a/b: MLflow at sqlite:" in refused("a/b")
    run = run_of(client, cell).info
    client.update_run(run.run_id, "RUNNING")
    reported = refused(NAME)
    client.set_terminated(run.run_id, "FINISHED", run.end_time)
    assert f"has no finished run of this cell (fingerprint {cell.fingerprint[:10]}); the sweep's command" in reported
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"not a database" * 100)
    reported = refused(NAME, "--tracking-uri", f"sqlite:///{broken}")
    assert reported.endswith(
        f"tracking.uri=sqlite:///{broken}: the store does not open: (sqlite3.DatabaseError) file is not a database\n"
    )
    model = models.load_model(cell.folder)
    with pytest.raises(InputError, match=rf"--register {NAME}: .* has no mlflow\.db; name the run's MLflow with"):
        onnx_file.register_model(model, content, name=NAME, store=tmp_path, uri=None)


def test_a_registered_model_is_found_again_in_a_store_that_was_moved(cell, client, call, tmp_path):
    assert call("moved") == 0
    run = run_of(client, cell)
    moved = Path(shutil.copytree(cell.store, tmp_path / "elsewhere"))
    mirror.Tracker(store=moved, uri=None)
    uri = mirror.store_uri(moved, None)
    there = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert there.get_model_version_download_uri("moved", "1").startswith(f"file://{moved}/artifacts/")
    logged = there.search_logged_models([run.info.experiment_id])
    assert logged
    assert all(each.artifact_location.startswith(f"file://{moved}/artifacts/") for each in logged)
    assert client.get_model_version_download_uri("moved", "1").startswith(f"file://{cell.store}/")
