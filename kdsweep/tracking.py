"""The only module that talks to MLflow: runs are written here, and read back as pandas frames.

A sweep is a parent run; what it asked for is written on it as tags ``kdsweep.asked.PLACE = FINGERPRINT``. A cell is a
run of its own, computed once per fingerprint, and counts in every sweep that asked for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from kdsweep.checkpoint import remove_parts
from kdsweep.errors import InputError
from kdsweep.grid import Cell
from kdsweep.records import Record, now_ms

# Before the import of mlflow, which reads them.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; a server that is down would block for minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # whoever calls tries again

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

for _noisy in ("alembic", "mlflow"):  # they tell every table of a new database at level INFO
    logging.getLogger(_noisy).setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of what is raised as well

EXPERIMENT = "kdsweep"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on curves, not on prompts
ASKED = "kdsweep.asked."
ERROR = "kdsweep.error"
DATABASE = "mlflow.db"
ARTIFACTS = ("test_scores.csv", "test_predictions.npz", "split.json")
BATCH = 100  # MLflow takes at most so many params, or so many tags, in one call


class TrackingError(Exception):
    """The store does not answer now; it may later."""


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
    return uri or f"sqlite:///{store.resolve() / DATABASE}"


def passes(error: BaseException, uri: str) -> bool:
    """Whether a failure may be over the next time: a server that does not answer, a database locked, a disk full."""
    signs = ("database is locked", "disk is full", "disk I/O error", "readonly database", "No space left")
    return uri.startswith("http") or any(sign in str(error) for sign in signs)


@dataclass
class _Known:
    """What a store is known to hold of a cell's run."""

    run_id: str
    status: str
    metrics: dict[str, float]
    params: dict[str, str]
    epochs: list[tuple[int, int]] | None = None  # logged ones and when they ended; None: not asked yet
    failed: bool = False  # whether it tells of an error


class Tracker:
    """One MLflow store: its experiment, its sweeps and its cells.

    Args:
        store: folder of the runs; the default SQLite file and the artifacts lie in it.
        uri: of an MLflow server or database, or None for the SQLite file.
        experiment: name of the MLflow experiment.

    Raises:
        InputError: the store cannot be opened.
        TrackingError: not now.
    """

    def __init__(self, *, store: Path, uri: str | None, experiment: str = EXPERIMENT) -> None:
        self.uri, self.store = store_uri(store, uri), store
        self._parents: dict[str, str] = {}
        self._known: dict[str, list[_Known]] = {}
        self._looked = False
        store.mkdir(parents=True, exist_ok=True)
        try:
            with alone(store):  # a fresh database that many open at once breaks
                if uri is None and not (store / DATABASE).exists():
                    _make_database(store, experiment)
                if uri is None and os.access(store, os.W_OK):
                    _follow_move(store, experiment)
                self._client = MlflowClient(tracking_uri=self.uri)
                self.experiment_id = self._open(experiment, uri)
        except Exception as error:
            if passes(error, self.uri):
                raise TrackingError(line(error)) from error
            if isinstance(error, MlflowException | sqlite3.Error):
                raise InputError(f"tracking.uri={self.uri}: the store does not open: {line(error)}") from error
            raise

    def _open(self, experiment: str, uri: str | None) -> str:
        found = self._client.get_experiment_by_name(experiment)
        if found is not None:
            return str(found.experiment_id)
        # A database has no place for artifacts: they go beside it. A server has one of its own.
        place = None if uri and uri.startswith("http") else _artifacts(self.store)
        return str(self._client.create_experiment(experiment, place, tags=EXPERIMENT_TAGS))

    def ask(self, sweep: str, cells: list[Cell]) -> None:
        """Write down that this sweep wants these cells, finished or not, so that a table shows what is missing."""
        parent = self._parent(sweep)
        tags = [RunTag("kdsweep.asked_at", str(time.time()))]
        tags += [RunTag(ASKED + cell.place, cell.fingerprint) for cell in cells]
        for part in _parts(tags):
            self._client.log_batch(parent, tags=part)

    def mirror(self, record: Record, *, sweep: str) -> str:
        """Make the run of a cell hold what its folder tells, each value once; the run's id.

        A run that is there goes on if all it holds is in the folder too. If not (a checkpoint was lost and the cell is
        computed again), it is left behind, and a finished one is deleted as soon as the new one is finished with other
        scores: a cell has one finished run.

        Args:
            record: of a cell that was begun.
            sweep: in whose name a new run is opened.
        """
        fingerprint = record.tags["kdsweep.fingerprint"]
        if not self._looked:
            for run in self._search("tags.`kdsweep.role` != 'sweep'"):
                self._known.setdefault(run.data.tags["kdsweep.fingerprint"], []).append(_known(run))
            self._looked = True
        own = self._own(record, self._known.get(fingerprint, []))
        if own is None:  # another command may have opened one since, or the answer to this one's request was lost
            found = self._search(f"tags.`kdsweep.role` != 'sweep' and tags.`kdsweep.fingerprint` = '{fingerprint}'")
            self._known[fingerprint] = [_known(run) for run in found]
            own = self._own(record, self._known[fingerprint])
        runs = self._known[fingerprint]
        finished = [run for run in runs if run.status == "FINISHED"]
        if own in finished:
            return own.run_id
        for other in runs:
            if other is not own and other.status == "RUNNING":
                self._client.set_terminated(other.run_id, "KILLED")
                other.status = "KILLED"
        if own is None:
            own = self._create(record, sweep, again=bool(runs))
            runs.insert(0, own)
        self._log(record, own)
        for old in finished:
            self._client.delete_run(old.run_id)
            runs.remove(old)
        return own.run_id

    def _own(self, record: Record, runs: list[_Known]) -> _Known | None:
        """The run of these that is the record's: a finished one that agrees with it, else one that can go on."""
        finished = [run for run in runs if run.status == "FINISHED"]
        for run in finished:
            if record.status != "FINISHED" or _same(record.values, run.metrics):
                return run
        return next((run for run in runs if run not in finished and self._fits(run, record)), None)

    def _fits(self, run: _Known, record: Record) -> bool:
        """Whether the epochs that a run holds are the first ones of the record, so that it can go on."""
        if run.epochs is None:
            run.epochs = self._logged(run.run_id)
        return run.epochs == _epochs(record)[: len(run.epochs)]

    def _create(self, record: Record, sweep: str, *, again: bool) -> _Known:
        tags = {**record.tags, "mlflow.parentRunId": self._parent(sweep), "kdsweep.sweep": sweep}
        name = f"{tags['kdsweep.notation']}/split{tags['kdsweep.split']}"
        start_ms = now_ms() if again else record.started_ms  # so that the newest is known
        run = self._client.create_run(self.experiment_id, start_ms, tags, run_name=name)
        return _Known(run.info.run_id, "RUNNING", {}, {}, epochs=[])

    def _log(self, record: Record, known: _Known) -> None:
        params = {key: str(value) for key, value in sorted(record.params.items()) if key not in known.params}
        for part in _parts([Param(key, value) for key, value in params.items()]):
            self._client.log_batch(known.run_id, params=part)
        known.params |= params
        new = list(zip(record.history, record.times_ms, strict=True))[len(known.epochs or []) :]
        for part in _parts(new):
            metrics = [
                Metric(name, value, time_ms, int(epoch["epoch"]))
                for epoch, time_ms in part
                for name, value in epoch.items()
                if name != "epoch"
            ]
            self._client.log_batch(known.run_id, metrics=metrics)
        known.epochs = _epochs(record)
        if record.status == "FINISHED":
            final = [Metric(name, value, record.ended_ms, 0) for name, value in record.values.items()]
            self._client.log_batch(known.run_id, metrics=final)
            for name in ARTIFACTS:
                self._client.log_artifact(known.run_id, str(record.folder / name))
            known.metrics = dict(record.values)
        if record.status == "FAILED":
            self._client.set_tag(known.run_id, ERROR, record.error[:4000])
        elif known.failed:
            self._client.delete_tag(known.run_id, ERROR)
        known.failed = record.status == "FAILED"
        if record.status != known.status:
            if record.status == "RUNNING":
                self._client.update_run(known.run_id, "RUNNING")
            else:
                self._client.set_terminated(known.run_id, record.status, record.ended_ms or None)
            known.status = record.status

    def _logged(self, run_id: str) -> list[tuple[int, int]]:
        points = self._client.get_metric_history(run_id, "val/loss")
        return sorted((point.step, point.timestamp) for point in points)

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
        file = _artifact(self._client, self.store, row["run_id"], "test_scores.csv")
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
        if sweep not in self._parents:
            found = self._search(f"tags.`kdsweep.role` = 'sweep' and tags.`kdsweep.sweep` = '{sweep}'")
            tags = {"kdsweep.role": "sweep", "kdsweep.sweep": sweep}
            run = found[0] if found else self._client.create_run(self.experiment_id, run_name=sweep, tags=tags)
            if run.info.status != "FINISHED":  # it groups runs and computes nothing that could go on
                self._client.set_terminated(run.info.run_id, "FINISHED")
            self._parents[sweep] = str(run.info.run_id)
        return self._parents[sweep]

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


@contextmanager
def alone(store: Path) -> Iterator[None]:
    """Keep the other processes that write about this store to MLflow out; one that died keeps nobody out."""
    lock = FileLock(store / ".mlflow.lock")
    try:
        lock.acquire(timeout=60)
    except Timeout as error:
        raise TrackingError("another process has been at it for a minute") from error
    except OSError:  # a store that can only be read
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _make_database(store: Path, experiment: str) -> None:
    """Make the SQLite file beside its place: MLflow takes seconds for it, and a kill in between would spoil it."""
    remove_parts(store)
    scratch = store / f".{DATABASE}.{os.getpid()}.part"
    client = MlflowClient(tracking_uri=f"sqlite:///{scratch.resolve()}")
    client.create_experiment(experiment, _artifacts(store), tags=EXPERIMENT_TAGS)
    scratch.replace(store / DATABASE)


def _artifacts(store: Path) -> str:
    return (store.resolve() / "artifacts").as_uri()


def _artifact(client: MlflowClient, store: Path, run_id: str, name: str) -> Path:
    """A run's file: in a store that was moved, MLflow looks for it at the old place."""
    file = store / "artifacts" / run_id / "artifacts" / name
    return file if file.is_file() else Path(client.download_artifacts(run_id, name))


def _follow_move(store: Path, experiment: str) -> None:
    """Tell the SQLite file where its artifacts are now: it knows them by absolute names, and the store may be moved."""
    file, place = store / DATABASE, _artifacts(store)
    if not file.is_file():
        return
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        has = "SELECT count(*) FROM sqlite_master WHERE name IN ('experiments', 'runs')"
        if database.execute(has).fetchone() != (2,):
            return
        query = "SELECT artifact_location FROM experiments WHERE name = ? AND artifact_location LIKE 'file:%'"
        for (old,) in database.execute(query, (experiment,)).fetchall():
            if old != place:
                database.execute("UPDATE experiments SET artifact_location = ? WHERE name = ?", (place, experiment))
                change = (
                    "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?"
                )
                database.execute(change, (place, len(old) + 1, len(old) + 1, f"{old}/"))


def _known(run: Run) -> _Known:
    data = run.data
    return _Known(run.info.run_id, run.info.status, dict(data.metrics), dict(data.params), failed=ERROR in data.tags)


def _same(values: dict[str, float], metrics: dict[str, float]) -> bool:
    """Whether a run's metrics are these values; one that is not a number equals itself here."""
    return all(repr(value) == repr(metrics.get(name)) for name, value in values.items())


def _epochs(record: Record) -> list[tuple[int, int]]:
    return [(int(epoch["epoch"]), time_ms) for epoch, time_ms in zip(record.history, record.times_ms, strict=True)]


def line(error: BaseException) -> str:
    """What went wrong with MLflow in one line, without the database's statement."""
    return " ".join(str(error).split()).partition(" [SQL:")[0][:300]


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
        "data": run.data.params.get("data.name", ""),
        "weights": run.data.params.get("weights", ""),
        "device": tags["kdsweep.device"],
        "teacher": tags["kdsweep.teacher"],
        "status": run.info.status,
        "run_id": run.info.run_id,
        "params": dict(run.data.params),
        "trivial_dice": run.data.metrics.get("test/trivial_dice", float("nan")),
    }


def artifact(*, store: Path, uri: str | None, run_id: str, name: str) -> Path:
    """Local path of a file that a run recorded."""
    return _artifact(MlflowClient(tracking_uri=store_uri(store, uri)), store, run_id, name)


def read_sweep(*, store: Path, uri: str | None, name: str | None) -> Sweep:
    """Read a sweep of a store that must be there already; see ``Tracker.read_sweep``.

    Raises:
        InputError: no store, or no such sweep in it.
    """
    if uri is None and not (store / DATABASE).is_file():
        raise InputError(f"--store {store}: no mlflow.db in it; run a sweep first, or name its folder")
    try:
        return Tracker(store=store, uri=uri).read_sweep(name)
    except Exception as error:
        if not isinstance(error, TrackingError) and not passes(error, uri or ""):
            raise
        what = f"--tracking-uri {uri} does not answer" if uri else f"--store {store}: its MLflow store does not answer"
        raise InputError(f"{what}: {line(error)}") from error
