"""Statistics worked out by hand, or by their law."""

import warnings

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.stats import bootstrap, ttest_1samp, ttest_ind, wilcoxon
from scipy.stats import t as student_t
from statsmodels.formula.api import ols
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.anova import anova_lm

from kdsweep.core.errors import InputError
from kdsweep.results import paper, stats


def rows_of(points, images=None):
    """Differences of one split, an image each unless they are named; each image is a group."""
    points = np.asarray(points, dtype=float)
    images = np.arange(len(points)) if images is None else images
    return pd.DataFrame({"split": 0, "image": images, "group": images, "test_to_train": 0.3125, "points": points})


def trainings(*, seeds=3, splits=3, images=33, of=163, run_sd=0.0, image_sd=0.0, noise_sd=20.0, mean=0.0, rng=0):
    """Differences as the model draws them: images of overlapping splits, trainings, and noise of each in each."""
    rng = np.random.default_rng(rng)
    effects = rng.normal(0, image_sd, of)
    parts = []
    for split in range(splits):
        tested = rng.permutation(of)[:images]
        for seed in range(seeds):
            points = mean + effects[tested] + rng.normal(0, run_sd) + rng.normal(0, noise_sd, images)
            place = {"split": split, "seed": seed, "test_to_train": 0.3125}
            parts.append(pd.DataFrame(place | {"image": tested, "group": tested, "points": points}))
    return pd.concat(parts, ignore_index=True)


def scored(notation, dice, *, split=0, teacher=""):
    images = [f"image{i}" for i in range(len(dice))]
    columns = {
        "fingerprint": f"{notation}-{split}",
        "notation": notation,
        "split": split,
        "seed": 0,
        "teacher": teacher,
    }
    return pd.DataFrame({"image": images, "group": images, "test_to_train": 0.3125, "dice": dice}).assign(**columns)


def test_holm_by_hand():
    # 4 x 0.01 = 0.04; 3 x 0.02 = 0.06; 2 x 0.02 = 0.04, held up to 0.06; 0.9
    adjusted = stats.holm(pd.Series([0.9, 0.02, 0.01, 0.02], index=list("dbac")))
    assert adjusted.to_dict() == pytest.approx({"d": 0.9, "b": 0.06, "a": 0.04, "c": 0.06})


def test_holm_leaves_three_of_the_papers_twelve():
    adjusted = stats.holm(pd.Series({cell: paper.PAPER[cell][3] for cell in paper.CELLS}))
    assert set(adjusted[adjusted < 0.05].index) == {"L_KLD_WAug", "HReg_KLD", "L_KLD"}
    assert adjusted["L_KLD_WAug"] == pytest.approx(12 * 0.0012)
    assert adjusted["L_KLD"] == pytest.approx(10 * 0.0037)
    assert adjusted["H_KLD"] == pytest.approx(9 * 0.0067)


def test_holm_skips_what_is_not_there_and_never_passes_one():
    adjusted = stats.holm(pd.Series([np.nan, 0.03, 0.6, 0.7]))
    assert adjusted.iloc[1:].tolist() == pytest.approx([0.09, 1.0, 1.0])
    assert np.isnan(adjusted.iloc[0])


@pytest.mark.parametrize("test", ["ttest", "wilcoxon"])
def test_equal_scores_give_p_one_without_a_warning(test):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stats.networks_p(rows_of(np.subtract([0.5, 0.7, 0.9], [0.5, 0.7, 0.9])), test=test) == 1.0


def test_t_test_by_hand():
    # differences 1, 2, 3: t = 2 sqrt(3); with two degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    p = stats.networks_p(rows_of(np.subtract([2, 4, 6], [1, 2, 3])), test="ttest")
    assert p == pytest.approx(1 - np.sqrt(12 / 14))


def test_wilcoxon_by_hand():
    # five differences of one sign: 2 of the 2^5 signings are as extreme
    p = stats.networks_p(rows_of(np.subtract([1, 2, 3, 4, 5], [0, 0, 0, 0, 0])), test="wilcoxon")
    assert p == pytest.approx(2 / 32)


@pytest.mark.parametrize("pairs", [([], []), ([0.5], [0.4]), ([0.75, 0.5], [0.5, 0.25])])
def test_no_p_without_two_pairs_or_without_spread(pairs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(stats.networks_p(rows_of(np.subtract(*pairs)), test="ttest"))


def test_wilcoxon_needs_no_spread():
    assert stats.networks_p(rows_of([0.25] * 5), test="wilcoxon") == wilcoxon([0.25] * 5).pvalue


def test_interval_is_seeded_contains_the_mean_and_narrows_with_n():
    differences = np.random.default_rng(3).normal(4, 10, 99)
    low, high = stats.clustered_interval(rows_of(differences))
    assert (low, high) == stats.clustered_interval(rows_of(differences))
    expected = bootstrap((differences,), np.mean, n_resamples=stats.RESAMPLES, random_state=np.random.default_rng(0))
    assert (low, high) == tuple(expected.confidence_interval)
    assert low < differences.mean() < high
    half = 1.96 * differences.std(ddof=1) / np.sqrt(99)
    assert [low, high] == pytest.approx([differences.mean() - half, differences.mean() + half], abs=0.15 * half)


def test_interval_without_spread_or_pairs():
    assert np.isfinite(stats.clustered_interval(rows_of([1, 2]))).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stats.clustered_interval(rows_of([2.0, 2.0, 2.0])) == (2.0, 2.0)
        assert np.isnan(stats.clustered_interval(rows_of([2.0]))).all()


def test_pairs_are_of_one_image_whatever_the_order():
    ours, baseline = scored("L_MSE", [0.1, 0.2, 0.3]), scored("Student", [0.4, 0.5, 0.6])
    pairs = stats.pair(ours=ours.iloc[::-1], baseline=baseline.iloc[[1, 2, 0]])
    assert pairs["dice_ours"].tolist() == [0.1, 0.2, 0.3]
    assert pairs["dice_baseline"].tolist() == [0.4, 0.5, 0.6]
    assert pairs["points"].tolist() == pytest.approx([-30, -30, -30])
    assert pairs.index.tolist() == [0, 1, 2]


def test_a_split_without_a_baseline_leaves_no_pair_and_one_without_us_is_refused():
    one, both = (pd.concat([scored("L_MSE", [0.1], split=split) for split in splits]) for splits in ((0,), (0, 1)))
    assert stats.pair(ours=both, baseline=one).empty
    of_one_seed, of_two = one.assign(notation="Student"), pd.concat([one, one.assign(seed=1)])
    assert stats.pair(ours=of_two, baseline=of_one_seed).empty
    partner = "L_MSE and L_MSE were scored on different images: 1 without a partner, the first is image0 of split 1"
    with pytest.raises(InputError, match=partner):
        stats.pair(ours=one, baseline=both)


def test_nothing_to_compare_has_no_values():
    row = stats.compare(trainings().iloc[:0], test="ttest")
    assert list(row) == [*stats.MEASURED, "n_images"]
    assert pd.Series(row).isna().all()


# ---- these networks ------------------------------------------------------------------------------------------------


def test_clusters_are_those_of_statsmodels():
    rows = stats.over_seeds(trainings(image_sd=20, run_sd=3))
    assert rows["image"].nunique() < len(rows)
    fit = sm.OLS(rows["points"].to_numpy(), np.ones(len(rows))).fit()
    fit = fit.get_robustcov_results("cluster", groups=rows["image"].to_numpy(), use_t=True, use_correction=False)
    images = rows["image"].nunique()
    spread = stats.networks_spread(rows)
    assert spread.error == pytest.approx(fit.bse[0] * np.sqrt(images / (images - 1)))
    assert stats.networks_p(rows, test="ttest") == pytest.approx(
        2 * student_t.sf(abs(fit.params[0]) / spread.error, images - 1)
    )


def test_seeds_of_one_image_are_not_more_images():
    """Three times the same scores are as much evidence as once."""
    once = trainings(seeds=1)
    thrice = pd.concat([once.assign(seed=seed) for seed in range(3)])
    one, three = (stats.compare(rows, test="ttest") for rows in (once, thrice))
    for name in ("difference_points", "low_points", "high_points", "p", "n_images"):
        assert one[name] == pytest.approx(three[name])


def test_the_interval_draws_images_whole():
    rows = pd.concat([rows_of(np.random.default_rng(1).normal(3, 10, 40)).assign(split=split) for split in range(3)])
    alone = rows[rows["split"] == 0]
    assert stats.clustered_interval(rows) == pytest.approx(stats.clustered_interval(alone))


# ---- these methods -------------------------------------------------------------------------------------------------


def test_one_seed_cannot_tell_the_methods_apart():
    row = stats.compare(trainings(seeds=1, mean=10), test="ttest")
    unknown = ["p_methods", "methods_low_points", "methods_high_points", "methods_detectable_points"]
    assert np.isnan([row[name] for name in unknown]).all()
    assert row["p"] < 0.05


def test_variance_components_are_those_of_statsmodels():
    """Where every image is in every training, the mean squares are those of the two-way table without interaction."""
    rows = trainings(splits=1, seeds=4, images=30, run_sd=6, image_sd=15, noise_sd=10)
    parts = stats.components(rows)
    table = anova_lm(ols("points ~ C(image) + C(seed)", rows).fit())["mean_sq"]
    assert parts.runs.error**2 == pytest.approx(table["C(seed)"] / 30 / 4)
    assert parts.noise == pytest.approx(table["Residual"] / 30 / 4)
    assert parts.images.error**2 == pytest.approx(table["C(image)"] / 30 / 4)
    total = parts.images.error**2 + parts.runs.error**2 - parts.noise
    assert parts.spread().error ** 2 == pytest.approx(total)


def test_the_interval_of_methods_is_that_of_students_t_with_their_spread():
    rows = trainings(run_sd=6, image_sd=15, noise_sd=10, mean=4)
    row, methods = stats.compare(rows, test="ttest"), stats.components(rows).spread()
    law = student_t(methods.freedom, loc=stats.over_seeds(rows)["points"].mean(), scale=methods.error)
    assert (row["methods_low_points"], row["methods_high_points"]) == pytest.approx(law.interval(0.95))
    assert row["p_methods"] == pytest.approx(2 * law.cdf(0))


def test_the_freedom_of_two_parts_is_that_of_welchs_test():
    random = np.random.default_rng(5)
    samples = random.normal(0, 1, 9), random.normal(0, 4, 5)
    parts = [stats.Spread(each.std(ddof=1) / np.sqrt(len(each)), len(each) - 1) for each in samples]
    variance = sum(part.error**2 for part in parts)
    welch = ttest_ind(*samples, equal_var=False)
    spread = stats.satterthwaite(variance, *parts)
    assert spread.freedom == pytest.approx(welch.df)
    assert spread.p(samples[0].mean() - samples[1].mean()) == pytest.approx(welch.pvalue)
    assert stats.Components(*parts, noise=0.0).spread() == pytest.approx(spread)
    less = stats.Components(*parts, noise=0.3 * parts[1].error ** 2).spread()
    assert less.freedom == pytest.approx(welch.df * (less.error**2 / variance) ** 2)
    assert np.isnan(stats.satterthwaite(0.0, stats.Spread(0.0, 3)).freedom)
    assert stats.Components(*parts, noise=parts[0].error ** 2 + 1).images_spread() == (0.0, 8)


def test_other_trainings_never_make_a_difference_surer():
    """Means of the trainings that are all equal lie closer together than their images' noise would have them."""
    rows = trainings(splits=1, seeds=3, images=30, run_sd=0, image_sd=15, noise_sd=10)
    rows["points"] -= rows.groupby("seed")["points"].transform("mean")
    parts = stats.components(rows)
    assert parts.runs.error == pytest.approx(0, abs=1e-6)
    assert parts.noise > 0
    assert parts.spread().error == pytest.approx(stats.networks_spread(stats.over_seeds(rows)).error)


def test_a_mixed_model_finds_the_same_spread():
    rows = trainings(splits=1, seeds=8, images=60, run_sd=6, image_sd=15, noise_sd=10)
    variances = {"image": "0 + C(image)", "training": "0 + C(seed)"}
    fit = MixedLM.from_formula("points ~ 1", rows, groups=np.zeros(len(rows)), vc_formula=variances).fit()
    assert stats.components(rows).spread().error == pytest.approx(fit.bse_fe.iloc[0], rel=0.03)


def test_the_spread_between_trainings_is_in_the_p_of_methods_alone():
    rows = trainings(seeds=3, run_sd=0, noise_sd=5, mean=4)
    runs = rows.groupby(["split", "seed"]).ngroup().to_numpy()
    restless = rows.assign(
        points=rows["points"] + np.random.default_rng(0).permutation([-9, -6, -3, 0, 0, 0, 3, 6, 9])[runs]
    )
    calm, moved = (stats.compare(frame, test="ttest") for frame in (rows, restless))
    assert calm["p_methods"] < 0.01 < 0.05 < moved["p_methods"]
    assert moved["p"] < 0.05


def test_nadeau_and_bengio_by_hand():
    rows = pd.concat(
        [rows_of([mean - 1, mean + 1]).assign(split=split, seed=0) for split, mean in enumerate([1, 2, 6])]
    )
    # means 1, 2, 6: mean 3, variance 7; t = 3 / sqrt((1/3 + test / train) 7)
    for ratio in (0.20 / 0.64, 0.10 / 0.72):
        t = 3 / np.sqrt((1 / 3 + ratio) * 7)
        assert stats.corrected_p(rows.assign(test_to_train=ratio)) == pytest.approx(2 * student_t.sf(t, 2))
    two = 1.5 / np.sqrt((1 / 2 + 0.3125) * 0.5)  # means 1 and 2
    assert stats.corrected_p(rows[rows["split"] < 2]) == pytest.approx(2 * student_t.sf(two, 1))
    assert np.isnan(stats.corrected_p(rows[rows["split"] == 0]))


@pytest.mark.slow
@pytest.mark.parametrize("run_sd", [0.0, 3.0, 6.4])
def test_a_true_null_is_rejected_about_as_often_as_is_said(run_sd):
    """The table of docs/statistics.md has more trials; these bounds hold for a rate of 3 to 7 % in 400 of them."""
    trials = [trainings(run_sd=run_sd, image_sd=12, noise_sd=18, rng=seed) for seed in range(400)]
    p_values = [stats.components(rows).spread().p(stats.over_seeds(rows)["points"].mean()) for rows in trials]
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.10


# ---- power and non-inferiority -------------------------------------------------------------------------------------


def test_the_detectable_difference_is_found_in_four_of_five_trials():
    assert stats.Spread(error=2.0, freedom=1e9).detectable == pytest.approx(2 * (1.959964 + 0.841621), rel=1e-5)
    rng = np.random.default_rng(0)
    effect = stats.Spread(error=10 / np.sqrt(30), freedom=29).detectable
    p_values = [stats.networks_p(rows_of(rng.normal(effect, 10, 30)), test="ttest") for _ in range(400)]
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.8, abs=0.07)


@pytest.mark.parametrize("mean", [-1.5, -4.0, 0.3])
def test_non_inferiority_is_scipys_one_sided_test(mean):
    points = np.random.default_rng(2).normal(mean, 3, 40)
    row = stats.non_inferiority(rows_of(points).assign(seed=0), margin_points=2.0)
    better = ttest_1samp(points, -2.0, alternative="greater")
    assert row["p_non_inferior"] == pytest.approx(better.pvalue)
    assert row["bound_points"] == pytest.approx(better.confidence_interval(0.95).low)
    assert row["p_inferior"] == pytest.approx(ttest_1samp(points, -2.0, alternative="less").pvalue)
    assert np.isnan(row["p_methods_non_inferior"])


def test_non_inferiority_of_methods_is_the_one_sided_test_with_their_spread():
    rows = trainings(run_sd=2, noise_sd=8, mean=-0.5)
    row, methods = stats.non_inferiority(rows, margin_points=2.0), stats.components(rows).spread()
    mean = stats.over_seeds(rows)["points"].mean()
    law = student_t(methods.freedom, scale=methods.error)
    assert row["methods_bound_points"] == pytest.approx(mean - law.ppf(0.95))
    assert row["p_methods_non_inferior"] == pytest.approx(law.sf(mean + 2.0))
    assert row["methods_bound_points"] < row["bound_points"]
    assert 0.01 < row["p_non_inferior"] < row["p_methods_non_inferior"] < 0.5


def test_what_no_number_of_seeds_takes_away_is_the_images_own_spread():
    """The noise of three trainings is taken off: what remains is image_sd over the root of the images."""
    drawn = [
        stats.components(trainings(splits=1, images=160, image_sd=15, noise_sd=20, rng=rng)).images_spread()
        for rng in range(20)
    ]
    assert np.mean([spread.error for spread in drawn]) == pytest.approx(15 / np.sqrt(160), rel=0.05)
    assert {spread.freedom for spread in drawn} == {159}
    few = trainings(splits=1, image_sd=0, noise_sd=20)
    assert stats.components(few).images_spread().error >= 0


def test_adjusted_p_values_stand_behind_their_own_and_those_of_no_family_are_not_adjusted():
    table = pd.DataFrame({"model": list("abcd"), "p": [0.01, 0.04, 0.03, 0.02], "p_methods": [0.5, 0.01, 0.2, 0.3]})
    result = stats.adjusted(table, family=pd.Series(["x", "x", "y", None]))
    assert list(result) == ["model", "p", "p_holm", "p_methods", "p_methods_holm"]
    assert result["p_holm"].tolist()[:3] == pytest.approx([0.02, 0.04, 0.03])
    assert result["p_methods_holm"].tolist()[:3] == pytest.approx([0.5, 0.02, 0.2])
    assert np.isnan(result.loc[3, ["p_holm", "p_methods_holm"]].astype(float)).all()


def test_images_of_one_group_are_one_cluster():
    """Checked against statsmodels, as for images; three views of each patient hold less than three patients."""
    rows = trainings(splits=1, seeds=1, images=30, run_sd=0, image_sd=15, noise_sd=0)
    patients = rows["image"].map({image: number // 3 for number, image in enumerate(sorted(set(rows["image"])))})
    alike = rows.assign(points=rows.groupby(patients)["points"].transform("mean") + 0.01 * rows["points"])
    grouped = alike.assign(group=patients.astype(str))
    fit = ols("points ~ 1", grouped).fit(cov_type="cluster", cov_kwds={"groups": patients, "use_correction": False})
    by_group = stats.networks_spread(stats.over_seeds(grouped))
    assert by_group.error == pytest.approx(fit.bse.iloc[0] * np.sqrt(10 / 9))
    assert by_group.freedom == 9
    by_image = stats.networks_spread(stats.over_seeds(alike))
    assert by_group.error > 1.5 * by_image.error
    assert stats.compare(grouped, test="ttest")["n_images"] == 30


def test_groups_of_the_scores_reach_the_pairs():
    ours, baseline = scored("L_MSE", [0.5, 0.6, 0.7]), scored("Student", [0.4, 0.6, 0.6])
    pairs = stats.pair(ours=ours.assign(group=["a", "a", "b"]), baseline=baseline.assign(group=["a", "a", "b"]))
    assert pairs["group"].tolist() == ["a", "a", "b"]
