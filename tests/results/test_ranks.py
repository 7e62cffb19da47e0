"""Models in rank order: the correlation against SciPy's, its interval against a bootstrap by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from kdsweep.results.ranks import rank_correlation
from kdsweep.results.stats import RESAMPLES


def on_images(dice, groups=None):
    """Scores of models (rows) on images (columns)."""
    count = dice.shape[1]
    groups = [f"image{i}" for i in range(count)] if groups is None else groups
    frames = [pd.DataFrame({"notation": f"m{k}", "group": groups, "dice": row}) for k, row in enumerate(dice)]
    return pd.concat(frames, ignore_index=True)


def test_the_rank_correlation_is_scipys_and_its_interval_that_of_a_bootstrap_over_the_groups_of_both_sides():
    random = np.random.default_rng(3)
    skill = np.linspace(0, 0.2, 8)[:, None]
    ours = skill + random.uniform(0.2, 0.7, (8, 40))
    others = skill + random.uniform(0.1, 0.8, (8, 24))
    groups = [f"patient{i // 2}" for i in range(24)]
    estimate, low, high = rank_correlation(on_images(ours), on_images(others, groups))
    assert estimate == pytest.approx(spearmanr(ours.mean(axis=1), others.mean(axis=1)).statistic)
    drawn = []
    for _ in range(2000):
        images, patients = random.integers(0, 40, 40), random.integers(0, 12, 12)
        other_images = np.concatenate([others[:, [2 * patient, 2 * patient + 1]] for patient in patients], axis=1)
        drawn.append(spearmanr(ours[:, images].mean(axis=1), other_images.mean(axis=1)).statistic)
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.05)
    assert low < estimate < high


def test_a_group_counts_by_its_images_and_each_resample_by_its_groups():
    """Exactly, from the weights that are drawn: the same call gives the same interval."""
    random = np.random.default_rng(8)
    sides = [random.uniform(size=(20, 24)), random.uniform(size=(20, 18))]
    groups = [[f"patient{i * i // 40}" for i in range(24)], [f"woman{i % 11}" for i in range(18)]]
    scored = [on_images(dice, names).assign(seed=7) for dice, names in zip(sides, groups, strict=True)]
    means, random = [], np.random.default_rng(0)
    for dice, names in zip(sides, groups, strict=True):
        order = sorted(set(names))
        weights = random.multinomial(len(order), np.full(len(order), 1 / len(order)), RESAMPLES)
        of_image = np.vstack([np.ones(len(order)), weights])[:, [order.index(name) for name in names]]
        means.append([np.average(dice, axis=1, weights=row) for row in of_image])
    expected, *drawn = (spearmanr(ours, others).statistic for ours, others in zip(*means, strict=True))
    assert rank_correlation(*scored) == pytest.approx((expected, *np.percentile(drawn, [2.5, 97.5])))
    assert np.isfinite(rank_correlation(scored[0], on_images(sides[1], ["a"] * 4 + ["b"] * 14))).all(), "two groups"


def test_models_of_one_order_correlate_fully_and_two_models_or_equal_ones_not_at_all():
    dice = np.linspace(0, 0.5, 4)[:, None] + np.linspace(0, 0.3, 9)[None]
    assert rank_correlation(on_images(dice), on_images(dice[:, :5])) == pytest.approx((1, 1, 1))
    assert rank_correlation(on_images(dice), on_images(-dice))[0] == pytest.approx(-1)
    assert np.isnan(rank_correlation(on_images(dice[:2]), on_images(dice[:2]))).all()
    assert np.isnan(rank_correlation(on_images(dice * 0), on_images(dice))).all()
