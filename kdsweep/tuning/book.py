"""Keep the address of Optuna's database in the store, and the lock that a command holds while it tunes."""

from __future__ import annotations

from pathlib import Path

from filelock import BaseFileLock, FileLock

from kdsweep.core.errors import InputError
from kdsweep.core.files import DamagedError, below, is_locked, read_json, write_json

FOLDER = "tuning"
TUNED = "-tuned"  # behind the name of a sweep, the one with the chosen settings


def read(store: Path, sweep: str) -> str:
    """Return the address of the database with a sweep's trials; empty if it was never tuned."""
    try:
        record = read_json(below(store / FOLDER, f"{sweep}.json"), "storage")
    except DamagedError as error:
        raise InputError(f"{error}; move it away and run the command that tunes {sweep} again") from error
    return "" if record is None else record["storage"] or default_storage(store)


def write(store: Path, sweep: str, *, storage: str) -> None:
    """Record the address of the database with a sweep's trials; that in the store moves with it."""
    read(store, sweep)  # a damaged file is not overwritten
    (store / FOLDER).mkdir(parents=True, exist_ok=True)
    content = {"storage": "" if storage == default_storage(store) else storage}
    write_json(below(store / FOLDER, f"{sweep}.json"), content)


def default_storage(store: Path) -> str:
    """Return the address of the database for trials that a store holds."""
    from kdsweep.core.databases import sqlite_url  # with SQLAlchemy, which the status of other sweeps does not need

    return sqlite_url(store.absolute() / "optuna.db")


def sweeps(store: Path) -> list[str]:
    """Return the names of the sweeps of a store that are tuned, the latest at the end."""
    files = sorted((store / FOLDER).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return [file.stem for file in files if read(store, file.stem)]


def as_configured(store: Path, sweep: str) -> str:
    """Return the name under which a sweep was tuned; ``sweep`` may be the one with the chosen settings."""
    return sweep if read(store, sweep) else sweep.removesuffix(TUNED)


def check_name(store: Path, sweep: str) -> None:
    """Refuse to tune two sweeps of which one has the name of the other's sweep with the chosen settings.

    Raises:
        InputError: the store holds the other one.
    """
    for other in (sweep.removesuffix(TUNED), f"{sweep}{TUNED}"):
        if other != sweep and read(store, other):
            longer = max(sweep, other, key=len)
            why = f"this store holds the tuning of {other}, and {longer} would be two sweeps"
            raise InputError(f"sweep_name={sweep}: {why}; give another name")


def lock(store: Path, sweep: str) -> BaseFileLock:
    """Return the lock that a command holds while it tunes a sweep; the system opens it when the command ends."""
    (store / FOLDER).mkdir(parents=True, exist_ok=True)
    return FileLock(below(store / FOLDER, f"{sweep}.lock"), thread_local=False)


def is_held(store: Path, sweep: str) -> bool:
    """Return whether a command tunes a sweep."""
    return is_locked(below(store / FOLDER, f"{sweep}.lock"))
