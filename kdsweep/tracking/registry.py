"""An exported network in MLflow's model registry."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Run

from kdsweep.core.errors import InputError
from kdsweep.tracking.database import DATABASE, check_location, exclusive, line, store_uri
from kdsweep.tracking.mirror import Tracker


def register_onnx(
    proto: Any,
    *,
    example: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    tolerance: float,
    metadata: dict[str, str],
    name: str,
    store: Path,
    uri: str | None,
) -> int:
    """Log a model under the finished run of its cell and register it as a new version; return the version's number.

    Args:
        proto: the ONNX model.
        example: an input array by name; its first dimension is the batch, of any size.
        expected: the output array that it gives, by name.
        tolerance: by which an output may differ once the model was logged and loaded again; else there is no version.
        metadata: what the model says about itself; names the fingerprint of its cell.
        name: of the registered model; made if there is none.
        store: folder of the runs.
        uri: of an MLflow server or database, or None for the file in the store.

    Raises:
        InputError: there is no such run, MLflow does not take the model, or gives back another one.
    """
    address = store_uri(store, uri)
    if uri is None and not (store / DATABASE).is_file():
        raise InputError(f"--register {name}: {store} has no {DATABASE}; name the run's MLflow with --tracking-uri")
    try:
        run = _finished_run(metadata["kdsweep.fingerprint"], name=name, store=store, uri=uri)
        with exclusive(store), _current(address) as client, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow warns about parts of itself
            check_location(client, run.info.run_id, store, uri)
            model = client.create_logged_model(run.info.experiment_id, "onnx", run.info.run_id, tags=metadata)
            try:
                _log_onnx(proto, example, expected, metadata=metadata, model=model)
                _check_loaded(model.model_uri, example, expected, name=name, tolerance=tolerance)
                return int(mlflow.register_model(model.model_uri, name, tags=metadata).version)
            except BaseException:
                client.delete_logged_model(model.model_id)
                raise
    except InputError:
        raise
    except Exception as error:  # of many kinds: server, network, database, disk
        raise InputError(f"--register {name}: MLflow at {address}: {line(error)}") from error


def _finished_run(fingerprint: str, *, name: str, store: Path, uri: str | None) -> Run:
    finished = f"tags.`kdsweep.fingerprint` = '{fingerprint}' and attributes.status = 'FINISHED'"
    for run in Tracker(store=store, uri=uri).search(finished):
        return run
    raise InputError(
        f"--register {name}: {store_uri(store, uri)} has no finished run of this cell (fingerprint {fingerprint[:10]})"
        "; the sweep's command writes it there, or name the MLflow that has it with --tracking-uri"
    )


@contextlib.contextmanager
def _current(uri: str) -> Iterator[MlflowClient]:
    """Make a URI current for MLflow's functions that take no address, and yield a client of it."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)  # sets the variable too
    try:
        yield MlflowClient()
    finally:
        mlflow.set_tracking_uri(before)


def _log_onnx(
    proto: Any, example: dict[str, np.ndarray], expected: dict[str, np.ndarray], *, metadata: dict[str, str], model: Any
) -> None:
    import mlflow.onnx
    from mlflow.models import infer_signature

    mlflow.onnx.log_model(
        proto,
        model_id=model.model_id,  # else it would be one of MLflow's current experiment, not of the run's
        run_id=model.source_run_id,
        signature=infer_signature(example, expected),
        input_example=example,
        metadata=metadata,
        pip_requirements=mlflow.onnx.get_default_pip_requirements(),  # else MLflow loads it in processes to find them
        onnx_execution_providers=["CPUExecutionProvider"],  # what it is checked on; CUDA would warn without a GPU
        save_as_external_data=False,
    )


def _check_loaded(
    model_uri: str, example: dict[str, np.ndarray], expected: dict[str, np.ndarray], *, name: str, tolerance: float
) -> None:
    loaded = mlflow.pyfunc.load_model(model_uri).predict(example)
    difference = max(float(np.abs(loaded[key] - values).max()) for key, values in expected.items())
    if not difference <= tolerance:
        raise InputError(
            f"--register {name}: not registered, what MLflow loads differs by {difference:.1e} from what was logged; "
            f"allowed are {tolerance:.0e}"
        )
