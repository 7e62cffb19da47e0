"""Files that say which part or which group an image belongs to: of ``split.file`` and ``split.group``."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError

from kdsweep.core.errors import InputError, reading
from kdsweep.data.splits import PARTS, SPLIT_SEED, Listed, Split, with_validation

PART_NAMES = {"train": "train", "training": "train", "val": "validation", "validation": "validation", "test": "test"}
SHOWN = 5  # images that a message names


class Fold(BaseModel, extra="forbid", coerce_numbers_to_str=True):
    """A fold of nnU-Net's splits_final.json: the ids of its parts."""

    train: list[str]
    val: list[str]
    test: list[str] | None = None


def read_split(listed: Listed, file: Path, *, fold: int) -> Split:
    """Read a split from a file: a CSV with the columns id and part, or nnU-Net's splits_final.json.

    An nnU-Net fold has ``train`` and ``val``: its ``val`` is what the fold is scored on, so it is test here, and
    validation images are taken from ``train`` (16 of 80 %). A fold that has ``test`` too is taken as it is.

    Args:
        listed: the data set.
        file: the CSV or JSON file.
        fold: number of the entry in the JSON file's list.

    Raises:
        InputError: the file cannot be read; ids are unknown, missing or in two parts; a part is empty.
    """
    parts = _parts_of_json(file, fold=fold) if file.suffix.lower() == ".json" else _parts_of_csv(file)
    parts = {part: list(map(_composed, ids)) for part, ids in parts.items()}
    numbers_by_id = {_composed(image_id): number for number, image_id in enumerate(listed.ids)}
    placed = Counter(image_id for ids in parts.values() for image_id in ids)
    wrong = {
        "are not in the data set": sorted(placed.keys() - numbers_by_id.keys()),
        "are in two parts": sorted(image_id for image_id, count in placed.items() if count > 1),
        "of the data set are in no part": sorted(numbers_by_id.keys() - placed.keys()),
    }
    for problem, ids in wrong.items():
        if ids:
            raise InputError(f"split.file={file}: {_several(ids)} {problem}; give each image of the data set one part")
    if empty := [part for part, ids in parts.items() if not ids]:
        raise InputError(f"split.file={file}: no image is in the part {empty[0]}")
    numbers = {part: sorted(numbers_by_id[image_id] for image_id in ids) for part, ids in parts.items()}
    if "validation" not in numbers:
        return with_validation(listed, *(np.array(numbers[part]) for part in ("train", "test")), seed=SPLIT_SEED)
    return Split(**numbers)


def _parts_of_csv(file: Path) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for row in _read_rows(file, "split.file", ("id",), "part"):
        part = PART_NAMES.get(row["part"].strip().lower())
        if part is None:
            raise InputError(f"split.file={file}: part {row['part']!r} of {row['id']} is not train, validation or test")
        parts[part].append(row["id"])
    return parts


def _parts_of_json(file: Path, *, fold: int) -> dict[str, list[str]]:
    try:
        folds = TypeAdapter(list[Fold]).validate_json(_read_text(file, "split.file"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        layout = 'nnU-Net\'s list of folds, {"train": [IDS], "val": [IDS]}'
        raise InputError(f"split.file={file}: {where}: {first['msg']}; expected {layout}") from error
    if fold >= len(folds):
        raise InputError(f"split.fold={fold} is not allowed: {file} has {len(folds)} folds, from 0")
    train, val, test = folds[fold].train, folds[fold].val, folds[fold].test
    return {"train": train, "test": val} if test is None else {"train": train, "validation": val, "test": test}


class Groups(NamedTuple):
    """The group of each of N images, and the names in rows of the groups file that name none of them."""

    names: list[str]
    unused: list[str]


def read_groups(ids: Sequence[str], group: str, *, root: Path | None) -> Groups:
    """Return the group of each image, whose images stay on one side of a split.

    Args:
        ids: N ids.
        group: a regular expression that finds the group in an id, by its first named or numbered bracket; or a CSV file
            with the columns id (or image, or file) and group; or the name of a column in the one CSV file in ``root``
            that has it.
        root: folder of the images; None where the data set has none.

    Raises:
        InputError: no such file or column; an id without group, or with two.
    """
    if "(" in group:
        return Groups(_groups_by_pattern(ids, group), [])
    file, column = Path(group).expanduser(), "group"
    if file.suffix.lower() != ".csv":
        file, column = _file_with(group, root), group
    ids_by_name = {_composed(image_id): image_id for image_id in ids}
    groups: dict[str, str] = {}
    unused = []
    for row in _read_rows(file, "split.group", ("id", "image", "file"), column):
        name, value = row["id"], row[column].strip()
        # A row names an image by its id, else by a file of this stem.
        image_id = ids_by_name.get(_composed(name)) or ids_by_name.get(_composed(Path(name).stem))
        if image_id is None:
            unused.append(name)
        elif groups.setdefault(image_id, value) != value:
            both = f"{groups[image_id]!r} and {value!r}"
            raise InputError(f"split.group={group}: {file} has two groups for {image_id}, {both}; leave one row")
    if missing := [image_id for image_id in ids if not groups.get(image_id)]:
        raise InputError(f"split.group={group}: {_several(missing)} of the data set have no {column} in {file}")
    return Groups([groups[image_id] for image_id in ids], unused)


def _composed(name: str) -> str:
    """Return a name in Unicode NFC: macOS names files in NFD, and tables are typed in NFC."""
    return unicodedata.normalize("NFC", name)


def _groups_by_pattern(ids: Sequence[str], pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"split.group={pattern} is not a regular expression: {error}") from error
    if not compiled.groups:
        raise InputError(f"split.group={pattern}: which part is the group? Put it in (?P<patient>...)")
    matches = [compiled.fullmatch(image_id) for image_id in ids]
    if missing := [image_id for image_id, match in zip(ids, matches, strict=True) if not match or not match[1]]:
        raise InputError(f"split.group={pattern} does not match {_several(missing)}; it must match each complete id")
    return [match[1] for match in matches if match]


def _file_with(column: str, root: Path | None) -> Path:
    """Return the CSV file in ``root`` that has a column."""
    files = sorted(root.glob("*.csv")) if root is not None and root.is_dir() else []
    matches = [file for file in files if (rows := _read_csv(file, "split.group")) and column in rows[0]]
    if len(matches) != 1:
        where = f"{len(matches)} CSV files in {root} have" if matches else f"no CSV file in {root} has"
        remedy = "use a regular expression with a bracket, such as '(?P<patient>\\d+)_.*', or FILE.csv"
        raise InputError(f"split.group={column}: {where} a column of this name; {remedy}")
    return matches[0]


def _read_rows(file: Path, key: str, id_columns: tuple[str, ...], column: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file as ``id``, from the first of these columns that it has, and another column."""
    rows = _read_csv(file, key)
    columns = list(rows[0]) if rows else []
    id_column = next((name for name in id_columns if name in columns), None)
    if id_column is None or column not in columns:
        needed = id_columns[0] + (f" (or {', or '.join(id_columns[1:])})" if len(id_columns) > 1 else "")
        present = ", ".join(map(str, columns)) or "no row"
        raise InputError(f"{key}={file}: it needs the columns {needed} and {column}, it has {present}")
    return [{"id": row[id_column] or "", column: row[column] or ""} for row in rows]


def _read_csv(file: Path, key: str) -> list[dict[str, str | None]]:
    with reading(f"{key}={file}", what="CSV", remedy="save it as CSV in UTF-8"):
        return list(csv.DictReader(_read_text(file, key).splitlines()))


def _read_text(file: Path, key: str) -> str:
    with reading(f"{key}={file}", what="text in UTF-8", remedy="save it in UTF-8"):
        return file.read_text(encoding="utf-8-sig")


def _several(ids: Sequence[str]) -> str:
    """Return a count of images with the first ones' ids."""
    more = ", ..." if len(ids) > SHOWN else ""
    return f"{len(ids)} image{'s' if len(ids) > 1 else ''} ({', '.join(ids[:SHOWN])}{more})"
