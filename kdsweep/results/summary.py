"""A sweep in words, from what its runs recorded: cells, data, settings, hardware, code and time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from kdsweep import __version__
from kdsweep.config.decisions import decides
from kdsweep.config.grid import variant_label
from kdsweep.core.progress import duration, plural
from kdsweep.results.formats import DASH
from kdsweep.results.mixing import known_values
from kdsweep.results.paper import BASELINES, in_order
from kdsweep.tracking import artifacts

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

STATUS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "interrupted", "RUNNING": "running"}


def summarize(sweep: Sweep, *, store: Path, uri: str | None) -> dict[str, str]:
    """Summarize what was run, by heading; a dash if the runs do not record it, all values where they differ.

    Args:
        sweep: as ``tracking.read_sweep`` gives it.
        store: folder of the runs.
        uri: of the MLflow server or database, or None for the file in the store.
    """
    runs = sweep.runs
    cells = runs[runs["role"] != "teacher"]
    teachers = runs[runs["role"] == "teacher"]
    settings = dict.fromkeys(variant_label(variant) for variant in runs["variant"] if variant)
    per_split = sweep.scores.groupby("fingerprint")["image"].nunique().rename("images").reset_index()
    tested = runs.merge(per_split).groupby("split")["images"].max()
    size, patience = _params(sweep, "image_size"), _params(sweep, "train.patience")
    started, ended = (runs.loc[runs[key] > 0, key] for key in ("started_ms", "ended_ms"))
    timed = runs[(runs["started_ms"] > 0) & (runs["ended_ms"] > runs["started_ms"])]
    seconds = (timed["ended_ms"] - timed["started_ms"]).sum() / 1000
    return {
        "Sweep": sweep.name,
        "Cells": f"{counts(cells)}{f'; Teachers: {counts(teachers)}' if len(teachers) else ''}",
        "Factors": _factors(set(cells["notation"])),
        **({"Settings": "; ".join(settings)} if settings else {}),
        "Splits and seeds": f"{plural(cells['split'].nunique(), 'split')} ({listed(sorted(set(cells['split'])))}), "
        f"{plural(cells['seed'].nunique(), 'seed')} ({listed(sorted(set(cells['seed'])))})",
        "Split protocol": listed(known_values(runs, "split_protocol")),
        "Data": listed(known_values(runs, "data")),
        "Images": _images(sweep, store=store, uri=uri),
        "Test images": ", ".join(f"{count} in split {split}" for split, count in tested.items()) or DASH,
        "Profile": listed(known_values(runs, "profile")),
        "Image size": size if size == DASH else f"{size} pixels, square",
        "Batch size": _params(sweep, "train.batch_size"),
        "Epochs at most": f"{_params(sweep, 'train.epochs')}; patience {patience}",
        "Learning rate": f"Student {_params(sweep, 'train.lr')}, Teacher {_params(sweep, 'teacher.lr')}",
        "Student": f"{_params(sweep, 'student.encoder')}; weights: {listed(known_values(cells, 'weights'))}",
        "Teacher": f"{_params(sweep, 'teacher.encoder')}; weights: {_teacher_weights(sweep)}",
        "KD weight": _params(sweep, "kd.weight"),
        "Precision": _params(sweep, "precision"),
        "Device": f"{listed(known_values(runs, 'device'))}; threads: {_tags(sweep, 'kdsweep.threads')}",
        "PyTorch": _tags(sweep, "kdsweep.torch"),
        "Code": _code(sweep),
        "Trained": f"{_time(started.min())} to {_time(ended.max())}",
        "Training time": f"{duration(seconds)}, summed over {plural(len(timed), 'run')} from start to end; cells "
        "trained in one lockstep group overlap, so the sweep itself took less" if len(timed) else DASH,
        "Page": f"kdsweep {__version__}, {_time(1000 * datetime.now(UTC).timestamp())}",
    }  # fmt: skip


def _images(sweep: Sweep, *, store: Path, uri: str | None) -> str:
    """Return how many images the data set has: all parts of a finished run's split."""
    finished = sweep.runs[sweep.runs["status"] == "FINISHED"]
    for run in finished.head(1).to_dict("records"):
        try:
            split = json.loads(artifacts.read(run, "split.json", store=store, uri=uri))
            return str(sum(map(len, split.values())))
        except Exception:  # of many kinds: MLflow, files, JSON; the page has more to tell
            return DASH
    return DASH


def listed(values: Iterable[object]) -> str:
    """Join values with commas; a dash if there are none."""
    return ", ".join(map(str, values)) or DASH


def _order(value: Any) -> tuple[float, str]:
    try:
        return float(value), str(value)
    except ValueError:
        return float("inf"), str(value)


def _params(sweep: Sweep, key: str) -> str:
    """Return the values that a param has in the runs whose role uses it."""
    rows = zip(sweep.runs["role"], sweep.runs["params"], strict=True)
    values: set[str] = {params.get(key, "") for role, params in rows if decides(key, role=role, params=params)}
    return listed(sorted(values - {"", "None"}, key=_order))


def _teacher_weights(sweep: Sweep) -> str:
    """Return what the Teachers began with; as the cells asked for it where the Teachers have no run yet."""
    known = known_values(sweep.runs[sweep.runs["role"] == "teacher"], "weights")
    return listed(known) if known else _params(sweep, "teacher.weights")


def _tags(sweep: Sweep, key: str) -> str:
    values: set[str] = {tags.get(key, "") for tags in sweep.runs["tags"]}
    return listed(sorted(values - {""}, key=_order))


def _code(sweep: Sweep) -> str:
    commits = _tags(sweep, "mlflow.source.git.commit")
    several = f"{commits.count(',') + 1} states of the code: " if "," in commits else ""
    changed = " (-dirty: with changes that the commit does not hold)" if "-dirty" in commits else ""
    return f"{several}{commits}{changed}"


def counts(runs: pd.DataFrame) -> str:
    """Count these runs by state, such as ``11 of 13 finished, 2 failed``."""
    statuses = runs["status"].map(lambda status: STATUS.get(status, "not run")).value_counts()
    others = "".join(f", {count} {status}" for status, count in statuses.items() if status != "finished")
    return f"{statuses.get('finished', 0)} of {len(runs)} finished{others}"


def _factors(notations: set[str]) -> str:
    cells = in_order(notations.difference(BASELINES))
    if not cells:
        return "none: only the Student, without distillation"
    parts = [name.removesuffix("_WAug").partition("_") for name in cells]
    levels = {
        "path or method": [path for path, _, _ in parts],
        "loss": [loss for _, _, loss in parts if loss],
        "Teacher augmentation": ["weak" if name.endswith("_WAug") else "strong" for name in cells],
    }
    told_ = "; ".join(f"{factor}: {listed(dict.fromkeys(there))}" for factor, there in levels.items() if there)
    student = ", and Student without distillation" if "Student" in notations else ""
    return f"{told_} ({plural(len(cells), 'combination')}{student})"


def _time(ms: float) -> str:
    return DASH if pd.isna(ms) else f"{datetime.fromtimestamp(ms / 1000, tz=UTC):%Y-%m-%d %H:%M} UTC"
