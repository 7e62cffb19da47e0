"""Read a sweep as pandas frames: its requests from its file, its runs from MLflow."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run, RunData

from kdsweep.config.networks import UNSET
from kdsweep.core.errors import InputError
from kdsweep.store import cell_folder, sweep_file
from kdsweep.store.cell_folder import SCORES
from kdsweep.store.sweep_file import Request, SweepFile
from kdsweep.tracking import artifacts, database
from kdsweep.tracking.artifacts import EXTERNAL
from kdsweep.tracking.database import answering, check_location, exclusive, line, store_uri
from kdsweep.tracking.mirror import SWEEP_FILE, Tracker

SCORED = "kdsweep.external"  # tag with the names of those files
IDENTITY = ("fingerprint", "role", "notation", "split", "seed")
TAGS = (  # columns of a sweep's runs, by tags
    *("profile", "data_digest", "user_code", "results_version"),
    *("split_protocol", "split_digest", "device", "teacher"),
)
VALUES = {  # further ones, by metrics
    "trivial_dice": "test/trivial_dice",
    "epochs": "epochs",
    "best_epoch": "best_epoch",
    "val_dice": "best/val_dice",
    "kd_gradient_ratio": "kd/gradient_ratio",
    "kd_weight": "kd/weight",
    "best_test_epoch_dice": "test/dice_of_best_test_epoch",
}


@dataclass(frozen=True, eq=False)  # a sweep equals itself alone, so that what is made of it can be kept
class Sweep:
    """The requests of a sweep and what MLflow holds of them.

    A row of ``runs`` is a requested cell or a Teacher that they learn from; columns of IDENTITY, TAGS and VALUES, and
    data, weights (that its network began with), status, run_id, started_ms, ended_ms, params, tags, variant (a dict);
    unknown values are 0, empty or NaN. A row of ``scores`` is a test image of a finished run: fractions 0 to 1, HD95
    in pixels.
    """

    name: str
    runs: pd.DataFrame
    scores: pd.DataFrame
    varied: tuple[str, ...] = ()  # keys beyond the factors in which its cells differ on purpose
    tuned: tuple[str, ...] = field(default=(), kw_only=True)  # keys set by tuning, for each method and split separately
    commands: tuple[str, ...] = ()  # that requested its cells, as they can be typed again, the latest at the end
    run_id: str = ""  # of the parent run; empty as long as no cell is begun
    experiment_id: str = ""
    external: pd.DataFrame = field(default_factory=pd.DataFrame)  # as scores; data_set is like folder-1a2b3c4d


# --- a sweep


def read_sweep(*, store: Path, uri: str | None, name: str | None) -> Sweep:
    """Read what a sweep requests, with its scores; for None the last one that has a finished run.

    Raises:
        InputError: no store, or no such sweep in it, or its MLflow does not answer.
    """
    if uri is None and not database.has_database(store):
        remedy = database.REBUILD if sweep_file.sweeps(store) else "run a sweep first, or name its folder"
        raise InputError(f"--store {store}: no {database.DATABASE} in it, or an empty one; {remedy}")
    with answering(store, uri):
        return _read_sweep(Tracker(store=store, uri=uri), name)


def _read_sweep(tracker: Tracker, name: str | None) -> Sweep:
    tagged = [run for run in tracker.search("") if "kdsweep.role" in run.data.tags]
    tagged.sort(key=lambda run: (run.info.status == "FINISHED", run.info.start_time))
    runs = {run.data.tags["kdsweep.fingerprint"]: run for run in tagged if run.data.tags["kdsweep.role"] != "sweep"}
    parents = {run.data.tags["kdsweep.sweep"]: run for run in tagged if run.data.tags["kdsweep.role"] == "sweep"}
    name, content = _find_sweep(tracker, name, runs=runs, parents=parents)
    cells = [row for _, row in sorted(content.requests.items()) if row.role != "teacher"]
    if not cells:
        raise InputError(f"sweep={name} requests no cells yet; `python -m kdsweep status` shows how far it is")
    is_begun = any((row.folder(tracker.store) / cell_folder.CELL).is_file() for row in cells)
    if is_begun and runs.keys().isdisjoint(row.fingerprint for row in cells):
        raise InputError(f"sweep={name} is in {tracker.store}, but not in MLflow at {tracker.uri}; {database.REBUILD}")
    rows = [_row(runs.get(request.fingerprint), request) for request in cells]
    rows += [_row(runs[fingerprint]) for fingerprint in sorted({row["teacher"] for row in rows} & runs.keys())]
    finished = [row for row in rows if row["status"] == "FINISHED"]
    return Sweep(
        name,
        pd.DataFrame(rows),
        _scores(tracker, finished, {row["run_id"]: runs[row["fingerprint"]].data.metrics for row in finished}),
        tuple(content.varied),
        tuple(content.commands),
        parents[name].info.run_id if name in parents else "",
        tracker.experiment_id,
        _external(tracker, finished),
        tuned=tuple(content.tuned),
    )


def _find_sweep(
    tracker: Tracker, name: str | None, *, runs: Mapping[str, Run], parents: Mapping[str, Run]
) -> tuple[str, SweepFile]:
    """Return a sweep's name and file, for None of the last one with a finished cell, else of the last one."""
    in_store = sweep_file.sweeps(tracker.store)
    latest = sorted(parents, key=lambda sweep: parents[sweep].info.end_time or 0)  # which is that of the last request
    existing = list(dict.fromkeys([*latest, *in_store]))
    if not existing or (name is not None and name not in existing):
        raise InputError(f"sweep={name or 'any'} is not in this store; it holds: {', '.join(existing) or 'none yet'}")

    def read(sweep: str) -> SweepFile:
        if sweep in in_store:
            return sweep_file.read(tracker.store, sweep)
        content = artifacts.artifact(tracker.client, tracker.store, parents[sweep].info.run_id, SWEEP_FILE)
        return sweep_file.parse(json.loads(content))

    finished = {fingerprint for fingerprint, run in runs.items() if run.info.status == "FINISHED"}
    names = [name] if name is not None else (in_store or existing)[::-1]
    for sweep in names:
        content = read(sweep)
        if not finished.isdisjoint(row.fingerprint for row in content.requests.values()):
            return sweep, content
    return names[0], read(names[0])


def _row(run: Run | None, request: Request | None = None) -> dict[str, Any]:
    """Return the row of a run, or of a requested cell without one."""
    data, info = (run.data, run.info) if run else (RunData(), None)
    of_cell = {name: data.tags.get(f"kdsweep.{name}") or getattr(request, name, "") for name in IDENTITY}
    return {
        **of_cell,
        **{name: int(of_cell[name]) for name in ("split", "seed")},
        **{name: data.tags.get(f"kdsweep.{'data' if name == 'data_digest' else name}", "") for name in TAGS},
        "data": data.params.get("data.name", ""),
        "weights": _weights(of_cell["role"], data),
        "status": info.status if info else "missing",
        "run_id": info.run_id if info else "",
        "started_ms": (info and info.start_time) or 0,
        "ended_ms": (info and info.end_time) or 0,
        "params": dict(data.params),
        "tags": dict(data.tags),
        **{column: data.metrics.get(metric, nan) for column, metric in VALUES.items()},
        "variant": request.variant if request else {},
    }


def _weights(role: str, data: RunData) -> str:
    """Return the weights that a run's network began with, or came with: none, imagenet, or a file and its digest."""
    network = "teacher" if role == "teacher" else "student"
    weights: str = data.params.get(f"{network}.weights", data.params.get("weights", ""))
    if role == "teacher" and data.params.get("teacher.trained") not in (None, *UNSET):
        weights = data.params["teacher.trained"]
    digest = data.tags.get("kdsweep.weights", "")
    return weights if weights in ("", "none", "imagenet") or not digest else f"{weights} (SHA-256 {digest[:10]})"


def read_scores(text: io.StringIO) -> pd.DataFrame:
    """Read a table of per-image scores; ids, labels and groups stay text."""
    text_columns = {"image": str, "label": str, "group": str}
    return pd.read_csv(text, dtype=text_columns, keep_default_na=False, na_values=[""])  # an id may be nan or null


def _scores(tracker: Tracker, rows: list[dict[str, Any]], metrics: Mapping[str, dict[str, float]]) -> pd.DataFrame:
    """Read the scores of finished runs; those that no checksum proves must have the mean Dice of their run."""
    tables = [] if rows else [pd.DataFrame(columns=["fingerprint", "image", "dice"])]
    for row in rows:
        content, is_proved = artifacts.read_proved(tracker.client, tracker.store, row, SCORES)
        mean = metrics[row["run_id"]].get("test/dice", nan)
        try:
            table = read_scores(io.StringIO(content.decode()))
            is_complete = is_proved or isnan(mean) or abs(table["dice"].mean() - mean) < 1e-6
        except (ValueError, TypeError, KeyError):
            is_complete = False
        if not is_complete:
            raise artifacts.lost(tracker.store, row, SCORES, "damaged, its mean Dice is not that of its run")
        tables.append(table.assign(fingerprint=row["fingerprint"]))
    return pd.concat(tables, ignore_index=True)


def _external(tracker: Tracker, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Read the scores of finished runs on other data sets; empty without any."""
    tables = [pd.DataFrame()]
    for row, name in ((run, name) for run in rows for name in run["tags"].get(SCORED, "").split()):
        content, _ = artifacts.read_proved(tracker.client, tracker.store, row, f"{EXTERNAL}/{name}")
        try:
            table = read_scores(io.StringIO(content.decode())).astype({"dice": float})
        except (ValueError, KeyError) as error:
            file = artifacts.folder_of(tracker.store, row) / EXTERNAL / name
            remedy = "remove it and run `python -m kdsweep score` on that data set again"
            raise InputError(f"{file} is damaged ({line(error)}); {remedy}") from error
        tables.append(table.assign(data_set=Path(name).stem, fingerprint=row["fingerprint"]))
    return pd.concat(tables[1:] or tables, ignore_index=True)


# --- further values of its runs, and what is added to them


def read_curves(sweep: Sweep, *, store: Path, uri: str | None, metric: str = "val/dice") -> pd.DataFrame:
    """Read a metric of a sweep's begun runs: columns notation, split, seed, metric, epoch, value."""
    client = MlflowClient(tracking_uri=store_uri(store, uri))
    rows = []
    for run in sweep.runs[sweep.runs["run_id"] != ""].to_dict("records"):
        with answering(store, uri):
            points = client.get_metric_history(run["run_id"], metric)
        cell = [run[key] for key in ("notation", "split", "seed")]
        rows += [[*cell, metric, point.step, point.value] for point in points]
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
    """Log the scores of a run on another data set, once; raise InputError if MLflow does not answer."""
    with answering(store, uri), exclusive(store):
        client = MlflowClient(tracking_uri=store_uri(store, uri))
        logged = client.get_run(run_id).data.tags.get(SCORED, "").split()
        if file.name not in logged:
            check_location(client, run_id, store, uri)
            client.log_artifact(run_id, str(file), EXTERNAL)
            client.set_tag(run_id, SCORED, " ".join(sorted([*logged, file.name])))
