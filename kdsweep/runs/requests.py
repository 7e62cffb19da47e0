"""The cells that each sweep of a store has asked for: their folders, by their places."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from kdsweep.config.grid import Cell, superseded
from kdsweep.core.errors import InputError
from kdsweep.core.files import DamagedError, below, read_json, remove_parts, write_json
from kdsweep.runs.records import LOCK

SWEEPS = "sweeps"


def ask(store: Path, sweep: str, *, cells: list[Cell], teachers: list[Cell], varied: Sequence[str] = ()) -> None:
    """Add cells and their Teachers to those that a sweep has asked for.

    A cell asked for again with replaced images or under a later results version replaces the old one.

    Args:
        store: folder of the runs.
        sweep: its name.
        cells: the cells.
        teachers: the Teachers that they learn from.
        varied: keys beyond the factors to which its command line gave several values.
    """
    folder = store / SWEEPS
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        remove_parts(folder)
        asked, variants = read_asked(store, sweep), read_variants(store, sweep)
        new = {cell.key: str(cell.folder.relative_to(store)) for cell in [*teachers, *cells]}
        told = {cell.key: cell.variant for cell in [*teachers, *cells] if cell.variant}
        for place in superseded(_with_variants(asked, variants), _with_variants(new, told)):
            del asked[place]
            variants.pop(place, None)
        keys = dict.fromkeys([*read_varied(store, sweep), *varied])
        content = {"asked": asked | new, "varied": list(keys), "variants": variants | told}
        write_json(below(folder, f"{sweep}.json"), content)


def _with_variants(asked: dict[str, str], variants: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return each folder followed by the variant of its place."""
    return {place: f"{folder} {json.dumps(variants.get(place, {}))}" for place, folder in asked.items()}


def read_asked(store: Path, sweep: str) -> dict[str, str]:
    """Return the folders, relative to the store, of a sweep's cells and Teachers, by their places."""
    asked: dict[str, str] = _read_sweep(store, sweep).get("asked", {})
    return asked


def read_variants(store: Path, sweep: str) -> dict[str, dict[str, str]]:
    """Return the variants of a sweep's cells and Teachers, by their places; those without one are left out."""
    variants: dict[str, dict[str, str]] = _read_sweep(store, sweep).get("variants", {})
    return variants


def read_varied(store: Path, sweep: str) -> list[str]:
    """Return the keys beyond the factors to which the command lines of a sweep gave several values."""
    varied: list[str] = _read_sweep(store, sweep).get("varied", [])
    return varied


def _read_sweep(store: Path, sweep: str) -> dict[str, Any]:
    file = below(store / SWEEPS, f"{sweep}.json")
    try:
        return read_json(file, "asked") or {}
    except DamagedError as error:
        remedy = "move it away and run the commands of this sweep again: finished cells are not run again"
        raise InputError(f"{error}; {remedy}") from error


def sweeps(store: Path) -> list[str]:
    """Return the names of a store's sweeps, the latest at the end."""
    files = sorted((store / SWEEPS).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return [file.stem for file in files]
