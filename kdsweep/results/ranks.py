"""The order of models on two sets of images."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from kdsweep.results.stats import NAN, RESAMPLES


def rank_correlation(ours: pd.DataFrame, others: pd.DataFrame) -> tuple[float, float, float]:
    """Return Spearman's correlation of the mean Dice of models on two sets of images, and its 95 % interval.

    The interval is the percentile bootstrap (seeded): images, or their groups, of both sets are drawn again, the models
    stay. It tends to be low, since drawing adds noise to the ranks. NaN for fewer than 3 models or 2 groups, and for
    models that are all equal. Source: Efron and Tibshirani, An introduction to the bootstrap, 1993, section 13.3.

    Args:
        ours: columns notation, group, dice; every model has the same images.
        others: likewise, of other images and the same models.
    """
    sides = []
    for rows in (ours, others):
        sums = rows.pivot_table(index="group", columns="notation", values="dice", aggfunc="sum").sort_index(axis=1)
        sizes = rows[rows["notation"] == rows["notation"].iloc[0]].groupby("group").size()
        sides.append((sums.to_numpy(), sizes.reindex(sums.index).to_numpy(dtype=float)))
    if sides[0][0].shape[1] < 3 or min(len(sizes) for _, sizes in sides) < 2:
        return NAN, NAN, NAN
    random, drawn = np.random.default_rng(0), []
    for totals, sizes in sides:
        weights = random.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), RESAMPLES)
        weights = np.vstack([np.ones(len(sizes)), weights])  # the first is the sample itself
        drawn.append(weights @ totals / (weights @ sizes)[:, None])
    values = _spearman(*drawn)
    if np.isnan(values[0]):
        return NAN, NAN, NAN
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return float(values[0]), float(low), float(high)


def _spearman(ours: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each row of two (R, K) arrays."""
    ranks = [rankdata(values.round(12), axis=1) for values in (ours, others)]  # equal up to rounding: one rank
    centered = [rank - rank.mean(axis=1, keepdims=True) for rank in ranks]
    with np.errstate(invalid="ignore"):  # all equal: NaN
        product = (centered[0] * centered[1]).sum(axis=1)
        return np.asarray(product / np.sqrt((centered[0] ** 2).sum(axis=1) * (centered[1] ** 2).sum(axis=1)))
