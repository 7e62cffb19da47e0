"""Record the tuning of a sweep in its store: where the studies are, and those that there should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from filelock import BaseFileLock, FileLock

from kdsweep.core.errors import InputError
from kdsweep.core.files import DamagedError, below, is_locked, read_json, write_json

FOLDER = "tuning"
TUNED = "-tuned"  # behind the name of a sweep, the one with the chosen settings


@dataclass(frozen=True)
class Entry:
    """A study: one method on one split.

    Attributes:
        name: of the study in Optuna's storage.
        notation: of the method, such as ``HReg_KLD_WAug`` or ``Teacher``.
        split: its number.
        role: ``distilled``, ``baseline`` or ``teacher``.
        trials: how many it is to have; 0 for a method that uses no key of the space.
    """

    name: str
    notation: str
    split: int
    role: str
    trials: int


@dataclass(frozen=True)
class Book:
    """The studies of a sweep.

    Attributes:
        storage: address of Optuna's database; empty if the sweep was never tuned.
        entries: by name of the study.
        epoch_s: timed seconds of an epoch, by fingerprint, where the budget is in seconds.
    """

    storage: str = ""
    entries: Mapping[str, Entry] = field(default_factory=dict)
    epoch_s: Mapping[str, float] = field(default_factory=dict)


def read(store: Path, sweep: str) -> Book:
    """Return what is known of a sweep's tuning; an empty one if it was never tuned."""
    try:
        known = read_json(below(store / FOLDER, f"{sweep}.json"), "storage", "entries", "epoch_s")
    except DamagedError as error:
        raise InputError(f"{error}; move it away and run the command that tunes {sweep} again") from error
    if known is None:
        return Book()
    entries = {name: Entry(**own) for name, own in known["entries"].items()}
    return Book(known["storage"] or default_storage(store), entries, known["epoch_s"])


def default_storage(store: Path) -> str:
    """Return the address of the database for trials that a store holds."""
    from kdsweep.core.databases import sqlite_url  # with SQLAlchemy, which the status of other sweeps does not need

    return sqlite_url(store.absolute() / "optuna.db")


def sweeps(store: Path) -> list[str]:
    """Return the names of the sweeps of a store that are tuned, the latest at the end."""
    files = sorted((store / FOLDER).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return [file.stem for file in files if read(store, file.stem).entries]


def as_configured(store: Path, sweep: str) -> str:
    """Return the name under which a sweep was tuned: its own, or that of which it has the chosen settings."""
    return sweep if read(store, sweep).entries else sweep.removesuffix(TUNED)


def check_name(store: Path, sweep: str) -> None:
    """Refuse to tune two sweeps of which one has the name of the other's sweep with the chosen settings.

    Raises:
        InputError: the store holds the other one.
    """
    for other in (sweep.removesuffix(TUNED), f"{sweep}{TUNED}"):
        if other != sweep and read(store, other).entries:
            longer = max(sweep, other, key=len)
            told = f"this store holds the tuning of {other}, and {longer} would be two sweeps"
            raise InputError(f"sweep_name={sweep}: {told}; give another name")


def lock(store: Path, sweep: str) -> BaseFileLock:
    """Return the lock that a command holds while it tunes a sweep; the system opens it when the command ends."""
    (store / FOLDER).mkdir(parents=True, exist_ok=True)
    return FileLock(below(store / FOLDER, f"{sweep}.lock"), thread_local=False)


def is_held(store: Path, sweep: str) -> bool:
    """Return whether a command tunes a sweep."""
    return is_locked(below(store / FOLDER, f"{sweep}.lock"))


def write(
    store: Path,
    sweep: str,
    *,
    storage: str | None = None,
    entries: Sequence[Entry] = (),
    epoch_s: Mapping[str, float] | None = None,
) -> None:
    """Add to what is known of a sweep's tuning.

    A study takes the place of one of the same method and split that was made with other settings.

    Args:
        store: folder of the runs.
        sweep: its name.
        storage: address of Optuna's database.
        entries: studies.
        epoch_s: timed seconds of an epoch, by fingerprint.
    """
    known = read(store, sweep)
    places = {(own.notation, own.split) for own in entries}
    kept = {name: own for name, own in known.entries.items() if (own.notation, own.split) not in places}
    known = replace(known, entries=kept | {own.name: own for own in entries})
    known = replace(known, storage=known.storage if storage is None else storage)
    known = replace(known, epoch_s=known.epoch_s if epoch_s is None else epoch_s)
    (store / FOLDER).mkdir(parents=True, exist_ok=True)
    studies = {name: asdict(own) for name, own in known.entries.items()}
    storage = "" if known.storage == default_storage(store) else known.storage  # the store may be moved
    content = {"storage": storage, "epoch_s": dict(known.epoch_s), "entries": studies}
    write_json(below(store / FOLDER, f"{sweep}.json"), content)
