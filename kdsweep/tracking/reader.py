"""Read a sweep as pandas frames: its requests from its file, its runs from MLflow."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run

from kdsweep.core.errors import InputError
from kdsweep.store import cell_folder, sweep_file
from kdsweep.store.sweep_file import Request, SweepFile
from kdsweep.tracking.artifacts import EXTERNAL, SCORES, artifact, check_scores, folder_of, kept_file
from kdsweep.tracking.database import (
    DATABASE,
    REBUILD,
    check_location,
    damaged,
    exclusive,
    has_database,
    is_damage,
    line,
    passes,
    store_uri,
)
from kdsweep.tracking.mirror import SWEEP_FILE, Tracker

T = TypeVar("T")
SCORED = "kdsweep.external"  # tag with the names of those files
VALUES = {  # metrics by column of a sweep's runs
    "trivial_dice": "test/trivial_dice",
    "epochs": "epochs",
    "best_epoch": "best_epoch",
    "val_dice": "best/val_dice",
    "kd_gradient_ratio": "kd/gradient_ratio",
    "kd_weight": "kd/weight",
}
TAGS = {  # tags by column
    "profile": "kdsweep.profile",
    "data_digest": "kdsweep.data",
    "user_code": "kdsweep.user_code",
    "results_version": "kdsweep.results_version",
    "split_protocol": "kdsweep.split_protocol",
    "split_digest": "kdsweep.split_digest",
    "device": "kdsweep.device",
    "teacher": "kdsweep.teacher",
}


@dataclass(frozen=True)
class Sweep:
    """The requests of a sweep and what MLflow holds of them.

    Attributes:
        name: of the sweep.
        runs: one row per requested cell and per Teacher they learn from; columns fingerprint, role, notation, split,
            seed, variant (values of the further keys that the sweep varies, as a dict), profile, data, data_digest,
            user_code (its digest), weights (what its network began with), results_version, split_protocol (how images
            are divided, in words), split_digest (of the ids of its parts), device, teacher, status, run_id,
            started_ms, ended_ms, params, tags, trivial_dice, epochs (how many it was trained), best_epoch (counted
            from 0), val_dice (of that epoch), kd_gradient_ratio (KD to supervised, geometric mean up to that epoch),
            kd_weight (the matched one); unknown values are 0, empty or NaN.
        scores: one row per fingerprint and test image of the finished ones; fractions 0 to 1, HD95 in pixels.
        varied: the keys beyond the factors in which its cells differ on purpose.
        tuned: the keys whose values tuning has set, for each method and split separately.
        commands: those that requested its cells, as they can be typed again, the latest one last.
        run_id: of the parent run; empty as long as no cell is begun.
        experiment_id: of the MLflow experiment.
        external: as scores, on other data sets (``python -m kdsweep score``), column data_set: its name and the first
            digits of its digest, such as ``folder-1a2b3c4d``.
    """

    name: str
    runs: pd.DataFrame
    scores: pd.DataFrame
    varied: tuple[str, ...] = ()
    tuned: tuple[str, ...] = field(default=(), kw_only=True)
    commands: tuple[str, ...] = ()
    run_id: str = ""
    experiment_id: str = ""
    external: pd.DataFrame = field(default_factory=pd.DataFrame)


# --- a sweep


def read_sweep(*, store: Path, uri: str | None, name: str | None) -> Sweep:
    """Read what a sweep requests, with its scores; for None the last one that has a finished run.

    Raises:
        InputError: no store, or no such sweep in it, or its MLflow does not answer.
    """
    if uri is None and not has_database(store):
        remedy = REBUILD if sweep_file.sweeps(store) else "run a sweep first, or name its folder"
        raise InputError(f"--store {store}: no {DATABASE} in it, or an empty one; {remedy}")
    return _answered(lambda: _read_sweep(Tracker(store=store, uri=uri), name), store=store, uri=uri)


def _answered(call: Callable[[], T], *, store: Path, uri: str | None) -> T:
    """Return what MLflow answers; raise InputError if it does not answer."""
    try:
        return call()
    except Exception as error:
        if is_damage(error, uri):
            raise damaged(store, error) from error
        if isinstance(error, InputError) or not passes(error, uri or ""):
            raise
        what = f"--tracking-uri {uri} does not answer" if uri else f"--store {store}: its MLflow store does not answer"
        raise InputError(f"{what}: {line(error)}") from error


def _read_sweep(tracker: Tracker, name: str | None) -> Sweep:
    tagged = [run for run in tracker.search("") if "kdsweep.role" in run.data.tags]
    tagged.sort(key=lambda run: (run.info.status == "FINISHED", run.info.start_time))
    runs = {run.data.tags["kdsweep.fingerprint"]: run for run in tagged if run.data.tags["kdsweep.role"] != "sweep"}
    parents = {run.data.tags["kdsweep.sweep"]: run for run in tagged if run.data.tags["kdsweep.role"] == "sweep"}
    name, content = _sweep_file(tracker, name, runs=runs, parents=parents)
    cells = [row for _, row in sorted(content.requests.items()) if row.role != "teacher"]
    is_begun = any((row.folder(tracker.store) / cell_folder.CELL).is_file() for row in cells)
    if is_begun and runs.keys().isdisjoint(row.fingerprint for row in cells):
        raise InputError(f"sweep={name} is in {tracker.store}, but not in MLflow at {tracker.uri}; {REBUILD}")
    rows = [
        (_row(runs[row.fingerprint]) if row.fingerprint in runs else _missing(row)) | {"variant": row.variant}
        for row in cells
    ]
    teachers = sorted({row["teacher"] for row in rows} & runs.keys())
    rows += [_row(runs[fingerprint]) | {"variant": {}} for fingerprint in teachers]
    finished = [row for row in rows if row["status"] == "FINISHED"]
    means = {fingerprint: run.data.metrics.get("test/dice", nan) for fingerprint, run in runs.items()}
    return Sweep(
        name,
        pd.DataFrame(rows),
        _scores(tracker, finished, means),
        tuple(content.varied),
        tuple(content.commands),
        parents[name].info.run_id if name in parents else "",
        tracker.experiment_id,
        _external(tracker, finished),
        tuned=tuple(content.tuned),
    )


def _sweep_file(
    tracker: Tracker, name: str | None, *, runs: Mapping[str, Run], parents: Mapping[str, Run]
) -> tuple[str, SweepFile]:
    """Return a sweep's name and file, for None of the last one with a finished cell, else of the last one.

    Raises:
        InputError: there is no such sweep.
    """
    in_store = sweep_file.sweeps(tracker.store)
    latest = sorted(parents, key=lambda sweep: parents[sweep].info.end_time or 0)  # which is that of the last request
    existing = list(dict.fromkeys([*latest, *in_store]))
    if not existing or (name is not None and name not in existing):
        raise InputError(f"sweep={name or 'any'} is not in this store; it holds: {', '.join(existing) or 'none yet'}")

    def read(sweep: str) -> SweepFile:
        if sweep in in_store:
            return sweep_file.read(tracker.store, sweep)
        kept = artifact(tracker.client, tracker.store, parents[sweep].info.run_id, SWEEP_FILE)
        return sweep_file.parse(json.loads(kept))

    finished = {fingerprint for fingerprint, run in runs.items() if run.info.status == "FINISHED"}
    last, *earlier = [name] if name is not None else reversed(in_store or existing)
    for sweep in (last, *earlier):
        content = read(sweep)
        if not finished.isdisjoint(row.fingerprint for row in content.requests.values()):
            return sweep, content
    return last, read(last)


def _row(run: Run) -> dict[str, Any]:
    tags, params, info = run.data.tags, run.data.params, run.info
    return {
        **{name: tags[f"kdsweep.{name}"] for name in ("fingerprint", "role", "notation")},
        **{name: int(tags[f"kdsweep.{name}"]) for name in ("split", "seed")},
        **{column: tags.get(tag, "") for column, tag in TAGS.items()},
        "data": params.get("data.name", ""),
        "weights": _weights(tags, params),
        "status": info.status,
        "run_id": info.run_id,
        "started_ms": info.start_time or 0,
        "ended_ms": info.end_time or 0,
        "params": dict(params),
        "tags": dict(tags),
        **{column: run.data.metrics.get(metric, nan) for column, metric in VALUES.items()},
    }


def _missing(request: Request) -> dict[str, Any]:
    """Return the row of a requested cell without a run."""
    return {
        **{name: getattr(request, name) for name in ("fingerprint", "role", "notation", "split", "seed")},
        **dict.fromkeys([*TAGS, "data", "weights", "run_id"], ""),
        "status": "missing",
        "started_ms": 0,
        "ended_ms": 0,
        "params": {},
        "tags": {},
        **dict.fromkeys(VALUES, nan),
    }


def _weights(tags: dict[str, str], params: dict[str, str]) -> str:
    """Return the weights that a run's network began with: none, imagenet, or a file and its digest."""
    network = "teacher" if tags["kdsweep.role"] == "teacher" else "student"
    weights = params.get(f"{network}.weights", params.get("weights", ""))
    digest = tags.get("kdsweep.weights", "")
    return weights if weights in ("", "none", "imagenet") or not digest else f"{weights} (SHA-256 {digest[:10]})"


def read_scores(text: io.StringIO) -> pd.DataFrame:
    """Read a table of per-image scores; ids, labels and groups stay text."""
    text_columns = {"image": str, "label": str, "group": str}
    return pd.read_csv(text, dtype=text_columns, keep_default_na=False, na_values=[""])  # an id may be nan or null


def _scores(tracker: Tracker, rows: list[dict[str, Any]], means: Mapping[str, float]) -> pd.DataFrame:
    """Read the scores of finished runs; files of equal columns are read as one, since a thousand take seconds."""
    bodies: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        content, is_proved = kept_file(tracker.client, tracker.store, row, SCORES)
        if not is_proved:
            check_scores(content, row, mean=means[row["fingerprint"]], store=tracker.store)
        header, _, body = content.decode().partition("\n")
        bodies.setdefault(header, []).append((row["fingerprint"], body))
    tables = [] if bodies else [pd.DataFrame(columns=["fingerprint", "image", "dice"])]
    for header, parts in bodies.items():
        table = read_scores(io.StringIO("\n".join([header, *(body.rstrip("\n") for _, body in parts)])))
        counts = [len(list(csv.reader(io.StringIO(body)))) for _, body in parts]
        tables.append(table.assign(fingerprint=np.repeat([fingerprint for fingerprint, _ in parts], counts)))
    return pd.concat(tables, ignore_index=True)


def _external(tracker: Tracker, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Read the scores of finished runs on other data sets; empty without any."""
    tables = []
    for row in rows:
        for name in row["tags"].get(SCORED, "").split():
            kept, _ = kept_file(tracker.client, tracker.store, row, f"{EXTERNAL}/{name}")
            try:
                table = read_scores(io.StringIO(kept.decode())).astype({"dice": float})
            except (ValueError, KeyError) as error:
                file = folder_of(tracker.store, row) / EXTERNAL / name
                remedy = "remove it and run `python -m kdsweep score` on that data set again"
                raise InputError(f"{file} is damaged ({line(error)}); {remedy}") from error
            tables.append(table.assign(data_set=Path(name).stem, fingerprint=row["fingerprint"]))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


# --- further values and files of its runs


def read_curves(sweep: Sweep, *, store: Path, uri: str | None, metric: str = "val/dice") -> pd.DataFrame:
    """Read a metric by epoch of a sweep's begun runs: columns notation, split, seed, metric, epoch, value.

    Raises:
        InputError: the store does not answer.
    """
    client = MlflowClient(tracking_uri=store_uri(store, uri))
    rows = []
    for run in sweep.runs[sweep.runs["run_id"] != ""].to_dict("records"):
        cell = {key: run[key] for key in ("notation", "split", "seed")}
        points = _answered(partial(client.get_metric_history, run["run_id"], metric), store=store, uri=uri)
        rows += [{**cell, "metric": metric, "epoch": point.step, "value": point.value} for point in points]
    columns = ["notation", "split", "seed", "metric", "epoch", "value"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(columns[:-1])


def attach(sweep: Sweep, files: Sequence[Path], *, folder: str, store: Path, uri: str | None) -> str:
    """Log files as artifacts of a sweep's parent run; return a sentence on whether that succeeded.

    A failure (a read-only store, a server that is down) raises nothing: the files themselves are kept.
    """
    try:
        with exclusive(store):
            client = MlflowClient(tracking_uri=store_uri(store, uri))
            check_location(client, sweep.run_id, store, uri)
            for file in files:
                client.log_artifact(sweep.run_id, str(file), folder)
    except Exception as error:  # of many kinds: server, network, database, disk
        return f"not logged to MLflow: {line(error)}"
    return f"logged to MLflow, run {sweep.run_id}"


def keep_external(file: Path, *, run_id: str, store: Path, uri: str | None) -> None:
    """Log the scores of a run on another data set, unless they are there already.

    Raises:
        InputError: the store does not answer.
    """

    def log() -> None:
        with exclusive(store):
            client = MlflowClient(tracking_uri=store_uri(store, uri))
            kept = client.get_run(run_id).data.tags.get(SCORED, "").split()
            if file.name not in kept:
                check_location(client, run_id, store, uri)
                client.log_artifact(run_id, str(file), EXTERNAL)
                client.set_tag(run_id, SCORED, " ".join(sorted([*kept, file.name])))

    _answered(log, store=store, uri=uri)
