"""Paired statistics of Dice: differences, p-values, Holm's correction, intervals, power.

Scores have a row per run and image (columns fingerprint, notation, split, seed, teacher, image, dice), differences one
per (split, seed, image) and a column points (percentage points). Both have a column group, such as the patient: images
of one group count as one cluster; and a column test_to_train, the test images of a split per training image.

There are two questions (docs/statistics.md): do *these networks* differ, as trained, on other images; and do *these
methods*, so that newly trained networks would differ too.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, t, wilcoxon

from kdsweep.core.errors import InputError

NAN = float("nan")
PLACE = ["split", "seed"]
OF_IMAGE = ["group", "test_to_train"]  # columns that are the same in all runs of a split
TEST_NAMES = {
    "ttest": "paired two-sided t-test, clustered by image or its group",
    "wilcoxon": "two-sided Wilcoxon signed-rank test",
}
TESTS = tuple(TEST_NAMES)
RESAMPLES = 9999
ALPHA = 0.05
POWER = 0.8
MEASURED = (  # what ``compare`` measures, besides n_images
    *("difference_points", "low_points", "high_points", "p"),
    *("methods_low_points", "methods_high_points", "p_methods", "p_runs"),
    *("detectable_points", "methods_detectable_points", "images_detectable_points"),
)
EQUAL = 1e-10  # points: smaller ones are rounding


class Spread(NamedTuple):
    """The standard error of a mean difference (points) and its degrees of freedom; NaN where they are unknown."""

    error: float = NAN
    freedom: float = NAN

    def p(self, mean: float) -> float:
        """Return the two-sided p of a t-test of this mean against 0; NaN without spread."""
        return 2 * self.p_greater(abs(mean))

    def p_greater(self, mean: float) -> float:
        """Return the one-sided p of "the true mean is 0 or less"; NaN without spread."""
        return float(t.sf(mean / self.error, self.freedom)) if self.error > EQUAL else NAN

    def half_width(self, level: float = 1 - ALPHA) -> float:
        """Return half the width of the two-sided interval of this level (points)."""
        return float(t.ppf((1 + level) / 2, self.freedom) * self.error)

    @property
    def detectable(self) -> float:
        """Return the smallest true difference (points) that a two-sided 5 % test shows with 80 % power.

        (t(0.975) + t(0.8)) x standard error. Source: Julious, Sample sizes for clinical trials with normal data,
        Stat. Med. 23, 2004, section 3, with the t quantiles in place of the normal ones.
        """
        return float((t.ppf(1 - ALPHA / 2, self.freedom) + t.ppf(POWER, self.freedom)) * self.error)


def satterthwaite(variance: float, *parts: Spread) -> Spread:
    """Return the spread of a variance that is estimated from these parts; NaN degrees of freedom if all are 0.

    Source: Satterthwaite, An approximate distribution of estimates of variance components, Biometrics Bulletin 2, 1946.
    """
    terms = sum(part.error**4 / part.freedom for part in parts)
    return Spread(float(np.sqrt(variance)), float(variance**2 / terms) if terms else NAN)


def pair(*, ours: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """Pair the two Dice scores of each (split, seed, image), columns dice_ours and dice_baseline (fractions).

    Column points is their difference in percentage points. Empty if the baseline lacks scores in any split and seed of
    ours: a gap, never fewer pairs.

    Raises:
        InputError: both were scored, but on different images.
    """
    places, baseline_places = (set(zip(frame["split"], frame["seed"], strict=True)) for frame in (ours, baseline))
    keys = [*PLACE, "image", *OF_IMAGE]
    both = ours.merge(baseline, on=keys, how="outer", suffixes=("_ours", "_baseline"), indicator=True)
    both["points"] = 100 * (both["dice_ours"] - both["dice_baseline"])
    if not places or not places <= baseline_places:
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


def over_seeds(differences: pd.DataFrame) -> pd.DataFrame:
    """Average the seeds within each (split, image): columns split, image, group, points."""
    return differences.groupby(["split", "image", "group"])[["points"]].mean().reset_index()


def compare(differences: pd.DataFrame, *, test: str) -> dict[str, object]:
    """Answer both questions on a paired mean difference.

    Args:
        differences: columns split, seed, image, group, test_to_train, points.
        test: of TESTS, for these networks; these methods are always compared by the t-test.

    Returns:
        Points: the mean, low_points and high_points (95 % bootstrap interval, these networks), methods_low_points and
        methods_high_points (95 %, these methods), detectable_points and methods_detectable_points (at 80 % power),
        images_detectable_points (the same for any number of seeds); p, p_methods, p_runs (Nadeau and Bengio's);
        n_images, the number of different images. NaN what is unknown; all of it without differences.
    """
    if differences.empty:
        return {**dict.fromkeys(MEASURED, NAN), "n_images": pd.NA}
    rows = over_seeds(differences)
    mean, parts = rows["points"].mean(), components(differences)
    methods = parts.spread()
    half = methods.half_width()
    of_networks = (mean, *clustered_interval(rows), networks_p(rows, test=test))
    of_methods = (mean - half, mean + half, methods.p(mean), corrected_p(differences))
    detectable = [spread.detectable for spread in (networks_spread(rows), methods, parts.images_spread())]
    measured = dict(zip(MEASURED, (*of_networks, *of_methods, *detectable), strict=True))
    return {**measured, "n_images": rows["image"].nunique()}


def networks_spread(rows: pd.DataFrame) -> Spread:
    """Return the spread of the mean over rows (split, image, group, points), groups as clusters.

    Squared error: G / (G - 1) x sum over the G groups of (sum of its rows' deviations)^2, / N^2; G - 1 degrees of
    freedom. With one row per group it is that of the paired t-test. Source: Cameron and Miller, A practitioner's guide
    to cluster-robust inference, J. Human Resources 50, 2015, equation 11, for a mean.
    """
    deviations = (rows["points"] - rows["points"].mean()).groupby(rows["group"]).sum()
    count = len(deviations)
    if count < 2:
        return Spread()
    return Spread(float(np.sqrt(count / (count - 1) * (deviations**2).sum()) / len(rows)), count - 1)


def networks_p(rows: pd.DataFrame, *, test: str) -> float:
    """Return the two-sided p over groups: mean 0 (ttest), or each group's mean symmetric about 0 (wilcoxon).

    NaN for fewer than 2 groups, and for a t-test whose differences are all equal but not 0: no spread, no t.
    """
    if rows["group"].nunique() < 2:
        return NAN
    if rows["points"].abs().max() < EQUAL:
        return 1.0
    if test == "wilcoxon":
        return float(wilcoxon(rows.groupby("group")["points"].mean()).pvalue)
    return networks_spread(rows).p(rows["points"].mean())


def clustered_interval(rows: pd.DataFrame) -> tuple[float, float]:
    """Return the 95 % bootstrap interval (BCa, seeded) of the mean over rows (group, points), groups drawn together.

    In points; NaN for fewer than 2 groups.
    """
    sums, sizes = rows.groupby("group")["points"].agg(["sum", "size"]).to_numpy(dtype=float).T
    if len(sums) < 2:
        return NAN, NAN
    if np.ptp(rows["points"]) < EQUAL:  # BCa divides by the spread
        return (float(rows["points"].iloc[0]),) * 2
    drawn = np.concatenate([_ratio(sums[part], sizes[part]) for part in _resamples(len(sums))])
    drawn_before = SimpleNamespace(bootstrap_distribution=drawn)
    result = bootstrap((sums, sizes), _ratio, paired=True, n_resamples=0, bootstrap_result=drawn_before)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _ratio(sums: np.ndarray, sizes: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(sums.sum(axis=axis) / sizes.sum(axis=axis))


@lru_cache(maxsize=1)
def _resamples(count: int) -> list[np.ndarray]:
    """Return the indices (below count) that each resample takes, as SciPy draws them with seed 0."""
    drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    return np.array_split(drawn, -(-drawn.size // 10**6))  # in parts that fit the cache of a processor


class Components(NamedTuple):
    """Parts of the variance of a mean difference; NaN with one seed."""

    images: Spread = Spread()  # of the mean over seeds, as for these networks
    runs: Spread = Spread()  # of the means of the trainings of one split, images in common
    noise: float = NAN  # points squared: each image's noise in each training, which is in images and in runs

    def spread(self) -> Spread:
        """Return the spread of the mean, trainings and images both random; freedom by Satterthwaite.

        The noise is in two of the parts, so one is taken off. The images' part is the least, which is that of these
        networks: trainings cannot take variance away, only their estimate of a few can fall below the noise.
        """
        variance = self.images.error**2 + max(self.runs.error**2 - self.noise, 0.0)
        return satterthwaite(variance, self.images, self.runs)

    def images_spread(self) -> Spread:
        """Return the spread that would remain with any number of seeds: that of the images."""
        return Spread(float(np.sqrt(max(self.images.error**2 - self.noise, 0.0))), self.images.freedom)


def components(differences: pd.DataFrame) -> Components:
    """Estimate the parts of the variance of a mean difference by their mean squares.

    Images of one group share one cluster in the images' part. The noise is estimated image by image: where a group
    shares it, too little is taken off, and the spread is stated too large.

    The model, for image i of split s, training k: points = mean + image_i + training_sk + noise_ski. Source: Searle,
    Casella, McCulloch, Variance components, 1992, section 4.3 (ANOVA estimators).
    """
    count = differences.groupby("split")[["image", "seed"]].nunique()
    runs_freedom = (count["seed"] - 1).sum()
    noise_freedom = ((count["seed"] - 1) * (count["image"] - 1)).sum()
    images = networks_spread(over_seeds(differences))
    if not runs_freedom or not noise_freedom or np.isnan(images.error):
        return Components()
    keys = (["split"], ["split", "image"], PLACE)
    of_split, of_image, of_run = (differences.groupby(key)["points"].transform("mean") for key in keys)
    within = ((differences["points"] - of_image - of_run + of_split) ** 2).sum()
    means = differences.groupby(PLACE)["points"].mean()
    between = ((means - means.groupby("split").transform("mean")) ** 2).sum()
    shares = (count["image"] / count["image"].sum()) ** 2 / count["seed"]
    runs = between / runs_freedom * shares.sum()
    noise = within / noise_freedom * (shares / count["image"]).sum()
    return Components(images, Spread(float(np.sqrt(runs)), runs_freedom), noise)


def corrected_p(differences: pd.DataFrame) -> float:
    """Return the two-sided p over trainings, corrected for training sets that overlap; NaN for fewer than two.

    t = mean / sqrt((1 / R + test / train) s^2), with R - 1 degrees of freedom, over the R means of (split, seed);
    test / train from the column test_to_train. Source: Nadeau and Bengio, Inference for the generalization error,
    Machine Learning 52, 2003, section 3.
    """
    means, ratios = (differences.groupby(PLACE)[column].mean() for column in ("points", "test_to_train"))
    if len(means) < 2:
        return NAN
    error = np.sqrt((1 / len(means) + ratios.mean()) * means.var(ddof=1))
    return Spread(float(error), len(means) - 1).p(means.mean())


def non_inferiority(differences: pd.DataFrame, *, margin_points: float) -> dict[str, float]:
    """Return whether ours may be worse by the margin at most: one-sided, these networks and these methods.

    Keys bound_points and methods_bound_points: lower ends of the one-sided 95 % intervals; p_non_inferior and
    p_methods_non_inferior of "worse by the margin or more"; p_inferior of "worse by the margin at most". Source:
    Piaggio et al., CONSORT for noninferiority and equivalence trials, JAMA 308, 2012.
    """
    rows = over_seeds(differences)
    mean = rows["points"].mean()
    networks, methods = networks_spread(rows), components(differences).spread()
    return {
        "bound_points": mean - networks.half_width(1 - 2 * ALPHA),
        "p_non_inferior": networks.p_greater(mean + margin_points),
        "p_inferior": networks.p_greater(-mean - margin_points),
        "methods_bound_points": mean - methods.half_width(1 - 2 * ALPHA),
        "p_methods_non_inferior": methods.p_greater(mean + margin_points),
    }


def holm(p_values: pd.Series) -> pd.Series:
    """Return step-down adjusted p-values of one family; NaN stays NaN and does not count in the family.

    With p_(1) <= ... <= p_(m): adjusted p_(i) = min(1, max over j <= i of (m - j + 1) p_(j)).
    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6, 1979.
    """
    ordered = p_values.dropna().sort_values()
    factors = np.arange(len(ordered), 0, -1)
    return (ordered * factors).cummax().clip(upper=1.0).reindex(p_values.index)


def adjusted(table: pd.DataFrame, *, family: pd.Series) -> pd.DataFrame:
    """Return a table with p_holm after p and p_methods_holm after p_methods, a family for each value of a series.

    Rows without a family are not adjusted.
    """
    for column in ("p", "p_methods"):
        table.insert(list(table).index(column) + 1, f"{column}_holm", table.groupby(family)[column].transform(holm))
    return table
