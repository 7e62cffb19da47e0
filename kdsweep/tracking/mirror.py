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
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.utils import chunk_list, get_results_from_paginated_fn
from sqlalchemy.exc import SQLAlchemyError

from kdsweep.core.databases import sqlite_url
from kdsweep.core.errors import InputError
from kdsweep.core.files import DamagedError, read_json, remove_parts, write_json
from kdsweep.store import sweep_file
from kdsweep.store.cell_folder import PREDICTIONS, SCORES, SPLIT, Record
from kdsweep.store.sweep_file import SweepFile
from kdsweep.tracking import database
from kdsweep.tracking.database import exclusive, line, store_uri

EXPERIMENT = "kdsweep"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on curves, not on prompts
ID = "kdsweep.id"  # tag of an experiment: a server has several addresses, and a new database is another mirror
MIRROR = "mlflow.json"  # of a cell's folder: what is logged, by the id of the experiment
SWEEP_FILE = "sweep.json"  # artifact of a parent run
UI_TRAINING = "workflowType=machine_learning"  # else MLflow's pages open on prompts and traces
ERROR = "kdsweep.error"
ARTIFACTS = (SCORES, PREDICTIONS, SPLIT)
SOURCE = {"mlflow.source.name": "python -m kdsweep", "mlflow.source.type": "LOCAL"}  # the UI's column Source
MOST_PARAMS, MOST_METRICS, MOST_DIGITS = 100, 1000, 36  # that MLflow takes in one call, and of a digest


@dataclass
class Logged:
    """The logged part of a cell, as ``mlflow.json`` in its folder records it after each log.

    MLflow keeps values of one name, epoch and time once, so a call that is made again doubles nothing.
    """

    run_id: str
    epochs: int = 0  # that are logged
    last_ms: int = 0  # when the last of them ended; another time means that the cell was computed again
    status: str = ""  # of the run; empty until all of the first log is there
    values: dict[str, float] = field(default_factory=dict)  # the final ones

    def continues(self, record: Record) -> bool:
        """Return whether the logged epochs are the first ones of a record."""
        return not self.epochs or record.times_ms[self.epochs - 1 : self.epochs] == [self.last_ms]


class Tracker:
    """An experiment in MLflow at ``uri``, for None in the SQLite file of the store.

    Raises:
        InputError: it cannot be opened.
        TrackingError: not now.
    """

    def __init__(self, *, store: Path, uri: str | None, experiment: str = EXPERIMENT) -> None:
        self.uri, self.store, self._is_local = store_uri(store, uri), store, uri is None
        self._parents: dict[str, str] = {}
        store.mkdir(parents=True, exist_ok=True)
        try:
            with database.answering(store, uri), exclusive(store):  # a fresh database breaks if many open it at once
                if uri is None:
                    _make_database(store)
                    database.follow_move(store, experiment)
                self.client = MlflowClient(tracking_uri=self.uri)
                self.experiment_id, self.id = self._open(experiment)
        except (MlflowException, sqlite3.Error, SQLAlchemyError) as error:
            if uri is None:
                raise database.DamageError(store, error) from error
            raise InputError(f"tracking.uri={self.uri}: the store does not open: {line(error)}") from error

    def _open(self, experiment: str) -> tuple[str, str]:
        """Return MLflow's id of the experiment and the mirror's; make what is missing."""
        if (opened := self.client.get_experiment_by_name(experiment)) is None:
            # Artifacts of a database are stored next to it; a server chooses the location.
            location = None if self.uri.startswith("http") else database.artifacts_uri(self.store)
            self.client.create_experiment(experiment, location, tags=EXPERIMENT_TAGS)
            opened = self.client.get_experiment_by_name(experiment)
        experiment_id, mirror_id = str(opened.experiment_id), opened.tags.get(ID) or uuid.uuid4().hex
        if ID not in opened.tags:
            self.client.set_experiment_tag(experiment_id, ID, mirror_id)
        return experiment_id, mirror_id

    def search(self, condition: str) -> list[Run]:
        """Return all runs of the experiment that meet a condition, however many pages they fill."""

        def page(size: int, token: str | None) -> list[Run]:
            return self.client.search_runs([self.experiment_id], condition, max_results=size, page_token=token)

        runs: list[Run] = get_results_from_paginated_fn(page, 1000)
        return runs

    def publish(self, sweep: str) -> str:
        """Bring the parent run of a sweep up to date with the sweep's file; return the id of the run."""
        if sweep not in self._parents:
            runs = self.search(f"tags.`kdsweep.role` = 'sweep' and tags.`kdsweep.sweep` = '{sweep}'")
            tags = {"kdsweep.role": "sweep", "kdsweep.sweep": sweep}
            run = runs[0] if runs else self.client.create_run(self.experiment_id, run_name=sweep, tags=tags)
            self._parents[sweep] = str(run.info.run_id)
        parent, content = self._parents[sweep], sweep_file.read(self.store, sweep)
        self.client.log_dict(parent, asdict(replace(content, storage=None)), SWEEP_FILE)  # it may have a password
        self.client.set_tag(parent, "mlflow.note.content", _note(sweep, content))  # what the UI shows about a run
        self.client.set_terminated(parent, "FINISHED")  # it computes nothing; its end is the last request
        return parent

    def sync(self, record: Record, *, sweep: str) -> str:
        """Make the run of a cell hold what its folder holds, each value once; return the run's id.

        A cell that is computed again, or whose run is missing or has another status than was logged, gets a new run.
        A finished run is deleted as soon as the new one is finished, so that a cell has one finished run. A new run is
        opened under the parent run of the sweep.
        """
        logged = self._logged(record)
        if logged and logged.status == "FINISHED":
            if record.status != "FINISHED":  # it is computed again; until that is finished, the old scores count
                return logged.run_id
            if _is_equal(logged.values, record.values):
                self._repair(record, logged.run_id)
                return logged.run_id
        if not logged or logged.status == "FINISHED" or not logged.continues(record):
            logged = self._open_run(record, sweep)
        self._log(record, logged)
        if record.status == "FINISHED":
            logged.run_id = self._keep_one(record, logged.run_id)
        self._write(record.folder, logged)
        return logged.run_id

    def _logged(self, record: Record) -> Logged | None:
        """Return the logged part of a cell as its folder records it; None if MLflow has another status."""
        logged = read(record.folder).get(self.id)
        if logged and self._statuses.get(logged.run_id) != logged.status:  # another process may have logged since
            self._statuses.update((run.info.run_id, run.info.status) for run in self._runs_of(record))
        return logged if logged and self._statuses.get(logged.run_id) == logged.status else None

    @cached_property
    def _statuses(self) -> dict[str, str]:
        """The status of each run, by its id: one query for all that are there before the first is written."""
        return {run.info.run_id: run.info.status for run in self.search("")}

    def _runs_of(self, record: Record) -> list[Run]:
        return self.search(f"tags.`kdsweep.fingerprint` = '{record.tags['kdsweep.fingerprint']}'")

    def _open_run(self, record: Record, sweep: str) -> Logged:
        """Open a run; delete the cell's unfinished one, and those that a kill or a lost answer has left empty."""
        old = read(record.folder).get(self.id)
        for run in self._runs_of(record):
            is_old = old is not None and run.info.run_id == old.run_id
            if run.info.status != "FINISHED" and (is_old or not run.data.metrics):
                self.client.delete_run(run.info.run_id)
        parent = self._parents.get(sweep) or self.publish(sweep)
        tags = {**record.tags, **SOURCE, "mlflow.parentRunId": parent, "kdsweep.sweep": sweep}
        name = f"{tags['kdsweep.notation']}/split{tags['kdsweep.split']}"
        run = self.client.create_run(self.experiment_id, record.started_ms, tags, run_name=name)
        logged = Logged(str(run.info.run_id))
        self._write(record.folder, logged)
        return logged

    def _write(self, folder: Path, logged: Logged) -> None:
        self._statuses[logged.run_id] = logged.status or "RUNNING"
        mirrors = read(folder) | {self.id: logged}
        write_json(folder / MIRROR, {key: asdict(entry) for key, entry in mirrors.items()})

    def _log(self, record: Record, logged: Logged) -> None:
        run_id = logged.run_id
        if not logged.status:
            self.client.log_inputs(run_id, _data_set(record))
            params = [Param(key, str(value)) for key, value in sorted(record.params.items())]
            for part in chunk_list(params, MOST_PARAMS):
                self.client.log_batch(run_id, params=part)
        metrics = [
            Metric(name, value, time_ms, int(epoch["epoch"]))
            for epoch, time_ms in list(zip(record.history, record.times_ms, strict=True))[logged.epochs :]
            for name, value in epoch.items()
            if name != "epoch"
        ]
        metrics += [Metric(name, value, record.ended_ms, 0) for name, value in record.values.items()]
        for part in chunk_list(metrics, MOST_METRICS):
            self.client.log_batch(run_id, metrics=part)
        for name in ARTIFACTS if record.status == "FINISHED" else ():
            self.client.log_artifact(run_id, str(record.folder / name))
        if record.status == "FAILED":
            self.client.set_tag(run_id, ERROR, record.error[:4000])
        elif logged.status == "FAILED" and ERROR in self.client.get_run(run_id).data.tags:
            self.client.delete_tag(run_id, ERROR)
        if record.status == "RUNNING":
            self.client.update_run(run_id, "RUNNING")
        elif record.status != logged.status:
            self.client.set_terminated(run_id, record.status, record.ended_ms or None)
        logged.epochs, logged.last_ms = len(record.times_ms), (record.times_ms or [0])[-1]
        logged.status, logged.values = record.status, record.values

    def _keep_one(self, record: Record, run_id: str) -> str:
        """Delete all runs of a finished cell but one, and return its id.

        That is the run of another store on the same server if its scores are equal: both stores then share it.
        """
        runs, kept = self._runs_of(record), run_id
        for run in runs:
            values = {name: value for name, value in run.data.metrics.items() if name in record.values}
            if run.info.run_id != run_id and run.info.status == "FINISHED" and _is_equal(values, record.values):
                kept = str(run.info.run_id)
        for run in runs:
            if run.info.run_id != kept:
                self.client.delete_run(run.info.run_id)
        return kept

    def _repair(self, record: Record, run_id: str) -> None:
        """Log the files of a finished run again that the store's artifacts lack or that were changed there."""
        for name in ARTIFACTS if self._is_local else ():
            kept, file = database.artifact_file(self.store, run_id, name), record.folder / name
            if not kept.is_file() or not filecmp.cmp(kept, file, shallow=False):
                self.client.log_artifact(run_id, str(file))


def _make_database(store: Path) -> None:
    """Make the SQLite file, under another name first: it takes seconds, and a kill in between would spoil it."""
    if not database.has_database(store):
        remove_parts(store)
        scratch = store / f".{database.DATABASE}.{os.getpid()}.part"
        MlflowClient(tracking_uri=sqlite_url(scratch.resolve())).search_experiments(max_results=1)
        scratch.replace(store / database.DATABASE)


def read(folder: Path) -> dict[str, Logged]:
    """Return the logged part of a cell in each MLflow experiment, by the experiment's id."""
    try:
        return {key: Logged(**entry) for key, entry in (read_json(folder / MIRROR) or {}).items()}
    except (DamagedError, TypeError):
        return {}


def _is_equal(one: dict[str, float], other: dict[str, float]) -> bool:
    """Return whether values are equal; NaN equals itself here."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _data_set(record: Record) -> list[DatasetInput]:
    """Return the entry of MLflow's column Dataset: name, digest, folder; empty if the record has none."""
    digest, name = record.tags.get("kdsweep.data", ""), record.params.get("data.name")
    if not digest or not name:
        return []
    folder = record.params.get("data.root") or record.params.get("data.source.cache_dir") or ""
    about = Dataset(str(name), digest[:MOST_DIGITS], "local", json.dumps({"uri": str(folder)}))
    return [DatasetInput(about, [InputTag("mlflow.data.context", "training, validation, test")])]


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
