"""Write the runs of sweeps and cells to MLflow.

A sweep is a parent run; what it asked for is written on it as tags ``kdsweep.asked.PLACE = FINGERPRINT VARIANT``. A
cell is a run of its own, computed once per fingerprint, and counts in every sweep that asked for it.
"""

from __future__ import annotations

import filecmp
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from kdsweep.config.grid import Cell, superseded
from kdsweep.core.databases import sqlite_url
from kdsweep.core.errors import InputError
from kdsweep.core.files import remove_parts
from kdsweep.runs.records import Record, now_ms
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
ASKED = "kdsweep.asked."
VARIED, TUNED = "kdsweep.varied", "kdsweep.tuned"
COMMANDS, COMMANDS_LENGTH = "kdsweep.commands", 4000  # a tag, and how many characters MLflow surely takes for one
UI_TRAINING = "workflowType=machine_learning"  # else MLflow's pages open on prompts and traces
ERROR = "kdsweep.error"
NOTE = "mlflow.note.content"  # what the UI shows as a run's description
ARTIFACTS = ("test_scores.csv", "test_predictions.npz", "split.json")
SOURCE = {"mlflow.source.name": "python -m kdsweep", "mlflow.source.type": "LOCAL"}  # the UI's column Source
DIGEST_LENGTH = 36  # MLflow's limit
BATCH = 100  # MLflow takes at most so many params, or so many tags, in one call


@dataclass
class _Known:
    """The known state of a cell's run in a store."""

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
        self._looked, self._is_own = False, uri is None
        store.mkdir(parents=True, exist_ok=True)
        try:
            with exclusive(store):  # a fresh database breaks if many open it at once
                if uri is None and not has_database(store):
                    _make_database(store, experiment)
                if uri is None:
                    follow_move(store, experiment)
                self.client = MlflowClient(tracking_uri=self.uri)
                self.experiment_id = self._open(experiment, uri)
        except Exception as error:
            if passes(error, self.uri):
                raise TrackingError(line(error)) from error
            if not isinstance(error, MlflowException | sqlite3.Error | SQLAlchemyError):
                raise
            if uri is None:
                raise damaged(store, error) from error
            raise InputError(f"tracking.uri={self.uri}: the store does not open: {line(error)}") from error

    def _open(self, experiment: str, uri: str | None) -> str:
        found = self.client.get_experiment_by_name(experiment)
        if found is not None:
            return str(found.experiment_id)
        # A database has no place for artifacts: they go beside it. A server has one of its own.
        place = None if uri and uri.startswith("http") else artifacts_uri(self.store)
        return str(self.client.create_experiment(experiment, place, tags=EXPERIMENT_TAGS))

    def ask(
        self,
        sweep: str,
        cells: list[Cell],
        *,
        varied: Sequence[str] = (),
        tuned: Sequence[str] = (),
        command: str = "",
    ) -> None:
        """Record that this sweep wants these cells, finished or not, so that a table shows what is missing.

        Args:
            sweep: its name.
            cells: those it asks for now, in addition to earlier ones.
            varied: keys beyond the factors in which they differ on purpose.
            tuned: keys whose values tuning has set.
            command: the one that asks for them, as it can be typed again.
        """
        parent = self._parent(sweep)
        before = dict(self.client.get_run(parent).data.tags)
        keys = dict.fromkeys([*before.get(VARIED, "").split(), *varied])
        asked = {}
        for cell in cells:
            key = ASKED + cell.key
            asked[key] = f"{cell.fingerprint} {json.dumps(cell.variant)}" if cell.variant else cell.fingerprint
            if before.get(key, "").startswith(f"{asked[key]} "):  # asked for alone this time, among others before
                asked[key] = before[key]
        for key in superseded({key: value for key, value in before.items() if key.startswith(ASKED)}, asked):
            self.client.delete_tag(parent, key)
            del before[key]
        chosen = dict.fromkeys([*before.get(TUNED, "").split(), *tuned])
        about = {"kdsweep.asked_at": str(time.time()), VARIED: " ".join(keys), NOTE: _note(sweep, before | asked)}
        about |= {TUNED: " ".join(chosen)} if chosen else {}
        commands = [known for known in before.get(COMMANDS, "").splitlines() if known != command] + [command]
        while len("\n".join(commands)) > COMMANDS_LENGTH:
            del commands[0]
        about[COMMANDS] = "\n".join(filter(None, commands))
        for part in _parts([RunTag(key, value) for key, value in (about | asked).items()]):
            self.client.log_batch(parent, tags=part)

    def sync(self, record: Record, *, sweep: str) -> str:
        """Make the run of a cell hold what its folder holds, each value once; return the run's id.

        An existing run goes on if all it holds is in the folder too. If not (a checkpoint was lost and the cell is
        computed again), a new one is opened; an old finished run is deleted as soon as the new one is finished with
        other scores: a cell has one finished run.

        Args:
            record: of a cell that was begun.
            sweep: the one under which a new run is opened.
        """
        fingerprint = record.tags["kdsweep.fingerprint"]
        if not self._looked:
            for run in self.search("tags.`kdsweep.role` != 'sweep'"):
                self._known.setdefault(run.data.tags["kdsweep.fingerprint"], []).append(_known(run))
            self._looked = True
        own = self._own(record, self._known.get(fingerprint, []))
        if own is None:  # another command may have opened one since, or the answer to this one's request was lost
            found = self.search(f"tags.`kdsweep.role` != 'sweep' and tags.`kdsweep.fingerprint` = '{fingerprint}'")
            self._known[fingerprint] = [_known(run) for run in found]
            own = self._own(record, self._known[fingerprint])
        runs = self._known[fingerprint]
        finished = [run for run in runs if run.status == "FINISHED"]
        if own in finished:
            self._repair(record, own.run_id)
            return own.run_id
        for other in runs:
            if other is not own and other.status == "RUNNING":
                self.client.set_terminated(other.run_id, "KILLED")
                other.status = "KILLED"
        if own is None:
            own = self._create(record, sweep, again=bool(runs))
            runs.insert(0, own)
        self._log(record, own)
        for old in finished:
            self.client.delete_run(old.run_id)
            runs.remove(old)
        return own.run_id

    def _repair(self, record: Record, run_id: str) -> None:
        """Log the files of a finished run again that the store's artifacts lack or that were changed there."""
        if not self._is_own or record.status != "FINISHED":
            return
        for name in ARTIFACTS:
            kept, file = artifact_file(self.store, run_id, name), record.folder / name
            if not kept.is_file() or not filecmp.cmp(kept, file, shallow=False):
                self.client.log_artifact(run_id, str(file))

    def _own(self, record: Record, runs: list[_Known]) -> _Known | None:
        """Return the record's run among these: a finished one that agrees with it, else one that can go on."""
        finished = [run for run in runs if run.status == "FINISHED"]
        for run in finished:
            if record.status != "FINISHED" or _same(record.values, run.metrics):
                return run
        return next((run for run in runs if run not in finished and self._fits(run, record)), None)

    def _fits(self, run: _Known, record: Record) -> bool:
        """Return whether a run's epochs are the first ones of the record, so that it can go on."""
        if run.epochs is None:
            run.epochs = self._logged(run.run_id)
        return run.epochs == _epochs(record)[: len(run.epochs)]

    def _create(self, record: Record, sweep: str, *, again: bool) -> _Known:
        tags = {**record.tags, **SOURCE, "mlflow.parentRunId": self._parent(sweep), "kdsweep.sweep": sweep}
        name = f"{tags['kdsweep.notation']}/split{tags['kdsweep.split']}"
        start_ms = now_ms() if again else record.started_ms  # so that the newest is known
        run = self.client.create_run(self.experiment_id, start_ms, tags, run_name=name)
        if data := _data_set(record):
            self.client.log_inputs(run.info.run_id, [data])
        return _Known(run.info.run_id, "RUNNING", {}, {}, epochs=[])

    def _log(self, record: Record, known: _Known) -> None:
        params = {key: str(value) for key, value in sorted(record.params.items()) if key not in known.params}
        for part in _parts([Param(key, value) for key, value in params.items()]):
            self.client.log_batch(known.run_id, params=part)
        known.params |= params
        new = list(zip(record.history, record.times_ms, strict=True))[len(known.epochs or []) :]
        for part in _parts(new):
            metrics = [
                Metric(name, value, time_ms, int(epoch["epoch"]))
                for epoch, time_ms in part
                for name, value in epoch.items()
                if name != "epoch"
            ]
            self.client.log_batch(known.run_id, metrics=metrics)
        known.epochs = _epochs(record)
        if record.status == "FINISHED":
            final = [Metric(name, value, record.ended_ms, 0) for name, value in record.values.items()]
            self.client.log_batch(known.run_id, metrics=final)
            for name in ARTIFACTS:
                self.client.log_artifact(known.run_id, str(record.folder / name))
            known.metrics = dict(record.values)
        if record.status == "FAILED":
            self.client.set_tag(known.run_id, ERROR, record.error[:4000])
        elif known.failed:
            self.client.delete_tag(known.run_id, ERROR)
        known.failed = record.status == "FAILED"
        if record.status != known.status:
            if record.status == "RUNNING":
                self.client.update_run(known.run_id, "RUNNING")
            else:
                self.client.set_terminated(known.run_id, record.status, record.ended_ms or None)
            known.status = record.status

    def _logged(self, run_id: str) -> list[tuple[int, int]]:
        points = self.client.get_metric_history(run_id, "val/loss")
        return sorted((point.step, point.timestamp) for point in points)

    def _parent(self, sweep: str) -> str:
        if sweep not in self._parents:
            found = self.search(f"tags.`kdsweep.role` = 'sweep' and tags.`kdsweep.sweep` = '{sweep}'")
            tags = {"kdsweep.role": "sweep", "kdsweep.sweep": sweep}
            run = found[0] if found else self.client.create_run(self.experiment_id, run_name=sweep, tags=tags)
            if run.info.status != "FINISHED":  # it groups runs and computes nothing that could go on
                self.client.set_terminated(run.info.run_id, "FINISHED")
            self._parents[sweep] = str(run.info.run_id)
        return self._parents[sweep]

    def search(self, condition: str) -> list[Run]:
        """Return all runs of the experiment that meet a condition, however many pages they fill."""
        found: list[Run] = []
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], condition, ViewType.ACTIVE_ONLY, 1000, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found


def _make_database(store: Path, experiment: str) -> None:
    """Make the SQLite file under another name first: it takes seconds, and a kill in between would spoil it."""
    remove_parts(store)
    scratch = store / f".{DATABASE}.{os.getpid()}.part"
    client = MlflowClient(tracking_uri=sqlite_url(scratch.resolve()))
    client.create_experiment(experiment, artifacts_uri(store), tags=EXPERIMENT_TAGS)
    scratch.replace(store / DATABASE)


def _data_set(record: Record) -> DatasetInput | None:
    """Return what MLflow's column Dataset shows of a record: name, digest, folder; None if it does not say."""
    digest, name = record.tags.get("kdsweep.data", ""), record.params.get("data.name")
    if not digest or not name:
        return None
    folder = record.params.get("data.root") or record.params.get("data.source.cache_dir") or ""
    about = Dataset(str(name), digest[:DIGEST_LENGTH], "local", json.dumps({"uri": str(folder)}))
    return DatasetInput(about, [InputTag("mlflow.data.context", "training, validation, test")])


def _note(sweep: str, tags: dict[str, str]) -> str:
    """Return the description of a sweep's parent run, in Markdown, from its tags."""
    places = [key.removeprefix(ASKED).rsplit("/", 3) for key in tags if key.startswith(ASKED)]
    names = sorted({notation for notation, *_ in places})
    splits, seeds = (sorted({place[number] for place in places}) for number in (1, 2))
    return (
        f"**{len(places)} cells** of sweep `{sweep}`: {', '.join(names)}; {', '.join(splits)}; {', '.join(seeds)}.\n\n"
        "Each is a run of its own below this one, named NOTATION/splitK; Teachers are there too. Select several and "
        "press Compare: `test/dice` is the mean Dice over the test images, `val/dice` the curve; the artifact "
        "test_scores.csv holds the scores of each image.\n\n"
        f"Tables and figures: `python -m kdsweep report --sweep {sweep}`; those made so far are among the "
        "artifacts."
    )


def _known(run: Run) -> _Known:
    data = run.data
    return _Known(run.info.run_id, run.info.status, dict(data.metrics), dict(data.params), failed=ERROR in data.tags)


def _same(values: dict[str, float], metrics: dict[str, float]) -> bool:
    """Return whether a run's metrics are these values; NaN equals itself here."""
    return all(repr(value) == repr(metrics.get(name)) for name, value in values.items())


def _epochs(record: Record) -> list[tuple[int, int]]:
    return [(int(epoch["epoch"]), time_ms) for epoch, time_ms in zip(record.history, record.times_ms, strict=True)]


def _parts(entries: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(entries), BATCH):
        yield entries[start : start + BATCH]
