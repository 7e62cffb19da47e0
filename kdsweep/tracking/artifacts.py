"""Files of finished runs: as the cell's folder has them, else as MLflow keeps them among a run's artifacts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from kdsweep.config.grid import run_folder
from kdsweep.core.errors import InputError
from kdsweep.store import cell_folder
from kdsweep.tracking.database import artifact_file, line, store_uri

MISSING = "RESOURCE_DOES_NOT_EXIST"  # code of MLflow's error
EXTERNAL = "external"  # folder of the scores on other data sets, among a run's artifacts and in a cell's folder


def read(run: Mapping[Any, Any], name: str, *, store: Path, uri: str | None) -> bytes:
    """Return a file of one of ``Sweep.runs``; raise InputError if neither the cell's folder nor MLflow has it."""
    return read_proved(MlflowClient(tracking_uri=store_uri(store, uri)), store, run, name)[0]


def read_proved(client: MlflowClient, store: Path, run: Mapping[Any, Any], name: str) -> tuple[bytes, bool]:
    """Return a file as ``read`` does, and whether its checksum proves it: only the cell's folder has one."""
    folder = folder_of(store, run)
    is_proved = cell_folder.check_file(folder, name)
    if is_proved or (name.startswith(EXTERNAL) and (folder / name).is_file()):
        return (folder / name).read_bytes(), is_proved
    try:
        return artifact(client, store, run["run_id"], name), False
    except (OSError, MlflowException) as error:
        if getattr(error, "error_code", MISSING) != MISSING:  # a server or a database that does not answer
            raise
        raise lost(store, run, name, line(error)) from error


def artifact(client: MlflowClient, store: Path, run_id: str, name: str) -> bytes:
    """Return an artifact of a run."""
    file = artifact_file(store, run_id, name)  # in a store that was moved, MLflow looks for it where it was
    if file.is_file():
        return file.read_bytes()
    with tempfile.TemporaryDirectory() as scratch:  # without a folder MLflow leaves one behind for each file
        return Path(client.download_artifacts(run_id, name, scratch)).read_bytes()


def folder_of(store: Path, run: Mapping[Any, Any]) -> Path:
    """Return the folder of a run's cell; of a Teacher also if the row names the seed of cells that share it."""
    folder = run_folder(store, run)
    if run["role"] == "teacher" and not folder.is_dir():
        return next(folder.parent.glob(f"*-{run['fingerprint'][:10]}"), folder)
    return folder


def lost(store: Path, run: Mapping[Any, Any], name: str, why: str) -> InputError:
    """Return the error for a run's file that is missing or damaged."""
    what = f"{artifact_file(store, run['run_id'], name)} of {run['notation']} split {run['split']} seed {run['seed']}"
    remedy = "run the command of its sweep again: it is logged again from the folder of the cell, or computed again"
    return InputError(f"{what}: {why}; {remedy}")
