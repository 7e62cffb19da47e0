"""The random splits of a data set into training, validation and test images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdsweep.core.errors import InputError
from kdsweep.data.images import Images

SPLIT_SEED = 2025  # of the three random splits; the same for every data set, cell and machine


TEST_SHARE, VALIDATION_SHARE = 0.20, 0.16  # 33 and 26 of the paper's 163 images


@dataclass(frozen=True)
class Split:
    """Indices into ``Images`` of the three parts."""

    train: list[int]
    validation: list[int]
    test: list[int]


def random_split(count: int, *, index: int) -> Split:
    """Draw random split ``index`` of ``count`` images: 104 / 26 / 33 at the paper's 163, 64 / 16 / 20 % elsewhere.

    Raises:
        InputError: too few images for three parts.
    """
    from sklearn.model_selection import ShuffleSplit  # takes a second, and fingerprints do not need it

    test, validation = round(count * TEST_SHARE), round(count * VALIDATION_SHARE)
    if min(test, validation) < 1 or count - test - validation < 1:
        raise InputError(f"the data set has {count} images; training, validation and test need at least 4")
    shuffles = ShuffleSplit(n_splits=index + 1, test_size=test, train_size=count - test, random_state=SPLIT_SEED)
    rest, test_part = list(shuffles.split(np.zeros(count)))[index]
    return Split(train=rest[validation:].tolist(), validation=rest[:validation].tolist(), test=test_part.tolist())


def check_training_masks(images: Images, part: Split) -> None:
    """Raise InputError if no training image shows a lesion: nothing could be learned."""
    if not images.masks[part.train].any():
        raise InputError(
            f"data={images.name}: all {len(part.train)} training masks are empty; a lesion's pixels must be above 127"
        )
