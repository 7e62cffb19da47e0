"""Splits of a data set into training, validation and test images: the paper's, held out, or k folds.

scikit-learn draws them. It is imported late: it takes a second, and the fingerprints of the paper's splits do without.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdsweep.core.errors import InputError
from kdsweep.core.progress import plural
from kdsweep.data.images import Images

SPLIT_SEED = 2025  # of all random splits; the same for every data set, cell and machine
TEST_SHARE, VALIDATION_SHARE = 0.20, 0.16  # 33 and 26 of the paper's 163 images
PARTS = ("train", "validation", "test")


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
        groups: N names of groups, such as patients, whose images stay together; None if each image is a group.
    """

    ids: list[str]
    labels: list[str]
    groups: list[str] | None = None

    @property
    def stratified(self) -> bool:
        """Return whether the parts have equal shares of the labels: each image has one, and there are several."""
        return "unknown" not in self.labels and len(set(self.labels)) > 1


def random_split(count: int, *, index: int) -> Split:
    """Draw the paper's random split ``index`` of ``count`` images: 104 / 26 / 33 at its 163, 64 / 16 / 20 % elsewhere.

    Raises:
        InputError: too few images for three parts.
    """
    from sklearn.model_selection import ShuffleSplit

    test, validation = round(count * TEST_SHARE), round(count * VALIDATION_SHARE)
    if min(test, validation) < 1:
        raise InputError(f"the data set has {count} images; training, validation and test need at least 4")
    shuffles = ShuffleSplit(n_splits=index + 1, test_size=test, random_state=SPLIT_SEED)
    rest, test_part = list(shuffles.split(np.zeros(count)))[index]
    return Split(train=rest[validation:].tolist(), validation=rest[:validation].tolist(), test=test_part.tolist())


def holdout(listed: Listed, *, index: int) -> Split:
    """Hold out 20 % for test and 16 % for validation, by groups and, if ``listed.stratified``, with equal label shares.

    Raises:
        InputError: too few images, groups or images of a label.
    """
    everything = np.arange(len(listed.ids))
    rest, test = _hold_out(listed, everything, share=TEST_SHARE, seed=SPLIT_SEED + index)
    return with_validation(listed, rest, test, seed=SPLIT_SEED + index)


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
    return with_validation(listed, rest, test, seed=SPLIT_SEED)


def _check_folds(listed: Listed, folds: int) -> None:
    units = {"images": len(listed.ids)} | ({} if listed.groups is None else {"groups": len(set(listed.groups))})
    if listed.stratified:
        label, count = min(Counter(listed.labels).items(), key=lambda item: item[1])
        units[f"{label} images"] = count
    for unit, count in units.items():
        if count < folds:
            raise InputError(f"split.folds={folds} is not allowed: the data set has {count} {unit}")


def with_validation(listed: Listed, rest: np.ndarray, test: np.ndarray, *, seed: int) -> Split:
    """Return the split that has these test images (indices); validation images are drawn from the rest."""
    train, validation = _hold_out(listed, rest, share=VALIDATION_SHARE / (1 - TEST_SHARE), seed=seed)
    return Split(train.tolist(), validation.tolist(), test.tolist())


def _hold_out(listed: Listed, among: np.ndarray, *, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (the rest, a share held out) of the images ``among``, indices.

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
        rest, held = next(iter(draws.split(among, labels, groups)))
    except ValueError as error:
        grouped = "" if listed.groups is None else f" in {plural(len(set(listed.groups)), 'group')}"
        counted = f"{plural(len(listed.ids), 'image')}{grouped}"
        raise InputError(f"split: {counted} cannot be divided into training, validation and test: {error}") from error
    return among[rest], among[held]


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


def check_training_masks(images: Images, part: Split) -> None:
    """Raise InputError if no training image shows a lesion, or one of several classes: it could not be learned."""
    for index, name in enumerate(images.class_names, start=1):
        if not (images.masks[part.train] == index).any():
            remedy = "add images of it, take another split, or leave it out of data.classes"
            raise InputError(
                f"data={images.name}: none of {len(part.train)} training masks shows the class {name}; {remedy}"
            )
    if not images.masks[part.train].any():
        raise InputError(
            f"data={images.name}: all {len(part.train)} training masks are empty; a lesion's pixels must be above 127"
        )
