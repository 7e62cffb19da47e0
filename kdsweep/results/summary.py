"""A sweep in words, from what its runs recorded: cells, data, settings, hardware, code and time."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pandas as pd

from kdsweep import __version__
from kdsweep.config import identity
from kdsweep.config.decisions import decides
from kdsweep.config.grid import variant_label
from kdsweep.core.progress import duration, plural
from kdsweep.results.formats import DASH
from kdsweep.results.mixing import distinct_values, rank
from kdsweep.results.paper import BASELINES, in_order

if TYPE_CHECKING:
    from kdsweep.tracking.reader import Sweep

STATUS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "interrupted", "RUNNING": "running"}


def summarize(sweep: Sweep) -> dict[str, str]:
    """Summarize what was run, by heading; a dash if the runs do not record it, all values where they differ."""
    runs = sweep.runs
    cells, teachers = runs[runs["role"] != "teacher"], runs[runs["role"] == "teacher"]
    settings = dict.fromkeys(variant_label(variant) for variant in runs["variant"] if variant)
    per_split = sweep.scores.groupby("fingerprint")["image"].nunique().rename("images").reset_index()
    tested = runs.merge(per_split).groupby("split")["images"].max()
    size, teacher_weights = _params(runs, "image_size"), distinct_values(teachers, "weights")
    started, ended = (runs.loc[runs[key] > 0, key] for key in ("started_ms", "ended_ms"))
    timed = runs[(runs["started_ms"] > 0) & (runs["ended_ms"] > runs["started_ms"])]
    seconds = (timed["ended_ms"] - timed["started_ms"]).sum() / 1000
    return {
        "Sweep": sweep.name,
        "Cells": f"{counts(cells)}{f'; Teachers: {counts(teachers)}' if len(teachers) else ''}",
        "Factors": _factors(set(cells["notation"])),
        **({"Settings": "; ".join(settings)} if settings else {}),
        "Splits and seeds": f"{_numbered(cells['split'], 'split')}, {_numbered(cells['seed'], 'seed')}",
        "Split protocol": listed(distinct_values(runs, "split_protocol")),
        "Data": listed(distinct_values(runs, "data")),
        "Images": _images(runs),
        "Test images": listed(f"{count} in split {split}" for split, count in tested.items()),
        "Profile": listed(distinct_values(runs, "profile")),
        "Image size": size if size == DASH else f"{size} pixels, square",
        "Batch size": _params(runs, "train.batch_size"),
        "Epochs at most": f"{_params(runs, 'train.epochs')}; patience {_params(runs, 'train.patience')}",
        "Learning rate": f"Student {_params(runs, 'train.lr')}, Teacher {_params(runs, 'teacher.lr')}",
        "Student": f"{_networks(runs, 'student')}; weights: {listed(distinct_values(cells, 'weights'))}",
        "Teacher": f"{_networks(runs, 'teacher')}; weights: "
        f"{listed(teacher_weights) if teacher_weights else _params(runs, 'teacher.weights')}",  # before any has a run
        "KD weight": _params(runs, "kd.weight"),
        "Precision": _params(runs, "precision"),
        "Device": f"{listed(distinct_values(runs, 'device'))}; threads: {_tags(runs, 'kdsweep.threads')}",
        "PyTorch": _tags(runs, "kdsweep.torch"),
        "Code": _code(_tags(runs, "mlflow.source.git.commit")),
        "Trained": f"{_time(started.min())} to {_time(ended.max())}",
        "Training time": f"{duration(seconds)}, summed over {plural(len(timed), 'run')} from start to end; cells "
        "trained in one lockstep group overlap, so the sweep itself took less" if len(timed) else DASH,
        "Page": f"kdsweep {__version__}, {_time(1000 * datetime.now(UTC).timestamp())}",
    }  # fmt: skip


def listed(values: Iterable[object]) -> str:
    """Join values with commas; a dash if there are none."""
    return ", ".join(map(str, values)) or DASH


def counts(runs: pd.DataFrame) -> str:
    """Count these runs by state, such as ``11 of 13 finished, 2 failed``."""
    statuses = runs["status"].map(lambda status: STATUS.get(status, "not run")).value_counts()
    others = "".join(f", {count} {status}" for status, count in statuses.items() if status != "finished")
    return f"{statuses.get('finished', 0)} of {len(runs)} finished{others}"


def _numbered(values: pd.Series, noun: str) -> str:
    return f"{plural(values.nunique(), noun)} ({listed(sorted(set(values)))})"


def _images(runs: pd.DataFrame) -> str:
    """Return how many images the data set has: all parts of a run's split."""
    sizes = [tags["kdsweep.split_images"] for tags in runs["tags"] if "kdsweep.split_images" in tags]
    return str(sum(map(int, sizes[0].split("/")))) if sizes else DASH


def _params(runs: pd.DataFrame, key: str) -> str:
    """Return the values that a param has in the runs whose role uses it."""
    cells = zip(runs["role"], runs["params"], strict=True)
    return _distinct(params.get(key, "") for role, params in cells if decides(key, role=role, params=params))


def _networks(runs: pd.DataFrame, group: str) -> str:
    """Return the names of the encoders or modules in the runs whose role uses the network."""
    cells = zip(runs["role"], runs["params"], strict=True)
    used = (params for role, params in cells if decides(group, role=role, params=params))
    networks = (identity.architecture(params, group) for params in used)
    return _distinct(network.name for network in networks if network is not None)


def _tags(runs: pd.DataFrame, key: str) -> str:
    return _distinct(tags.get(key, "") for tags in runs["tags"])


def _distinct(values: Iterable[str]) -> str:
    ordered = sorted(set(values) - {"", "None"}, key=rank)
    return listed(ordered)


def _code(commits: str) -> str:
    several = f"{commits.count(',') + 1} states of the code: " if "," in commits else ""
    changed = " (-dirty: with changes that the commit does not hold)" if "-dirty" in commits else ""
    return f"{several}{commits}{changed}"


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
    text = "; ".join(f"{factor}: {listed(dict.fromkeys(names))}" for factor, names in levels.items() if names)
    student = ", and Student without distillation" if "Student" in notations else ""
    return f"{text} ({plural(len(cells), 'combination')}{student})"


def _time(ms: float) -> str:
    return DASH if pd.isna(ms) else f"{datetime.fromtimestamp(ms / 1000, tz=UTC):%Y-%m-%d %H:%M} UTC"
