"""Paired statistics over the test images: pairs of scores, p-values, Holm's correction, intervals.

Scores are frames with one row per run and image (columns fingerprint, notation, split, seed, teacher, image, dice).
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, ttest_rel, wilcoxon

from kdsweep.core.errors import InputError

NAN = float("nan")
PLACE = ["split", "seed"]
TESTS = {"ttest": ttest_rel, "wilcoxon": wilcoxon}
TEST_NAMES = {"ttest": "paired two-sided t-test", "wilcoxon": "two-sided Wilcoxon signed-rank test"}
RESAMPLES = 9999


def own_teachers(*, ours: pd.DataFrame, scored: pd.DataFrame) -> pd.DataFrame:
    """Return the scores of the Teachers that these cells learnt from."""
    links = ours[["teacher", *PLACE]].drop_duplicates().rename(columns={"teacher": "fingerprint"})
    return scored.drop(columns="teacher").merge(links)


def pair(*, ours: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """Pair the two Dice scores of each (split, seed, image), columns dice_ours and dice_baseline (fractions).

    Empty if the baseline lacks scores in any split and seed of ours: a gap, never fewer pairs.

    Raises:
        InputError: both were scored, but on different images.
    """
    asked, there = (set(zip(frame["split"], frame["seed"], strict=True)) for frame in (ours, baseline))
    both = ours.merge(baseline, on=[*PLACE, "image"], how="outer", suffixes=("_ours", "_baseline"), indicator=True)
    if not asked or not asked <= there:
        return both.iloc[:0]
    alone = both[both["_merge"] != "both"]
    if not alone.empty:
        names = f"{ours['notation'].iloc[0]} and {baseline['notation'].iloc[0]}"
        split, seed, image = alone.iloc[0][[*PLACE, "image"]]
        raise InputError(
            f"{names} were scored on different images: {len(alone)} without a partner, "
            f"the first is {image} of split {split} seed {seed}; run both on the same data"
        )
    return both.sort_values([*PLACE, "image"], ignore_index=True)


def p_value(pairs: pd.DataFrame, *, test: str) -> float:
    """Return the two-sided p of a paired test: equal means (ttest) or differences symmetric about 0 (wilcoxon).

    NaN for fewer than 2 pairs, and for a t-test whose differences are all equal but not 0: no spread, no t.
    """
    ours, baseline = pairs["dice_ours"].to_numpy(), pairs["dice_baseline"].to_numpy()
    if len(pairs) < 2:
        return NAN
    if np.allclose(ours, baseline, rtol=0, atol=1e-12):
        return 1.0
    if test == "ttest" and np.ptp(ours - baseline) < 1e-12:
        return NAN
    return float(TESTS[test](ours, baseline).pvalue)


def holm(p_values: pd.Series) -> pd.Series:
    """Return step-down adjusted p-values of one family; NaN stays NaN and does not count in the family.

    With p_(1) <= ... <= p_(m): adjusted p_(i) = min(1, max over j <= i of (m - j + 1) p_(j)).
    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6, 1979.
    """
    ordered = p_values.dropna().sort_values()
    factors = np.arange(len(ordered), 0, -1)
    return (ordered * factors).cummax().clip(upper=1.0).reindex(p_values.index)


def mean_interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval (BCa, seeded) of the mean of n differences, in their unit; NaN if n < 2."""
    if len(differences) < 2:
        return NAN, NAN
    if np.ptp(differences) < 1e-12:  # BCa divides by the spread
        return float(differences[0]), float(differences[0])
    means = np.concatenate([differences[part].mean(axis=-1) for part in _resamples(len(differences))])
    drawn = SimpleNamespace(bootstrap_distribution=means)
    interval = bootstrap((differences,), np.mean, n_resamples=0, bootstrap_result=drawn).confidence_interval
    return float(interval.low), float(interval.high)


@lru_cache(maxsize=1)
def _resamples(count: int) -> list[np.ndarray]:
    """Return the indices (below count) that each resample takes, as SciPy draws them with seed 0."""
    drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    return np.array_split(drawn, -(-drawn.size // 10**6))  # in parts that fit the cache of a processor
