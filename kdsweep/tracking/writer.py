"""The only module that talks to MLflow: runs are written here, and read back as pandas frames.

A sweep is a parent run; what it asked for is written on it as tags ``kdsweep.asked.PLACE = FINGERPRINT VARIANT``. A
cell is a run of its own, computed once per fingerprint, and counts in every sweep that asked for it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from kdsweep.config.grid import Cell, superseded
from kdsweep.core.errors import InputError
from kdsweep.runs.checkpoint import remove_parts
from kdsweep.runs.records import Record, now_ms
from kdsweep.tracking.database import (
    DATABASE,
    TrackingError,
    alone,
    artifacts_uri,
    follow_move,
    line,
    passes,
    store_uri,
)

# Before the import of mlflow, which reads them.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; a server that is down would block for minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # whoever calls tries again

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

for _noisy in ("alembic", "mlflow"):  # they tell every table of a new database at level INFO
    logging.getLogger(_noisy).setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of what is raised as well

T = TypeVar("T")
EXPERIMENT = "kdsweep"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on curves, not on prompts
ASKED = "kdsweep.asked."
VARIED = "kdsweep.varied"
COMMANDS, COMMANDS_LENGTH = "kdsweep.commands", 4000  # a tag, and how many characters MLflow surely takes for one
UI_TRAINING = "workflowType=machine_learning"  # else MLflow's pages open on prompts and traces
ERROR = "kdsweep.error"
NOTE = "mlflow.note.content"  # what the UI shows as a run's description
ARTIFACTS = ("test_scores.csv", "test_predictions.npz", "split.json")
VALUES = {"test/trivial_dice": "trivial_dice", "epochs": "epochs", "best_epoch": "best_epoch"}  # in a sweep's runs
BATCH = 100  # MLflow takes at most so many params, or so many tags, in one call


@dataclass(frozen=True)
class Sweep:
    """What a sweep asked for and what is there of it.

    Attributes:
        name: of the sweep.
        runs: one row per cell asked for and per Teacher they learn from; columns fingerprint, role, notation, split,
            seed, variant (values of the further keys that the sweep varies, as a dict), profile, data, weights,
            results_version, device, teacher, status, run_id, started_ms, ended_ms, params, tags, trivial_dice, epochs
            (how many it was trained), best_epoch (counted from 0); what is not known is 0, empty or NaN.
        scores: one row per fingerprint and test image of the finished ones; fractions 0 to 1, HD95 in pixels.
        varied: the keys beyond the factors in which its cells differ on purpose.
        commands: that asked for its cells, as they can be typed again, the last one last.
        run_id: of the parent run.
        experiment_id: of the MLflow experiment.
    """

    name: str
    runs: pd.DataFrame
    scores: pd.DataFrame
    varied: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    run_id: str = ""
    experiment_id: str = ""


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
                    follow_move(store, experiment)
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
        place = None if uri and uri.startswith("http") else artifacts_uri(self.store)
        return str(self._client.create_experiment(experiment, place, tags=EXPERIMENT_TAGS))

    def ask(self, sweep: str, cells: list[Cell], *, varied: Sequence[str] = (), command: str = "") -> None:
        """Write down that this sweep wants these cells, finished or not, so that a table shows what is missing.

        Args:
            sweep: its name.
            cells: that it asks for, beside those it asked for before.
            varied: keys beyond the factors in which they differ on purpose.
            command: that asks for them, as it can be typed again.
        """
        parent = self._parent(sweep)
        before = dict(self._client.get_run(parent).data.tags)
        keys = dict.fromkeys([*before.get(VARIED, "").split(), *varied])
        asked = {}
        for cell in cells:
            key = ASKED + cell.place
            asked[key] = f"{cell.fingerprint} {json.dumps(cell.variant)}" if cell.variant else cell.fingerprint
            if before.get(key, "").startswith(f"{asked[key]} "):  # asked for alone this time, among others before
                asked[key] = before[key]
        for key in superseded({key: value for key, value in before.items() if key.startswith(ASKED)}, asked):
            self._client.delete_tag(parent, key)
            del before[key]
        about = {"kdsweep.asked_at": str(time.time()), VARIED: " ".join(keys), NOTE: _note(sweep, before | asked)}
        commands = [known for known in before.get(COMMANDS, "").splitlines() if known != command] + [command]
        while len("\n".join(commands)) > COMMANDS_LENGTH:
            del commands[0]
        about[COMMANDS] = "\n".join(filter(None, commands))
        for part in _parts([RunTag(key, value) for key, value in (about | asked).items()]):
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
        tags = parent.data.tags
        varied = tuple(tags.get(VARIED, "").split())
        asked = {key.removeprefix(ASKED): value for key, value in tags.items() if key.startswith(ASKED)}
        runs = self._by_fingerprint()
        rows = []
        for place, value in sorted(asked.items()):
            fingerprint, _, variant = value.partition(" ")
            row = _row(fingerprint, runs.get(fingerprint), place)
            rows.append(row | {"variant": json.loads(variant or "{}")})
        teachers = sorted({row["teacher"] for row in rows} - {""})
        rows += [
            _row(fingerprint, runs[fingerprint], "") | {"variant": {}}
            for fingerprint in teachers
            if fingerprint in runs
        ]
        table = self._scores([row for row in rows if row["status"] == "FINISHED"])
        name, run_id = parent.data.tags["kdsweep.sweep"], str(parent.info.run_id)
        commands = tuple(tags.get(COMMANDS, "").splitlines())
        return Sweep(name, pd.DataFrame(rows), table, varied, commands, run_id, str(self.experiment_id))

    def _scores(self, rows: list[dict[str, Any]]) -> pd.DataFrame:
        """The scores of finished runs; files of equal columns are read as one, a thousand of which take seconds."""
        parts: dict[str, list[tuple[str, str]]] = {}
        for row in rows:
            kept = _artifact(self._client, self.store, row["run_id"], "test_scores.csv")
            header, _, body = kept.decode().partition("\n")
            parts.setdefault(header, []).append((row["fingerprint"], body))
        tables = [pd.DataFrame(columns=["fingerprint", "image", "dice"])] if not parts else []
        for header, own in parts.items():
            text = io.StringIO("\n".join([header, *(body.rstrip("\n") for _, body in own)]))
            counts = [len(list(csv.reader(io.StringIO(body)))) for _, body in own]
            table = pd.read_csv(text, dtype={"image": str, "label": str})
            tables.append(table.assign(fingerprint=np.repeat([fingerprint for fingerprint, _ in own], counts)))
        return pd.concat(tables, ignore_index=True)

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


def _make_database(store: Path, experiment: str) -> None:
    """Make the SQLite file beside its place: MLflow takes seconds for it, and a kill in between would spoil it."""
    remove_parts(store)
    scratch = store / f".{DATABASE}.{os.getpid()}.part"
    client = MlflowClient(tracking_uri=f"sqlite:///{scratch.resolve()}")
    client.create_experiment(experiment, artifacts_uri(store), tags=EXPERIMENT_TAGS)
    scratch.replace(store / DATABASE)


def _artifact(client: MlflowClient, store: Path, run_id: str, name: str) -> bytes:
    """What is in a run's file: in a store that was moved, MLflow looks for it at the old place."""
    file = store / "artifacts" / run_id / "artifacts" / name
    if file.is_file():
        return file.read_bytes()
    with tempfile.TemporaryDirectory() as scratch:  # without a folder MLflow leaves one behind for each file
        return Path(client.download_artifacts(run_id, name, scratch)).read_bytes()


def _note(sweep: str, tags: dict[str, str]) -> str:
    """The description of a sweep's parent run, in Markdown, from its tags."""
    places = [key.removeprefix(ASKED).rsplit("/", 3) for key in tags if key.startswith(ASKED)]
    names = sorted({notation for notation, *_ in places})
    splits, seeds = (sorted({place[number] for place in places}) for number in (1, 2))
    return (
        f"**{len(places)} cells** of sweep `{sweep}`: {', '.join(names)}; {', '.join(splits)}; {', '.join(seeds)}.\n\n"
        "Each is a run of its own below this one, named NOTATION/splitK; Teachers are there too. Select several and "
        "press Compare: `test/dice` is the mean Dice over the test images, `val/dice` the curve; the artifact "
        "test_scores.csv holds the scores of each image.\n\n"
        f"Tables and figures: `python -m kdsweep.results.report --sweep {sweep}`; those made so far are among the "
        "artifacts."
    )


def _known(run: Run) -> _Known:
    data = run.data
    return _Known(run.info.run_id, run.info.status, dict(data.metrics), dict(data.params), failed=ERROR in data.tags)


def _same(values: dict[str, float], metrics: dict[str, float]) -> bool:
    """Whether a run's metrics are these values; one that is not a number equals itself here."""
    return all(repr(value) == repr(metrics.get(name)) for name, value in values.items())


def _epochs(record: Record) -> list[tuple[int, int]]:
    return [(int(epoch["epoch"]), time_ms) for epoch, time_ms in zip(record.history, record.times_ms, strict=True)]


def _parts(entries: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(entries), BATCH):
        yield entries[start : start + BATCH]


def _row(fingerprint: str, run: Run | None, place: str) -> dict[str, Any]:
    if run is None:
        notation, split, seed, _ = place.split("/")
        role = "student" if notation == "Student" else "cell"
        where = {"split": int(split.removeprefix("split")), "seed": int(seed.removeprefix("seed"))}
        unknown = dict.fromkeys(("profile", "data", "weights", "results_version", "device", "teacher", "run_id"), "")
        own = {"fingerprint": fingerprint, "role": role, "notation": notation}
        no_run = {"started_ms": 0, "ended_ms": 0, "params": {}, "tags": {}} | dict.fromkeys(VALUES.values(), nan)
        return {**own, **where, **unknown, "status": "missing", **no_run}
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
        "results_version": tags.get("kdsweep.results_version", "0"),  # the first ones told none
        "device": tags["kdsweep.device"],
        "teacher": tags["kdsweep.teacher"],
        "status": run.info.status,
        "run_id": run.info.run_id,
        "started_ms": run.info.start_time or 0,
        "ended_ms": run.info.end_time or 0,
        "params": dict(run.data.params),
        "tags": dict(tags),
        **{name: run.data.metrics.get(metric, nan) for metric, name in VALUES.items()},
    }


def artifact(*, store: Path, uri: str | None, run_id: str, name: str) -> bytes:
    """What is in a file that a run recorded."""
    return _artifact(MlflowClient(tracking_uri=store_uri(store, uri)), store, run_id, name)


def read_curves(sweep: Sweep, *, store: Path, uri: str | None, metric: str = "val/dice") -> pd.DataFrame:
    """A metric of each epoch of all begun runs of a sweep: columns notation, split, seed, metric, epoch, value.

    Raises:
        InputError: the store does not answer.
    """
    client = MlflowClient(tracking_uri=store_uri(store, uri))
    rows = []
    for run in sweep.runs[sweep.runs["run_id"] != ""].to_dict("records"):
        place = {key: run[key] for key in ("notation", "split", "seed")}
        points = _answered(partial(client.get_metric_history, run["run_id"], metric), store=store, uri=uri)
        rows += [{**place, "metric": metric, "epoch": point.step, "value": point.value} for point in points]
    columns = ["notation", "split", "seed", "metric", "epoch", "value"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(columns[:-1])


def attach(sweep: Sweep, files: Sequence[Path], *, folder: str, store: Path, uri: str | None) -> str:
    """Keep files among the artifacts of a sweep's parent run; what became of it, in words.

    That MLflow takes no files now (a store that can only be read, a server that is down) costs nobody the files.
    """
    try:
        with alone(store):
            client = MlflowClient(tracking_uri=store_uri(store, uri))
            for file in files:
                client.log_artifact(sweep.run_id, str(file), folder)
    except Exception as error:  # of many kinds: server, network, database, disk
        return f"not logged to MLflow: {line(error)}"
    return f"logged to MLflow, run {sweep.run_id}"


def read_sweep(*, store: Path, uri: str | None, name: str | None) -> Sweep:
    """Read a sweep of a store that must be there already; see ``Tracker.read_sweep``.

    Raises:
        InputError: no store, or no such sweep in it.
    """
    if uri is None and not (store / DATABASE).is_file():
        raise InputError(f"--store {store}: no mlflow.db in it; run a sweep first, or name its folder")
    return _answered(lambda: Tracker(store=store, uri=uri).read_sweep(name), store=store, uri=uri)


def _answered(ask: Callable[[], T], *, store: Path, uri: str | None) -> T:
    """What MLflow answers, or InputError if it does not answer."""
    try:
        return ask()
    except Exception as error:
        if not isinstance(error, TrackingError) and not passes(error, uri or ""):
            raise
        what = f"--tracking-uri {uri} does not answer" if uri else f"--store {store}: its MLflow store does not answer"
        raise InputError(f"{what}: {line(error)}") from error


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
    """Log a model under the finished run of its cell and make it the next version of a registered one; its number.

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
    place = store_uri(store, uri)
    if uri is None and not (store / DATABASE).is_file():
        raise InputError(f"--register {name}: {store} has no {DATABASE}; name the run's MLflow with --tracking-uri")
    try:
        run = _finished_run(metadata["kdsweep.fingerprint"], name=name, store=store, uri=uri)
        with alone(store), _current(place) as client, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of MLflow about its own parts
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
        raise InputError(f"--register {name}: MLflow at {place}: {line(error)}") from error


def _finished_run(fingerprint: str, *, name: str, store: Path, uri: str | None) -> Run:
    finished = f"tags.`kdsweep.fingerprint` = '{fingerprint}' and attributes.status = 'FINISHED'"
    for run in Tracker(store=store, uri=uri)._search(finished):
        return run
    raise InputError(
        f"--register {name}: {store_uri(store, uri)} has no finished run of this cell (fingerprint {fingerprint[:10]})"
        "; the sweep's command writes it there, or name the MLflow that has it with --tracking-uri"
    )


@contextlib.contextmanager
def _current(uri: str) -> Iterator[MlflowClient]:
    """A client of what MLflow's own functions, which take no address, work on meanwhile."""
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
    found = mlflow.pyfunc.load_model(model_uri).predict(example)
    difference = max(float(np.abs(found[key] - values).max()) for key, values in expected.items())
    if not difference <= tolerance:
        raise InputError(
            f"--register {name}: not registered, what MLflow loads differs by {difference:.1e} from what was logged; "
            f"allowed are {tolerance:.0e}"
        )
