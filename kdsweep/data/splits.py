"""Splits of a data set into training, validation and test images: the paper's, held out, k folds, or a file's.

scikit-learn draws them. It is imported late: it takes a second, and the fingerprints of the paper's splits do without.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from kdsweep.core.errors import InputError
from kdsweep.data.images import Images

SPLIT_SEED = 2025  # of all random splits; the same for every data set, cell and machine
TEST_SHARE, VALIDATION_SHARE = 0.20, 0.16  # 33 and 26 of the paper's 163 images
PARTS = ("train", "validation", "test")
PART_NAMES = {"train": "train", "training": "train", "val": "validation", "validation": "validation", "test": "test"}
SHOWN = 5  # images that a message names


@dataclass(frozen=True)
class Split:
    """Indices of the three parts into the sorted ids of a data set."""

    train: list[int]
    validation: list[int]
    test: list[int]


@dataclass(frozen=True)
class Listed:
    """Hold what a split is drawn from: ids, labels and groups.

    Attributes:
        ids: N unique ids, sorted.
        labels: N labels; ``unknown`` where there is none.
        groups: N names of groups, such as patients, whose images stay together; None if each image is its own.
    """

    ids: list[str]
    labels: list[str]
    groups: list[str] | None = None

    @property
    def stratified(self) -> bool:
        """Return whether the parts are to have equal shares of the labels: they are known, and there are several."""
        return "unknown" not in self.labels and len(set(self.labels)) > 1


def random_split(count: int, *, index: int) -> Split:
    """Draw the paper's random split ``index`` of ``count`` images: 104 / 26 / 33 at its 163, 64 / 16 / 20 % elsewhere.

    Raises:
        InputError: too few images for three parts.
    """
    from sklearn.model_selection import ShuffleSplit

    test, validation = round(count * TEST_SHARE), round(count * VALIDATION_SHARE)
    if min(test, validation) < 1 or count - test - validation < 1:
        raise InputError(f"the data set has {count} images; training, validation and test need at least 4")
    shuffles = ShuffleSplit(n_splits=index + 1, test_size=test, train_size=count - test, random_state=SPLIT_SEED)
    rest, test_part = list(shuffles.split(np.zeros(count)))[index]
    return Split(train=rest[validation:].tolist(), validation=rest[:validation].tolist(), test=test_part.tolist())


def holdout(listed: Listed, *, index: int) -> Split:
    """Hold out 20 % for test and 16 % for validation, by groups and with equal shares of the labels where known.

    Raises:
        InputError: too few images, groups or images of a label.
    """
    everything = np.arange(len(listed.ids))
    rest, test = _hold_out(listed, everything, share=TEST_SHARE, seed=SPLIT_SEED + index)
    return _with_validation(listed, rest, test, seed=SPLIT_SEED + index)


def kfold(listed: Listed, *, folds: int, fold: int) -> Split:
    """Return fold ``fold`` of k as test; of the others 16 of 80 % are validation. Each image is tested once.

    Raises:
        InputError: fewer images, groups or images of a label than folds.
    """
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    kinds = {
        (False, False): KFold,
        (True, False): StratifiedKFold,
        (False, True): GroupKFold,
        (True, True): StratifiedGroupKFold,
    }
    _check_folds(listed, folds)
    draws = kinds[listed.stratified, listed.groups is not None](folds, shuffle=True, random_state=SPLIT_SEED)
    rest, test = list(draws.split(listed.ids, listed.labels, listed.groups))[fold]
    return _with_validation(listed, rest, test, seed=SPLIT_SEED)


def _check_folds(listed: Listed, folds: int) -> None:
    units = {"images": len(listed.ids)} | ({} if listed.groups is None else {"groups": len(set(listed.groups))})
    if listed.stratified:
        label, count = min(Counter(listed.labels).items(), key=lambda item: item[1])
        units[f"{label} images"] = count
    for unit, count in units.items():
        if count < folds:
            raise InputError(f"split.folds={folds} is not allowed: the data set has {count} {unit}")


def _with_validation(listed: Listed, rest: np.ndarray, test: np.ndarray, *, seed: int) -> Split:
    train, validation = _hold_out(listed, rest, share=VALIDATION_SHARE / (1 - TEST_SHARE), seed=seed)
    return Split(train.tolist(), validation.tolist(), test.tolist())


def _hold_out(listed: Listed, among: np.ndarray, *, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (what is left, a share held out) of the images ``among``, indices.

    With groups and labels it is one of 1 / share folds: scikit-learn has no grouped and stratified shuffle.
    """
    from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedGroupKFold, StratifiedShuffleSplit

    labels = [listed.labels[i] for i in among]
    groups = None if listed.groups is None else [listed.groups[i] for i in among]
    draws: Any
    if groups is not None and listed.stratified:
        draws = StratifiedGroupKFold(round(1 / share), shuffle=True, random_state=seed)
    elif groups is not None:
        draws = GroupShuffleSplit(1, test_size=share, random_state=seed)
    else:
        kind = StratifiedShuffleSplit if listed.stratified else ShuffleSplit
        draws = kind(1, test_size=max(1, round(len(among) * share)), random_state=seed)
    try:
        left, held = next(iter(draws.split(among, labels, groups)))
    except ValueError as error:
        counted = f"{len(listed.ids)} images" + (
            "" if listed.groups is None else f" in {len(set(listed.groups))} groups"
        )
        raise InputError(f"split: {counted} cannot be divided into training, validation and test: {error}") from error
    return among[left], among[held]


def from_file(listed: Listed, file: Path, *, fold: int) -> Split:
    """Read a split from a file: a CSV with the columns id and part, or nnU-Net's splits_final.json.

    An nnU-Net fold has ``train`` and ``val``: its ``val`` is what the fold is scored on, so it is test here, and
    validation images are taken from ``train`` (16 of 80 %). A fold with ``test`` beside them is taken as it is.

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
    placed = [image_id for ids in parts.values() for image_id in ids]
    wrong = {
        "are not in the data set": sorted(set(placed) - numbers_by_id.keys()),
        "are in two parts": sorted(image_id for image_id, count in Counter(placed).items() if count > 1),
        "of the data set are in no part": sorted(numbers_by_id.keys() - set(placed)),
    }
    for what, ids in wrong.items():
        if ids:
            raise InputError(f"split.file={file}: {_several(ids)} {what}; give each image of the data set one part")
    if empty := [part for part, ids in parts.items() if not ids]:
        raise InputError(f"split.file={file}: no image is in the part {empty[0]}")
    numbers = {part: sorted(numbers_by_id[image_id] for image_id in ids) for part, ids in parts.items()}
    if "validation" not in numbers:
        return _with_validation(listed, *(np.array(numbers[part]) for part in ("train", "test")), seed=SPLIT_SEED)
    return Split(**numbers)


def _parts_of_csv(file: Path) -> dict[str, list[str]]:
    rows = _read_csv(file, "split.file")
    if not rows or not {"id", "part"} <= rows[0].keys():
        _refuse_columns(file, "split.file", rows, needed="id and part")
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for row in rows:
        part = PART_NAMES.get((row["part"] or "").strip().lower())
        if part is None:
            raise InputError(f"split.file={file}: part {row['part']!r} of {row['id']} is not train, validation or test")
        parts[part].append(str(row["id"]))
    return parts


def _parts_of_json(file: Path, *, fold: int) -> dict[str, list[str]]:
    try:
        folds = json.loads(_read_text(file, "split.file"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"split.file={file} is not JSON: {error}; save it as nnU-Net does") from error
    if not isinstance(folds, list) or not all(isinstance(of, dict) and {"train", "val"} <= of.keys() for of in folds):
        raise InputError(
            f'split.file={file}: expected a list of folds as nnU-Net writes it, {{"train": [], "val": []}}'
        )
    if fold >= len(folds):
        raise InputError(f"split.fold={fold} is not allowed: {file} has {len(folds)} folds, from 0")
    where = f"split.file={file}: fold {fold}"
    if unknown := sorted(folds[fold].keys() - {"train", "val", "test"}):
        raise InputError(f"{where} has the key {unknown[0]!r}; it may have train, val and test")
    parts = {key: _ids(ids, f"{where}: {key}") for key, ids in folds[fold].items()}
    if "test" in parts:
        return {"train": parts["train"], "validation": parts["val"], "test": parts["test"]}
    return {"train": parts["train"], "test": parts["val"]}


def _ids(value: Any, where: str) -> list[str]:
    """Return the ids of a part of a JSON file, which may be texts or whole numbers."""
    if not isinstance(value, list):
        raise InputError(f"{where} is {json.dumps(value)[:40]}; it must be a list of image ids")
    for image_id in value:
        if not isinstance(image_id, str | int) or isinstance(image_id, bool):
            raise InputError(f"{where} holds {json.dumps(image_id)[:40]}; an image id is a text")
    return list(map(str, value))


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
    rows = _read_csv(file, "split.group")
    key = next((name for name in ("id", "image", "file") if rows and name in rows[0]), None)
    if key is None or column not in rows[0]:
        _refuse_columns(file, "split.group", rows, needed=f"id (or image, or file) and {column}")
    ids_by_name = {_composed(image_id): image_id for image_id in ids}
    groups: dict[str, str] = {}
    unused = []
    for row in rows:
        name, value = row[key] or "", (row[column] or "").strip()
        image_id = _named_by(name, ids_by_name)
        if image_id is None:
            unused.append(name)
        elif groups.setdefault(image_id, value) != value:
            both = f"{groups[image_id]!r} and {value!r}"
            raise InputError(f"split.group={group}: {file} has two groups for {image_id}, {both}; leave one row")
    if lacking := [image_id for image_id in ids if not groups.get(image_id)]:
        raise InputError(f"split.group={group}: {_several(lacking)} of the data set have no {column} in {file}")
    return Groups([groups[image_id] for image_id in ids], unused)


def _named_by(name: str, ids: Mapping[str, str]) -> str | None:
    """Return the image that a row names: by its id, else by a file of this stem."""
    return ids.get(_composed(name)) or ids.get(_composed(Path(name).stem))


def _composed(name: str) -> str:
    """Return a name in Unicode NFC: macOS names files in NFD, and tables are typed in NFC."""
    return unicodedata.normalize("NFC", name)


def _groups_by_pattern(ids: Sequence[str], pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"split.group={pattern} is no regular expression: {error}") from error
    if not compiled.groups:
        raise InputError(f"split.group={pattern}: which part is the group? Put it in (?P<patient>...)")
    matches = [compiled.fullmatch(image_id) for image_id in ids]
    if lacking := [image_id for image_id, match in zip(ids, matches, strict=True) if not match or not match[1]]:
        raise InputError(f"split.group={pattern} does not match {_several(lacking)}; it must match each whole id")
    return [match[1] for match in matches if match]


def _file_with(column: str, root: Path | None) -> Path:
    """Return the CSV file in ``root`` that has a column."""
    files = sorted(root.glob("*.csv")) if root is not None and root.is_dir() else []
    matches = [file for file in files if (rows := _read_csv(file, "split.group")) and column in rows[0]]
    if len(matches) != 1:
        where = f"{len(matches)} CSV files in {root} have" if matches else f"no CSV file in {root} has"
        remedy = "give a regular expression with a bracket, such as '(?P<patient>\\d+)_.*', or FILE.csv"
        raise InputError(f"split.group={column}: {where} a column of this name; {remedy}")
    return matches[0]


def _read_csv(file: Path, key: str) -> list[dict[str, str | None]]:
    import csv

    try:
        return list(csv.DictReader(_read_text(file, key).splitlines()))
    except csv.Error as error:
        raise InputError(f"{key}={file} is not CSV: {error}; save it as CSV in UTF-8") from error


def _read_text(file: Path, key: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{error}; save it in UTF-8"
        raise InputError(f"{key}={file} cannot be read: {reason}") from error


def _refuse_columns(file: Path, key: str, rows: Sequence[Mapping[str, object]], *, needed: str) -> NoReturn:
    there = ", ".join(map(str, rows[0])) if rows else "no row"
    raise InputError(f"{key}={file}: it needs the columns {needed}, it has {there}")


def leaking_groups(listed: Listed, split: Split) -> dict[str, list[str]]:
    """Return the images of each group that is in several parts, by group; empty without groups."""
    if listed.groups is None:
        return {}
    parts = {number: part for part in PARTS for number in getattr(split, part)}
    where: dict[str, set[str]] = {}
    for number, part in parts.items():
        where.setdefault(listed.groups[number], set()).add(part)
    return {
        group: [image for image, name in zip(listed.ids, listed.groups, strict=True) if name == group]
        for group, parts in sorted(where.items())
        if len(parts) > 1
    }


def _several(ids: Sequence[str]) -> str:
    """Return a count of images with the first ones' ids."""
    more = ", ..." if len(ids) > SHOWN else ""
    return f"{len(ids)} image{'s' if len(ids) > 1 else ''} ({', '.join(ids[:SHOWN])}{more})"


def check_training_masks(images: Images, part: Split) -> None:
    """Raise InputError if no training image shows a lesion: nothing could be learned."""
    if not images.masks[part.train].any():
        raise InputError(
            f"data={images.name}: all {len(part.train)} training masks are empty; a lesion's pixels must be above 127"
        )
