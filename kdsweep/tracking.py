"""The only module that talks to MLflow: runs are written here, and read back as pandas frames.

A sweep is a parent run; what it asked for is written on it as tags ``kdsweep.asked.PLACE = FINGERPRINT``. A cell is a
run of its own, computed once per fingerprint, and counts in every sweep that asked for it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kdsweep.errors import InputError
from kdsweep.grid import Cell

# Before the import of mlflow, which reads them.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

for _noisy in ("alembic", "mlflow"):  # they tell every table of a new database at level INFO
    logging.getLogger(_noisy).setLevel(logging.WARNING)

EXPERIMENT = "kdsweep"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on curves, not on prompts
ASKED = "kdsweep.asked."
BATCH = 100  # MLflow takes at most so many params, or so many tags, in one call


@dataclass(frozen=True)
class Sweep:
    """What a sweep asked for and what is there of it.

    Attributes:
        name: of the sweep.
        runs: one row per cell asked for and per Teacher they learn from; columns fingerprint, role, notation, split,
            seed, profile, data, weights, device, teacher, status, run_id, params, trivial_dice.
        scores: one row per fingerprint and test image of the finished ones; fractions 0 to 1, HD95 in pixels.
    """

    name: str
    runs: pd.DataFrame
    scores: pd.DataFrame


def store_uri(store: Path, uri: str | None) -> str:
    """The tracking URI: the one given, or a SQLite file in the store (absolute: the working directory may change)."""
    return uri or f"sqlite:///{store.resolve() / 'mlflow.db'}"


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the calls inside are done: one cut in the middle leaves the database locked."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


class CellRun:
    """The MLflow run of one cell in training."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self.run_id = client, run_id

    def log_epoch(self, values: dict[str, float], epoch: int) -> None:
        """Record the values of one epoch in one call."""
        now_ms = int(time.time() * 1000)
        with uninterrupted():
            self._client.log_batch(self.run_id, metrics=[Metric(k, v, now_ms, epoch) for k, v in values.items()])

    def finish(self, values: dict[str, float], files: list[Path]) -> None:
        """Record the final values and files and close the run as FINISHED."""
        now_ms = int(time.time() * 1000)
        with uninterrupted():
            self._client.log_batch(self.run_id, metrics=[Metric(k, v, now_ms, 0) for k, v in values.items()])
            for file in files:
                self._client.log_artifact(self.run_id, str(file))
            self._client.set_terminated(self.run_id, "FINISHED")

    def abort(self, *, status: str) -> None:
        """Close the run as FAILED or KILLED."""
        with uninterrupted():
            self._client.set_terminated(self.run_id, status)


class Tracker:
    """One MLflow store: its experiment, its sweeps and its cells.

    Args:
        store: folder of the runs; the default SQLite file and the artifacts lie in it.
        uri: of an MLflow server or database, or None for the SQLite file.
        experiment: name of the MLflow experiment.

    Raises:
        InputError: the store cannot be opened.
    """

    def __init__(self, *, store: Path, uri: str | None, experiment: str = EXPERIMENT) -> None:
        store.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=store_uri(store, uri))
        try:
            found = self._client.get_experiment_by_name(experiment)
            if found is None:
                # A database has no place for artifacts: they go beside it. A server has one of its own.
                place = None if uri and uri.startswith("http") else (store.resolve() / "artifacts").as_uri()
                self.experiment_id = self._client.create_experiment(experiment, place, tags=EXPERIMENT_TAGS)
            else:
                self.experiment_id = found.experiment_id
        except MlflowException as error:
            raise InputError(f"tracking.uri={store_uri(store, uri)}: the store does not open: {error}") from error

    def ask(self, sweep: str, cells: list[Cell]) -> None:
        """Write down that this sweep wants these cells, finished or not, so that a table shows what is missing."""
        parent = self._parent(sweep)
        tags = [RunTag("kdsweep.asked_at", str(time.time()))]
        tags += [RunTag(ASKED + cell.place, cell.fingerprint) for cell in cells]
        for part in _parts(tags):
            self._client.log_batch(parent, tags=part)

    def start(self, cell: Cell, *, sweep: str, params: dict[str, Any], tags: dict[str, str]) -> CellRun:
        """Open the run of a cell; one that a killed process left open for it is closed as KILLED.

        Args:
            cell: to be computed.
            sweep: in whose name.
            params: the flat resolved configuration.
            tags: further tags, such as the git commit.
        """
        for stale in self._search(f"tags.`kdsweep.fingerprint` = '{cell.fingerprint}'"):
            if stale.info.status == "RUNNING":
                self._client.set_terminated(stale.info.run_id, "KILLED")
        own = {
            "mlflow.parentRunId": self._parent(sweep),
            "kdsweep.cell": cell.place,
            "kdsweep.notation": cell.notation,
            "kdsweep.role": cell.role,
            "kdsweep.split": str(cell.split),
            "kdsweep.seed": str(cell.seed),
            "kdsweep.sweep": sweep,
            "kdsweep.fingerprint": cell.fingerprint,
            "kdsweep.teacher": cell.evidence.get("teacher", ""),
        }
        run = self._client.create_run(self.experiment_id, run_name=cell.run_name, tags={**tags, **own})
        for part in _parts([Param(key, str(value)) for key, value in sorted(params.items())]):
            self._client.log_batch(run.info.run_id, params=part)
        return CellRun(self._client, run.info.run_id)

    def read_sweep(self, name: str | None) -> Sweep:
        """Everything a sweep asked for, with its scores; None takes the sweep last asked for.

        Raises:
            InputError: there is no such sweep.
        """
        parent = self._named_sweep(name)
        asked = {key.removeprefix(ASKED): value for key, value in parent.data.tags.items() if key.startswith(ASKED)}
        runs = self._by_fingerprint()
        rows = [_row(fingerprint, runs.get(fingerprint), place) for place, fingerprint in sorted(asked.items())]
        teachers = sorted({row["teacher"] for row in rows} - {""})
        rows += [_row(fingerprint, runs[fingerprint], "") for fingerprint in teachers if fingerprint in runs]
        scores = [self._scores(row) for row in rows if row["status"] == "FINISHED"]
        table = (
            pd.concat(scores, ignore_index=True) if scores else pd.DataFrame(columns=["fingerprint", "image", "dice"])
        )
        return Sweep(parent.data.tags["kdsweep.sweep"], pd.DataFrame(rows), table)

    def _scores(self, row: dict[str, Any]) -> pd.DataFrame:
        file = self._client.download_artifacts(row["run_id"], "test_scores.csv")
        return pd.read_csv(file, dtype={"image": str, "label": str}).assign(fingerprint=row["fingerprint"])

    def _named_sweep(self, name: str | None) -> Run:
        sweeps = self._search("tags.`kdsweep.role` = 'sweep'")
        sweeps.sort(key=lambda run: float(run.data.tags.get("kdsweep.asked_at", 0)))
        known = [run.data.tags["kdsweep.sweep"] for run in sweeps]
        if name is None and sweeps:
            return sweeps[-1]
        if name is None or name not in known:
            raise InputError(f"sweep={name or 'any'} is not in this store; it holds: {', '.join(known) or 'none yet'}")
        return sweeps[known.index(name)]

    def _by_fingerprint(self) -> dict[str, Run]:
        """The run that counts for each fingerprint: the finished one, else the newest."""
        runs = self._search("tags.`kdsweep.role` != 'sweep'")
        runs.sort(key=lambda run: (run.info.status == "FINISHED", run.info.start_time))
        return {run.data.tags["kdsweep.fingerprint"]: run for run in runs}

    def _parent(self, sweep: str) -> str:
        found = self._search(f"tags.`kdsweep.role` = 'sweep' and tags.`kdsweep.sweep` = '{sweep}'")
        if found:
            return str(found[0].info.run_id)
        tags = {"kdsweep.role": "sweep", "kdsweep.sweep": sweep}
        run_id: str = self._client.create_run(self.experiment_id, run_name=sweep, tags=tags).info.run_id
        self._client.set_terminated(run_id, "FINISHED")  # it groups runs and computes nothing that could go on
        return run_id

    def _search(self, condition: str) -> list[Run]:
        found: list[Run] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], condition, ViewType.ACTIVE_ONLY, 1000, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found


def _parts(entries: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(entries), BATCH):
        yield entries[start : start + BATCH]


def _row(fingerprint: str, run: Run | None, place: str) -> dict[str, Any]:
    if run is None:
        notation, split, seed, _ = place.split("/")
        role = "student" if notation == "Student" else "cell"
        where = {"split": int(split.removeprefix("split")), "seed": int(seed.removeprefix("seed"))}
        unknown = dict.fromkeys(("profile", "data", "weights", "device", "teacher", "run_id"), "")
        own = {"fingerprint": fingerprint, "role": role, "notation": notation}
        return {**own, **where, **unknown, "status": "missing", "params": {}, "trivial_dice": float("nan")}
    tags = run.data.tags
    return {
        "fingerprint": fingerprint,
        "role": tags["kdsweep.role"],
        "notation": tags["kdsweep.notation"],
        "split": int(tags["kdsweep.split"]),
        "seed": int(tags["kdsweep.seed"]),
        "profile": tags["kdsweep.profile"],
        "data": run.data.params["data.name"],
        "weights": run.data.params["weights"],
        "device": tags["kdsweep.device"],
        "teacher": tags["kdsweep.teacher"],
        "status": run.info.status,
        "run_id": run.info.run_id,
        "params": dict(run.data.params),
        "trivial_dice": run.data.metrics.get("test/trivial_dice", float("nan")),
    }


def artifact(*, store: Path, uri: str | None, run_id: str, name: str) -> Path:
    """Local path of a file that a run recorded."""
    return Path(MlflowClient(tracking_uri=store_uri(store, uri)).download_artifacts(run_id, name))


def read_sweep(*, store: Path, uri: str | None, name: str | None) -> Sweep:
    """Read a sweep of a store that must be there already; see ``Tracker.read_sweep``.

    Raises:
        InputError: no store, or no such sweep in it.
    """
    if uri is None and not (store / "mlflow.db").is_file():
        raise InputError(f"--store {store}: no mlflow.db in it; run a sweep first, or name its folder")
    return Tracker(store=store, uri=uri).read_sweep(name)
