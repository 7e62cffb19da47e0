"""The folder of a cell: its record, its lock and its marker, of which MLflow's runs and the status are made.

The folder alone says what the cell is and how far it is trained. So a store can be moved, a tracking server can be
down, and a process can be killed without warning.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from kdsweep.config.grid import TEACHER, Cell, weights_file
from kdsweep.core.errors import InputError
from kdsweep.core.files import DamagedError, file_digest, is_locked, read_json, write_json

log = logging.getLogger(__name__)

CELL, PROGRESS, FAILED, FINISHED, LOCK = "cell.json", "progress.json", "failed.json", "finished.json", ".lock"
SPLIT, PARTS = "split.json", ("train", "validation", "test")
SCORES, PREDICTIONS, HISTORY = "test_scores.csv", "test_predictions.npz", "history.csv"
KEYS = {  # of each record; without them it is damaged
    CELL: ("tags", "params", "started_ms", "settings"),
    PROGRESS: ("epochs", "history", "times_ms", "seconds"),
    FAILED: ("error", "time_ms"),
    FINISHED: ("values", "sha256", "time_ms"),
}


@dataclass(frozen=True)
class Record:
    """The state of a cell, as read from its folder; times in milliseconds since 1970."""

    folder: Path
    status: str  # WAITING (not begun), RUNNING, KILLED (begun, but not running), FAILED or FINISHED
    params: dict[str, Any] = field(default_factory=dict)  # the flat resolved configuration
    tags: dict[str, str] = field(default_factory=dict)  # of its run: those of the cell and of the process that trains
    started_ms: int = 0
    epochs: int = 0  # the maximum
    history: list[dict[str, float]] = field(default_factory=list)  # values of each epoch, "epoch" among them
    times_ms: list[int] = field(default_factory=list)  # when each epoch ended
    seconds: list[float] = field(default_factory=list)  # of each epoch (``Learner.seconds``)
    error: str = ""  # of a failed cell, in one line
    values: dict[str, float] = field(default_factory=dict)  # the final ones of a finished cell
    ended_ms: int = 0  # when it failed or was finished


def now_ms() -> int:
    """Return the milliseconds since 1970."""
    return int(time.time() * 1000)


# --- the lock


def lock(folder: Path) -> BaseFileLock:
    """Return the lock that a process holds while it computes a cell; the system opens it when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / LOCK, thread_local=False)


def hold(stack: contextlib.ExitStack, folder: Path) -> bool:
    """Take the lock of a cell until the stack is closed; return False if another process has it."""
    try:  # ``is_held`` of another process may have it for a moment
        stack.enter_context(lock(folder).acquire(timeout=0.5, poll_interval=0.05))
    except Timeout:
        return False
    return True


def is_held(folder: Path) -> bool:
    """Return whether a process computes the cell of this folder."""
    return is_locked(folder / LOCK)


# --- written by the training


def describe(cell: Cell, *, split: dict[str, list[str]], params: dict[str, Any], tags: dict[str, str]) -> None:
    """Write the description of a cell before it is trained, with the image ids of its split; remove a failure.

    ``params`` is the flat resolved configuration without folders of this machine; ``tags`` are those of its run that do
    not follow from the cell.
    """
    folder, inputs = cell.folder, cell.input_digests
    of_cell = {
        **{name: str(getattr(cell, name)) for name in ("notation", "role", "split", "seed", "fingerprint")},
        "weights": inputs.get(f"{'teacher' if cell.role == 'teacher' else 'student'}_weights", ""),
        **{name: inputs.get(name, "") for name in ("teacher", "data", "user_code", "results_version")},
    }
    content = {
        "tags": tags | {f"kdsweep.{name}": value for name, value in of_cell.items()},
        "started_ms": (_read(folder / CELL) or {}).get("started_ms", now_ms()),
        "settings": cell.settings,
        "input_digests": inputs,
        "params": params,
        "data_root": cell.sources.get("data.root", ""),
    }
    write_json(folder / SPLIT, split)
    write_json(folder / CELL, content)
    (folder / FAILED).unlink(missing_ok=True)


def data_root(folder: Path) -> Path | None:
    """Return the folder of the images that a cell was trained on; None if it names none."""
    root = (_read(folder / CELL) or {}).get("data_root")
    return Path(root) if root else None


def write_progress(
    folder: Path, *, epochs: int, history: list[dict[str, float]], times_ms: list[int], seconds: list[float]
) -> None:
    """Write the epochs that the checkpoint holds, never more: a resumed training would report them twice."""
    content = {"epochs": epochs, "times_ms": times_ms, "seconds": seconds, "history": history}
    write_json(folder / PROGRESS, content)


def write_failed(folder: Path, error: str) -> None:
    """Write the error of a failed cell; if this fails too (a full disk), ignore it."""
    parent = folder.absolute().parents[2]  # of the store: MLflow gets the text without this path of the machine
    text = " ".join(error.split()).replace(f"{parent}/", "")
    with contextlib.suppress(OSError):
        write_json(folder / FAILED, {"error": text, "time_ms": now_ms()})


def write_finished(folder: Path, *, values: dict[str, float], files: list[str]) -> None:
    """Write the marker of a finished cell, last of all: its final values, and the SHA-256 of its files."""
    content = {"time_ms": now_ms(), "values": values, "sha256": {name: file_digest(folder / name) for name in files}}
    write_json(folder / FINISHED, {**content, "seal": _seal(content)})
    (folder / FAILED).unlink(missing_ok=True)


# --- reading


def _read(file: Path) -> dict[str, Any] | None:
    """Return the content of a record: empty if it is missing, None if it is damaged."""
    try:
        content = read_json(file, *KEYS.get(file.name, ())) or {}
    except DamagedError:
        return None
    is_sealed = not content or file.name != FINISHED or content.pop("seal", None) == _seal(content)
    return content if is_sealed else None


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_finished(folder: Path) -> dict[str, float] | None:
    """Return the final values of a finished cell, or None.

    A damaged cell is logged in one line and no longer counts: it is tested again from its checkpoint, or trained again.
    A Teacher's weights are not checked here, since that takes seconds, but when they are read.
    """
    marker = _read(folder / FINISHED)
    if marker == {}:
        return None
    damaged = [name for name in (FINISHED, CELL, PROGRESS) if _read(folder / name) is None]
    files = [] if marker is None else [name for name in marker["sha256"] if name != weights_file(TEACHER)]
    damaged += [name for name in files if not check_file(folder, name)]
    if damaged or marker is None:
        forget_finished(folder, folder / damaged[0])
        return None
    values: dict[str, float] = marker["values"]
    return values


def forget_finished(folder: Path, damaged: Path) -> None:
    """Log which file of a finished cell is damaged, and have the cell computed again."""
    log.warning("%s: damaged, its checksum differs; what it held is computed again", damaged)
    with contextlib.suppress(OSError):
        (folder / FINISHED).unlink(missing_ok=True)


def check_file(folder: Path, name: str) -> bool:
    """Return whether a file of a finished cell still has the bytes that were written."""
    digest = (_read(folder / FINISHED) or {}).get("sha256", {}).get(name)
    try:
        return file_digest(folder / name) == digest
    except OSError:
        return False


def read_split(folder: Path) -> dict[str, list[str]]:
    """Return the image ids of a cell's parts: train, validation, test; raise InputError if the file is damaged."""
    split = _read(folder / SPLIT) or {}
    if not all(isinstance(split.get(part), list) for part in PARTS):
        raise InputError(f"{folder / SPLIT} is missing or damaged; the command of its sweep writes it again")
    return split


def read_predecessor(cell: Cell, *, excluded: set[Path]) -> dict[str, Any] | None:
    """Read the description of the latest other cell of the same name, split and seed, if this one was never begun.

    Folders in ``excluded`` are left out.
    """
    if (cell.folder / CELL).exists():
        return None
    name, _, digits = cell.folder.name.rpartition("-")
    alike = cell.folder.parent.glob(f"{glob.escape(name)}-{'?' * len(digits)}/{CELL}")
    begun = [file for file in alike if file.parent not in excluded]
    return _read(max(begun, key=lambda file: file.stat().st_mtime_ns)) if begun else None


def version(folder: Path) -> tuple[int, ...]:
    """Return numbers that change whenever the record of a folder does; the first is 0 if the cell was never begun."""
    stamps = []
    for name in (CELL, PROGRESS, FAILED, FINISHED):
        try:
            stamps.append((folder / name).stat().st_mtime_ns)
        except OSError:
            stamps.append(0)
    return (*stamps, is_held(folder))


def epochs(folder: Path) -> int:
    """Return the number of saved epochs of a cell, 0 without a folder."""
    return len((_read(folder / PROGRESS) or {}).get("times_ms", []))


def read(folder: Path) -> Record:
    """Read the record of a cell; its folder need not exist."""
    is_finished = read_finished(folder) is not None
    records = {name: _read(folder / name) for name in KEYS}
    for name in (CELL, PROGRESS):
        if records[name] is None:
            log.warning("%s is damaged; the same command writes it again", folder / name)
    end: dict[str, Any] = {}
    if is_finished:
        status, end = "FINISHED", records[FINISHED] or {}
    elif records[FAILED] != {}:
        damaged = {"error": f"{folder / FAILED} is damaged; the same command tries the cell again"}
        status, end = "FAILED", records[FAILED] or damaged
    elif records[CELL] != {}:
        status = "RUNNING" if is_held(folder) else "KILLED"
    else:
        status = "WAITING"
    state = {**(records[CELL] or {}), **(records[PROGRESS] or {}), **end, "ended_ms": end.get("time_ms", 0)}
    return Record(folder, status, **{key: value for key, value in state.items() if key in Record.__annotations__})
