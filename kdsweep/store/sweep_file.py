"""The file of each sweep in a store, ``sweeps/NAME.json``: the cells that it requests, and by which commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from kdsweep.config import grid
from kdsweep.config.grid import Cell
from kdsweep.core.errors import InputError
from kdsweep.core.files import DamagedError, below, read_json, remove_parts, write_json
from kdsweep.store.cell_folder import LOCK

SWEEPS = "sweeps"
TUNED = "-tuned"  # behind the name of a sweep, the one with the chosen settings


@dataclass(frozen=True)
class Request:
    """A cell or Teacher that a sweep requests."""

    role: str
    notation: str
    split: int
    seed: int
    fingerprint: str
    version: int  # results version of the command that requested it
    variant: dict[str, str]  # values of the swept keys, as far as they distinguish it from others of its name

    def folder(self, store: Path) -> Path:
        """Return the folder of the cell."""
        return grid.run_folder(store, vars(self))

    @property
    def name(self) -> tuple[object, ...]:
        """Return what cells of two results versions have in common if one replaces the other."""
        return self.notation, self.split, self.seed, tuple(sorted(self.variant.items()))


@dataclass(frozen=True)
class SweepFile:
    """A sweep's requested cells and how they vary."""

    requests: dict[str, Request] = field(default_factory=dict)  # by ``Cell.key``, those of their Teachers too
    swept: list[str] = field(default_factory=list)  # keys beyond the factors to which commands gave several values
    varied: list[str] = field(default_factory=list)  # those, and all others in which cells of such a command differ
    tuned: list[str] = field(default_factory=list)  # keys set by tuning, for each method and split separately
    commands: list[str] = field(default_factory=list)  # as they can be typed again, the latest at the end
    storage: str | None = None  # address of the database of its trials, empty for that in the store; None: not tuned


def parse(content: dict[str, Any]) -> SweepFile:
    """Return the sweep file with this content."""
    return SweepFile(**content | {"requests": {key: Request(**row) for key, row in content["requests"].items()}})


def read(store: Path, sweep: str) -> SweepFile:
    """Return what a sweep requests, nothing without a file; raise InputError if the file is damaged."""
    try:
        content = read_json(file_of(store, sweep), *(SweepFile.__annotations__.keys() - {"storage"}))
    except DamagedError as error:
        remedy = "move it away and run the commands of this sweep again: finished cells are not run again"
        raise InputError(f"{error}; {remedy}") from error
    return parse(content) if content else SweepFile()


def add(
    store: Path,
    sweep: str,
    *,
    cells: Sequence[Cell],
    teachers: Sequence[Cell],
    swept: Sequence[str] = (),
    varied: Sequence[str] = (),
    tuned: Sequence[str] = (),
    command: str = "",
    storage: str | None = None,
) -> None:
    """Add cells, Teachers, keys, a command and a storage to the file of a sweep, as ``SweepFile`` names them.

    A cell that is requested again with replaced images, under another name of its data, or under a later results
    version replaces the old one.
    """
    file = file_of(store, sweep)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.parent / LOCK):
        remove_parts(file.parent)
        before = read(store, sweep)
        content = SweepFile(
            requests=_merge(before.requests, [*teachers, *cells]),
            swept=list(dict.fromkeys([*before.swept, *swept])),
            varied=list(dict.fromkeys([*before.varied, *varied])),
            tuned=list(dict.fromkeys([*before.tuned, *tuned])),
            commands=[line for line in before.commands if line != command] + ([command] if command else []),
            storage=before.storage if storage is None else storage,
        )
        write_json(file, asdict(content))


def _merge(before: dict[str, Request], cells: Sequence[Cell]) -> dict[str, Request]:
    """Return the requests of a sweep with those of further cells, less those that they replace."""
    new = {}
    for cell in cells:
        # A cell that is requested alone keeps the variant that it had among others.
        variant = cell.variant or (before[cell.key].variant if cell.key in before else {})
        about = cell.role, cell.notation, cell.split, cell.seed, cell.fingerprint
        new[cell.key] = Request(*about, grid.RESULTS_VERSION, variant)
    fingerprints, names = ({getattr(row, of) for row in new.values()} for of in ("fingerprint", "name"))
    kept = {
        key: row
        for key, row in before.items()
        if row.fingerprint not in fingerprints and not (row.version < grid.RESULTS_VERSION and row.name in names)
    }
    return kept | new


def file_of(store: Path, sweep: str) -> Path:
    """Return the file of a sweep."""
    return below(store / SWEEPS, f"{sweep}.json")


def tuning_lock(store: Path, sweep: str) -> Path:
    """Return the file that a command locks while it tunes a sweep."""
    return below(store / SWEEPS, f"{sweep}.lock")


def as_configured(store: Path, sweep: str) -> str:
    """Return the name under which a sweep was tuned; ``sweep`` may be the one with the chosen settings."""
    return sweep if read(store, sweep).storage is not None else sweep.removesuffix(TUNED)


def sweeps(store: Path) -> list[str]:
    """Return the names of a store's sweeps, the latest at the end."""
    files = sorted((store / SWEEPS).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return [file.stem for file in files]


def folders(store: Path) -> set[Path]:
    """Return the folders of all cells that the sweeps of a store request."""
    return {row.folder(store) for sweep in sweeps(store) for row in read(store, sweep).requests.values()}
