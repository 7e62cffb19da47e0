"""The address of MLflow, its lock, its errors, and the SQLite file of a store that was moved."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from kdsweep.core.databases import sqlite_url
from kdsweep.core.errors import InputError
from kdsweep.core.files import below

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
REBUILD = "run the command of its sweep again: the runs are logged again from the folders of the cells"
DAMAGE = ("file is not a database", "malformed", "no such table", "no such column")
PASSING = ("database is locked", "disk is full", "disk I/O error", "readonly database", "No space left")
# Columns of the SQLite file with paths of artifacts. MLflow 3 makes each path absolute when it is written, even that of
# an experiment which is made with a relative one, and has no call that changes them; so ``follow_move`` writes there.
PATHS = (
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("experiments", "artifact_location"),
)


class TrackingError(InputError):
    """MLflow does not answer now (for the reason ``why``); it may later."""

    def __init__(self, store: Path, uri: str | None, why: str) -> None:
        self.why = why
        place = f"--tracking-uri {uri} does" if uri else f"--store {store}: its MLflow store does"
        super().__init__(f"{place} not answer: {why}")


class DamageError(InputError):
    """The database in a store is damaged; the message names the remedy."""

    def __init__(self, store: Path, error: BaseException) -> None:
        problem = f"{store / DATABASE} does not open or is damaged ({line(error)})"
        super().__init__(f"{problem}; move it away and {REBUILD}")


@contextlib.contextmanager
def answering(store: Path, uri: str | None) -> Iterator[None]:
    """Raise MLflow's errors as DamageError if the store's database is damaged, as TrackingError if they may pass."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = str(error)
        if uri is None and any(sign in text for sign in DAMAGE):
            raise DamageError(store, error) from error
        if (uri or "").startswith("http") or any(sign in text for sign in PASSING):
            raise TrackingError(store, uri, line(error)) from error
        raise


def line(error: BaseException) -> str:
    """Return MLflow's error in one line, without the database's statement."""
    if isinstance(error, InputError):
        return str(error)
    return " ".join(str(error).split()).partition(" [SQL:")[0][:300]


@contextlib.contextmanager
def exclusive(store: Path) -> Iterator[None]:
    """Hold the lock on this store's MLflow, so that one process writes at a time; a dead process frees it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(store / ".mlflow.lock").acquire(timeout=60))
        except Timeout as error:
            raise TrackingError(store, None, "another process has been at it for a minute") from error
        except OSError:  # a store that can only be read
            pass
        yield


def store_uri(store: Path, uri: str | None) -> str:
    """Return the URI, for None that of a SQLite file in the store (absolute: the working directory may change)."""
    return uri or sqlite_url(store.resolve() / DATABASE)


def has_database(store: Path) -> bool:
    """Return whether a store has a database; an empty file is what a full disk leaves."""
    file = store / DATABASE
    return file.is_file() and file.stat().st_size > 0


def artifacts_uri(store: Path) -> str:
    """Return the address of a store's artifacts."""
    return (store.resolve() / "artifacts").as_uri()


def artifact_file(store: Path, run_id: str, name: str) -> Path:
    """Return the file of a run's artifact in a store that holds its MLflow."""
    return below(store, "artifacts", run_id, "artifacts", name)


def is_writable(store: Path) -> bool:
    """Return whether this user may write to the store and to the database in it."""
    return all(os.access(path, os.W_OK) for path in (store, store / DATABASE))


def check_location(client: MlflowClient, run_id: str, store: Path, uri: str | None) -> None:
    """Raise InputError if a run's files would be written to another store, from which this one was copied."""
    location = client.get_run(run_id).info.artifact_uri
    if uri is None and not location.startswith(f"{artifacts_uri(store)}/"):
        copied = f"{store} cannot be written to, and its artifacts still belong in the store that it was copied from"
        raise InputError(f"{copied}, {location}; log from that one, or from a copy that can be written to")


def follow_move(store: Path, experiment: str) -> None:
    """Update the absolute paths of artifacts in the SQLite file after the store was moved.

    Raises:
        sqlite3.Error: the file is damaged; MLflow would try to open it for minutes.
    """
    new = artifacts_uri(store)
    with contextlib.closing(sqlite3.connect(store / DATABASE)) as database, database:
        query = "SELECT artifact_location FROM experiments WHERE name = ? AND artifact_location LIKE 'file:%'"
        for (old,) in database.execute(query, (experiment,)).fetchall():
            for table, column in PATHS if old != new and is_writable(store) else ():
                is_below = f"substr({column} || '/', 1, ?) = ?"
                change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {is_below}"
                database.execute(change, (new, len(old) + 1, len(old) + 1, f"{old}/"))
