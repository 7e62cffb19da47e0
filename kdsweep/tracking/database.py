"""MLflow's place for a store's runs: its address, its lock, and the SQLite file of a store that was moved."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

DATABASE = "mlflow.db"
# Columns of the SQLite file that hold places below the folder of the artifacts, beside that of the experiment.
PLACES = (
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


class TrackingError(Exception):
    """The store does not answer now; it may later."""


def store_uri(store: Path, uri: str | None) -> str:
    """Return the URI given, or that of a SQLite file in the store (absolute: the working directory may change)."""
    return uri or f"sqlite:///{store.resolve() / DATABASE}"


def passes(error: BaseException, uri: str) -> bool:
    """Return whether a later try may succeed: a server that does not answer, a database locked, a disk full."""
    signs = ("database is locked", "disk is full", "disk I/O error", "readonly database", "No space left")
    return uri.startswith("http") or any(sign in str(error) for sign in signs)


def artifacts_uri(store: Path) -> str:
    """Return the place of a store's artifacts."""
    return (store.resolve() / "artifacts").as_uri()


@contextmanager
def exclusive(store: Path) -> Iterator[None]:
    """Hold the lock on this store's MLflow, so that one process writes at a time; a dead process frees it."""
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


def follow_move(store: Path, experiment: str) -> None:
    """Update the absolute paths of artifacts in the SQLite file after the store was moved."""
    file, place = store / DATABASE, artifacts_uri(store)
    if not file.is_file():
        return
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"experiments", *(table for table, _ in PLACES)} <= tables:
            return
        query = "SELECT artifact_location FROM experiments WHERE name = ? AND artifact_location LIKE 'file:%'"
        for (old,) in database.execute(query, (experiment,)).fetchall():
            if old == place:
                continue
            database.execute("UPDATE experiments SET artifact_location = ? WHERE name = ?", (place, experiment))
            for table, column in PLACES:
                change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
                database.execute(change, (place, len(old) + 1, len(old) + 1, f"{old}/"))


def line(error: BaseException) -> str:
    """Return MLflow's error in one line, without the database's statement."""
    return " ".join(str(error).split()).partition(" [SQL:")[0][:300]
