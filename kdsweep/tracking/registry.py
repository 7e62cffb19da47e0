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
from mlflow.entities import LoggedModel, Run
from mlflow.environment_variables import MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING

from kdsweep.core.errors import InputError
from kdsweep.tracking.database import check_location, exclusive, has_database, line, store_uri
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

    The logged model must return, for an example (arrays by input name, the batch first), the expected arrays (by output
    name) up to a tolerance. The metadata names the fingerprint of its cell. A missing registered model is made.

    Raises:
        InputError: there is no such run, MLflow does not take the model, or returns another one.
    """
    address, fingerprint = store_uri(store, uri), metadata["kdsweep.fingerprint"]
    if uri is None and not has_database(store):
        raise InputError(f"--register {name}: {store} has no mlflow.db; name the run's MLflow with --tracking-uri")
    is_finished = f"tags.`kdsweep.fingerprint` = '{fingerprint}' and attributes.status = 'FINISHED'"
    try:
        if not (runs := Tracker(store=store, uri=uri).search(is_finished)):
            remedy = "the sweep's command writes it there, or name the MLflow that has it with --tracking-uri"
            problem = f"{address} has no finished run of this cell (fingerprint {fingerprint[:10]})"
            raise InputError(f"--register {name}: {problem}; {remedy}")
        with exclusive(store), _new_model(address, runs[0], tags=metadata) as model:
            check_location(MlflowClient(), runs[0].info.run_id, store, uri)
            _log_onnx(proto, example, expected, metadata=metadata, model=model)
            difference = _difference(model.model_uri, example, expected)
            if not difference <= tolerance:
                problem = f"the model that MLflow loads differs by {difference:.1e} from the one that was logged"
                raise InputError(f"--register {name}: not registered, {problem}; allowed are {tolerance:.0e}")
            return int(mlflow.register_model(model.model_uri, name, tags=metadata).version)
    except InputError:
        raise
    except Exception as error:  # of many kinds: server, network, database, disk
        raise InputError(f"--register {name}: MLflow at {address}: {line(error)}") from error


@contextlib.contextmanager
def _new_model(uri: str, run: Run, *, tags: dict[str, str]) -> Iterator[LoggedModel]:
    """Make a logged model of a run, in the MLflow that is the current one until the end; delete it after an error."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)  # for MLflow's functions that take no address; sets the variable too
    record = MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING
    recorded = record.get_raw()
    record.set(False)  # MLflow reads its set of names while other threads, who read variables, add to it: an error
    try:
        client = MlflowClient()
        model = client.create_logged_model(run.info.experiment_id, "onnx", run.info.run_id, tags=tags)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # MLflow warns about parts of itself
                yield model
        except BaseException:
            client.delete_logged_model(model.model_id)
            raise
    finally:
        mlflow.set_tracking_uri(before)
        record.unset() if recorded is None else record.set(recorded)


def _difference(uri: str, example: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Return by how much a logged model's output for an example differs at most from the expected one."""
    loaded = mlflow.pyfunc.load_model(uri).predict(example)
    return max(float(np.abs(loaded[key] - values).max()) for key, values in expected.items())


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
