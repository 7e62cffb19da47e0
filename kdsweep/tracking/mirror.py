"""Write the runs of sweeps and cells to MLflow: a mirror of the cells' folders.

A sweep is a parent run with the sweep's file as an artifact. A cell is a run below it, computed once per fingerprint,
and counts in every sweep that requests it. The cell's folder holds the id of its run and how much is logged there.
"""

from __future__ import annotations

import filecmp
import json
import os
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, Run, ViewType
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from kdsweep.core.databases import sqlite_url
from kdsweep.core.errors import InputError
from kdsweep.core.files import DamagedError, read_json, remove_parts, write_json
from kdsweep.store import sweep_file
from kdsweep.store.cell_folder import Record, now_ms
from kdsweep.store.sweep_file import SweepFile
from kdsweep.tracking.database import (
    DATABASE,
    TrackingError,
    artifact_file,
    artifacts_uri,
    damaged,
    exclusive,
    follow_move,
    has_database,
    line,
    passes,
    store_uri,
)

EXPERIMENT = "kdsweep"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on curves, not on prompts
ID = "kdsweep.id"  # tag of an experiment: a server has several addresses, and a new database is another mirror
MIRROR = "mlflow.json"  # of a cell's folder: what is logged, by the id of the experiment
SWEEP_FILE = "sweep.json"  # artifact of a parent run
UI_TRAINING = "workflowType=machine_learning"  # else MLflow's pages open on prompts and traces
ERROR = "kdsweep.error"
NOTE = "mlflow.note.content"  # what the UI shows as a run's description
ARTIFACTS = ("test_scores.csv", "test_predictions.npz", "split.json")
SOURCE = {"mlflow.source.name": "python -m kdsweep", "mlflow.source.type": "LOCAL"}  # the UI's column Source
DIGEST_LENGTH = 36  # MLflow's limit
MOST_PARAMS, MOST_METRICS = 100, 1000  # that MLflow takes in one call


@dataclass
class Logged:
    """The logged part of a cell, as ``mlflow.json`` in its folder records it.

    It is written after each log. A call that is made again after a power cut doubles nothing: MLflow keeps values of
    one name, epoch and time once.

    Attributes:
        run_id: of its run.
        epochs: that are logged.
        last_ms: when the last of them ended; another time means that the cell was computed again.
        status: of the run; empty until its parameters are logged.
        values: the final ones.
    """

    run_id: str
    epochs: int = 0
    last_ms: int = 0
    status: str = ""
    values: dict[str, float] = field(default_factory=dict)

    def continues(self, record: Record) -> bool:
        """Return whether the logged epochs are the first ones of a record."""
        return not self.epochs or record.times_ms[self.epochs - 1 : self.epochs] == [self.last_ms]


class Tracker:
    """One MLflow store: its experiment, its sweeps and its cells.

    Args:
        store: folder of the runs; the default SQLite file and the artifacts are in it.
        uri: of an MLflow server or database, or None for the SQLite file.
        experiment: name of the MLflow experiment.

    Raises:
        InputError: the store cannot be opened.
        TrackingError: not now.
    """

    def __init__(self, *, store: Path, uri: str | None, experiment: str = EXPERIMENT) -> None:
        self.uri, self.store = store_uri(store, uri), store
        self._parents: dict[str, str] = {}
        self._statuses: dict[str, str] | None = None
        self._checked: set[str] = set()
        self._is_local = uri is None
        store.mkdir(parents=True, exist_ok=True)
        try:
            with exclusive(store):  # a fresh database breaks if many open it at once
                if uri is None and not has_database(store):
                    _make_database(store, experiment)
                if uri is None:
                    follow_move(store, experiment)
                self.client = MlflowClient(tracking_uri=self.uri)
                opened = self._open(experiment, uri)
        except Exception as error:
            if passes(error, self.uri):
                raise TrackingError(line(error)) from error
            if not isinstance(error, MlflowException | sqlite3.Error | SQLAlchemyError):
                raise
            if uri is None:
                raise damaged(store, error) from error
            raise InputError(f"tracking.uri={self.uri}: the store does not open: {line(error)}") from error
        self.experiment_id, self.id = str(opened.experiment_id), opened.tags[ID]

    def _open(self, experiment: str, uri: str | None) -> Experiment:
        opened = self.client.get_experiment_by_name(experiment)
        if opened is None:
            # Artifacts of a database are stored next to it; a server chooses the location.
            location = None if uri and uri.startswith("http") else artifacts_uri(self.store)
            made = self.client.create_experiment(experiment, location, tags=_experiment_tags())
            opened = self.client.get_experiment(made)
        if ID not in opened.tags:  # made by hand
            self.client.set_experiment_tag(opened.experiment_id, ID, _experiment_tags()[ID])
            opened = self.client.get_experiment(opened.experiment_id)
        return opened

    def publish(self, sweep: str) -> str:
        """Bring the parent run of a sweep up to date with the sweep's file; return the id of the run."""
        if sweep not in self._parents:
            runs = self.search(f"tags.`kdsweep.role` = 'sweep' and tags.`kdsweep.sweep` = '{sweep}'")
            tags = {"kdsweep.role": "sweep", "kdsweep.sweep": sweep}
            run = runs[0] if runs else self.client.create_run(self.experiment_id, run_name=sweep, tags=tags)
            self._parents[sweep] = str(run.info.run_id)
        parent, content = self._parents[sweep], sweep_file.read(self.store, sweep)
        self.client.log_dict(parent, asdict(content), SWEEP_FILE)
        self.client.set_tag(parent, NOTE, _note(sweep, content))
        self.client.set_terminated(parent, "FINISHED")  # it computes nothing; its end is the last request
        return parent

    def run_id(self, folder: Path) -> str:
        """Return the id of a cell's run, or ``""``."""
        logged = _read_mirror(folder).get(self.id)
        return logged.run_id if logged else ""

    def sync(self, record: Record, *, sweep: str) -> str:
        """Make the run of a cell hold what its folder holds, each value once; return the run's id.

        A cell that is computed again gets a new run. The old one is deleted as soon as the new one is finished, so that
        a cell has one finished run.

        Args:
            record: of a cell that was begun.
            sweep: the one under which a new run is opened.
        """
        logged = self._logged(record)
        if logged and logged.status == "FINISHED" and record.status != "FINISHED":
            return logged.run_id  # it is computed again; until that is finished, the old scores count
        if logged and logged.status == "FINISHED" and _is_equal(logged.values, record.values):
            self._repair(record, logged.run_id)
            return logged.run_id
        if not logged or logged.status == "FINISHED" or not logged.continues(record):
            logged = Logged(self._open_run(record, sweep))
            self._write(record.folder, logged)
        self._log(record, logged)
        if record.status == "FINISHED":
            logged.run_id = self._keep_one(record, logged.run_id)
        self._write(record.folder, logged)
        return logged.run_id

    def _keep_one(self, record: Record, run_id: str) -> str:
        """Delete all runs of a finished cell but one, and return its id.

        That is the run of another store on the same server if its scores are equal: both stores then share it.
        """
        runs = self._runs_of(record)
        others = [run for run in runs if run.info.run_id != run_id and run.info.status == "FINISHED"]
        shared = next((run for run in others if _has_values(run, record.values)), None)
        kept = run_id if shared is None else str(shared.info.run_id)
        for run in runs:
            if run.info.run_id != kept:
                self.client.delete_run(run.info.run_id)
        return kept

    def _logged(self, record: Record) -> Logged | None:
        """Return what MLflow has of a cell; None if it has no run, or one that was deleted by hand."""
        logged = _read_mirror(record.folder).get(self.id)
        if logged is None or logged.run_id in self._checked:
            return logged
        if self._statuses is None:  # one query for all that were there when the command started
            self._statuses = {run.info.run_id: run.info.status for run in self.search("")}
        if logged.run_id not in self._statuses:
            self._statuses |= {run.info.run_id: run.info.status for run in self._runs_of(record)}
        status = self._statuses.get(logged.run_id)
        if status == logged.status:
            self._checked.add(logged.run_id)
            return logged
        if not status or not logged.continues(record):
            return logged if status else None
        return Logged(logged.run_id)  # killed between a log and its note in the folder, or changed by hand: all again

    def _write(self, folder: Path, logged: Logged) -> None:
        self._checked.add(logged.run_id)
        mirrors = _read_mirror(folder) | {self.id: logged}
        write_json(folder / MIRROR, {key: asdict(entry) for key, entry in mirrors.items()})

    def _runs_of(self, record: Record) -> list[Run]:
        return self.search(f"tags.`kdsweep.fingerprint` = '{record.tags['kdsweep.fingerprint']}'")

    def _open_run(self, record: Record, sweep: str) -> str:
        """Return the id of a new run, or of one that a lost answer or a kill left without its note in the folder."""
        others = self._runs_of(record)
        for run in others:
            if not run.data.metrics:
                return str(run.info.run_id)
            if run.info.status == "RUNNING":
                self.client.set_terminated(run.info.run_id, "KILLED")
        parent = self._parents.get(sweep) or self.publish(sweep)
        tags = {**record.tags, **SOURCE, "mlflow.parentRunId": parent, "kdsweep.sweep": sweep}
        name = f"{tags['kdsweep.notation']}/split{tags['kdsweep.split']}"
        start_ms = now_ms() if others else record.started_ms  # the newest counts
        run = self.client.create_run(self.experiment_id, start_ms, tags, run_name=name)
        return str(run.info.run_id)

    def _log(self, record: Record, logged: Logged) -> None:
        run_id = logged.run_id
        if not logged.status:
            self._log_inputs(record, run_id)
        new = list(zip(record.history, record.times_ms, strict=True))[logged.epochs :]
        self._log_metrics(
            run_id,
            [
                Metric(name, value, time_ms, int(epoch["epoch"]))
                for epoch, time_ms in new
                for name, value in epoch.items()
                if name != "epoch"
            ],
        )
        if record.status == "FINISHED":
            self._log_metrics(
                run_id, [Metric(name, value, record.ended_ms, 0) for name, value in record.values.items()]
            )
            for name in ARTIFACTS:
                self.client.log_artifact(run_id, str(record.folder / name))
        if record.status == "FAILED":
            self.client.set_tag(run_id, ERROR, record.error[:4000])
        elif logged.status == "FAILED" and ERROR in self.client.get_run(run_id).data.tags:
            self.client.delete_tag(run_id, ERROR)
        if record.status != logged.status and record.status == "RUNNING":
            self.client.update_run(run_id, "RUNNING")
        elif record.status != logged.status:
            self.client.set_terminated(run_id, record.status, record.ended_ms or None)
        logged.epochs, logged.last_ms = len(record.times_ms), (record.times_ms or [0])[-1]
        logged.status, logged.values = record.status, record.values

    def _log_inputs(self, record: Record, run_id: str) -> None:
        if data := _data_set(record):
            self.client.log_inputs(run_id, [data])
        before = self.client.get_run(run_id).data.params  # MLflow changes no param
        params = [Param(key, str(value)) for key, value in sorted(record.params.items()) if key not in before]
        for part in _parts(params, MOST_PARAMS):
            self.client.log_batch(run_id, params=part)

    def _log_metrics(self, run_id: str, metrics: list[Metric]) -> None:
        for part in _parts(metrics, MOST_METRICS):
            self.client.log_batch(run_id, metrics=part)

    def _repair(self, record: Record, run_id: str) -> None:
        """Log the files of a finished run again that the store's artifacts lack or that were changed there."""
        for name in ARTIFACTS if self._is_local else ():
            kept, file = artifact_file(self.store, run_id, name), record.folder / name
            if not kept.is_file() or not filecmp.cmp(kept, file, shallow=False):
                self.client.log_artifact(run_id, str(file))

    def search(self, condition: str) -> list[Run]:
        """Return all runs of the experiment that meet a condition, however many pages they fill."""
        runs: list[Run] = []
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], condition, ViewType.ACTIVE_ONLY, 1000, page_token=token
            )
            runs += page
            token = page.token
            if not token:
                return runs


def _experiment_tags() -> dict[str, str]:
    return {**EXPERIMENT_TAGS, ID: uuid.uuid4().hex}


def _make_database(store: Path, experiment: str) -> None:
    """Make the SQLite file under another name first: it takes seconds, and a kill in between would spoil it."""
    remove_parts(store)
    scratch = store / f".{DATABASE}.{os.getpid()}.part"
    client = MlflowClient(tracking_uri=sqlite_url(scratch.resolve()))
    client.create_experiment(experiment, artifacts_uri(store), tags=_experiment_tags())
    scratch.replace(store / DATABASE)


def _read_mirror(folder: Path) -> dict[str, Logged]:
    """Return what each MLflow experiment has of a cell, by the experiment's id."""
    try:
        return {key: Logged(**entry) for key, entry in (read_json(folder / MIRROR) or {}).items()}
    except (DamagedError, TypeError):  # then the run is searched by its fingerprint
        return {}


def _is_equal(one: dict[str, float], other: dict[str, float]) -> bool:
    """Return whether values are equal; NaN equals itself here."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _has_values(run: Run, values: dict[str, float]) -> bool:
    """Return whether a run has these metrics among its own."""
    return _is_equal(values, {name: value for name, value in run.data.metrics.items() if name in values})


def _data_set(record: Record) -> DatasetInput | None:
    """Return what MLflow's column Dataset shows of a record: name, digest, folder; None if it does not say."""
    digest, name = record.tags.get("kdsweep.data", ""), record.params.get("data.name")
    if not digest or not name:
        return None
    folder = record.params.get("data.root") or record.params.get("data.source.cache_dir") or ""
    about = Dataset(str(name), digest[:DIGEST_LENGTH], "local", json.dumps({"uri": str(folder)}))
    return DatasetInput(about, [InputTag("mlflow.data.context", "training, validation, test")])


def _note(sweep: str, content: SweepFile) -> str:
    """Return the description of a sweep's parent run, in Markdown."""
    cells = [row for row in content.requests.values() if row.role != "teacher"]
    names = sorted({row.notation for row in cells})
    splits, seeds = sorted({f"split{row.split}" for row in cells}), sorted({f"seed{row.seed}" for row in cells})
    return (
        f"**{len(cells)} cells** of sweep `{sweep}`: {', '.join(names)}; {', '.join(splits)}; {', '.join(seeds)}.\n\n"
        "Each is a run below this one, named NOTATION/splitK; Teachers are there too. Select several and "
        "press Compare: `test/dice` is the mean Dice over the test images, `val/dice` the curve; the artifact "
        "test_scores.csv holds the scores of each image.\n\n"
        f"Tables and figures: `python -m kdsweep report --sweep {sweep}`; those made so far are among the "
        f"artifacts. {SWEEP_FILE} there lists what the sweep requests."
    )


def _parts(entries: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(entries), size):
        yield list(entries[start : start + size])
