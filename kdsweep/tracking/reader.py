"""Read what MLflow holds of a sweep, as pandas frames."""

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
from kdsweep.runs import requests
from kdsweep.tracking.artifacts import EXTERNAL, SCORES, check_scores, folder_of, kept_file
from kdsweep.tracking.database import (
    DATABASE,
    REBUILD,
    TrackingError,
    check_place,
    damaged,
    exclusive,
    has_database,
    is_damage,
    line,
    passes,
    store_uri,
)
from kdsweep.tracking.writer import ASKED, COMMANDS, TUNED, VARIED, Tracker

T = TypeVar("T")
SCORED = "kdsweep.external"  # tag with the names of those files
ROLES = {"cell": "distilled", "student": "baseline"}  # as stores before results version 1 call them


VALUES = {  # in a sweep's runs
    "test/trivial_dice": "trivial_dice",
    "epochs": "epochs",
    "best_epoch": "best_epoch",
    "best/val_dice": "val_dice",
    "kd/gradient_ratio": "kd_gradient_ratio",
    "kd/weight": "kd_weight",
}
UNKNOWN = (
    "profile",
    "data",
    "data_digest",
    "user_code",
    "weights",
    "results_version",
    "split_protocol",
    "split_digest",
    "device",
    "teacher",
    "run_id",
)  # columns that are "" without a run


@dataclass(frozen=True)
class Sweep:
    """The request of a sweep and what MLflow holds of it.

    Attributes:
        name: of the sweep.
        runs: one row per cell asked for and per Teacher they learn from; columns fingerprint, role, notation, split,
            seed, variant (values of the further keys that the sweep varies, as a dict), profile, data, data_digest,
            user_code (its digest), weights (what its network began with), results_version, split_protocol (how images
            are divided, in words), split_digest (of the ids of its parts), device, teacher, status, run_id,
            started_ms, ended_ms, params, tags, trivial_dice, epochs (how many it was trained), best_epoch (counted
            from 0), val_dice (of that epoch), kd_gradient_ratio (KD to supervised, geometric mean up to that epoch),
            kd_weight (the matched one); what is not known is 0, empty or NaN.
        scores: one row per fingerprint and test image of the finished ones; fractions 0 to 1, HD95 in pixels.
        varied: the keys beyond the factors in which its cells differ on purpose.
        tuned: the keys whose values tuning has set, for each method and split its own.
        commands: those that asked for its cells, as they can be typed again, the latest one last.
        run_id: of the parent run.
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


def _row(fingerprint: str, run: Run | None, place: str) -> dict[str, Any]:
    if run is None:
        notation, split, seed, _ = place.split("/")
        role = "baseline" if notation == "Student" else "distilled"
        where = {"split": int(split.removeprefix("split")), "seed": int(seed.removeprefix("seed"))}
        unknown = dict.fromkeys(UNKNOWN, "")
        own = {"fingerprint": fingerprint, "role": role, "notation": notation}
        no_run = {"started_ms": 0, "ended_ms": 0, "params": {}, "tags": {}} | dict.fromkeys(VALUES.values(), nan)
        return {**own, **where, **unknown, "status": "missing", **no_run}
    tags = run.data.tags
    return {
        "fingerprint": fingerprint,
        "role": ROLES.get(tags["kdsweep.role"], tags["kdsweep.role"]),
        "notation": tags["kdsweep.notation"],
        "split": int(tags["kdsweep.split"]),
        "seed": int(tags["kdsweep.seed"]),
        "profile": tags["kdsweep.profile"],
        "data": run.data.params.get("data.name", ""),
        "data_digest": tags.get("kdsweep.data", ""),
        "user_code": tags.get("kdsweep.user_code", ""),
        "weights": _weights(tags, run.data.params),
        "results_version": tags.get("kdsweep.results_version", "0"),  # the first runs recorded none
        "split_protocol": tags.get("kdsweep.split_protocol", ""),
        "split_digest": tags.get("kdsweep.split_digest", ""),
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


def _weights(tags: dict[str, str], params: dict[str, str]) -> str:
    """Return what a run's own network began with: none, imagenet, or a file and its digest."""
    network = "teacher" if tags["kdsweep.role"] == "teacher" else "student"
    weights = params.get(f"{network}.weights", params.get("weights", ""))
    digest = tags.get("kdsweep.weights", "")
    return weights if weights in ("", "none", "imagenet") or not digest else f"{weights} (SHA-256 {digest[:10]})"


def read_curves(sweep: Sweep, *, store: Path, uri: str | None, metric: str = "val/dice") -> pd.DataFrame:
    """Read a metric by epoch of a sweep's begun runs: columns notation, split, seed, metric, epoch, value.

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
    """Log files as artifacts of a sweep's parent run; return a sentence on whether that succeeded.

    A failure (a read-only store, a server that is down) raises nothing: the files themselves are kept.
    """
    try:
        with exclusive(store):
            client = MlflowClient(tracking_uri=store_uri(store, uri))
            check_place(client, sweep.run_id, store, uri)
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

    def work() -> None:
        with exclusive(store):
            client = MlflowClient(tracking_uri=store_uri(store, uri))
            kept = client.get_run(run_id).data.tags.get(SCORED, "").split()
            if file.name not in kept:
                check_place(client, run_id, store, uri)
                client.log_artifact(run_id, str(file), EXTERNAL)
                client.set_tag(run_id, SCORED, " ".join(sorted([*kept, file.name])))

    _answered(work, store=store, uri=uri)


def read_scores(text: io.StringIO) -> pd.DataFrame:
    """Read a table of per-image scores; ids, labels and groups stay text."""
    text_columns = {"image": str, "label": str, "group": str}
    return pd.read_csv(text, dtype=text_columns, keep_default_na=False, na_values=[""])  # an id may be nan or null


def read_sweep(*, store: Path, uri: str | None, name: str | None) -> Sweep:
    """Read a sweep of a store that must be there already; see ``_read_sweep``.

    Raises:
        InputError: no store, or no such sweep in it.
    """
    if uri is None and not has_database(store):
        remedy = REBUILD if requests.sweeps(store) else "run a sweep first, or name its folder"
        raise InputError(f"--store {store}: no {DATABASE} in it, or an empty one; {remedy}")
    return _answered(lambda: _read_sweep(Tracker(store=store, uri=uri), name), store=store, uri=uri)


def _answered(ask: Callable[[], T], *, store: Path, uri: str | None) -> T:
    """Return what MLflow answers; raise InputError if it does not answer."""
    try:
        return ask()
    except Exception as error:
        if is_damage(error, uri):
            raise damaged(store, error) from error
        if not isinstance(error, TrackingError) and not passes(error, uri or ""):
            raise
        what = f"--tracking-uri {uri} does not answer" if uri else f"--store {store}: its MLflow store does not answer"
        raise InputError(f"{what}: {line(error)}") from error


def _read_sweep(tracker: Tracker, name: str | None) -> Sweep:
    """Read everything a sweep asked for, with its scores; None takes the last one that has a finished run.

    Raises:
        InputError: there is no such sweep.
    """
    runs = _by_fingerprint(tracker)
    parent = _named_sweep(tracker, name, finished={key for key, run in runs.items() if run.info.status == "FINISHED"})
    tags = parent.data.tags
    varied, tuned = (tuple(tags.get(name, "").split()) for name in (VARIED, TUNED))
    asked = {key.removeprefix(ASKED): value for key, value in tags.items() if key.startswith(ASKED)}
    rows = []
    for place, value in sorted(asked.items()):
        fingerprint, _, variant = value.partition(" ")
        row = _row(fingerprint, runs.get(fingerprint), place)
        rows.append(row | {"variant": json.loads(variant or "{}")})
    teachers = sorted({row["teacher"] for row in rows} - {""})
    rows += [
        _row(fingerprint, runs[fingerprint], "") | {"variant": {}} for fingerprint in teachers if fingerprint in runs
    ]
    finished = [row for row in rows if row["status"] == "FINISHED"]
    means = {key: run.data.metrics.get("test/dice", nan) for key, run in runs.items()}
    table, external = _scores(tracker, finished, means), _external(tracker, finished)
    name, run_id = parent.data.tags["kdsweep.sweep"], str(parent.info.run_id)
    commands = tuple(tags.get(COMMANDS, "").splitlines())
    own = (varied, commands, run_id, str(tracker.experiment_id), external)
    return Sweep(name, pd.DataFrame(rows), table, *own, tuned=tuned)


def _scores(tracker: Tracker, rows: list[dict[str, Any]], means: Mapping[str, float]) -> pd.DataFrame:
    """Read the scores of finished runs; files of equal columns are read as one, since a thousand take seconds."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        kept, is_proved = kept_file(tracker.client, tracker.store, row, SCORES)
        if not is_proved:
            check_scores(kept, row, mean=means[row["fingerprint"]], store=tracker.store)
        header, _, body = kept.decode().partition("\n")
        parts.setdefault(header, []).append((row["fingerprint"], body))
    tables = [pd.DataFrame(columns=["fingerprint", "image", "dice"])] if not parts else []
    for header, own in parts.items():
        text = io.StringIO("\n".join([header, *(body.rstrip("\n") for _, body in own)]))
        counts = [len(list(csv.reader(io.StringIO(body)))) for _, body in own]
        table = read_scores(text)
        tables.append(table.assign(fingerprint=np.repeat([fingerprint for fingerprint, _ in own], counts)))
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


def _named_sweep(tracker: Tracker, name: str | None, *, finished: set[str]) -> Run:
    """Return the parent run of a sweep, for None of the last one with a finished cell, else of the last one."""
    sweeps = tracker.search("tags.`kdsweep.role` = 'sweep'")
    sweeps.sort(key=lambda run: float(run.data.tags.get("kdsweep.asked_at", 0)))
    known = [run.data.tags["kdsweep.sweep"] for run in sweeps]
    if name is None and sweeps:
        return next((run for run in reversed(sweeps) if not finished.isdisjoint(_asked(run.data.tags))), sweeps[-1])
    if name is None or name not in known:
        if requests.sweeps(tracker.store) and (name is None or name in requests.sweeps(tracker.store)):
            where = f"is in {tracker.store}, but not in MLflow at {tracker.uri}"
            raise InputError(f"sweep={name or 'any'} {where}; {REBUILD}")
        raise InputError(f"sweep={name or 'any'} is not in this store; it holds: {', '.join(known) or 'none yet'}")
    return sweeps[known.index(name)]


def _asked(tags: dict[str, str]) -> set[str]:
    """Return the fingerprints that a sweep asked for."""
    return {value.partition(" ")[0] for key, value in tags.items() if key.startswith(ASKED)}


def _by_fingerprint(tracker: Tracker) -> dict[str, Run]:
    """Return the run that counts for each fingerprint: the finished one, else the newest."""
    runs = tracker.search("tags.`kdsweep.role` != 'sweep'")
    runs.sort(key=lambda run: (run.info.status == "FINISHED", run.info.start_time))
    return {run.data.tags["kdsweep.fingerprint"]: run for run in runs}
